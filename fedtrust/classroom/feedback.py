"""What a student is handed back: the score and how it comes about, opponents, costs, and what failed, each in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedtrust.classroom import folder
from fedtrust.classroom.exercise import EVADED, Exercise
from fedtrust.classroom.folder import About
from fedtrust.classroom.sandbox.faults import MEANING
from fedtrust.classroom.scoring import Board, Line, Outcome

PHASES = {"public": "public seeds", "hidden": "hidden seeds, daily", "final": "final"}


def stepped(value: float, about: About) -> float:
    """Return a score as this phase tells it: rounded in the hidden one."""
    step = about.exercise.phases.daily_step
    return round(round(value / step) * step, 6) if about.phase == "hidden" else round(value, 6)


def percent(value: float) -> str:
    """Return a share in percent, without the sign."""
    return f"{100 * value:.1f}"


def scoring_words(exercise: Exercise, seeds: int) -> list[str]:
    """Say how it is scored, with the exercise's own numbers."""
    rules, words = exercise.scoring, []
    if exercise.sides[0] in ("attack", "defence"):
        what = "the success of the exercise's goal, less what it has with a model that nobody attacked"
        how = "(clean − attacked) / (clean − what the commonest class alone scores), against the same defence without an attack"
        words.append(f"Damage D of a game: {what if exercise.goal else how}, clipped to 0…1.")
        words += ["An attack's effectiveness E is its mean damage over the defences."] * ("attack" in exercise.sides)
        words += [
            f"A defence's E = {rules.mean:g} · mean (1 − D) + {rules.worst:g} · (1 − largest D) + {rules.clean:g} · clean accuracy "
            f"relative to plain FedAvg; 0 if without an attack it loses more than {100 * rules.gates.clean_loss:g} points, or its worst "
            f"client more than {100 * rules.gates.worst_client:g}."
        ] * ("defence" in exercise.sides)
    else:
        words.append(f"Effectiveness E: {exercise.measure}, rescaled so that chance is 0 and perfection 1; the mean over the games.")
        words += [
            f"`evaded` is the share of {EVADED} samples that the model gets right and gets wrong once you have changed them. A feature "
            f"that moved by more than {exercise.budget.eps:g} anywhere, or left its range, breaks the budget of the whole game."
        ] * (exercise.kind == "evasion")
    units = [u for u, most in exercise.budget.counted().items() if most and rules.prices.get(u, 0.0) > 0]  # type: ignore[call-overload]
    counted = f"C counts {' and '.join(units)}." if units else "Nothing is counted here: C is 0."
    words.append(f"Score = {rules.effect:g} · E + {rules.thrift:g} · E · (1 − C / C_max) − penalty. {counted}")
    fine = rules.penalties
    nothing = "no attack, or as plain FedAvg" if exercise.sides[0] in ("attack", "defence") else "nothing found"
    words.append(
        f"A game in which a submission fails counts as {nothing}, and costs "
        f"{100 * fine.per_fault:g} points of the score each, at most {100 * fine.most:g}."
    )
    over = f"Intervals: 95 % bootstrap over {seeds} seeds. " if seeds > 1 else "One seed: there are no intervals. "
    words.append(
        over + "The first leads a group, and whoever's interval overlaps the leader's shares his rank (=); the first whose interval does "
        f"not leads the next group. Marks by group: {', '.join(map(str, rules.bands))}."
    )
    return words


def entry_page(about: About, board: Board, cells: Sequence[Outcome], student: str) -> dict[str, Any]:
    """Lay out what a student is handed back."""
    names = folder.labels(about.exercise, about.submissions)
    parts = []
    for one in about.submissions:
        if one.student == student:
            name = names[one.student, one.side]
            line = next(ln for ln in board.lines[one.side] if ln.name == name)
            parts.append(_feedback(about, board, cells, line) | {"sha256": one.sha256})
    return {
        "title": f"{student}: {about.exercise.title}",
        "facts": [about.exercise.name, PHASES[about.phase] + (f" ({about.day})" if about.day else ""), *_called(about, student)],
        "parts": parts,
        "scoring": scoring_words(about.exercise, len(about.seeds)),
        "rounded": "" if about.phase != "hidden" else "Scores are rounded in this phase, and what each game gave is not told.",
    }


def _called(about: About, student: str) -> list[str]:
    """Return what the student's folder was called, where its name had to be changed."""
    given = next((s.given for s in about.submissions if s.student == student), "")
    return [f"handed in as {given}"] if given not in ("", student) else []


def _feedback(about: About, board: Board, cells: Sequence[Outcome], line: Line) -> dict[str, Any]:
    told = about.phase != "hidden"
    tiles = [("Score", f"{100 * stepped(line.score, about):.{1 if told else 0}f}", "of 100")]
    if told:
        span = "" if line.interval is None else f"95 % interval {percent(line.interval.low)} to {percent(line.interval.high)}"
        tiles[0] = ("Score", percent(line.score), span or "of 100")
        last = max(ln.group or 0 for ln in board.lines[line.side])
        tiles += [("Rank", "–" if line.group is None else f"{line.group}", f"of {last}" if last else "")]
        tiles += [("Mark", f"{line.mark}", "")]
    return {
        "name": line.name,
        "side": line.side,
        "tiles": tiles,
        "gate": line.gate if told else "see the rules" if line.gate else "",
        "how": _how(about, line) if told else [],
        "opponents": _opponents(board, line) if told else [],
        "costs": _costs(about, cells, line) if told else [],
        "faults": _faults(line, told),
        "cells": f"{line.cells[0]} of {line.cells[1]} games were played without a fault",
    }


def _how(about: About, line: Line) -> list[tuple[str, str]]:
    rules = about.exercise.scoring
    found = []
    if line.side == "defence" and "mean" in line.parts:
        found += [
            ("Mean damage let through", percent(line.parts["mean"])),
            ("Worst attack's damage", percent(line.parts["worst"])),
            ("Accuracy without an attack", percent(line.parts.get("clean", math.nan))),
            ("… less than FedAvg by", percent(line.parts.get("lost", math.nan))),
        ]
    if "measure" in line.parts:
        found.append((about.exercise.measure, f"{line.parts['measure']:.3f}"))
        found.append(("… without any skill", f"{line.parts['chance']:.3f}"))
    found += [
        ("Effectiveness E", percent(line.effect)),
        ("Cost C / C_max", percent(line.cost)),
        (
            f"{rules.effect:g} · E + {rules.thrift:g} · E · (1 − C / C_max)",
            percent(rules.effect * line.effect + rules.thrift * line.effect * (1 - line.cost)),
        ),
        ("Penalty", f"−{percent(line.penalty)}" if line.penalty else "0"),
        ("Score", percent(line.score)),
    ]
    return found


def _opponents(board: Board, line: Line) -> list[dict[str, Any]]:
    """Return the mean damage with every opponent; of an evasion the share that it fooled, by model."""
    if line.side == "evasion":
        mine = [(model, value) for (name, model), value in board.pairs.items() if name == line.name]
        return [{"name": model, "house": False, "damage": percent(value)} for model, value in mine]
    if line.side not in ("attack", "defence"):
        return []
    others = board.lines["defence" if line.side == "attack" else "attack"]
    found = []
    for other in others:
        value = board.pairs.get((line.name, other.name) if line.side == "attack" else (other.name, line.name))
        found.append({"name": other.name, "house": other.house, "damage": "–" if value is None else percent(value)})
    return found


def _costs(about: About, cells: Sequence[Outcome], line: Line) -> list[tuple[str, str, str]]:
    """Return what a game took on average, and what it may take: (unit, used, budget)."""
    budget = about.exercise.budget.model_dump()
    return [
        (unit, f"{value:,.4g}", f"{budget[unit]:,}" if budget.get(unit) else "not limited") for unit, value in sorted(line.used.items())
    ]


def _meaning(kind: str) -> str:
    return {str(known): words for known, words in MEANING.items()}.get(kind, kind)


def _faults(line: Line, told: bool) -> list[dict[str, str]]:
    """Return what went wrong, each sentence once, with the games in which it did."""
    found: dict[tuple[str, str], list[str]] = {}
    for outcome, fault in line.faults:
        sentence = fault.sentence if told else _meaning(fault.kind)  # its own words could carry out what it has seen
        other = outcome.defence if line.side != "defence" else outcome.attack
        where = "without an attack, " if other is None else f"against {other}, " if other != "-" else ""
        found.setdefault((fault.kind, sentence), []).append(f"{where}{outcome.partition}, seed {outcome.seed + 1}" if told else "")
    made = []
    for (kind, sentence), games in found.items():
        few = "; ".join(games[:6]) + (f"; and {len(games) - 6} more" if len(games) > 6 else "")
        made.append({"kind": kind, "sentence": sentence, "games": few if told else "", "times": f"{len(games)}"})
    return made
