"""Several runs on one page: their numbers, their curves, and what else differs between their scenarios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedtrust.report import verdict
from fedtrust.report.curves import by_round
from fedtrust.report.devices import comparison_panels
from fedtrust.report.heat import heat_maps
from fedtrust.report.load import Matrix, Run
from fedtrust.report.parts import COLUMNS_OF_LINES, STATUS_WORDS, Budget, duration, flat, is_share, metric_title, shown
from fedtrust.report.run_page import run_alerts
from fedtrust.report.svg import Axes, Series, clipped, line_chart

_MOST_COLUMNS, _MOST_ROWS = 8, 300
_NAMED = ("title", "attackers", "strategy", "seed", "sweep", "week")  # keys whose difference is the point of the comparison


def page(found: Sequence[Run | Matrix]) -> dict[str, Any]:
    """Lay out a comparison.

    Args:
        found: the runs and matrices, in the order in which they are shown.

    Returns:
        Values for the template.
    """
    names = _names(found)
    runs = [(name, entry) for name, entry in zip(names, found, strict=True) if isinstance(entry, Run)]
    matrices = [(name, entry) for name, entry in zip(names, found, strict=True) if isinstance(entry, Matrix)]
    curves = Budget(300_000)
    differing = _differences(names, found)
    return {
        "kind": "compare",
        "title": f"Comparison of {len(found)} run{'' if len(found) == 1 else 's'}",
        "status": "",
        "facts": [
            f"{len(runs)} single run{'' if len(runs) == 1 else 's'}" if runs else "",
            f"{len(matrices)} matri{'x' if len(matrices) == 1 else 'ces'}" if matrices else "",
        ],
        "verdict": _verdict(runs, matrices, differing),
        "alerts": [f"{name}: {alert}" for name, entry in zip(names, found, strict=True) for alert in _alerts(entry)],
        "cells": _table(runs, matrices),
        "curves": _curves(runs, curves) + comparison_panels(runs, curves),
        "curves_note": curves.note("panels"),
        "heat": [
            {**entry, "title": f"{name}{', ' if entry['title'] else ''}{entry['title']}"}
            for name, matrix in matrices
            for entry in heat_maps(matrix)
        ],
        "differences": differing,
        "warnings": [f"{name}: {words[:600]}" for name, entry in zip(names, found, strict=True) for words in entry.summary.warnings[:10]][
            :60
        ],
        "command": "fedtrust report " + " ".join(names),
    }


def _names(found: Sequence[Run | Matrix]) -> list[str]:
    """Call each by its folder; folders of the same name also by their parent."""
    paths = [entry.folder.path.resolve() for entry in found]
    short = [path.name for path in paths]
    return [name if short.count(name) == 1 else f"{path.parent.name}/{name}" for name, path in zip(short, paths, strict=True)]


def _alerts(entry: Run | Matrix) -> list[str]:
    if isinstance(entry, Run):
        return run_alerts(entry)
    if entry.folder.status == "finished":
        return []
    why = f": {entry.folder.why[:300]}" if entry.folder.why else ""
    return [f"this matrix {STATUS_WORDS.get(entry.folder.status, entry.folder.status[:60])}{why}."]


def _verdict(runs: Sequence[tuple[str, Run]], matrices: Sequence[tuple[str, Matrix]], differing: dict[str, Any]) -> list[str]:
    """Judge single runs as if they were the cells of one matrix, and say so where they differ in more than that."""
    said = []
    if len(runs) > 1:
        cells = [
            {"cell": name, "attackers": run.summary.attack or "none", "strategies": run.summary.strategy, "seed": run.summary.seed}
            | {"status": run.folder.status, "metrics": run.summary.metrics, "partitions": ""}
            for name, run in runs
        ]
        threats = {run.summary.attack: [t.model_dump() for t in run.summary.threats] for _, run in runs if run.summary.threats}
        said += verdict.sentences({"kind": "matrix", "cells": cells, "threats": threats})
        others = [row["name"] for row in differing["rows"] if row["name"].split(".")[0].split("[")[0] not in _NAMED]
        if others:
            more = f" and {len(others) - 4} more settings" if len(others) > 4 else ""
            what = f"{', '.join(others[:4])}{more}"
            said.append(f"The runs differ in other things too ({what}), so the difference is not the rule's or the attack's alone.")
    elif runs:
        said += verdict.sentences({**runs[0][1].folder.raw, "metrics": runs[0][1].summary.metrics})
    said += [f"{name}: {verdict.sentences(matrix.folder.raw)[0]}" for name, matrix in matrices]
    return said or ["There is nothing to compare."]


def _table(runs: Sequence[tuple[str, Run]], matrices: Sequence[tuple[str, Matrix]]) -> dict[str, Any]:
    every = [run.summary.metrics for _, run in runs] + [cell.metrics for _, matrix in matrices for cell in matrix.summary.cells]
    names = [name for name in dict.fromkeys(name for metrics in every for name in metrics) if not name.startswith("recall/")][
        :_MOST_COLUMNS
    ]
    rows = []
    for name, run in runs:
        s = run.summary
        numbers = [shown(metric, s.metrics.get(metric)) for metric in names]
        rows.append({"name": name, "values": [s.attack or "none", s.strategy, s.seed, *numbers, duration(s.seconds), run.folder.status]})
    for name, matrix in matrices:
        for cell in matrix.summary.cells:
            numbers = [shown(metric, cell.metrics.get(metric)) for metric in names]
            place = f"{name}{f', {cell.partitions}' if len(matrix.summary.axes.partitions) > 1 else ''}"
            rows.append(
                {"name": place, "values": [cell.attackers, cell.strategies, cell.seed, *numbers, duration(cell.seconds), cell.status]}
            )
    note = f"{len(rows) - _MOST_ROWS} more rows are in the runs' summary.json." if len(rows) > _MOST_ROWS else ""
    columns = ["Attack", "Strategy", "Seed", *map(metric_title, names), "Time", "Status"]
    return {"columns": columns, "rows": rows[:_MOST_ROWS], "note": note, "first": "Run"}


def _curves(runs: Sequence[tuple[str, Run]], budget: Budget) -> list[dict[str, Any]]:
    """Draw a panel a metric with a line a run; more runs than lines can be told apart go on in a further panel."""
    known = {name for _, run in runs for entry in run.rounds for name in entry.metrics}
    panels = []
    for metric in [name for name in (verdict.ACCURACY, verdict.SUCCESS, verdict.LOSS) if name in known]:
        for start in range(0, len(runs), COLUMNS_OF_LINES):
            lines = [
                Series(name, [(float(at), values[0]) for at, values in by_round([run], metric).items()], n)
                for n, (name, run) in enumerate(runs[start : start + COLUMNS_OF_LINES])
            ]
            title = metric_title(metric)
            svg = line_chart(f"{title} by round", lines, Axes("Round", title, is_share(metric)))
            if any(line.points for line in lines) and budget.take(svg):
                panels.append({"title": title, "svg": svg})
    return [{"title": "", "panels": panels}] if panels else []


def _differences(names: Sequence[str], found: Sequence[Run | Matrix]) -> dict[str, Any]:
    """List the settings in which the scenarios are not all alike."""
    tables = [flat(entry.folder.settings()) for entry in found]
    keys = [key for key in dict.fromkeys(key for table in tables for key in table) if len({table.get(key) for table in tables}) > 1]
    rows = [{"name": clipped(key, 80), "values": [clipped(table.get(key, "–"), 120) for table in tables]} for key in keys[:80]]
    return {"columns": list(names), "rows": rows, "note": "", "first": "Setting"}
