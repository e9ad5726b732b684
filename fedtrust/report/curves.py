"""Panels of curves: one line a strategy, one panel an attack, or the metrics of a single run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from fedtrust.report.load import Axes as MatrixAxes
from fedtrust.report.load import Cell, Matrix, Run
from fedtrust.report.parts import COLUMNS_OF_LINES, Budget, is_share, metric_title, points_of, window, words
from fedtrust.report.svg import Axes, Series, line_chart
from fedtrust.report.verdict import ACCURACY, LOSS, SUCCESS, is_none

_MOST_PANELS = 24
#: A line's name and points.
Line = tuple[str, list[tuple[float, float]]]


def run_panels(run: Run, budget: Budget) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw the metrics of a single run.

    Args:
        run: the run.
        budget: how much they may take.

    Returns:
        The panels to show first (accuracy, attack success, loss), and all others, a family like `recall/…` in one panel.
    """
    names = list(dict.fromkeys(name for entry in run.rounds for name in entry.metrics))
    first = [name for name in (ACCURACY, SUCCESS, LOSS) if name in names]
    families: dict[str, list[str]] = {}
    for name in names:
        if name not in first:
            families.setdefault(name.split("/")[0] if "/" in name else name, []).append(name)
    main = [_run_panel(run, metric_title(name), [name]) for name in first]
    more = []
    for family, members in list(families.items())[:_MOST_PANELS]:
        for start in range(0, len(members), COLUMNS_OF_LINES):
            more.append(_run_panel(run, metric_title(family), members[start : start + COLUMNS_OF_LINES]))
    return [p for p in main if budget.take(p["svg"])], [p for p in more if budget.take(p["svg"])]


def _run_panel(run: Run, title: str, names: Sequence[str]) -> dict[str, Any]:
    series = [Series(name.split("/", 1)[-1], _points([run], name), n) for n, name in enumerate(names)]
    marks = tuple((float(entry.round), entry.repair) for entry in run.rounds if entry.repair)
    axes = Axes("Round", title, is_share(names[0]), window(run.summary.threats), marks)
    return {"title": title, "svg": line_chart(f"{title} by round", series, axes)}


def matrix_panels(matrix: Matrix, budget: Budget) -> list[dict[str, Any]]:
    """Draw small multiples: for every metric and partition a panel an attack, in it a line a strategy, the mean over the seeds."""
    axes = matrix.summary.axes
    known = {name for run in matrix.runs.values() for entry in run.rounds for name in entry.metrics}
    groups = []
    for metric in [name for name in (ACCURACY, SUCCESS) if name in known] or [name for name in (LOSS,) if name in known]:
        for partition in axes.partitions:
            panels = []
            for attack in axes.attackers:
                if metric == SUCCESS and is_none(attack, matrix.summary.threats):
                    continue  # without an attacker there is no goal to reach
                panels += _attack_panels(matrix, metric, partition, attack)
            fitting = [panel for panel in panels if budget.take(panel["svg"])]
            if fitting:
                where = f", {partition}" if len(axes.partitions) > 1 else ""
                groups.append({"title": f"{metric_title(metric)}{where}", "panels": fitting})
    return groups


def _attack_panels(matrix: Matrix, metric: str, partition: str, attack: str) -> list[dict[str, Any]]:
    series = []
    for n, strategy in enumerate(matrix.summary.axes.strategies):
        cells = [c for c in matrix.summary.cells if (c.attackers, c.strategies, c.partitions) == (attack, strategy, partition)]
        runs = [matrix.runs[c.cell] for c in cells if c.ok and c.cell in matrix.runs]
        points = _points(runs, metric)
        if points:
            series.append(Series(strategy, points, n, _band(runs, metric) if len(runs) > 1 else []))
    axes = Axes("Round", metric_title(metric), is_share(metric), window(matrix.summary.threats.get(attack, [])))
    title = "no attack" if is_none(attack, matrix.summary.threats) else attack
    parts = [series[start : start + COLUMNS_OF_LINES] for start in range(0, len(series), COLUMNS_OF_LINES)]
    return [{"title": title, "svg": line_chart(f"{metric_title(metric)} by round, {title}", part, axes)} for part in parts]


def by_round(runs: Sequence[Run], metric: str) -> dict[int, list[float]]:
    """Collect a metric by round over several runs."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for entry in run.rounds:
            value = entry.metrics.get(metric)
            if value is not None:
                found.setdefault(entry.round, []).append(value)
    return dict(sorted(found.items()))


def _points(runs: Sequence[Run], metric: str) -> list[tuple[float, float]]:
    return [(float(at), fmean(values)) for at, values in by_round(runs, metric).items()]


def _band(runs: Sequence[Run], metric: str) -> list[tuple[float, float, float]]:
    return [(float(at), min(values), max(values)) for at, values in by_round(runs, metric).items()]


def together(matrix: Matrix, budget: Budget) -> list[dict[str, Any]]:
    """Lay out the curves that probes left in several cells, one picture a file: a line a cell, and once what is the same in all of them.

    More lines than can be told apart go into further pictures, each with the lines that all cells share.
    """
    files: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for cell in matrix.summary.cells:
        run = matrix.runs.get(cell.cell)
        for raw in run.artefacts if run else []:
            if raw.get("kind") == "curve" and isinstance(raw.get("series"), dict):
                files.setdefault(raw["file"], []).append((_short(cell, matrix.summary.axes), raw))
    found: list[dict[str, Any]] = []
    for file, cells in files.items():
        kinds = {(words(raw.get("x")), words(raw.get("y"))) for _, raw in cells}
        if len(cells) < 2 or len(kinds) > 1:  # of one cell alone it is that cell's picture
            continue
        (x, y), title = kinds.pop(), words(cells[0][1].get("title")) or file
        own, common = _lines(cells)
        room = COLUMNS_OF_LINES - len(common)
        for start in range(0, len(own), max(1, room)):
            part = own[start : start + max(1, room)]
            series = [Series(name, points, n) for n, (name, points) in enumerate([*part, *common])]
            chart = line_chart(title, series, Axes(x or "x", y or "y"))
            if budget.take(chart):
                caption = "A line a cell; the figures to it stand in the tables above and in each cell's own report."
                base = {"kind": "curve", "file": file, "title": title, "note": "", "caption": caption}
                found.append({**base, "svg": chart})
    return found


def _short(cell: Cell, axes: MatrixAxes) -> str:
    """Name a cell by what tells it from the others, for a legend."""
    parts = [cell.strategies] if len(axes.strategies) > 1 or len(axes.attackers) == 1 else []
    parts = [*([cell.attackers] if len(axes.attackers) > 1 else []), *parts]
    parts += [cell.partitions] if len(axes.partitions) > 1 else []
    return ", ".join([*parts, *([f"seed {cell.seed}"] if len(axes.seeds) > 1 else [])])


def _lines(cells: Sequence[tuple[str, dict[str, Any]]]) -> tuple[list[Line], list[Line]]:
    """Return the lines that are a cell's own, named by cell, and those that are the same in every cell."""
    first = cells[0][1]["series"]
    same = [name for name, points in first.items() if all(raw["series"].get(name) == points for _, raw in cells)]
    own = []
    for cell, raw in cells:
        names = [name for name in raw["series"] if name not in same]
        own += [(cell if len(names) == 1 else f"{cell}: {name}", points_of(raw["series"][name])) for name in names]
    return own, [(name, points_of(first[name])) for name in same]
