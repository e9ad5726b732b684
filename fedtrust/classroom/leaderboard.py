"""What comes out of a tournament: the leaderboard (HTML, CSV, JSON), a page per student with feedback to hand back, and the marks.

Nothing of it depends on how long anything took, so a tournament that was interrupted and gone on with has the same leaderboard. In the
hidden daily phase scores are rounded and nothing else is told, or the hidden seeds could be learnt from day to day.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from fedtrust.classroom import folder, tournament
from fedtrust.classroom.feedback import PHASES, entry_page, percent, scoring_words, stepped
from fedtrust.classroom.folder import About
from fedtrust.classroom.scoring import Board, Line, Side
from fedtrust.errors import InputError
from fedtrust.report import render
from fedtrust.report.svg import el
from fedtrust.runs import write_atomic, write_json

_TITLES: dict[Side, str] = {"attack": "Attacks", "defence": "Defences", "audit": "Audits", "evasion": "Evasions"}
COLUMNS = (
    "side", "rank", "name", "house", "mark", "score", "low", "high", "effect", "cost", "penalty", "faults", "cells", "of", "gate",
)  # fmt: skip
_BAR, _TALL = 150.0, 16.0


@cache
def _environment() -> Environment:
    return Environment(loader=PackageLoader("fedtrust.classroom", "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def write(out: Path, secret: bytes | None = None) -> Path:
    """Write the report of a tournament into its folder `report/`.

    Args:
        out: the tournament's folder.
        secret: to verify that the seeds are those that were committed to.

    Returns:
        The leaderboard's page.

    Raises:
        InputError: nothing was played yet, or the secret is not the one.
    """
    about, cells = folder.load(out), folder.outcomes(out)
    if not cells:
        raise InputError("no cell of this tournament was played yet", str(out))
    verified = "" if secret is None else folder.verify(about, secret)
    board = tournament.board(about, cells)
    target = out / "report"
    (target / "entries").mkdir(parents=True, exist_ok=True)
    rows = table(about, board)
    write_atomic(target / "leaderboard.csv", as_csv(COLUMNS, rows).encode())
    write_json(target / "leaderboard.json", as_json(about, board, rows))
    if about.phase != "hidden":
        marks = marks_of(about, board)
        write_atomic(target / "marks.csv", as_csv(tuple(marks[0]) if marks else ("student",), marks).encode())
    students = sorted({s.student for s in about.submissions})
    for student in students:
        page = entry_page(about, board, cells, student)
        render.save(_html("entry.html", page), target / "entries" / f"{student}.html")
    whole = sum(map(len, tournament.plan(about.field(), _partitions(about), len(about.seeds))))
    return render.save(_html("leaderboard.html", board_page(about, board, verified, (len(cells), whole))), target / "index.html")


def _partitions(about: About) -> list[str]:
    return list(about.exercise.partitions(about.phase != "public"))


def _html(name: str, page: Mapping[str, Any]) -> str:
    return _environment().get_template(name).render(page=page, **render.assets()).lstrip()


# -------------------------------------------------------------------------------------------------------------------------- tables


def table(about: About, board: Board) -> list[dict[str, Any]]:
    """Return the lines of the leaderboard, side by side, best first; in the hidden phase nothing but rounded scores and faults."""
    told = about.phase != "hidden"
    rows = []
    for side, lines in board.lines.items():
        for line in _shown(lines, about):
            interval = line.interval if told else None
            rows.append(
                {
                    "side": side,
                    "rank": line.group if told else None,
                    "name": line.name,
                    "house": line.house,
                    "mark": line.mark if told else None,
                    "score": stepped(line.score, about),
                    "low": None if interval is None else round(interval.low, 6),
                    "high": None if interval is None else round(interval.high, 6),
                    "effect": round(line.effect, 6) if told else None,
                    "cost": round(line.cost, 6) if told else None,
                    "penalty": round(line.penalty, 6),
                    "faults": len(line.faults),
                    "cells": line.cells[0],
                    "of": line.cells[1],
                    "gate": line.gate if told else "zero" if line.gate else "",
                }
            )
    return rows


def _shown(lines: Sequence[Line], about: About) -> list[Line]:
    """Return lines in the order in which they are shown: rounded scores must not tell by their order what they hide."""
    if about.phase != "hidden":
        return list(lines)
    return sorted(lines, key=lambda line: (-stepped(line.score, about), line.house, line.name))


def as_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV; what is not known is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _harmless(row.get(key)) for key in columns})
    return out.getvalue()


def _harmless(value: Any) -> Any:
    """Return a value as a spreadsheet shows it: a text that it would take for a formula gets a mark in front."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@")):
        return f"'{value}"
    return "" if value is None else value


def as_json(about: About, board: Board, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the leaderboard as an object."""
    told = about.phase != "hidden"
    pairs = [{"attack": a, "defence": d, "damage": round(v, 6)} for (a, d), v in sorted(board.pairs.items())] if told else []
    return {
        "exercise": about.exercise.name,
        "phase": about.phase,
        "day": about.day,
        "commitment": about.commitment,
        "seeds": len(about.seeds),
        "lines": [{key: row[key] for key in COLUMNS} for row in rows],
        "pairs": pairs,
    }


def marks_of(about: About, board: Board) -> list[dict[str, Any]]:
    """Return a row a student: the mark of each side that is asked for (0 for what was not handed in), their mean, and the folder's name."""
    found: dict[str, dict[Side, Line]] = {s.student: {} for s in about.submissions}
    names = folder.labels(about.exercise, about.submissions)
    for one in about.submissions:
        line = next(ln for ln in board.lines[one.side] if ln.name == names[one.student, one.side])
        found[one.student][one.side] = line
    rows, given = [], {s.student: s.given for s in about.submissions}
    for student, lines in sorted(found.items()):
        each: dict[str, int] = {side: (lines[side].mark or 0) if side in lines else 0 for side in about.exercise.sides}
        rows.append({"student": student, **each, "mark": round(sum(each.values()) / len(each), 1), "handed in as": given[student]})
    return rows


# --------------------------------------------------------------------------------------------------------------------------- pages


def bar(line: Line) -> Markup:
    """Draw a score from 0 to 1 as a bar, its interval as a whisker."""
    hint = f"{line.name}: {percent(line.score)}"
    hint += "" if line.interval is None else f", 95 % interval {percent(line.interval.low)} to {percent(line.interval.high)}"
    middle = _TALL / 2
    parts = [
        el("rect", x=0, y=middle - 5, width=_BAR, height=10, cls="track"),
        el("rect", el("title", hint), x=0, y=middle - 5, width=max(0.8, _BAR * line.score), height=10, cls="trust"),
    ]
    if line.interval is not None:
        low, high = (_BAR * end for end in line.interval)
        path = f"M{low:.1f} {middle - 4:.1f}v8M{low:.1f} {middle:.1f}H{high:.1f}M{high:.1f} {middle - 4:.1f}v8"
        parts.append(el("path", el("title", hint), d=path, cls="whisker"))
    return el("svg", *parts, viewBox=f"0 0 {_BAR:.0f} {_TALL:.0f}", width=_BAR, height=_TALL, role="img", aria_label=hint)


def board_page(about: About, board: Board, verified: str, cells: tuple[int, int]) -> dict[str, Any]:
    """Lay out the leaderboard."""
    exercise, told = about.exercise, about.phase != "hidden"
    links = {label: student for (student, _), label in folder.labels(exercise, about.submissions).items()}
    sides = [_side(side, lines, about, links) for side, lines in board.lines.items() if any(not ln.house for ln in lines) or told]
    facts = [exercise.name, PHASES[about.phase] + (f" ({about.day})" if about.day else "")]
    facts += [f"{len(about.seeds)} seed{'s'[: len(about.seeds) != 1]}", f"{cells[0]} of {cells[1]} games"]
    return {
        "title": exercise.title,
        "headline": _headline(board, about),
        "facts": facts,
        "alert": "" if cells[0] >= cells[1] else f"Not finished: {cells[0]} of {cells[1]} games were played, and the ranking will change.",
        "sides": [side for side in sides if side["rows"]],
        "heat": _heat(board, about) if told and board.pairs else None,
        "scoring": scoring_words(exercise, len(about.seeds)),
        "rounded": "" if told else f"Scores are rounded to {exercise.phases.daily_step:g}; ranks and marks come with the final phase.",
        "commitment": about.commitment,
        "verified": verified,
        "seeds": about.seeds if verified and about.phase == "final" else [],
    }


def _headline(board: Board, about: About) -> str:
    said = []
    for side, lines in board.lines.items():
        students = [ln for ln in _shown(lines, about) if not ln.house and ln.score > 0]
        if not students:
            continue
        best = stepped(students[0].score, about)
        first = (
            [ln for ln in students if ln.group == 1]
            if about.phase != "hidden"
            else [ln for ln in students if stepped(ln.score, about) == best]
        )
        more = "" if len(first) == 1 else f" and {first[1].name}" if len(first) == 2 else f" and {len(first) - 1} more"
        said.append(f"{first[0].name}{more} {'lead' if more else 'leads'} the {_TITLES[side].lower()}")
    return "; ".join(said) + "." if said else "Nobody has scored."


def _side(side: Side, lines: Sequence[Line], about: About, links: Mapping[str, str]) -> dict[str, Any]:
    told = about.phase != "hidden"
    shared = Counter(ln.group for ln in lines if not ln.house)
    rows = []
    for line in _shown(lines, about):
        rank = "–" if line.group is None or not told else f"={line.group}" if shared[line.group] > 1 else f"{line.group}"
        notes = [f"{len(line.faults)} of {line.cells[1]} games failed"] if line.faults else []
        notes += [f"zero: {line.gate.partition(' (')[0]}" if told else "zero"] if line.gate else []
        rows.append(
            {
                "rank": rank,
                "name": line.name,
                "link": "" if line.house else f"entries/{links[line.name]}.html",
                "house": line.house,
                "mark": "–" if line.mark is None or not told else f"{line.mark}",
                "score": f"{100 * stepped(line.score, about):.{1 if told else 0}f}",
                "bar": bar(line) if told else Markup(""),
                "effect": percent(line.effect) if told else "",
                "cost": percent(line.cost) if told else "",
                "penalty": f"−{percent(line.penalty)}" if line.penalty else "",
                "notes": "; ".join(notes),
            }
        )
    return {"title": _TITLES[side], "rows": rows, "told": told, "counted": any(r["cost"] not in ("", "0.0") for r in rows)}


_HEATS = {
    "attack": ("Attack × defence", "Mean damage of every attack against every defence (%)", "Attacks across, defences down, each side best "
               "first. Games in which a submission failed count as no attack, or as plain FedAvg."),
    "evasion": ("Evasion × model", "Share of the samples that every evasion turned wrong, by model (%)", "Evasions across, best first; "
                "models down. Games in which a submission failed count as nothing fooled."),
}  # fmt: skip


def _heat(board: Board, about: About) -> dict[str, Any]:
    side: Side = "attack" if "attack" in board.lines else "evasion"
    attacks = [ln.name for ln in board.lines[side]]
    rows = []
    for name in [ln.name for ln in board.lines["defence"]] if side == "attack" else about.exercise.models:
        values = [board.pairs.get((attack, name)) for attack in attacks]
        cells = [
            {
                "value": "–" if v is None else f"{100 * v:.0f}",
                "heat": None if v is None else int(10 * v + 1e-9),
                "hint": f"{a} against {name}" + ("" if v is None else f": {percent(v)} %"),
            }
            for a, v in zip(attacks, values, strict=True)
        ]
        known = [v for v in values if v is not None]
        rows.append({"name": name, "cells": cells, "mean": f"{100 * sum(known) / len(known):.0f}" if known else "–"})
    title, caption, words = _HEATS[side]
    return {"title": title, "caption": caption, "words": words, "columns": attacks, "rows": rows}
