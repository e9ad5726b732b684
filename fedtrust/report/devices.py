"""The pictures of a run whose clients have devices: metrics over virtual time, and what became of those who were asked."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from fedtrust.report.figures import MOST_ROWS
from fedtrust.report.load import Matrix, Round, Run
from fedtrust.report.parts import COLUMNS_OF_LINES, Budget, is_share, metric_title, window
from fedtrust.report.svg import WIDTH, Axes, Series, drawing, el, line_chart, text
from fedtrust.report.verdict import ACCURACY, LOSS, SUCCESS, is_none, listed

FATES = ("replied", "partial", "late", "dropped-out", "surplus")
WORDS = {
    "replied": "replied",
    "partial": "partial work",
    "late": "late",
    "dropped-out": "dropped out",
    "surplus": "surplus",
    "unreachable": "unreachable",
}
_MOST_ROUNDS, _ROW, _LEFT = 40, 15.0, 44.0


def timed(run: Run) -> bool:
    """Return whether virtual time passed in the run."""
    return any((entry.clock or 0.0) > 0 for entry in run.rounds)


def time_unit(longest: float) -> tuple[float, str]:
    """Return in what to measure up to `longest` virtual seconds: how many seconds one of it has, and its name."""
    units = ((300, 1.0, "s"), (18_000, 60.0, "min"), (432_000, 3600.0, "h"))
    return next(((size, name) for most, size, name in units if longest < most), (86_400.0, "days"))


def over_time(run: Run, metric: str, unit: float) -> list[tuple[float, float]]:
    """Return a metric at the virtual times (in `unit` seconds) at which it was measured."""
    found = ((entry.clock, entry.metrics.get(metric)) for entry in run.rounds)
    return [(clock / unit, value) for clock, value in found if clock is not None and value is not None]


def time_panels(run: Run, budget: Budget) -> list[dict[str, Any]]:
    """Draw the main metrics over virtual time; nothing for a run in which none passed.

    Args:
        run: the run.
        budget: how much they may take.
    """
    if not timed(run):
        return []
    unit, name = time_unit(max(entry.clock or 0.0 for entry in run.rounds))
    known = {metric for entry in run.rounds for metric in entry.metrics}
    panels = []
    for metric in (m for m in (ACCURACY, SUCCESS, LOSS) if m in known):
        title = metric_title(metric)
        axes = Axes(f"Virtual time ({name})", title, is_share(metric), _attacked(run, unit))
        chart = line_chart(f"{title} over virtual time", [Series(metric, over_time(run, metric, unit))], axes)
        panels.append({"title": title, "svg": chart, "note": _reached(run, unit, name) if metric == ACCURACY else ""})
    return [panel for panel in panels if budget.take(panel["svg"])]


def lines_over_time(runs: Sequence[tuple[str, Sequence[Run]]], metric: str, title: str) -> Markup | None:
    """Draw a metric of several runs over virtual time, a line a name.

    Args:
        runs: names, each with the runs (one a seed) over which time and metric are averaged, round by round.
        metric: what to draw.
        title: the image's name.

    Returns:
        A chart, or `None` where no time passed.
    """
    if not any(timed(run) for _, group in runs for run in group):
        return None
    unit, name = time_unit(max(entry.clock or 0.0 for _, group in runs for run in group for entry in run.rounds))
    series = []
    for n, (label, group) in enumerate(runs):
        found: dict[int, list[tuple[float, float]]] = {}
        for entry in (entry for run in group for entry in run.rounds):
            value = entry.metrics.get(metric)
            if entry.clock is not None and value is not None:
                found.setdefault(entry.round, []).append((entry.clock / unit, value))
        series.append(Series(label, [(fmean(c for c, _ in at), fmean(v for _, v in at)) for _, at in sorted(found.items())], n))
    return line_chart(title, series, Axes(f"Virtual time ({name})", metric_title(metric), is_share(metric)))


def comparison_panels(runs: Sequence[tuple[str, Run]], budget: Budget) -> list[dict[str, Any]]:
    """Draw the main metrics of several runs over virtual time, a line a run; runs without devices are left out."""
    some = [(name, [run]) for name, run in runs if timed(run)]
    known = {metric for _, group in some for run in group for entry in run.rounds for metric in entry.metrics}
    panels = []
    for metric in (m for m in (ACCURACY, SUCCESS, LOSS) if m in known):
        for start in range(0, len(some), COLUMNS_OF_LINES):
            chart = lines_over_time(some[start : start + COLUMNS_OF_LINES], metric, f"{metric_title(metric)} over virtual time")
            if chart is not None and budget.take(chart):
                panels.append({"title": metric_title(metric), "svg": chart})
    return [{"title": "Over virtual time", "panels": panels}] if panels else []


def matrix_panels(matrix: Matrix, budget: Budget) -> list[dict[str, Any]]:
    """Draw accuracy over virtual time: a panel an attack and partition, in it a line a strategy, the mean over the seeds."""
    axes, panels = matrix.summary.axes, []
    for partition in axes.partitions:
        for attack in axes.attackers:
            cells = [
                c for c in matrix.summary.cells if (c.attackers, c.partitions) == (attack, partition) and c.ok and c.cell in matrix.runs
            ]
            runs = [(s, [matrix.runs[c.cell] for c in cells if c.strategies == s]) for s in axes.strategies]
            where = f"{'no attack' if is_none(attack, matrix.summary.threats) else attack}"
            where += f", {partition}" if len(axes.partitions) > 1 else ""
            for start in range(0, len(runs), COLUMNS_OF_LINES):
                chart = lines_over_time(runs[start : start + COLUMNS_OF_LINES], ACCURACY, f"Accuracy over virtual time, {where}")
                if chart is not None and budget.take(chart):
                    panels.append({"title": where, "svg": chart})
    return [{"title": "Accuracy over virtual time", "panels": panels}] if panels else []


def _attacked(run: Run, unit: float) -> tuple[float, float] | None:
    """Return the virtual times between which the attack was active."""
    span = window(run.summary.threats)
    if span is None:
        return None
    clocks = [(entry.round, entry.clock / unit) for entry in run.rounds if entry.clock is not None]
    start = max((clock for number, clock in clocks if number < span[0]), default=0.0)
    return start, max((clock for number, clock in clocks if number <= span[1]), default=0.0)


def _reached(run: Run, unit: float, name: str) -> str:
    """Say when the accuracy was nearly as good as it ever was: the time to accuracy, by which systems are compared."""
    points = over_time(run, ACCURACY, unit)
    best = max((value for _, value in points), default=0.0)
    first = next((clock for clock, value in points if value >= 0.9 * best), None)
    return "" if first is None or best <= 0 else f"90 % of its best value ({100 * best:.1f} %) was reached after {first:.3g} {name}."


def fates_figure(run: Run, clients: int) -> dict[str, Any] | None:
    """Draw what became of the clients: each in each round, or for larger federations how many by round.

    Args:
        run: the run.
        clients: how many clients there are.

    Returns:
        A figure, or `None` for a run that recorded nothing about devices.
    """
    rounds = [entry for entry in run.rounds if entry.reachable is not None]
    if not rounds:
        return None
    title = "Who could be reached, and who replied"
    svg = _grid(rounds, run.malicious, clients, title) if 0 < clients <= MOST_ROWS else _lines(rounds, title)
    empty = " An empty place: could be reached, was not asked." if 0 < clients <= MOST_ROWS else ""
    return {"title": title, "svg": svg, "note": f"{_said(rounds, run.malicious, clients)}{empty}"}


def fates(entry: Round) -> dict[str, list[int]]:
    """Return the clients of a round by what became of them, those that could not be reached included."""
    found = {fate: entry.fates.get(fate, []) for fate in FATES[1:]}
    others = {client for ids in found.values() for client in ids}
    return {"replied": [c for c in entry.cohort if c not in others], **found, "unreachable": entry.unreachable}


def _lines(rounds: Sequence[Round], title: str) -> Markup:
    counted = [(float(entry.round), fates(entry)) for entry in rounds]
    used = [fate for fate in FATES if any(found[fate] for _, found in counted)]
    series = [Series(WORDS[fate], [(at, float(len(found[fate]))) for at, found in counted], n) for n, fate in enumerate(used)]
    return line_chart(title, series, Axes("Round", "Clients asked"))


def _grid(rounds: Sequence[Round], malicious: Sequence[int], clients: int, title: str) -> Markup:
    if len(rounds) > _MOST_ROUNDS:
        rounds = [rounds[round(n * (len(rounds) - 1) / (_MOST_ROUNDS - 1))] for n in range(_MOST_ROUNDS)]
    step = min((WIDTH - _LEFT - 6) / len(rounds), _ROW)
    size = min(step, _ROW) - 3
    known = [fates(entry) for entry in rounds]
    used = [fate for fate in WORDS if any(entry[fate] for entry in known)]
    head = 16.0 * -(-len(used) // 3) + 16
    shapes: dict[str, list[str]] = {fate: [] for fate in used}
    for n, entry in enumerate(known):
        for fate in used:
            x = _LEFT + (n + 0.5) * step
            shapes[fate] += [_shape(fate, x, head + 9 + c * _ROW, size) for c in entry[fate] if 0 <= c < clients]
    bad, parts = set(malicious), [text(0, head - 3, "client", "name")]
    for client in range(clients):
        middle = head + 9 + client * _ROW
        if client in bad:
            parts.append(el("rect", x=0, y=middle - _ROW / 2, width=WIDTH, height=_ROW, cls="badrow"))
            parts.append(el("path", el("title", "malicious"), d="M0 -4.2L4.2 3.4H-4.2z", transform=f"translate(6 {middle:.1f})", cls="bad"))
        parts.append(text(14, middle + 3.8, str(client), "bold" if client in bad else ""))
    # One path a fate: a shape for every client and round would make the page several times as large.
    parts += [el("path", el("title", WORDS[fate]), d="".join(shapes[fate]), **_style(fate)) for fate in used]
    parts += _legend(used)
    bottom = head + clients * _ROW + 14
    every = max(1, round(len(rounds) / 10))
    at = enumerate(rounds)
    parts += [text(_LEFT + (n + 0.5) * step, bottom, str(entry.round), "", "middle") for n, entry in at if n % every == 0]
    parts.append(text(_LEFT + len(rounds) * step / 2, bottom + 15, "Round", "name", "middle"))
    desc = "A mark for each client and round in which it was asked or could not be reached; the note below counts them."
    return drawing(WIDTH, bottom + 20, title, desc, *parts)


def _legend(used: Sequence[str]) -> list[Markup]:
    parts = []
    for n, fate in enumerate(used):
        x, y = 8 + (n % 3) * 112.0, 8 + (n // 3) * 16.0
        parts += [el("path", d=_shape(fate, x, y, 9.0), **_style(fate)), text(x + 10, y + 3.8, WORDS[fate])]
    return parts


def _shape(fate: str, x: float, y: float, size: float) -> str:
    """Return a path that tells the fate without its colour."""
    half = max(size, 2.0) / 2
    left, upper = f"{x - half:.1f}", f"{y - half:.1f}"
    if fate == "replied":
        return f"M{left} {upper}h{2 * half:.1f}v{2 * half:.1f}h{-2 * half:.1f}z"
    if fate == "partial":  # the lower half of a square
        return f"M{left} {y:.1f}h{2 * half:.1f}v{half:.1f}h{-2 * half:.1f}z"
    if fate == "late":
        return f"M{left} {upper}l{2 * half:.1f} {2 * half:.1f}m0 {-2 * half:.1f}l{-2 * half:.1f} {2 * half:.1f}"
    if fate == "dropped-out":
        return f"M{left} {upper}h{2 * half:.1f}l{-half:.1f} {2 * half:.1f}z"
    if fate == "surplus":
        r = 0.7 * half
        return f"M{x - r:.1f} {y:.1f}a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0"
    return f"M{x - 0.6 * half:.1f} {y:.1f}h{1.2 * half:.1f}"


def _style(fate: str) -> dict[str, str]:
    filled = {"replied": "trust", "partial": "trust", "dropped-out": "mark s4", "unreachable": "axis"}
    return {"cls": filled[fate]} if fate in filled else {"cls": f"line {'s1' if fate == 'late' else 's6'}", "stroke_width": "1.6"}


def _said(rounds: Sequence[Round], malicious: Sequence[int], clients: int) -> str:
    """Count them in words."""
    found = [fates(entry) for entry in rounds]
    totals = {fate: sum(len(entry[fate]) for entry in found) for fate in FATES}
    asked = sum(totals.values())
    many = [int(entry.reachable or 0) for entry in rounds]
    reach = f"{min(many)} to {max(many)}" if min(many) < max(many) else f"{max(many)}"
    words = f"{reach} of {clients} clients could be reached in a round." if clients else f"{reach} clients could be reached in a round."
    if not asked:
        return words
    done = totals["replied"] + totals["partial"]
    partly = f", {totals['partial']} of them after partial work" if totals["partial"] else ""
    lost = [f"{totals[fate]} {WORDS[fate]}" for fate in ("late", "dropped-out", "surplus") if totals[fate]]
    words += f" Of {asked} clients asked {done} replied{partly}{f'; {listed(lost)}' if lost else ''}."
    bad = set(malicious)
    if bad:
        shares = []
        for name, mine in (("malicious", True), ("honest", False)):
            wanted = [fate for entry in found for fate in FATES for c in entry[fate] if (c in bad) == mine]
            if wanted:
                shares.append(f"{name} ones {100 * sum(f in ('replied', 'partial') for f in wanted) / len(wanted):.0f} %")
        words += f" Replies of those asked: {', '.join(shares)}." if len(shares) > 1 else ""
    return words
