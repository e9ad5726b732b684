"""`fedtrust exercise check FILE`: the grading's own code on a public seed, for one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedtrust.classroom import exercise as exercises
from fedtrust.classroom import folder, players, tournament
from fedtrust.classroom.cells import Planned
from fedtrust.classroom.exercise import FILES, Exercise
from fedtrust.classroom.hall import Opener
from fedtrust.classroom.scoring import Board, Line, Outcome, Side
from fedtrust.classroom.submissions import Submission, read
from fedtrust.errors import InputError, allowed_list

_WIDTH = 78


class _Counter:
    """Says how far the check is."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told, self._cells = told, 0

    def began(self, cells: int, done: int) -> None:
        self._cells = cells
        self._told(f"playing {cells} games in the sandbox …")

    def played(self, cell: Planned, outcome: Outcome, left: int) -> None:
        self._told(f"played {self._cells - left} of {self._cells} games")


def check(
    file: Path, of: str | None, *, every: bool = False, told: Callable[[str], None] = lambda line: None, open_: Opener = players.sandboxed
) -> tuple[str, int]:
    """Return what there is to say about a file, and 0 if it can be handed in, else 1.

    Args:
        file: what is to be handed in.
        of: the exercise; by default exercise.toml beside the file.
        every: play every public seed.
        told: is told how it goes, a line at a time.
        open_: brings the submission up.

    Raises:
        InputError: there is no such file or exercise, or the file has another name than is asked for.
        RunError: no sandbox works on this machine.
    """
    exercise = exercises.load(_exercise(file, of))
    side = _side(file, exercise)
    try:
        found = players.findings(read(file).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text", str(file)) from None
    if found:
        lines = [f"{file.name}: cannot be handed in as it is", *(f"  {finding}" for finding in found)]
        return "\n".join(lines), 1
    seeds = exercise.public.seeds if every else exercise.public.seeds[:1]
    one = Submission("you", side, file)
    about, cells = tournament.tried(exercise, one, open_, seeds, _Counter(told))
    board = tournament.board(about, cells)
    name = folder.labels(exercise, [one])["you", side]
    line = next(ln for ln in board.lines[side] if ln.name == name)
    return _report(exercise, file, line, board, seeds), 1 if line.faults else 0


def _exercise(file: Path, of: str | None) -> Path:
    if not file.is_file():
        raise InputError("no such file", str(file))
    if of is not None:
        return exercises.find(of)
    beside = file.parent / "exercise.toml"
    if not beside.is_file():
        raise InputError("no exercise.toml lies beside it; say which exercise it is for", "--exercise")
    return beside


def _side(file: Path, exercise: Exercise) -> Side:
    """Return what a file is: by its name, or the only thing that is asked for."""
    for side in exercise.sides:
        if file.name == FILES[side] or len(exercise.sides) == 1:
            return side
    raise InputError(f"should be called {allowed_list(FILES[side] for side in exercise.sides)}", str(file))


def _report(exercise: Exercise, file: Path, line: Line, board: Board, seeds: Sequence[int]) -> str:
    """Say how it went, in at most 80 columns."""
    valid = "works" if not line.faults else f"FAILED in {len(line.faults)} of {line.cells[1]} games"
    lines = [f"{file.name} for '{exercise.name}': {valid}"]
    for fault in dict.fromkeys(fault for _, fault in line.faults):
        lines += _wrapped(f"{fault.kind}: {fault.sentence}")
    lines += _wrapped(f"zero: {line.gate}") if line.gate else []
    if line.side in ("attack", "defence"):
        lines += ["", f"damage {'done to' if line.side == 'attack' else 'let through from'} (%)"]
        others = board.lines["defence" if line.side == "attack" else "attack"]
        for other in others:
            pair = (line.name, other.name) if line.side == "attack" else (other.name, line.name)
            if pair in board.pairs:
                lines.append(f"  {other.name[:30]:30} {100 * board.pairs[pair]:6.1f}")
    if line.side == "evasion" and board.pairs:
        lines += ["", "fooled, by model (%)"]
        lines += [f"  {model[:30]:30} {100 * value:6.1f}" for (name, model), value in board.pairs.items() if name == line.name]
    if "measure" in line.parts:
        lines += ["", f"{exercise.measure:32} {line.parts['measure']:6.3f}", f"{'… without any skill':32} {line.parts['chance']:6.3f}"]
    for name, key in (("accuracy without an attack", "clean"), ("… less than FedAvg", "lost")):
        lines += [f"{name:32} {100 * line.parts[key]:6.1f}"] if key in line.parts else []
    lines += ["", "a game took, on average"]
    budget = exercise.budget.model_dump()
    for unit, value in line.used.items():
        most = f" of {budget[unit]:,}" if budget.get(unit) else ""
        lines.append(f"  {unit:30} {value:10,.6g}{most}")
    public = "the first public seed" if len(seeds) == 1 else f"{len(seeds)} public seeds"
    parts = f"E {100 * line.effect:.1f}, cost {100 * line.cost:.1f} %, penalty {100 * line.penalty:.1f}"
    lines += ["", f"score on {public}: {100 * line.score:.1f} of 100", f"  ({parts})"]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
