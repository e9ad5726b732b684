"""The tables of attack × strategy: who won, accuracy, attack success."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from fedtrust.report import findings, verdict
from fedtrust.report.load import Cell, Matrix
from fedtrust.report.parts import is_share, metric_title, shown

#: The ends of the scale of what a guess is worth: from nothing to all there is to find. Without an entry: lowest to highest cell.
_ENDS = {"auc": (0.5, 1.0), "psnr": (5.0, 40.0), "likeness": (0.0, 1.0)}
_MOST_GUESSES = 12
OUTCOMES: dict[verdict.Outcome, tuple[str, str, int]] = {  # sign, word, heat
    "won": ("▲", "attack won", 9),
    "partial": ("◆", "partly held", 4),
    "held": ("●", "held", 1),
    "unknown": ("–", "not judged", 0),
}


#: What is left of a backdoor when its attack has ended: of the probe `durability`.
AT_STOP, LIFESPAN, OUTLIVED = "durability/at-stop", "durability/lifespan", "durability/outlived"
_LASTING = {AT_STOP: "Attack success in the attack's last round", LIFESPAN: "How many rounds longer the backdoor worked"}
_UNITS = {verdict.ACCURACY: "share of test samples", verdict.SUCCESS: "share of attacked inputs", AT_STOP: "share of attacked inputs"}


def heat_maps(matrix: Matrix) -> list[dict[str, Any]]:
    """Lay out attack × strategy for every partition: who won, accuracy, attack success and how long it lasts, what observers found out.

    The loss stands there where neither accuracy nor success is known.
    """
    summary = matrix.summary
    have: dict[str, list[float]] = {}
    for cell in summary.cells:
        for name, value in cell.metrics.items():
            if value is not None:
                have.setdefault(name, []).append(value)
    maps = []
    for partition in summary.axes.partitions:
        fights = {(d.attack, d.strategy): d for d in verdict.duels(summary) if d.partition == partition}
        judged = any(d.outcome != "unknown" for d in fights.values() if not verdict.is_none(d.attack, summary.threats))
        tables = [_outcomes(matrix, fights)] if judged else []
        metrics = [name for name in (verdict.ACCURACY, verdict.SUCCESS) if name in have] or [
            name for name in (verdict.LOSS,) if name in have
        ]
        metrics += [name for name in _LASTING if name in have]
        tables += [_heat(matrix, partition, metric) for metric in [*metrics, *findings.measures(have)[:_MOST_GUESSES]]]
        maps.append({"title": partition if len(summary.axes.partitions) > 1 else "", "tables": tables})
    return [entry for entry in maps if entry["tables"]]


def _outcomes(matrix: Matrix, fights: dict[tuple[str, str], verdict.Duel]) -> dict[str, Any]:
    axes = matrix.summary.axes
    rows = []
    for attack in axes.attackers:
        if verdict.is_none(attack, matrix.summary.threats):
            continue
        cells = []
        for strategy in axes.strategies:
            duel = fights.get((attack, strategy))
            sign, word, heat = OUTCOMES[duel.outcome if duel else "unknown"]
            failed = duel is not None and duel.seeds == 0
            refused = duel is not None and duel.refused
            note = "refused" if refused else "failed" if failed else word
            hint = next((c.why for c in matrix.summary.cells if (c.attackers, c.strategies) == (attack, strategy)), "") if refused else ""
            cells.append({"value": sign, "note": note, "heat": heat, "failed": failed, "hint": hint[:300]})
        rows.append({"name": attack, "cells": cells})
    won = f"a success of {100 * verdict.SUCCESS_WON:.0f} % or {100 * verdict.COST_WON:.0f} points of accuracy lost, or more"
    held = f"at most {100 * verdict.SUCCESS_HELD:.0f} % and {100 * verdict.COST_HELD:.0f} points"
    note = f"Attack won: {won}. Held: {held}. Compared with the same strategy without an attack."
    return {"title": "Who won", "columns": axes.strategies, "long": _long(axes.strategies), "rows": rows, "note": note, "scale": []}


def _long(names: list[str]) -> bool:
    """Return whether a name has a word that a narrow column would cut: lines break at blanks and hyphens."""
    return any(len(word) > 8 for name in names for word in name.replace("-", " ").split())


def _heat(matrix: Matrix, partition: str, metric: str) -> dict[str, Any]:
    summary, share = matrix.summary, is_share(metric)
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in summary.cells:
        if cell.partitions == partition:
            groups.setdefault((cell.attackers, cell.strategies), []).append(cell)
    values = [value for cells in groups.values() if (value := verdict.mean(cells, metric)) is not None]
    ends = (0.0 if metric == LIFESPAN else min(values, default=0.0), max(values, default=1.0))
    low, high = (0.0, 1.0) if share else _ENDS.get(metric.rpartition("/")[2], ends)
    better_high = metric == verdict.ACCURACY
    rows = []
    for attack in summary.axes.attackers:
        cells = [_heat_cell(groups.get((attack, strategy), []), metric, (low, high), better_high) for strategy in summary.axes.strategies]
        if metric not in (verdict.SUCCESS, *_LASTING) or any(cell["value"] != "–" for cell in cells):
            none = verdict.is_none(attack, summary.threats)
            rows.append({"name": "no attack" if none else attack, "cells": cells})
    ends = (high, low) if better_high else (low, high)
    unit = _UNITS.get(metric, "")
    spread = "± is the standard deviation over the seeds. " if len(summary.axes.seeds) > 1 else ""
    note = f"{spread}{'Higher is better for the defender.' if better_high else 'Lower is better for the defender.'}"
    if metric == LIFESPAN:
        note += " 0: it no longer worked one round later, or never did; ≥: it still worked at the end (with some seed)."
    title = f"{_LASTING.get(metric, metric_title(metric))}{f' ({unit}, %)' if unit and share else ' (%)' if share else ''}"
    return {
        "title": title,
        "columns": summary.axes.strategies,
        "long": _long(summary.axes.strategies),
        "rows": rows,
        "note": note,
        "scale": [shown(metric, end).replace(".0 %", " %") for end in ends],
    }


def _heat_cell(cells: list[Cell], metric: str, ends: tuple[float, float], better_high: bool) -> dict[str, Any]:
    known = [value for cell in cells if cell.ok and (value := cell.metrics.get(metric)) is not None]
    broken = [cell for cell in cells if not cell.ok]
    why = "; ".join(f"seed {cell.seed}: {cell.why or cell.status}" for cell in broken)[:300]
    if broken and all(cell.refused for cell in cells):  # every seed for the same reason
        why = broken[0].why[:300]
    if not known:
        return {"value": "–", "note": broken[0].status if broken else "", "heat": 0, "failed": bool(broken), "hint": why}
    share = (fmean(known) - ends[0]) / ((ends[1] - ends[0]) or 1.0)
    bad = min(max(1 - share if better_high else share, 0.0), 1.0)
    notes = [f"± {_rounded(metric, stdev(known))}"] if len(known) > 1 else []
    notes += [f"{len(broken)} of {len(cells)} failed"] if broken else []
    printed = f"{100 * fmean(known):.1f}" if is_share(metric) else shown(metric, fmean(known))
    if metric == LIFESPAN and any(cell.metrics.get(OUTLIVED) for cell in cells):
        printed = f"≥ {printed}"
    return {"value": printed, "note": ", ".join(notes), "heat": int(10 * bad + 1e-9), "failed": False, "hint": why}


def _rounded(metric: str, value: float) -> str:
    return f"{value:.2g}" if metric == LIFESPAN else shown(metric, value).removesuffix(" %")
