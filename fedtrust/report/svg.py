"""A small SVG vocabulary and the line chart. Colours and type come from the page's style sheet, by class.

Drawings are about as wide as a phone (`WIDTH` units), so that a unit is a pixel there and labels stay readable; on a larger screen
several stand side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeVar

from markupsafe import Markup, escape

WIDTH, HEIGHT = 340.0, 216.0
COLOURS = 8  # line styles s0 … s7 in style.css
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 3", "1 3", "6 2 1 2 1 2")
_LEFT, _TOP, _BOTTOM, _LABEL = 40.0, 12.0, 36.0, 84.0
_MOST_POINTS, _MOST_HOVER = 80, 40
_LETTER, _MOST_LETTERS = 6.0, 18  # of a label at the end of a line: about how wide one is, and how many are shown

T = TypeVar("T")


def el(name: str, *children: str, **attributes: object) -> Markup:
    """Write one element; `_` in a name stands for `-`, `cls` for class, and text children are escaped."""
    written = Markup("").join(
        Markup(' {}="{}"').format({"cls": "class"}.get(key, key.replace("_", "-")), _plain(value))
        for key, value in attributes.items()
        if value is not None and value != ""
    )
    return Markup("<{}{}>{}</{}>").format(Markup(name), written, Markup("").join(escape(child) for child in children), Markup(name))  # noqa: S704


def _plain(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def drawing(width: float, height: float, title: str, desc: str, *children: str, cls: str = "") -> Markup:
    """Frame elements as an image with a name and a description for those who cannot see it."""
    name = (el("title", title), el("desc", desc))
    return el(
        "svg",
        *name,
        *children,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img",
        aria_label=f"{title}. {desc}",
        cls=f"plot {cls}".strip(),
    )


def text(x: float, y: float, words: str, cls: str = "", anchor: str = "", **more: object) -> Markup:
    """Write a line of text at a point; `anchor` is middle or end."""
    return el("text", words, x=x, y=y, cls=cls, text_anchor=anchor, **more)


def clipped(words: str, limit: int) -> str:
    """Shorten to `limit` characters."""
    return words if len(words) <= limit else words[: limit - 1].rstrip() + "…"


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (x, y), and a band (x, low, high) where it is a mean over seeds."""

    name: str
    points: list[tuple[float, float]]
    style: int = 0
    band: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Axes:
    """What the two axes of a chart say; `percent` axes run from 0 to 100 %."""

    x: str
    y: str
    percent: bool = False
    window: tuple[float, float] | None = None  # shaded stretch of x: when the attack was active
    marks: tuple[tuple[float, str], ...] = ()  # places on x with a name: what was done to the model after the last round
    ticks: tuple[tuple[float, str], ...] = ()  # places on x and their labels, where they are not round numbers
    log2: bool = False  # x is the logarithm of what it stands for

    def place(self, x: float) -> str:
        """Format a value of x."""
        named = [label for at, label in self.ticks if abs(at - x) < 1e-9]
        return named[0] if named else f"{2**x:.3g}" if self.log2 else f"{x:.4g}"

    def show(self, value: float) -> str:
        """Format a value of y."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


@dataclass(frozen=True)
class _Frame:
    x0: float
    x1: float
    y0: float
    y1: float
    right: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.right - _LEFT)

    def y(self, value: float) -> float:
        share = (value - self.y0) / (self.y1 - self.y0)
        return HEIGHT - _BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - _BOTTOM - _TOP)


def ticks(low: float, high: float, wanted: int = 5, *, whole: bool = False) -> list[float]:
    """Return round numbers that cover `low` to `high`."""
    span = high - low
    if not 1e-100 < span < 1e200:
        return [low]
    step = 10 ** math.floor(math.log10(span / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= wanted)
    step = max(1.0, float(round(step))) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def line_chart(title: str, series: list[Series], axes: Axes) -> Markup:
    """Draw lines that are told apart by colour, dash, marker and a label at their end.

    Args:
        title: the image's name; the caller prints the visible heading.
        series: the lines; empty ones are left out.
        axes: labels and scale.

    Returns:
        An inline SVG, or a sentence where there is nothing to draw.
    """
    drawn = [Series(s.name, _thinned(s.points), s.style, _thinned(s.band)) for s in series if s.points]
    if not drawn:
        return el("p", "No values were recorded.", cls="none")
    frame = _frame(drawn, axes)
    ends = "; ".join(f"{s.name} ends at {axes.show(s.points[-1][1])}" for s in drawn[:12])
    parts = [*_grid(frame, axes), *(_band(frame, s) for s in drawn if s.band)]
    parts += [part for s in drawn for part in _line(frame, s, axes)]
    parts += _labels(frame, drawn) if len(series) > 1 else []
    return drawing(WIDTH, HEIGHT, title, f"{axes.y} over {axes.x.lower()}: {ends}.", *parts)


def _thinned(points: list[T]) -> list[T]:
    if len(points) <= _MOST_POINTS:
        return points
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(n * step)] for n in range(_MOST_POINTS)]


def _frame(series: list[Series], axes: Axes) -> _Frame:
    xs = [x for s in series for x, _ in s.points] + [x for x, _ in axes.ticks]
    ys = [y for s in series for _, y in s.points] + [v for s in series for _, low, high in s.band for v in (low, high)]
    low, high = (0.0, 1.0) if axes.percent else (min(ys), max(ys))
    if not axes.percent:  # from zero, unless the values lie far above it
        low = min(low, 0.0) if low < 0.5 * high or low < 0 else low
        high = high if high > low else low + max(abs(low), 1.0)
    last = max(xs) if max(xs) > min(xs) else min(xs) + 1
    longest = max(min(len(s.name), _MOST_LETTERS) for s in series)
    labels = max(_LABEL, 21 + _LETTER * longest) if len(series) > 1 else 14.0
    return _Frame(min(xs), last, low, high, WIDTH - labels)


def _grid(frame: _Frame, axes: Axes) -> list[Markup]:
    bottom, middle = HEIGHT - _BOTTOM, (_TOP + HEIGHT - _BOTTOM) / 2
    parts = []
    if axes.window and (axes.window[0] > max(frame.x0, 1) or axes.window[1] < frame.x1):
        start, end = max(axes.window[0], frame.x0), min(axes.window[1], frame.x1)
        if end >= start:
            width = max(frame.x(end) - frame.x(start), 2.0)
            parts.append(
                el("rect", el("title", "attack active"), x=frame.x(start), y=_TOP, width=width, height=bottom - _TOP, cls="window")
            )
            parts.append(text(frame.x(start) + 3, bottom - 4, "attack active", "faint"))
    for place, (x, name) in enumerate(axes.marks):
        if frame.x0 <= x <= frame.x1:
            at, y = frame.x(x), _TOP + 9 + 11 * (place % 4)
            parts.append(el("line", el("title", name), x1=at, x2=at, y1=_TOP, y2=bottom, cls="mend"))
            parts.append(text(at - 3, y, clipped(name, 18), "faint", "end"))
    for value in ticks(frame.y0, frame.y1, 4):
        parts.append(el("line", x1=_LEFT, x2=frame.right, y1=frame.y(value), y2=frame.y(value), cls="rule"))
        parts.append(text(_LEFT - 5, frame.y(value) + 3.5, f"{100 * value:.0f}" if axes.percent else f"{value:.4g}", anchor="end"))
    plain = ticks(frame.x0, frame.x1, 6, whole=all(float(v).is_integer() for v in (frame.x0, frame.x1)))
    for value, label in axes.ticks or [(value, f"{value:.4g}") for value in plain]:
        parts.append(el("line", x1=frame.x(value), x2=frame.x(value), y1=bottom, y2=bottom + 3, cls="axis"))
        parts.append(text(frame.x(value), bottom + 15, label, anchor="middle"))
    parts.append(el("line", x1=_LEFT, x2=frame.right, y1=bottom, y2=bottom, cls="axis"))
    parts.append(text((_LEFT + frame.right) / 2, HEIGHT - 4, clipped(axes.x, 40), "name", "middle"))
    unit = f"{axes.y} (%)" if axes.percent else axes.y
    parts.append(text(10.0, middle, clipped(unit, 26), "name", "middle", transform=f"rotate(-90 10 {middle:.0f})"))
    return parts


def _band(frame: _Frame, series: Series) -> Markup:
    upper = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, high in series.band]
    lower = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, low, _ in reversed(series.band)]
    return el("polygon", points=" ".join(upper + lower), cls=f"band s{series.style % COLOURS}")


def _line(frame: _Frame, series: Series, axes: Axes) -> list[Markup]:
    style = series.style % COLOURS
    at = [(frame.x(x), frame.y(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    # The second eight lines reuse the colours, so their dashes move on by one.
    dash = _DASHES[(style + series.style // COLOURS) % len(_DASHES)]
    parts = [el("polyline", el("title", series.name), points=path, cls=f"line s{style}", stroke_dasharray=dash)]
    every = max(1, round((len(at) - 1) / 6))
    parts += [marker(x, y, series.style) for n, (x, y) in enumerate(at) if n % every == 0 or n == len(at) - 1]
    if len(at) <= _MOST_HOVER:  # a ring around each point that answers the mouse
        hover = [f"{series.name}, {axes.x.lower()} {axes.place(x)}: {axes.show(y)}" for x, y in series.points]
        parts += [el("circle", el("title", words), cx=x, cy=y, r=7, cls="hit") for (x, y), words in zip(at, hover, strict=True)]
    return parts


_SHAPES = (
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z",
    "M-3 -3h6v6h-6z",
    "M0 -3.8L3.6 2.8H-3.6z",
    "M0 -4L4 0L0 4L-4 0z",
    "M-3.2 -3.2L3.2 3.2M3.2 -3.2L-3.2 3.2",
    "M0 -4V4M-4 0H4",
    "M0 3.8L3.6 -2.8H-3.6z",
    "M-3.8 0L0 -1.6L3.8 0L0 1.6z",
)


def marker(x: float, y: float, style: int) -> Markup:
    """Draw the shape that belongs to a line style."""
    return el("path", d=_SHAPES[style % COLOURS], transform=f"translate({x:.1f} {y:.1f})", cls=f"mark s{style % COLOURS}")


def _labels(frame: _Frame, series: list[Series]) -> list[Markup]:
    """Name the lines at their ends, moved apart where they would overlap and tied to their end by a thin line."""
    step = min(13.0, (HEIGHT - _BOTTOM - _TOP + 10) / len(series))
    ordered = sorted(series, key=lambda s: (frame.y(s.points[-1][1]), s.style))
    wanted = [frame.y(s.points[-1][1]) for s in ordered]
    places = _apart(wanted, step, _TOP - 2, HEIGHT - _BOTTOM + 6)
    parts = []
    for s, end, place in zip(ordered, wanted, places, strict=True):
        x = frame.x(s.points[-1][0])
        parts.append(el("line", x1=x + 4, y1=end, x2=frame.right + 9, y2=place, cls="tie"))
        parts.append(marker(frame.right + 14, place, s.style))
        parts.append(el("text", el("title", s.name), clipped(s.name, _MOST_LETTERS), x=frame.right + 21, y=place + 3.5, cls="label"))
    return parts


def _apart(wanted: list[float], step: float, low: float, high: float) -> list[float]:
    """Move sorted places apart by at least `step`, inside `low` … `high`, each as near to its wish as the others allow."""
    blocks: list[tuple[float, int]] = []  # with n steps taken off, "apart" means "not falling": neighbours that fall share their mean
    for n, wish in enumerate(wanted):
        mean, size = wish - n * step, 1
        while blocks and blocks[-1][0] > mean:
            before, more = blocks.pop()
            mean, size = (mean * size + before * more) / (size + more), size + more
        blocks.append((mean, size))
    free = [mean for mean, size in blocks for _ in range(size)]
    return [max(min(place, high - (len(wanted) - 1) * step), low) + n * step for n, place in enumerate(free)]
