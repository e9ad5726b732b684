"""What privacy costs and buys: accuracy and the success of attacks on privacy over ε, a line for each kind of privacy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from fedtrust.report.load import Cell, Guarantee, Matrix
from fedtrust.report.parts import is_share, metric_title
from fedtrust.report.svg import Axes, Series, line_chart
from fedtrust.report.verdict import ACCURACY

#: Measures of attacks on privacy, by the end of a metric's name.
_ATTACKS = ("/auc", "/psnr", "/exposure", "/fidelity")
_KINDS = {
    ("server", "client"): "central, client",
    ("clients", "client"): "local, client",
    ("clients", "record"): "record",
}


def section(matrix: Matrix) -> dict[str, Any] | None:
    """Lay out the frontier of a matrix whose strategies differ in ε; `None` where there are not at least two values of it."""
    done = [cell for cell in matrix.summary.cells if cell.ok]
    spent = {round(e, 6) for cell in done if (e := _epsilon(cell)) is not None}
    if len(spent) < 2:
        return None
    free = [cell for cell in done if not cell.privacy]
    names = dict.fromkeys(name for cell in done for name in cell.metrics)
    metrics = [ACCURACY] * (ACCURACY in names) + [name for name in names if name.endswith(_ATTACKS)]
    none_at = math.log2(max(spent)) + 1.0
    ticks = [*_powers(min(spent), max(spent)), *([(none_at, "none")] if free else [])]
    panels = [_panel(metric, done, free, none_at, tuple(ticks)) for metric in metrics]
    note = (
        "ε as spent, on a logarithmic axis; smaller is more private. “none” is the same federation without privacy. "
        "A client's and a record's ε are promises about different things: compare lines by their shape, not at one ε."
    )
    return {"panels": panels, "note": note + (" Means over seeds; bands: lowest to highest seed." if _several(done) else "")}


def _epsilon(cell: Cell) -> float | None:
    """Return the ε of a cell's guarantee; of several the largest."""
    found = [g.epsilon for g in cell.privacy]
    return max((e for e in found if e is not None and e > 0), default=None)


def _kind(guarantee: Guarantee) -> str:
    kind = _KINDS.get((guarantee.by, guarantee.unit), f"{guarantee.by}, {guarantee.unit}")
    # What means something else by ε, or spends it otherwise, is no point of the same line.
    ways = {"DP-FTRL": guarantee.mechanism == "dp-ftrl", "fixed cohorts": guarantee.sampling == "fixed"}
    told = [way for way, is_so in {**ways, "adaptive clip": guarantee.clip_kind == "adaptive"}.items() if is_so]
    return ", ".join(told) or kind


def _several(cells: Sequence[Cell]) -> bool:
    return len({cell.seed for cell in cells}) > 1


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """Return the powers of two that lie in or next to a range, as places on the axis and labels."""
    first, last = math.floor(math.log2(low) + 0.1), math.ceil(math.log2(high) - 0.1)
    step = max(1, math.ceil((last - first + 1) / 6))
    return [(float(n), f"{2.0**n:g}") for n in range(first, last + 1, step)]


def _panel(metric: str, done: Sequence[Cell], free: Sequence[Cell], none_at: float, ticks: tuple[tuple[float, str], ...]) -> dict[str, Any]:
    series = []
    for n, kind in enumerate(dict.fromkeys(_kind(cell.privacy[0]) for cell in done if cell.privacy)):
        found: dict[str, list[tuple[float, float]]] = {}  # by strategy: its cells differ in their seeds
        for cell in done:
            epsilon, value = _epsilon(cell), cell.metrics.get(metric)
            if cell.privacy and _kind(cell.privacy[0]) == kind and epsilon is not None and value is not None:
                found.setdefault(cell.strategies, []).append((math.log2(epsilon), value))
        base = [v for cell in free if (v := cell.metrics.get(metric)) is not None]
        if base:
            found[""] = [(none_at, value) for value in base]
        points = sorted((fmean(x for x, _ in at), fmean(y for _, y in at)) for at in found.values())
        band = sorted((fmean(x for x, _ in at), min(y for _, y in at), max(y for _, y in at)) for at in found.values())
        series.append(Series(kind, points, n, band if _several(done) else []))
    title = metric_title(metric)
    axes = Axes("ε", title, is_share(metric), ticks=ticks, log2=True)
    return {"title": title, "svg": line_chart(f"{title} over ε", series, axes)}
