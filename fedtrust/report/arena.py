"""Every attack against every defence on one page: the damage of each pair, both rankings, and what the defences cost."""

from __future__ import annotations

import csv
import io
from collections import Counter
from typing import Any

from fedtrust import arena
from fedtrust.intervals import Interval
from fedtrust.report.arena_bars import ranking
from fedtrust.report.load import Cell, Matrix, MatrixSummary
from fedtrust.report.parts import duration
from fedtrust.report.verdict import ACCURACY, SUCCESS, is_none, listed, percent, points

#: A smaller matrix has no ranking worth the name.
LEAST_ATTACKS, LEAST_DEFENCES = 3, 3
#: Plain means by the name of their rule, the first one found is what lost accuracy is counted against.
PLAIN = ("mean", "weighted-mean", "flwr:FedAvg")
#: A backdoor that took this much more from the accuracy than it won is marked.
_BROKE = 0.10
#: A defence that gives up more accuracy than this when nobody attacks does not pass for the winner without a word.
_DEAR = 0.03
_WORDS = {"refused": "refused", "failed": "failed", "unjudged": "nothing to judge by", "missing": "not played"}
_SIGNS = {"refused": "×", "failed": "!", "unjudged": "–", "missing": "–"}
_PLACES = ("train", "aggregate", "probe")


def judged(summary: MatrixSummary) -> arena.Arena | None:
    """Judge a matrix; `None` for one that is too small for a ranking.

    Args:
        summary: of the matrix.
    """
    attacks = {cell.attack or cell.attackers for cell in summary.cells if not is_none(cell.attackers, summary.threats)}
    if len(attacks) < LEAST_ATTACKS or len(summary.axes.strategies) < LEAST_DEFENCES:
        return None
    return arena.judge([_entry(cell, summary) for cell in summary.cells], _reference(summary))


def _entry(cell: Cell, summary: MatrixSummary) -> arena.Entry:
    metrics, seconds = cell.round_means.metrics, cell.round_means.seconds
    own = [value for place, value in seconds.items() if place not in _PLACES and value is not None]
    return arena.Entry(
        None if is_none(cell.attackers, summary.threats) else cell.attack or cell.attackers,
        cell.strategies,
        cell.partitions,
        cell.seed,
        "" if cell.share is None else f"{cell.share:g}",
        cell.status,
        cell.why,
        cell.metrics.get(ACCURACY),
        cell.metrics.get(SUCCESS),
        {name: value for name, value in cell.clean_success.items() if value is not None},
        cell.floor,
        sum(own) if own else seconds.get("aggregate"),  # a stock strategy has no components of ours
        cell.repair_seconds,
        {name: value for name, value in metrics.items() if value is not None},
    )


def _reference(summary: MatrixSummary) -> str | None:
    rules = {cell.rule or cell.strategies: cell.strategies for cell in reversed(summary.cells)}
    return next((rules[name] for name in PLAIN if name in rules), None)


def section(matrix: Matrix) -> dict[str, Any] | None:
    """Lay out the section; `None` for a matrix that is too small for a ranking."""
    found = judged(matrix.summary)
    if found is None:
        return None
    reference, seeds = _reference(matrix.summary), len(matrix.summary.axes.seeds)
    return {
        "lead": _lead(found),
        "heat": _heat(found),
        "bars": [
            {"title": "Defences, least damage first", "svg": ranking("Defences by mean damage", found.defenders)},
            {"title": "Attacks, most damage first", "svg": ranking("Attacks by mean damage", found.attackers)},
        ],
        "bars_note": _resampled(found.resamples, seeds),
        "costs": _costs(found, reference),
        "excluded": _excluded(found),
    }


def _lead(found: arena.Arena) -> list[str]:
    """Who leads on either side, in a sentence each."""
    said = []
    for side, what in ((found.defenders, "lets the least through: a damage of"), (found.attackers, "does the most damage:")):
        first = [s for s in side if s.rank == 1]
        if first:
            best = first[0]
            more = f", tied with {_some([s.name for s in first[1:]])}" if first[1:] else ""
            lost = found.costs[best.name].lost if side is found.defenders else None
            more += f"; without an attack it gives up {points(lost)} of accuracy" if lost is not None and lost > _DEAR else ""
            said.append(f"{_start(best.name)} {what} {percent(best.mean)} on average{_between(best.interval)}{more}.")
    return said


def _start(words: str) -> str:
    return words[:1].upper() + words[1:]


def _some(names: list[str], limit: int = 5) -> str:
    return listed(names) if len(names) <= limit else f"{', '.join(names[:limit])} and {len(names) - limit} more"


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f" (95 % interval {100 * interval.low:.0f} to {100 * interval.high:.0f} %)"


def _resampled(resamples: int, seeds: int) -> str:
    if not resamples:
        return "One seed: there are no intervals, and ranks follow from the means alone. A point or two may be chance."
    how = f"all {resamples} resamples" if seeds**seeds == resamples else f"{resamples} random resamples"
    return f"Whiskers: 95 % bootstrap interval over {seeds} seeds ({how}). Overlapping intervals tie, = marks a shared rank."


def _heat(found: arena.Arena) -> dict[str, Any]:
    """Lay out the damage of every pair, both sides in the order of their rank, so that the damage gathers in one corner."""
    attacks = [s.name for s in found.attackers]
    rows: list[dict[str, Any]] = []
    for standing in found.defenders:
        cells = [_cell(found.pairs[attack, standing.name]) for attack in attacks]
        rows.append({"name": standing.name, "mean": _whole(standing.mean), "cells": cells})
    marks = Counter(cell["kind"] for row in rows for cell in row["cells"])
    notes = [
        "Damage in %. An attack on the model's accuracy: the share that it takes of what the same defence reaches without an attack, "
        "counted from what the commonest class alone would score. An attack with a goal: that, or how often it gets its way, less how "
        "often a model that nobody attacked does the same, whichever is more."
    ]
    notes += ["† The attack broke the model rather than met its goal: the damage is that to the accuracy."] * bool(marks["broke"])
    notes += [f"{_SIGNS[kind]} (hatched): {_WORDS[kind]}, {n} pair{'s'[: n > 1]}." for kind in ("refused", "failed") if (n := marks[kind])]
    bottom = [_whole(s.mean) for s in found.attackers]
    return {"columns": attacks, "rows": rows, "bottom": bottom, "note": " ".join(notes)}


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def _cell(pair: arena.Pair) -> dict[str, Any]:
    name = f"{pair.attack} against {pair.defence}"
    if pair.damage is None:
        why = f": {pair.why[:200]}" if pair.why else ""
        return {"value": _SIGNS[pair.status], "heat": None, "hint": f"{name}: {_WORDS[pair.status]}{why}", "kind": pair.status}
    broke = pair.broken is not None and pair.gained is not None and pair.broken > pair.gained + _BROKE
    hint = f"{name}: damage {percent(pair.damage)}{_between(pair.interval)}"
    hint += f"; success beyond a clean model's {percent(pair.gained)}" if broke else ""
    hint += f"; {pair.known} of {pair.of} cells" if pair.known < pair.of else ""
    heat = int(10 * pair.damage + 1e-9)
    return {"value": _whole(pair.damage) + "†"[: int(broke)], "heat": heat, "hint": hint, "kind": "broke" if broke else ""}


def place(rank: int | None, shared: Counter[int | None]) -> str:
    """Write a rank; one that is shared has a sign before it."""
    return "–" if rank is None else f"={rank}" if shared[rank] > 1 else f"{rank}"


def _costs(found: arena.Arena, reference: str | None) -> dict[str, Any]:
    shared = Counter(s.rank for s in found.defenders)
    rows = []
    for s in found.defenders:
        cost = found.costs[s.name]
        worst = "–" if s.extreme is None else f"{s.extreme[0]}, {_whole(s.extreme[1])} %"
        few = f" ({s.met} of {s.of})" if s.met < s.of else ""
        values = [place(s.rank, shared), percent(s.mean) + few if s.mean is not None else "–", worst, _share(cost.clean)]
        values += [_points(cost.lost), _times(cost)]
        values += ["–" if cost.score is None else f"{cost.score:.3f}"]
        rows.append({"name": s.name, "values": values})
    columns = ["Rank", "Mean damage", "Worst attack", "Clean accuracy", "Clean loss", "Time a round", "Score"]
    against = f"Clean loss: accuracy without an attack, against {reference}." if reference else "There is no plain mean to lose against."
    note = (
        f"{against} Time: what the defence's own components took a round, beside the other cells; repairs once, after the last round. "
        "Score: 0.5 · mean (1 − damage) + 0.25 · (1 − worst damage) + 0.25 · clean accuracy relative to the plain mean."
    )
    return {"columns": columns, "rows": rows, "note": note}


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _points(value: float | None) -> str:
    return "–" if value is None else points(round(value, 6) + 0.0).replace("-0.0", "0.0").replace("-", "−")


def _times(cost: arena.Cost) -> str:
    return _seconds(cost.seconds) + (f" + {_seconds(cost.once)} once" if cost.once is not None else "")


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.1 ms" if value < 1e-4 else f"{1000 * value:.2g} ms" if value < 0.1 else duration(value)


def _excluded(found: arena.Arena) -> dict[str, Any] | None:
    """Lay out whom the defences wrongly distrusted, the most unjust first; `None` where no rule has a notion of trust."""
    known = [e for e in found.excluded.values() if e.honest is not None or e.rare is not None]
    if not known:
        return None
    rows = []
    for e in sorted(known, key=lambda e: (-(e.gap if e.gap is not None else -2.0), -(e.honest or 0.0))):
        gap = "–" if e.gap is None else f"{100 * e.gap:+.1f} points".replace("-", "−")
        values = [_share(e.honest), _share(e.out), _share(e.rare), _share(e.common), gap]
        values += ["–" if trust is None else f"{trust:.2f}" for trust in (e.rare_trust, e.common_trust)]
        rows.append({"name": e.defence, "values": values})
    blind = len(found.excluded) - len(known)
    columns = ["Honest distrusted", "Left out", "Rare", "Others", "Rare minus others", "Trust in rare", "Trust in others"]
    note = (
        "Shares of honest clients whom a defence trusts by less than half, over all rounds and cells; left out: not at all. Rare: the "
        "quarter of the clients whose labels are furthest from those of all clients together (total-variation distance)."
    )
    return {"columns": columns, "rows": rows, "note": note + (f" {blind} more have no notion of trust." if blind else "")}


# ------------------------------------------------------------------------------------------------------------------------- export

COLUMNS = (
    "attack", "defence", "partition", "share", "seed", "status", "damage", "accuracy", "clean_accuracy", "accuracy_damage",
    "attack_success", "clean_attack_success", "floor", "defence_seconds",
)  # fmt: skip


def table(found: arena.Arena) -> str:
    """Return every attacked cell as CSV, a line each; what is not known is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for fight in found.fights:
        e = fight.entry
        labels = [e.attack, e.defence, e.partition, e.share, e.seed, e.status]
        numbers = [fight.damage, e.accuracy, fight.clean, fight.broken, e.success, fight.base, e.floor, e.seconds]
        writer.writerow([*labels, *("" if value is None else f"{value:.6g}" for value in numbers)])
    return out.getvalue()
