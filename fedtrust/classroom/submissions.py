"""What students handed in: found, named, copied. Nothing of it is run here."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedtrust.classroom.exercise import FILES
from fedtrust.classroom.scoring import Side
from fedtrust.errors import InputError, allowed_list
from fedtrust.scenario_io import slugs

#: A larger file is no student's attack.
MOST_BYTES = 200_000


@dataclass(frozen=True)
class Submission:
    """One file that was handed in.

    Attributes:
        student: whose, as a name that is safe in a file system.
        side: what it is.
        path: where it lies; after `collect` a copy in the tournament's folder.
        sha256: of its bytes.
        problem: why it cannot be played at all; "" if it can.
        given: what its folder or file was called, as text.
    """

    student: str
    side: Side
    path: Path
    sha256: str = ""
    problem: str = ""
    given: str = ""

    @property
    def label(self) -> str:
        """Its name among the attacks or the defences."""
        return self.student


def read(path: Path) -> bytes:
    """Return what a student's file holds.

    A link is not followed: what it leads to would be read with the teacher's rights and shown in the feedback.

    Raises:
        InputError: it is no regular file, too large, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError("is not a regular file", path.name)
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        reason = "is a link, and links are not followed" if path.is_symlink() else f"cannot be read: {error.strerror or error}"
        raise InputError(reason, path.name) from None
    if len(content) > MOST_BYTES:
        raise InputError(f"is larger than {MOST_BYTES // 1000} kB", path.name)
    return content


def found(folder: Path, sides: Sequence[Side]) -> list[Submission]:
    """Return what lies in a folder: one folder a student with `attack.py`, `defence.py`, …; where one file is asked for also NAME.py.

    A student's folder that holds nothing of what is asked for is a submission with a problem: nobody is forgotten.

    Raises:
        InputError: there is nothing to play in it, or a student has both a folder and a file.
    """
    if not folder.is_dir():
        raise InputError("no such folder", str(folder))
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "_")))
    students: dict[str, Path] = {}
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            students[entry.name] = entry
        elif entry.suffix == ".py" and len(sides) == 1:
            if entry.stem in students:
                raise InputError(f"'{entry.stem}' has both a folder and a file", str(folder))
            students[entry.stem] = entry
    names = slugs(students)
    made = []
    wanted = allowed_list(FILES[side] for side in sides)
    for student, entry in students.items():
        given = student.encode(errors="replace").decode()
        alone = entry.suffix == ".py" and not entry.is_dir()
        mine = {side: entry if alone else entry / FILES[side] for side in sides}
        there = [Submission(names[student], side, path, given=given) for side, path in mine.items() if path.is_symlink() or path.exists()]
        made += there or [Submission(names[student], sides[0], mine[sides[0]], problem=_missing(entry, wanted), given=given)]
    if all(one.problem for one in made):
        single = ", or NAME.py" if len(sides) == 1 else ""
        raise InputError(f"holds no submission: one folder a student with {wanted}{single}", str(folder))
    return made


def _missing(folder: Path, wanted: str) -> str:
    """Say that nothing of what is asked for lies in a student's folder, and what does."""
    others = sorted(entry.name.encode(errors="replace").decode() for entry in folder.iterdir() if not entry.name.startswith("."))
    few = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
    return f"nothing was handed in: its folder holds no {wanted}" + (f", but {few}"[:200] if others else "; it is empty")


def collect(given: Sequence[Submission], target: Path) -> list[Submission]:
    """Copy submissions into the tournament's folder: what was played stays known, whatever is handed in later.

    One that cannot be read is kept with its problem.
    """
    made = []
    for one in given:
        copy = target / one.student / FILES[one.side]
        if one.problem:
            made.append(replace(one, path=copy))
            continue
        try:
            content = read(one.path)
        except InputError as error:
            made.append(replace(one, path=copy, problem=f"{error.where} {error.message}"))
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
        made.append(replace(one, path=copy, sha256=hashlib.sha256(content).hexdigest()))
    return made
