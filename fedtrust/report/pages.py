"""What stands on the page of a run and of a matrix, as plain values for the template."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any

from fedtrust.report import verdict
from fedtrust.report.curves import matrix_panels, run_panels
from fedtrust.report.figures import Clients, holdings, trust_rounds, trust_strip, trust_words
from fedtrust.report.load import Cell, Matrix, Run, Threat
from fedtrust.report.parts import (
    STATUS_WORDS,
    Budget,
    artefact,
    command,
    duration,
    environment,
    is_share,
    metric_title,
    population,
    scenario,
    shown,
    threat_card,
    trouble,
)

OUTCOMES: dict[verdict.Outcome, tuple[str, str, int]] = {  # sign, word, heat
    "won": ("▲", "attack won", 9),
    "partial": ("◆", "partly held", 4),
    "held": ("●", "held", 1),
    "unknown": ("–", "not judged", 0),
}
_MOST_CELLS, _MOST_STRIPS, _MOST_METRICS = 400, 60, 10


def page(found: Run | Matrix) -> dict[str, Any]:
    """Lay out the report of one run directory."""
    return _matrix(found) if isinstance(found, Matrix) else _run(found)


def _common(found: Run | Matrix) -> dict[str, Any]:
    folder = found.folder
    return {
        "title": found.summary.title or folder.path.resolve().name,
        "status": folder.status,
        "command": command(folder),
        "scenario": scenario(folder),
        "environment": environment(folder),
        "warnings": [warning[:600] for warning in found.summary.warnings[:30]],
    }


# ------------------------------------------------------------------------------------------------------------------ a single run


def _run(run: Run) -> dict[str, Any]:
    summary = run.summary
    raw = {**run.folder.raw, "status": run.folder.status, "metrics": summary.metrics}
    main, more = run_panels(run, Budget(300_000))
    bad = trouble(run.rounds)
    pictures = Budget(250_000)
    clients = population(run)
    cards = [threat_card(threat, clients, summary.assumed_malicious, len(run.malicious)) for threat in summary.threats]
    played = (
        int(summary.rounds_counted or 0)
        if summary.rounds_counted is not None
        else len([e for e in run.rounds if e.round > 0 and e.counted])
    )
    facts = [
        f"{summary.attack or 'no attack'} against {summary.strategy}" if summary.strategy else "",
        f"{played} of {summary.rounds:.0f} rounds counted" if summary.rounds is not None else f"{played} rounds",
        f"{clients} clients" if clients else "",
        f"seed {summary.seed}" if summary.seed else "",
        duration(summary.seconds),
        summary.engine,
    ]
    return {
        **_common(run),
        "kind": "run",
        "facts": [fact for fact in facts if fact],
        "verdict": verdict.sentences(raw),
        "alerts": run_alerts(run),
        "tiles": _tiles(run),
        "metrics": [(metric_title(name), shown(name, value)) for name, value in list(summary.metrics.items())[:200]],
        "curves": [{"title": "", "panels": main}] if main else [],
        "more_curves": more,
        "clients": _run_clients(run, clients),
        "artefacts": [artefact(raw, pictures) for raw in run.artefacts[:40]],
        "threats": [{"title": "", "cards": cards}] if cards else [],
        "faults": [{"title": "", "trouble": bad}] if bad.dropped or bad.missed else [],
        "sha256": summary.model_sha256,
    }


def run_alerts(run: Run) -> list[str]:
    """Say how a run that is not whole ended, and which rounds had no quorum."""
    missed = trouble(run.rounds).missed
    alerts = []
    if run.folder.status != "finished":
        reached = run.rounds[-1].round if run.rounds else 0
        why = f": {run.folder.why[:600]}" if run.folder.why else ""
        alerts.append(
            f"This run {STATUS_WORDS.get(run.folder.status, f'has the status {run.folder.status[:60]}')} after round {reached}{why}."
        )
    if missed:
        alerts.append(f"The quorum was missed in {verdict.listed(missed[:6])}{' and more' if len(missed) > 6 else ''}.")
    return alerts


def _tiles(run: Run) -> list[dict[str, str]]:
    """The few numbers worth printing large."""
    metrics = run.summary.metrics
    wanted = [verdict.ACCURACY, verdict.SUCCESS, "client-accuracy/worst", "detection/recall", "detection/fpr", verdict.LOSS]
    names = [name for name in wanted if metrics.get(name) is not None] or [name for name, value in metrics.items() if value is not None]
    tiles = []
    for name in names[:4]:
        start = next((entry.metrics[name] for entry in run.rounds if entry.metrics.get(name) is not None), None)
        words = f"from {shown(name, start)} at the start" if start is not None and len(run.rounds) > 1 else ""
        tiles.append({"name": metric_title(name), "value": shown(name, metrics[name]), "note": words})
    return tiles


def _run_clients(run: Run, clients: int) -> dict[str, Any]:
    figures = [{"title": "Who holds what", "svg": holdings(_clients_of(run, clients)), "note": _skew_note(run, clients)}]
    if run.trust and 0 < clients <= 60 and run.clients.trust:
        figures.append(
            {
                "title": "Trust by round",
                "svg": trust_rounds(run.clients.trust, run.malicious, clients),
                "note": trust_words(run.trust, run.malicious),
            }
        )
    elif run.trust:
        svg = trust_strip(run.trust, run.malicious, clients, "Mean trust by client")
        figures.append({"title": "Mean trust", "svg": svg, "note": trust_words(run.trust, run.malicious)})
    none = "" if run.trust else f"{run.summary.strategy or 'The rule'} gives no trust to single clients."
    return {"figures": figures, "strips": [], "note": none}


def _clients_of(run: Run, clients: int, trust: bool = True) -> Clients:
    federation = run.summary.federation
    counts = [[value or 0.0 for value in row] for row in federation.label_counts[:clients]]
    return Clients(federation.labels, counts, frozenset(c for c in run.malicious if c < clients), run.trust if trust else {}, clients)


def _skew_note(run: Run, clients: int) -> str:
    sizes = [sum(value or 0.0 for value in row) for row in run.summary.federation.label_counts]
    bad = f"{len(run.malicious)} of {clients} clients are malicious (▲). " if run.malicious else "No client is malicious. "
    if not sizes:
        return bad if clients else ""
    ordered = sorted(sizes)
    return f"{bad}A client holds {ordered[0]:.0f} to {ordered[-1]:.0f} samples, {ordered[len(ordered) // 2]:.0f} in the middle."


# ---------------------------------------------------------------------------------------------------------------------- a matrix


def _matrix(matrix: Matrix) -> dict[str, Any]:
    summary, axes = matrix.summary, matrix.summary.axes
    curves = Budget(350_000)
    groups = matrix_panels(matrix, curves)
    rounds = max((entry.round for run in matrix.runs.values() for entry in run.rounds), default=0)
    sizes = [
        (len(axes.attackers), "attack rows"),
        (len(axes.strategies), "strategies"),
        (len(axes.partitions), "partitions"),
        (len(axes.seeds), "seeds"),
    ]
    facts = [f"{len(summary.cells)} cells", *(f"{size} {name}" for size, name in sizes if size > 1), f"{rounds} rounds" if rounds else ""]
    engine = summary.engine or next((run.summary.engine for run in matrix.runs.values() if run.summary.engine), "")
    return {
        **_common(matrix),
        "kind": "matrix",
        "facts": [fact for fact in [*facts, duration(summary.seconds), engine] if fact],
        "verdict": verdict.sentences(matrix.folder.raw),
        "alerts": _matrix_alerts(matrix),
        "heat": heat_maps(matrix),
        "curves": groups,
        "curves_note": curves.note("panels") + (" Bands: lowest to highest seed." if len(axes.seeds) > 1 else ""),
        "clients": _matrix_clients(matrix),
        "artefacts": _matrix_artefacts(matrix),
        "threats": _matrix_threats(matrix),
        "faults": _matrix_faults(matrix),
        "cells": _cell_table(summary.cells),
    }


def _matrix_alerts(matrix: Matrix) -> list[str]:
    alerts = []
    if matrix.folder.status != "finished":
        why = f": {matrix.folder.why[:600]}" if matrix.folder.why else ""
        alerts.append(f"This matrix {STATUS_WORDS.get(matrix.folder.status, f'has the status {matrix.folder.status[:60]}')}{why}.")
    broken = [cell for cell in matrix.summary.cells if not cell.ok]
    alerts += [
        f"{_cell_name(cell)} {STATUS_WORDS.get(cell.status, cell.status)}{f': {cell.why[:300]}' if cell.why else ''}."
        for cell in broken[:8]
    ]
    return alerts + ([f"{len(broken) - 8} more cells did not finish."] if len(broken) > 8 else [])


def _cell_name(cell: Cell) -> str:
    rest = [part for part in (cell.partitions, f"seed {cell.seed}" if cell.seed else "") if part]
    where = f" ({', '.join(rest)})" if rest else ""
    return f"{cell.attackers} against {cell.strategies}{where}"


def heat_maps(matrix: Matrix) -> list[dict[str, Any]]:
    """Lay out attack × strategy for every partition: who won, accuracy, attack success, or the loss where nothing else is known."""
    summary = matrix.summary
    have = {name for cell in summary.cells for name, value in cell.metrics.items() if value is not None}
    maps = []
    for partition in summary.axes.partitions:
        fights = {(d.attack, d.strategy): d for d in verdict.duels(summary) if d.partition == partition}
        judged = any(d.outcome != "unknown" for d in fights.values() if not verdict.is_none(d.attack, summary.threats))
        tables = [_outcomes(matrix, fights)] if judged else []
        metrics = [name for name in (verdict.ACCURACY, verdict.SUCCESS) if name in have] or [
            name for name in (verdict.LOSS,) if name in have
        ]
        tables += [_heat(matrix, partition, metric) for metric in metrics]
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
            cells.append({"value": sign, "note": "failed" if failed else word, "heat": heat, "failed": failed, "hint": ""})
        rows.append({"name": attack, "cells": cells})
    note = (
        f"Attack won: success of {100 * verdict.SUCCESS_WON:.0f} % or more, or {100 * verdict.COST_WON:.0f} points of accuracy or more lost. "
        f"Held: at most {100 * verdict.SUCCESS_HELD:.0f} % and {100 * verdict.COST_HELD:.0f} points. Compared with the same strategy without an attack."
    )
    return {"title": "Who won", "columns": axes.strategies, "rows": rows, "note": note, "scale": []}


def _heat(matrix: Matrix, partition: str, metric: str) -> dict[str, Any]:
    summary, share = matrix.summary, is_share(metric)
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in summary.cells:
        if cell.partitions == partition:
            groups.setdefault((cell.attackers, cell.strategies), []).append(cell)
    values = [value for cells in groups.values() if (value := verdict.mean(cells, metric)) is not None]
    low, high = (0.0, 1.0) if share else (min(values, default=0.0), max(values, default=1.0))
    better_high = metric == verdict.ACCURACY
    rows = []
    for attack in summary.axes.attackers:
        cells = [_heat_cell(groups.get((attack, strategy), []), metric, (low, high), better_high) for strategy in summary.axes.strategies]
        if metric != verdict.SUCCESS or any(cell["value"] != "–" for cell in cells):
            none = verdict.is_none(attack, summary.threats)
            rows.append({"name": "no attack" if none else attack, "cells": cells})
    ends = (high, low) if better_high else (low, high)
    unit = {verdict.ACCURACY: "share of test samples", verdict.SUCCESS: "share of attacked inputs"}.get(metric, "")
    spread = "± is the standard deviation over the seeds. " if len(summary.axes.seeds) > 1 else ""
    note = f"{spread}{'Higher is better for the defender.' if better_high else 'Lower is better for the defender.'}"
    title = f"{metric_title(metric)}{f' ({unit}, %)' if share else ''}"
    return {
        "title": title,
        "columns": summary.axes.strategies,
        "rows": rows,
        "note": note,
        "scale": [shown(metric, end).replace(".0 %", " %") for end in ends],
    }


def _heat_cell(cells: list[Cell], metric: str, ends: tuple[float, float], better_high: bool) -> dict[str, Any]:
    known = [value for cell in cells if cell.ok and (value := cell.metrics.get(metric)) is not None]
    broken = [cell for cell in cells if not cell.ok]
    why = "; ".join(f"seed {cell.seed}: {cell.why or cell.status}" for cell in broken)[:300]
    if not known:
        return {"value": "–", "note": broken[0].status if broken else "", "heat": 0, "failed": bool(broken), "hint": why}
    share = (fmean(known) - ends[0]) / ((ends[1] - ends[0]) or 1.0)
    bad = min(max(1 - share if better_high else share, 0.0), 1.0)
    notes = [f"± {shown(metric, stdev(known)).removesuffix(' %')}"] if len(known) > 1 else []
    notes += [f"{len(broken)} of {len(cells)} failed"] if broken else []
    value = f"{100 * fmean(known):.1f}" if is_share(metric) else shown(metric, fmean(known))
    return {"value": value, "note": ", ".join(notes), "heat": round(10 * bad), "failed": False, "hint": why}


def _matrix_clients(matrix: Matrix) -> dict[str, Any]:
    """One picture of the data a partition, from the cell that shows most, and a strip of trust for each defended cell."""
    figures = []
    for partition in matrix.summary.axes.partitions[:6]:
        runs = [matrix.runs[c.cell] for c in matrix.summary.cells if c.partitions == partition and c.cell in matrix.runs]
        best = max(runs, key=lambda run: (bool(run.summary.federation.label_counts), bool(run.malicious)), default=None)
        if best is not None and (clients := population(best)):
            title = f"Who holds what{f', {partition}' if len(matrix.summary.axes.partitions) > 1 else ''}"
            figures.append({"title": title, "svg": holdings(_clients_of(best, clients, trust=False)), "note": _skew_note(best, clients)})
    budget, strips = Budget(200_000), []
    for cell in matrix.summary.cells:
        run = matrix.runs.get(cell.cell)
        if run is None or not run.trust or not cell.ok:
            continue
        svg = trust_strip(run.trust, run.malicious, population(run), f"Mean trust: {_cell_name(cell)}")
        if len(strips) < _MOST_STRIPS and budget.take(svg):
            strips.append({"title": _cell_name(cell), "svg": svg, "note": trust_words(run.trust, run.malicious)})
    blind = sorted(
        {c.strategies for c in matrix.summary.cells if c.cell in matrix.runs}
        - {c.strategies for c in matrix.summary.cells if c.cell in matrix.runs and matrix.runs[c.cell].trust}
    )
    note = f"{verdict.listed(blind)}: no trust in single clients." if blind else ""
    return {"figures": figures, "strips": strips, "note": f"{note} {budget.note('strips')}".strip()}


def _matrix_artefacts(matrix: Matrix) -> list[dict[str, Any]]:
    """Show each attack's artefacts once, from its first cell that left any; equal pictures of other cells add nothing."""
    budget, found, seen = Budget(250_000), [], set()
    for cell in matrix.summary.cells:
        run = matrix.runs.get(cell.cell)
        for raw in run.artefacts if run else []:
            key = (cell.attackers, raw["file"])
            if key not in seen and len(found) < 40:
                seen.add(key)
                found.append({**artefact(raw, budget), "where": _cell_name(cell)})
    return found


def _matrix_threats(matrix: Matrix) -> list[dict[str, Any]]:
    groups = []
    for attack, threats in matrix.summary.threats.items():
        runs = [matrix.runs[c.cell] for c in matrix.summary.cells if c.attackers == attack and c.cell in matrix.runs]
        clients = max((population(run) for run in runs), default=0)
        assumed = next((run.summary.assumed_malicious for run in runs if run.summary.assumed_malicious is not None), None)
        bad = len({c for threat in threats for c in threat.clients}) or max((len(run.malicious) for run in runs), default=0)
        if threats:
            groups.append({"title": attack, "cards": [threat_card(threat, clients, assumed, bad) for threat in _distinct(threats)]})
    return groups[:30]


def _distinct(threats: Iterable[Threat]) -> list[Threat]:
    return list({threat.model_dump_json(): threat for threat in threats}.values())[:12]


def _matrix_faults(matrix: Matrix) -> list[dict[str, Any]]:
    found = []
    for cell in matrix.summary.cells:
        run = matrix.runs.get(cell.cell)
        bad = trouble(run.rounds, limit=8) if run else None
        if bad and (bad.dropped or bad.missed):
            found.append({"title": _cell_name(cell), "trouble": bad})
    return found[:40]


def _cell_table(cells: list[Cell]) -> dict[str, Any]:
    names = [name for name in dict.fromkeys(name for cell in cells for name in cell.metrics) if not name.startswith("recall/")][
        :_MOST_METRICS
    ]
    rows = [
        {"name": _cell_name(cell), "values": [*(shown(n, cell.metrics.get(n)) for n in names), duration(cell.seconds), cell.status]}
        for cell in cells[:_MOST_CELLS]
    ]
    note = f"{len(cells) - _MOST_CELLS} more cells are in summary.json." if len(cells) > _MOST_CELLS else ""
    return {"columns": [*map(metric_title, names), "Time", "Status"], "rows": rows, "note": note}
