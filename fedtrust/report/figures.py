"""The pictures of the clients: who holds which classes, who is malicious, whom the server trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from fedtrust.report.svg import HEIGHT, WIDTH, clipped, drawing, el, text, ticks

MOST_ROWS = 60  # more clients than this are shown as groups
_MOST_CLASSES, _MOST_STRIP_ROUNDS = 20, 40
_ROW, _HEAD = 17.0, 44.0


@dataclass(frozen=True)
class Clients:
    """What is known of the clients; every part may be empty."""

    labels: list[str]
    counts: list[list[float]]  # client × class
    malicious: frozenset[int]
    trust: Mapping[int, float]
    total: int  # how many clients there are, counted or not

    @property
    def grouped(self) -> bool:
        """Whether there are too many for a row each."""
        return self.total > MOST_ROWS


@dataclass(frozen=True)
class _Row:
    name: str
    bad: bool
    counts: list[float]
    samples: float | None
    trust: float | None
    hint: str


def holdings(clients: Clients) -> Markup:
    """Draw a row a client (or a group of clients) with a bubble a class, its samples and its mean trust.

    Args:
        clients: what is known of them.

    Returns:
        An inline SVG, or a sentence where nothing is known.
    """
    bins, binned = _bins(clients)
    rows = _groups(clients, bins, binned) if clients.grouped else _singles(clients, bins, binned)
    if not rows or not (bins or any(row.trust is not None for row in rows)):
        return el("p", "The run recorded neither the clients' data nor any trust.", cls="none")
    trusted = any(row.trust is not None for row in rows)
    left = 92.0 if clients.grouped else 44.0
    right = WIDTH - 44 - (72 if trusted else 0)
    parts = _heads(bins, left, right, trusted, clients.grouped)
    top = max([count for row in rows for count in row.counts], default=0.0) or 1.0
    for n, row in enumerate(rows):
        parts += _row(row, _HEAD + n * _ROW, left, right, top, trusted)
    what = f"{len(rows)} groups of {clients.total} clients" if clients.grouped else f"{len(rows)} clients"
    desc = f"{what}; {len(clients.malicious)} malicious, marked with a triangle. The area of a bubble is the number of samples of a class."
    return drawing(WIDTH, _HEAD + len(rows) * _ROW + 4, "Who holds which classes", desc, *parts)


def _bins(clients: Clients) -> tuple[list[str], list[list[float]]]:
    """Name the columns, and add neighbouring classes up where there are more than fit."""
    width = max((len(row) for row in clients.counts), default=0)
    labels = [clients.labels[n] if n < len(clients.labels) else str(n) for n in range(width)]
    rows = [[*row, *([0.0] * (width - len(row)))] for row in clients.counts]
    if width <= _MOST_CLASSES:
        return labels, rows
    size = -(-width // _MOST_CLASSES)
    starts = range(0, width, size)
    return [f"{labels[s]}–{labels[min(s + size, width) - 1]}" for s in starts], [[sum(row[s : s + size]) for s in starts] for row in rows]


def _singles(clients: Clients, bins: list[str], binned: list[list[float]]) -> list[_Row]:
    rows = []
    for n in range(clients.total):
        counts = binned[n] if n < len(binned) else []
        bad = n in clients.malicious
        hint = f"client {n}{', malicious' if bad else ''}"
        rows.append(_Row(str(n), bad, counts, sum(counts) if counts else None, clients.trust.get(n), hint))
    return rows


def _groups(clients: Clients, bins: list[str], binned: list[list[float]]) -> list[_Row]:
    """Group the honest clients by the class they hold most of; the malicious ones are a group of their own."""
    members: dict[tuple[bool, int], list[int]] = {}
    for n in range(clients.total):
        counts = binned[n] if n < len(binned) else []
        bad = n in clients.malicious
        most = -1 if bad or not any(counts) else max(range(len(counts)), key=counts.__getitem__)
        members.setdefault((bad, most), []).append(n)
    rows = []
    for (bad, most), ids in sorted(members.items()):
        known = [binned[n] for n in ids if n < len(binned)]
        counts = [fmean(column) for column in zip(*known, strict=True)] if known else []
        trust = [clients.trust[n] for n in ids if n in clients.trust]
        name = "malicious" if bad else f"most {clipped(bins[most], 6)}" if most >= 0 else "no data" if known else "honest"
        hint = (
            f"{len(ids)} {'malicious' if bad else 'honest'} clients"
            + (f" that hold most of class {bins[most]}" if most >= 0 else "")
            + ", mean"
        )
        rows.append(_Row(f"{name} · {len(ids)}", bad, counts, sum(counts) if counts else None, fmean(trust) if trust else None, hint))
    return rows


def _heads(bins: list[str], left: float, right: float, trusted: bool, grouped: bool) -> list[Markup]:
    parts = [text(0, _HEAD - 14, "group" if grouped else "client", "name")]
    if bins:
        step = (right - left) / len(bins)
        parts.append(
            text(left + (right - left) / 2, 11, "samples by class" + (" (mean of the group)" if grouped else ""), "name", "middle")
        )
        narrow = any(len(name) > 3 for name in bins) or len(bins) > 12
        for n, name in enumerate(bins):
            x = left + (n + 0.5) * step
            turn = {"transform": f"rotate(-60 {x:.1f} {_HEAD - 14:.1f})"} if narrow else {}
            parts.append(text(x, _HEAD - 14, clipped(name, 5), "", "" if narrow else "middle", **turn))
        parts.append(text(right + 38, _HEAD - 14, "all", "name", "end"))
    if trusted:
        parts.append(text(WIDTH - 68, _HEAD - 14, "mean trust", "name"))
    return parts


def _row(row: _Row, y: float, left: float, right: float, top: float, trusted: bool) -> list[Markup]:
    middle = y + 2
    parts = [el("rect", x=0, y=middle - _ROW / 2, width=WIDTH, height=_ROW, cls="badrow")] if row.bad else []
    if row.bad:
        parts.append(el("path", el("title", "malicious"), d="M0 -4.2L4.2 3.4H-4.2z", transform=f"translate(6 {middle:.1f})", cls="bad"))
    parts.append(text(14, middle + 3.8, row.name, "bold" if row.bad else ""))
    step = (right - left) / max(len(row.counts), 1)
    size = min(step / 2, _ROW / 2) - 0.4
    bubbles = [(n, max(size * (count / top) ** 0.5, 0.7)) for n, count in enumerate(row.counts) if count > 0]
    # One path for the whole row: a circle a sample count would double the size of the page.
    path = "".join(
        f"M{left + (n + 0.5) * step - r:.1f} {middle:.1f}a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0"
        for n, r in bubbles
    )
    counts = ", ".join(f"{count:.0f}" for count in row.counts)
    parts += [el("path", el("title", f"{row.hint}: {counts}"), d=path, cls="bubble")] if path else []
    if row.samples is not None:
        parts.append(text(right + 38, middle + 3.8, f"{row.samples:.0f}", "", "end"))
    if trusted and row.trust is None:
        parts.append(text(WIDTH - 68, middle + 3.8, "–", "faint"))
    elif trusted and row.trust is not None:
        width = 36 * min(max(row.trust, 0.0), 1.0)
        parts.append(el("rect", x=WIDTH - 68, y=middle - 4, width=36, height=8, cls="track"))
        parts.append(
            el(
                "rect",
                el("title", f"{row.hint}: mean trust {row.trust:.2f}"),
                x=WIDTH - 68,
                y=middle - 4,
                width=width,
                height=8,
                cls="trust",
            )
        )
        parts.append(text(WIDTH, middle + 3.8, f"{row.trust:.2f}", "", "end"))
    return parts


def trust_strip(trust: Mapping[int, float], malicious: Sequence[int], total: int, title: str) -> Markup:
    """Draw a bar a client as high as its mean trust, malicious ones hatched and marked below; many clients become a histogram."""
    if total > MOST_ROWS:
        return trust_histogram(trust, malicious, title)
    height, base, bad = 84.0, 62.0, set(malicious)
    step = (WIDTH - 30) / max(total, 1)
    width = min(step - 1.5, 18.0) if step > 3 else step * 0.7
    parts = [el("line", x1=24, x2=WIDTH, y1=y, y2=y, cls="rule") for y in (base - 50, base - 25)]
    parts += [text(20, y, words, "", "end") for y, words in ((base - 46.5, "1"), (base + 3, "0"))]
    for n in range(total):
        x, value = 26 + (n + 0.5) * step, trust.get(n)
        words = f"client {n}{', malicious' if n in bad else ''}: " + (
            "never asked or never valid" if value is None else f"mean trust {value:.2f}"
        )
        tall = 50 * min(max(value or 0.0, 0.0), 1.0)
        shape = {"x": x - width / 2, "width": width, "cls": "trust hatched" if n in bad else "trust"}
        parts.append(el("rect", el("title", words), y=base - max(tall, 0.6), height=max(tall, 0.6), **shape))
        if n in bad:
            parts.append(el("path", el("title", words), d="M0 -3.4L3.6 3H-3.6z", transform=f"translate({x:.1f} {base + 7:.1f})", cls="bad"))
        if total <= 24 or n % 5 == 0:
            parts.append(text(x, height - 2, str(n), "small", "middle"))
    parts.append(el("line", x1=24, x2=WIDTH, y1=base, y2=base, cls="axis"))
    return drawing(WIDTH, height, title, f"Mean trust of {total} clients between 0 and 1. {trust_words(trust, malicious)}", *parts)


def trust_words(trust: Mapping[int, float], malicious: Sequence[int]) -> str:
    """Say the mean trust of honest and of malicious clients."""
    bad = set(malicious)
    groups = (("Honest", [v for c, v in trust.items() if c not in bad]), ("malicious", [v for c, v in trust.items() if c in bad]))
    said = [f"{name} {fmean(values):.2f}" for name, values in groups if values]
    return ", ".join(said)


def trust_histogram(trust: Mapping[int, float], malicious: Sequence[int], title: str) -> Markup:
    """Draw how mean trust is distributed, honest bars beside malicious ones, as shares of their own group."""
    bad, bins = set(malicious), 10
    groups = [
        ("honest", [v for c, v in trust.items() if c not in bad], "trust"),
        ("malicious", [v for c, v in trust.items() if c in bad], "trust hatched"),
    ]
    left, base, top = 40.0, HEIGHT - 36, 24.0
    step = (WIDTH - left - 8) / bins
    parts = []
    for value in ticks(0, 1, 4):
        y = base - value * (base - top)
        parts += [el("line", x1=left, x2=WIDTH - 8, y1=y, y2=y, cls="rule"), text(left - 5, y + 3.5, f"{100 * value:.0f}", "", "end")]
    for side, (name, values, cls) in enumerate(groups):
        for n in range(bins):
            count = sum(min(int(max(v, 0.0) * bins), bins - 1) == n for v in values)
            tall = (base - top) * count / max(len(values), 1)
            words = f"{count} of {len(values)} {name} clients: mean trust {n / bins:.1f} to {(n + 1) / bins:.1f}"
            if count:
                parts.append(
                    el(
                        "rect",
                        el("title", words),
                        x=left + n * step + 2 + side * (step / 2 - 2),
                        y=base - tall,
                        width=step / 2 - 3,
                        height=tall,
                        cls=cls,
                    )
                )
        parts.append(el("rect", x=left + 4 + side * 130, y=4, width=10, height=10, cls=cls))
        parts.append(text(left + 19 + side * 130, 13, f"{name} ({len(values)})"))
    parts += [text(left + n * step, base + 15, f"{n / bins:.1f}", "", "middle") for n in range(0, bins + 1, 2)]
    parts += [
        el("line", x1=left, x2=WIDTH - 8, y1=base, y2=base, cls="axis"),
        text((left + WIDTH) / 2, HEIGHT - 4, "Mean trust", "name", "middle"),
    ]
    middle = (top + base) / 2
    parts.append(text(10.0, middle, "Clients of the group (%)", "name", "middle", transform=f"rotate(-90 10 {middle:.0f})"))
    return drawing(WIDTH, HEIGHT, title, f"{len(trust)} clients with a trust. {trust_words(trust, malicious)}", *parts)


def trust_rounds(trust: Mapping[int, Mapping[int, float]], malicious: Sequence[int], total: int) -> Markup:
    """Draw trust by client and round: the fuller the square, the more was its update used."""
    rounds = sorted({r for by_round in trust.values() for r in by_round})
    if len(rounds) > _MOST_STRIP_ROUNDS:
        rounds = [rounds[round(n * (len(rounds) - 1) / (_MOST_STRIP_ROUNDS - 1))] for n in range(_MOST_STRIP_ROUNDS)]
    bad, left, head, hover = set(malicious), 44.0, 14.0, total * len(rounds) <= 1000
    step = min((WIDTH - left - 6) / len(rounds), _ROW)
    parts = [text(0, head - 3, "client", "name")]
    for client in range(total):
        middle = head + 9 + client * _ROW
        if client in bad:
            parts.append(el("rect", x=0, y=middle - _ROW / 2, width=WIDTH, height=_ROW, cls="badrow"))
            parts.append(el("path", el("title", "malicious"), d="M0 -4.2L4.2 3.4H-4.2z", transform=f"translate(6 {middle:.1f})", cls="bad"))
        parts.append(text(14, middle + 3.8, str(client), "bold" if client in bad else ""))
        for n, at in enumerate(rounds):
            value = trust.get(client, {}).get(at)
            if value is not None:
                side = max((min(step, _ROW) - 2) * min(max(value, 0.0), 1.0) ** 0.5, 1.2)
                centre = left + (n + 0.5) * step
                hint = [el("title", f"client {client}, round {at}: trust {value:.2f}")] if hover else []
                parts.append(el("rect", *hint, x=centre - side / 2, y=middle - side / 2, width=side, height=side, cls="trust"))
    bottom = head + total * _ROW + 14
    every = max(1, round(len(rounds) / 10))
    parts += [text(left + (n + 0.5) * step, bottom, str(at), "", "middle") for n, at in enumerate(rounds) if n % every == 0]
    parts.append(text(left + len(rounds) * step / 2, bottom + 15, "Round", "name", "middle"))
    means = {client: fmean(by_round.values()) for client, by_round in trust.items() if by_round}
    desc = f"The area of a square is the trust in a client in a round. {trust_words(means, malicious)}"
    return drawing(WIDTH, bottom + 20, "Trust by client and round", desc, *parts)
