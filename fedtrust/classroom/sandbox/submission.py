"""A file that was handed in, its sandbox, and one game of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fedtrust.classroom.sandbox import crossing
from fedtrust.classroom.sandbox.channel import Expected
from fedtrust.classroom.sandbox.crossing import Names
from fedtrust.classroom.sandbox.faults import SubmissionFault
from fedtrust.classroom.sandbox.game import Answer, Game, Report
from fedtrust.classroom.sandbox.host import Sandbox
from fedtrust.classroom.sandbox.limits import Limits
from fedtrust.errors import InputError

Role = Literal["attack", "defence", "audit", "evasion"]
#: How often a game may ask for what costs the host work, unless an exercise says otherwise.
BUDGETS: Mapping[str, int] = {"defence": 200, "train": 100_000, "query": 100_000, "gradient": 100_000}


class Submission:
    """A file that was handed in, and its sandbox; both survive from game to game, nothing that the submission does survives.

    Can be sent to another process, where it starts a sandbox of its own.

    Args:
        source: the text.
        file: its name (`attack.py`), for its author.
        role: what it plays.
        params: values for parameters that it declares.
        backend: what keeps it in.
        limits: what a game may use.
    """

    def __init__(
        self,
        source: str,
        file: str,
        role: Role,
        *,
        params: Mapping[str, Any] | None = None,
        backend: str = "auto",
        limits: Limits | None = None,
    ) -> None:
        self.source, self.file, self.role, self.params = source, file, role, dict(params or {})
        self.backend, self.limits = backend, limits or Limits()
        self._sandbox: Sandbox | None = None

    @classmethod
    def read(cls, path: Path, role: Role, **more: Any) -> Submission:
        """Return the submission in a file.

        Raises:
            InputError: it cannot be read as text.
        """
        try:
            return cls(path.read_text(encoding="utf-8"), path.name, role, **more)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read as a Python file: {error}", str(path)) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sandbox": None}

    @property
    def sandbox(self) -> Sandbox:
        """Its sandbox in this process."""
        if self._sandbox is None:
            self._sandbox = Sandbox(self.backend, self.limits)
        return self._sandbox

    def close(self) -> None:
        """End the sandbox."""
        if self._sandbox is not None:
            self._sandbox.close()

    def __enter__(self) -> Submission:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Playing:
    """One game of a submission.

    Args:
        submission: whose.
        setting: the protocol, see `crossing.setting_of`.
        number: what pseudonyms and orders of this game are drawn from (`seeds.key(seed, "sandbox")`).
        population: how many clients there are.
        budgets: how much it may ask of the host, over `BUDGETS`.
    """

    def __init__(
        self,
        submission: Submission,
        setting: crossing.Plain,
        *,
        number: int,
        population: int,
        budgets: Mapping[str, int | None] | None = None,
    ) -> None:
        self.submission, self.setting = submission, setting
        self.names = Names(number, population)
        self.budgets: dict[str, int | None] = {**BUDGETS, **(budgets or {})}
        self._game: Game | None = None
        self._failed: SubmissionFault | None = None
        self._report = Report()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_game": None, "_lock": None, "_failed": None, "_report": Report()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_lock": threading.Lock()}

    def open(self) -> dict[str, Any]:
        """Load the submission, if it is not; return what it says of itself.

        Raises:
            SubmissionFault: it cannot be loaded.
            RunError: no sandbox comes up.
        """
        if self._failed is not None:
            raise self._failed
        if self._game is None:
            mine = self.submission
            try:
                self._game = mine.sandbox.game(mine.source, mine.file, mine.role, params=mine.params, setting=self.setting)
            except SubmissionFault as fault:
                self._failed, self._report = fault, mine.sandbox.report
                raise
        return self._game.about

    def call(
        self,
        op: str,
        data: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        expected: Expected,
        answers: Mapping[str, Answer] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Ask the submission; see `Game.call`."""
        with self._lock:
            self.open()
            if self._game is None:
                raise RuntimeError("no game")
            if self._game.over and self.report.faults:
                raise self.report.faults[-1]
            return self._game.call(op, data, {name: value.detach() for name, value in tensors.items()}, expected, answers)

    @property
    def report(self) -> Report:
        """What the game has cost so far; the processor time is known when it has ended."""
        if self._game is None:
            return self._report
        return self._game.report

    @property
    def faults(self) -> list[SubmissionFault]:
        """What has gone wrong in this process's game."""
        return list(self.report.faults)

    def end(self) -> Report:
        """End the game, not the sandbox; return what it cost."""
        return self.report if self._game is None else self._game.end()
