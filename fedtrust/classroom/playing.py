"""`fedtrust tournament run` and `report`: what the command line says while a tournament is played."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from fedtrust.classroom import exercise as exercises
from fedtrust.classroom import folder, leaderboard, players, tournament
from fedtrust.classroom import secret as secrets_
from fedtrust.classroom.cells import Planned
from fedtrust.classroom.folder import Phase
from fedtrust.classroom.hall import Opener
from fedtrust.classroom.scoring import Outcome
from fedtrust.classroom.submissions import found
from fedtrust.errors import RunError, said

_EVERY = 5.0


class _Lines:
    """A line every few seconds: how far it is, and how long it may take."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._cells, self._begun, self._first, self._told = quiet, 0, 0.0, 0, 0.0

    def began(self, cells: int, done: int) -> None:
        self._cells, self._first, self._begun = cells, cells - done, time.monotonic()
        if not self._quiet:
            before = f", {done} of them already played" if done else ""
            print(f"{cells} games{before}", file=sys.stderr, flush=True)

    def played(self, cell: Planned, outcome: Outcome, left: int) -> None:
        now = time.monotonic()
        if self._quiet or (now - self._told < _EVERY and left):
            return
        self._told, done = now, self._first - left
        rest = (now - self._begun) / max(done, 1) * left
        who = f"{cell.attack or 'no attack'} against {cell.defence}"[:38]
        print(f"{self._cells - left:6} of {self._cells}  {rest / 60:5.1f} min left  {who}", file=sys.stderr, flush=True)


def begin(
    submissions: Path,
    of: str,
    out: Path,
    phase: str,
    seed_file: Path | None,
    day: str,
    workers: int | None,
    *,
    quiet: bool = False,
    open_: Opener = players.sandboxed,
) -> int:
    """Begin a tournament, play it and write the report; return the exit code.

    Raises:
        InputError: what is asked for cannot be played; nothing was.
        RunError: the host failed; it can be gone on with.
    """
    exercise = exercises.load(exercises.find(of))
    secret = None if seed_file is None else secrets_.read(seed_file)
    asked: Phase = "public" if phase == "public" else "hidden" if phase == "hidden" else "final"
    about = folder.create(out, exercise, found(submissions, exercise.sides), asked, secret, day)
    if about.commitment and not quiet:
        print(f"SHA-256 of the secret file: {about.commitment}", file=sys.stderr)
    return _play(out, workers, quiet, open_)


def resume(out: Path, workers: int | None, seed_file: Path | None = None, *, quiet: bool = False, open_: Opener = players.sandboxed) -> int:
    """Go on with a tournament; return the exit code.

    Raises:
        InputError: there is no tournament, or a secret file is named that its seeds do not follow from.
        RunError: the host failed; it can be gone on with.
    """
    if seed_file is not None:
        folder.verify(folder.load(out), secrets_.read(seed_file))
    return _play(out, workers, quiet, open_)


def _play(out: Path, workers: int | None, quiet: bool, open_: Opener) -> int:
    again = f"go on with: fedtrust tournament run --resume {shlex.quote(str(out))}"
    try:
        result = tournament.run(out, open_, count=workers, tell=_Lines(quiet))
    except RunError as error:
        raise RunError(f"{said(error)}; {again}") from error
    if result.status == "interrupted":
        print(f"error: interrupted after {result.done} of {result.cells} games; {again}", file=sys.stderr)
        return 130
    print(report(out, None) if not quiet else leaderboard.write(out))
    return 0


def report(out: Path, seed_file: Path | None) -> str:
    """Write the report; return the leaderboard in a few lines, and where it lies."""
    secret = None if seed_file is None else secrets_.read(seed_file)
    page = leaderboard.write(out, secret)
    about = folder.load(out)
    rows = leaderboard.table(about, tournament.board(about, folder.outcomes(out)))
    lines = []
    for side in dict.fromkeys(row["side"] for row in rows):
        lines += [f"{side:30} {'rank':>5} {'score':>7} {'mark':>5}  faults"]
        for row in (r for r in rows if r["side"] == side):
            rank, mark = (("–" if row[key] is None else f"{row[key]}") for key in ("rank", "mark"))
            name = f"{row['name'][:26]}{' *' if row['house'] else ''}"
            lines.append(f"  {name:28} {rank:>5} {100 * row['score']:7.1f} {mark:>5}  {row['faults'] or ''}".rstrip())
        lines.append("")
    verified = [folder.verify(about, secret)] if secret is not None else []
    return "\n".join([*lines, "* house", *verified, f"leaderboard: {page}"])
