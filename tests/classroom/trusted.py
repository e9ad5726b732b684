"""Players for the tests of what is around the sandbox: our own registered components in this process.

No line of a submission is ever executed here; its first ones say what it stands for: `# play: alie` a component, `# fault: crash` what goes
wrong, `# host: …` a failing host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedtrust.classroom.exercise import Exercise
from fedtrust.classroom.sandbox.faults import SubmissionFault
from fedtrust.classroom.submissions import Submission
from fedtrust.client import Behaviour
from fedtrust.errors import RunError
from fedtrust.probes.base import Probe
from fedtrust.probes.guesses import Membership
from fedtrust.registry import REGISTRY
from fedtrust.server import Rule


class TrustedSeat:
    """One component in one game; a faulty one fails at its first call."""

    def __init__(self, submission: Submission, name: str, kind: str) -> None:
        self.fault: tuple[str, str] | None = None
        self.costs: Mapping[str, float] = {"bytes": 1000.0}
        self._submission, self._name, self._kind = submission, name, kind

    def _fail(self) -> None:
        self.fault = (self._kind, f"line 3: it does what '{self._kind}' stands for")
        raise SubmissionFault(self._kind, self.fault[1])  # type: ignore[arg-type]

    def behaviour(self, setup: Any) -> Behaviour:
        if not self._kind:
            made: Behaviour = REGISTRY.make("behaviour", self._name)
            return made
        seat = self

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Faulty(Behaviour):
            def craft(self, updates: Tensor, view: Any) -> Tensor:
                seat._fail()
                return updates

        return Faulty()

    def rule(self, setup: Any) -> Rule:
        if not self._kind:
            made: Rule = REGISTRY.make("aggregator", self._name)
            return made

        def faulty(updates: Tensor, ctx: Any) -> Tensor:
            self._fail()
            return updates.mean(0)

        return faulty

    def auditor(self, setup: Any) -> Probe:
        def look(ctx: Any) -> dict[str, Any]:
            if self._kind:
                self._fail()
            x, y = ctx.candidates
            told = ctx.query(x)
            return {"submission": Membership(told.log_softmax(1).gather(1, y[:, None]).squeeze(1))}

        return look

    def leave(self) -> None:
        pass


class TrustedPlayer:
    """A component that is up."""

    up = 0

    def __init__(self, submission: Submission) -> None:
        words = dict(line[2:].split(": ", 1) for line in submission.path.read_text().splitlines() if line.startswith("# "))
        if words.get("fault") == "unusable":
            raise SubmissionFault("unusable", "line 1: it holds nothing that is asked for")
        if "host" in words:
            raise RunError(words["host"])
        TrustedPlayer.up += 1
        self._submission, self._words = submission, words

    def seat(self) -> TrustedSeat:
        return TrustedSeat(self._submission, self._words.get("play", ""), self._words.get("fault", ""))

    def close(self) -> None:
        TrustedPlayer.up -= 1


def trusted(submission: Submission, exercise: Exercise) -> TrustedPlayer:
    return TrustedPlayer(submission)
