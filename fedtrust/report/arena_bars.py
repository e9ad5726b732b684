"""A ranking as bars: rank, name, mean damage and its interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from fedtrust.arena import Standing
from fedtrust.report.svg import WIDTH, clipped, drawing, el, text

_ROW, _HEAD = 18.0, 34.0
_RANK, _NAME, _LEFT, _RIGHT = 20.0, 26.0, 190.0, 306.0
_LETTERS = 24


def ranking(title: str, side: Sequence[Standing]) -> Markup:
    """Draw a bar for everyone who has a rank, best first, with the interval as a whisker; the others are named below without a bar.

    Args:
        title: the image's name.
        side: the ranking.

    Returns:
        An inline SVG, or a sentence where nobody has a rank.
    """
    placed = [s for s in side if s.rank is not None and s.mean is not None]
    if not placed:
        return el("p", "Nothing can be ranked.", cls="none")
    shared = Counter(s.rank for s in placed)
    height = _HEAD + len(side) * _ROW + 4
    parts = [text((_LEFT + _RIGHT) / 2, 10, "mean damage (%)", "name", "middle")]
    for share in (0.0, 0.5, 1.0):
        x = _LEFT + share * (_RIGHT - _LEFT)
        parts.append(el("line", x1=x, x2=x, y1=_HEAD - 4, y2=height - 4, cls="rule"))
        parts.append(text(x, _HEAD - 8, f"{100 * share:.0f}", "", "middle"))
    for n, standing in enumerate(side):
        parts += _bar(standing, _HEAD + (n + 0.5) * _ROW, shared)
    words = "; ".join(f"{s.rank}. {s.name} {100 * (s.mean or 0.0):.0f} %" for s in placed[:12])
    return drawing(WIDTH, height, title, f"{len(placed)} ranked: {words}.", *parts)


def _bar(standing: Standing, y: float, shared: Counter[int | None]) -> list[Markup]:
    name = el("text", el("title", standing.name), clipped(standing.name, _LETTERS), x=_NAME, y=y + 3.8, cls="label")
    if standing.mean is None or standing.rank is None:
        return [text(_RANK, y + 3.8, "–", "", "end"), name, text(_LEFT + 4, y + 3.8, "not ranked", "faint")]
    scale = _RIGHT - _LEFT
    rank = f"={standing.rank}" if shared[standing.rank] > 1 else f"{standing.rank}"
    hint = f"{standing.name}: {100 * standing.mean:.1f} %"
    if standing.interval is not None:
        hint += f", 95 % interval {100 * standing.interval.low:.1f} to {100 * standing.interval.high:.1f} %"
    width = max(scale * standing.mean, 0.8)
    bar = el("rect", el("title", hint), x=_LEFT, y=y - 5, width=width, height=10, cls="trust")
    parts = [text(_RANK, y + 3.8, rank, "", "end"), name, bar, text(WIDTH, y + 3.8, f"{100 * standing.mean:.1f}", "", "end")]
    if standing.interval is not None:
        low, high = (_LEFT + scale * end for end in standing.interval)
        path = f"M{low:.1f} {y - 3.5:.1f}v7M{low:.1f} {y:.1f}H{high:.1f}M{high:.1f} {y - 3.5:.1f}v7"
        parts.append(el("path", el("title", hint), d=path, cls="whisker"))
    return parts
