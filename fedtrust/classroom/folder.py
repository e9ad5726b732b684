"""A tournament's folder: what is played (`tournament.json`), by which exercise, and the cells that were (`cells.jsonl`)."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtrust.classroom import exercise as exercises
from fedtrust.classroom import secret as secrets_
from fedtrust.classroom.cells import Table
from fedtrust.classroom.exercise import Exercise
from fedtrust.classroom.scoring import Fault, Field, Outcome, Side
from fedtrust.classroom.submissions import Submission, collect
from fedtrust.errors import InputError
from fedtrust.runs import RunDirectory, read_json, write_atomic, write_json

Phase = Literal["public", "hidden", "final"]
CELLS, ABOUT, EXERCISE = "cells.jsonl", "tournament.json", "exercise.toml"


@dataclass(frozen=True)
class About:
    """What a tournament plays.

    Attributes:
        exercise: read from the folder's own copy.
        phase: `public`, `hidden` (daily) or `final`; `day` of the hidden phase.
        seeds: of the scenario.
        commitment: SHA-256 of the secret file; "" in the public phase.
        submissions: what was handed in.
    """

    exercise: Exercise
    phase: Phase
    day: str
    seeds: list[int]
    commitment: str
    submissions: list[Submission]

    def field(self) -> Field:
        """Return who takes part."""
        return field_of(self.exercise, self.submissions)


def labels(exercise: Exercise, submissions: Sequence[Submission]) -> dict[tuple[str, Side], str]:
    """Return the label of every submission on its side; one that is called like a house baseline gets a remark."""
    house = {"defence": exercise.defences, "attack": exercise.house.attacks}
    taken = {side: {label.casefold() for label in house.get(side, exercise.house.audits)} for side in exercises.FILES}
    return {(s.student, s.side): f"{s.student} (student)" if s.student.casefold() in taken[s.side] else s.student for s in submissions}


def field_of(exercise: Exercise, submissions: Sequence[Submission]) -> Field:
    """Return who takes part: the house first, then the students."""
    names = labels(exercise, submissions)
    attacks, defences = {}, {}
    main: Side = "attack" if exercise.sides[0] in ("attack", "defence") else exercise.sides[0]
    attacks = dict.fromkeys(exercise.house.attacks if main == "attack" else exercise.house.audits, True)
    defences = dict.fromkeys(exercise.defences if main == "attack" else exercise.models, True)
    for one in submissions:
        (defences if one.side == "defence" else attacks)[names[one.student, one.side]] = False
    reference = exercise.reference if main == "attack" else ""
    return Field(attacks, defences, reference, main, exercise.goal is not None, exercise.budget.counted())


def create(
    out: Path,
    exercise: Exercise,
    submissions: Sequence[Submission],
    phase: Phase,
    secret: bytes | None = None,
    day: str = "",
) -> About:
    """Lay out the folder of a new tournament.

    Args:
        out: a folder that does not exist yet, or is empty.
        exercise: read from a file.
        submissions: as found in the students' folder; they are copied.
        phase: which seeds are played.
        secret: the teacher's, for the phases with hidden seeds.
        day: of the hidden phase, YYYY-MM-DD; by default today.

    Raises:
        InputError: the folder is taken, the secret is missing or is not the one that the exercise committed to.
    """
    seeds, commitment, day = _seeds(exercise, phase, secret, day)
    Table(exercise, seeds, hidden=phase != "public")  # what cannot be played is refused before anything is written
    RunDirectory.create(out)
    write_atomic(out / EXERCISE, exercise.text.encode())
    if isinstance(exercise.scenario, str):
        target = out / exercise.scenario
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, (exercise._folder / exercise.scenario).read_bytes())
    kept = collect(submissions, out / "submissions")
    rows = [{"student": s.student, "side": s.side, "sha256": s.sha256, "problem": s.problem, "given": s.given} for s in kept]
    about = {
        "exercise": exercise.name,
        "exercise_sha256": hashlib.sha256(exercise.text.encode()).hexdigest(),
        "phase": phase,
        "day": day,
        "seeds": seeds,
        "commitment": commitment,
        "submissions": rows,
        "python": platform.python_version(),
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(out / ABOUT, about)
    return About(exercise, phase, day, seeds, commitment, kept)


def _seeds(exercise: Exercise, phase: Phase, secret: bytes | None, day: str) -> tuple[list[int], str, str]:
    if phase == "public":
        return list(exercise.public.seeds), "", ""
    if secret is None:
        raise InputError(f"the {phase} phase plays hidden seeds; name the secret file", "--seed-file")
    commitment = secrets_.commitment(secret)
    if exercise.commitment and exercise.commitment != commitment:
        raise InputError(f"its SHA-256 is {commitment[:16]}…, but the exercise committed to {exercise.commitment[:16]}…", "--seed-file")
    if phase == "final":
        day = ""
    else:
        day = day or datetime.datetime.now(datetime.UTC).date().isoformat()
        try:
            datetime.date.fromisoformat(day)
        except ValueError:
            raise InputError(f"should be a date, YYYY-MM-DD (got '{day}')", "--day") from None
    return secrets_.seeds(secret, exercise.name, phase, day, exercise.hidden.seeds), commitment, day


def load(out: Path) -> About:
    """Return what the tournament in a folder plays.

    Raises:
        InputError: it is none, or is damaged.
    """
    if not (out / ABOUT).is_file():
        raise InputError(f"not a tournament: {ABOUT} is missing", str(out))
    raw = read_json(out / ABOUT)
    try:
        given = [
            Submission(r["student"], r["side"], _copy(out, r), r["sha256"], r["problem"], r.get("given", "")) for r in raw["submissions"]
        ]
        about = About(exercises.load(out / EXERCISE), raw["phase"], raw["day"], list(raw["seeds"]), raw["commitment"], given)
    except (KeyError, TypeError) as error:
        raise InputError(f"{ABOUT} is damaged: {error}", str(out)) from None
    if hashlib.sha256((out / EXERCISE).read_bytes()).hexdigest() != raw.get("exercise_sha256"):
        raise InputError(f"{EXERCISE} was changed since the tournament began", str(out))
    for one in given:
        if not one.problem and (not one.path.is_file() or hashlib.sha256(one.path.read_bytes()).hexdigest() != one.sha256):
            raise InputError("is not what was handed in any more", str(one.path))
    return about


def _copy(out: Path, row: Mapping[str, Any]) -> Path:
    return out / "submissions" / str(row["student"]) / exercises.FILES[row["side"]]


def outcomes(out: Path) -> list[Outcome]:
    """Return the cells that were played; a last line that was only half written when the machine stopped is cut off.

    Raises:
        InputError: a line is damaged.
    """
    path = out / CELLS
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    found = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            found.append(from_record(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{CELLS}:{number} is damaged: {error}", str(out)) from None
    return found


def mend(out: Path) -> None:
    """Cut a half-written last line off, so that the next one begins on a line of its own."""
    path = out / CELLS
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)


def record(outcome: Outcome) -> dict[str, Any]:
    """Return a cell as its line holds it."""
    made = {key: value for key, value in dataclasses.asdict(outcome).items() if value not in (None, "", {})}
    if outcome.fault is not None:
        made["fault"] = {"side": outcome.fault.side, "kind": outcome.fault.kind, "sentence": outcome.fault.sentence}
    return {"attack": outcome.attack, **made}


def from_record(raw: Mapping[str, Any]) -> Outcome:
    """Return the cell that a line holds."""
    fault = raw.get("fault")
    return Outcome(**{**raw, "fault": None if fault is None else Fault(**fault)})


def verify(about: About, secret: bytes) -> str:
    """Return in a sentence that the seeds are those of the secret that was committed to.

    Raises:
        InputError: they are not.
    """
    if secrets_.commitment(secret) != about.commitment:
        raise InputError(f"is not the file whose SHA-256 is {about.commitment}", "--seed-file")
    if about.exercise.commitment and about.exercise.commitment != about.commitment:
        raise InputError(f"the exercise committed to {about.exercise.commitment}", "--seed-file")
    if secrets_.seeds(secret, about.exercise.name, about.phase, about.day, len(about.seeds)) != about.seeds:
        raise InputError("these are not the seeds that follow from it", "--seed-file")
    return f"The {len(about.seeds)} hidden seeds follow from the file whose SHA-256 is {about.commitment}."
