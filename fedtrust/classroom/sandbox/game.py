"""A game in a sandbox, seen from the host: what is asked and answered, with every wait bounded, counted, and ended in time.

Nothing a submission does raises anything here but a `SubmissionFault`.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fedtrust.classroom.sandbox import channel, seccomp
from fedtrust.classroom.sandbox.channel import Assembler, Expected, Frame
from fedtrust.classroom.sandbox.faults import KINDS, Kind, SubmissionFault, printable
from fedtrust.classroom.sandbox.limits import Limits
from fedtrust.classroom.sandbox.waiting import Wait, read
from fedtrust.errors import FedTrustError
from fedtrust.release import QueryBudgetError

#: Seconds that a sandbox's processes have to be gone.
ENDING = 5.0
_CHUNK = 1 << 16
#: So many times the output that is kept is a flood.
_FLOOD = 1000


class Answer(NamedTuple):
    """A question that a submission may ask in the middle of a call.

    Attributes:
        call: answers it, tensors and plain data in, tensors out; runs on the host, whose time does not count.
        expected: what the question's tensors must be.
        budget: how much may be asked in a game; `None`: as much as time allows.
        cost: how much a question counts, by its tensors and data; by default one.
        unit: what is counted, in words.
    """

    call: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]]
    expected: Expected
    budget: int | None = None
    cost: Callable[[Mapping[str, Tensor], Mapping[str, Any]], int] = lambda tensors, data: 1
    unit: str = "calls"


@dataclass
class Report:
    """What a game cost and what was noticed, as counted outside the submission's process.

    Attributes:
        calls: how often it was asked for something.
        bytes_in, bytes_out: sent to it and by it.
        asked: question → how much it asked of the host.
        cpu_seconds: processor time of all its processes, from the kernel; known when the game has ended.
        peak_bytes: the largest resident memory of its process, the shared part (torch) included.
        wall_seconds: how long the host waited for it.
        refused: system call → how often it was refused.
        output: the beginning of what it printed.
        printed: bytes that it printed in all.
        faults: what went wrong, in order.
    """

    calls: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    asked: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    wall_seconds: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)
    output: str = ""
    printed: int = 0
    faults: list[SubmissionFault] = field(default_factory=list)

    def noticed(self) -> list[str]:
        """Return what a teacher should know beside the faults: which forbidden things were tried."""
        return [f"it tried to {seccomp.purpose(name)} ({name}), {count}×: refused" for name, count in sorted(self.refused.items())]


class Home(Protocol):
    """The sandbox that a game is played in."""

    limits: Limits

    @property
    def running(self) -> bool:
        """Whether its process is there."""

    def order(self, data: Mapping[str, Any]) -> None:
        """Tell its supervisor something."""

    def close(self) -> None:
        """End it and everything in it."""


class Game:
    """A game of one submission: a process that is asked one thing after another.

    Attributes:
        about: what the submission says of itself (name, hooks, …).
        report: what it has cost so far.
        over: whether its process is gone.
    """

    def __init__(self, home: Home, pipes: dict[str, int]) -> None:
        self._home, self._pipes = home, pipes
        self._output = bytearray()
        self.about: dict[str, Any] = {}
        self.report = Report()
        self.over = False

    def __enter__(self) -> Game:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def load(self, what: Mapping[str, Any]) -> None:
        """Begin: a fresh process loads the submission, and `about` is what it says of itself.

        Args:
            what: its `source`, `file`, `role`, `params` and `setting`, as `Sandbox.game` has them.

        Raises:
            SubmissionFault: it cannot be loaded. The game is over.
        """
        try:
            self._home.order({"order": "game"})
            self.about = self._exchange(channel.pack({"op": "load", **what}), {}, {}, self._home.limits.load_seconds)[0]
        except ValueError as error:
            self.end()
            raise self._fault(SubmissionFault("unusable", f"its file is too long: {error}")) from None
        except BaseException:
            self.end()
            raise

    def call(
        self,
        op: str,
        data: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        expected: Expected,
        answers: Mapping[str, Answer] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Ask the submission for something; return its plain data and the tensors that were expected.

        Raises:
            SubmissionFault: it failed. After an error of its own (`crash`, `reply`, `not-finite`, `budget`, `memory`) it can be asked
                again; after anything else its process is gone.
        """
        if self.over:
            raise self._fault(SubmissionFault("killed", "its process has ended before"))
        self.report.calls += 1
        frame = channel.pack({"op": op, **data}, tensors)
        return self._exchange(frame, expected, answers or {}, self._home.limits.call_seconds)

    def _exchange(
        self, frame: bytes, expected: Expected, answers: Mapping[str, Answer], seconds: float
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        began, aside = time.monotonic(), 0.0
        most = max([channel.most_payload(expected), *(channel.most_payload(a.expected) for a in answers.values())])
        try:
            while True:
                waiting = Wait(self._pipes, began + seconds + aside, self._home.limits.output)
                reply = self._await(waiting, frame, most, seconds)
                if "ask" not in reply.data:
                    return self._finished(reply, expected)
                paused = time.monotonic()
                frame = self._answered(reply, answers)
                aside += time.monotonic() - paused
        except SubmissionFault as fault:
            raise self._fault(fault) from None
        except BaseException:  # the host's own: whoever waits for its answer waits in vain
            self.end()
            raise
        finally:
            self.report.wall_seconds += time.monotonic() - began - aside

    def _fault(self, fault: SubmissionFault) -> SubmissionFault:
        self.report.faults.append(fault)
        if fault.kind in ("timeout", "cpu", "flood", "forbidden", "killed"):
            self.end()
        return fault

    def _await(self, waiting: Wait, frame: bytes, most: int, seconds: float) -> Frame:
        """Send a frame and return the next one, whatever the submission does meanwhile."""
        left, inbox = memoryview(frame), Assembler(most)
        self.report.bytes_in += len(frame)
        while time.monotonic() < waiting.until:
            wanted = dict.fromkeys(("outward", "events", "printed"), selectors.EVENT_READ)
            if left:
                wanted["inward"] = selectors.EVENT_WRITE
            for ready in waiting.ready(wanted):
                if ready == "inward":
                    left = left[self._send(left) :]
                elif ready == "printed":
                    self._print(waiting)
                elif ready == "outward":
                    chunk = read(self._pipes["outward"]) or b""
                    self.report.bytes_out += len(chunk)
                    if chunk and (got := self._fed(inbox, chunk)) is not None:
                        return got
                elif ready == "events":
                    waiting.event()
            if waiting.died is not None or waiting.closed:
                raise self._death(waiting.died)
        raise SubmissionFault("timeout", f"it gave no answer within {seconds:g} s")

    def _fed(self, inbox: Assembler, chunk: bytes) -> Frame | None:
        try:
            return inbox.feed(chunk)
        except SubmissionFault:
            self.end()  # what follows in the pipe is no frame either
            raise

    def _send(self, left: memoryview) -> int:
        try:
            return os.write(self._pipes["inward"], left[:_CHUNK])
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            raise SubmissionFault("killed", "its sandbox has ended") from None

    def _print(self, waiting: Wait) -> None:
        before = waiting.printed
        waiting.take_output()
        self._output += waiting.output[: max(0, self._home.limits.output - len(self._output))]
        waiting.output.clear()
        self.report.printed += waiting.printed - before
        if self.report.printed > _FLOOD * self._home.limits.output:
            raise SubmissionFault("flood", f"it printed more than {_FLOOD * self._home.limits.output} bytes")

    def _death(self, died: Mapping[str, Any] | None) -> SubmissionFault:
        """Return the fault of a process that ended in the middle of a call."""
        if died is None:
            return SubmissionFault("killed", "its sandbox has ended")
        if died["forbidden"]:
            tried = ", ".join(f"{name} {count}×" for name, count in sorted(died["refused"].items()))
            return SubmissionFault("forbidden", f"it went on trying what no submission may do ({tried})")
        if died["signal"] == signal.SIGXCPU or (died["signal"] == signal.SIGKILL and self._used_up()):
            return SubmissionFault("cpu", f"it used more than {self._home.limits.cpu_seconds} s of processor time")
        if died["signal"]:
            return SubmissionFault("killed", f"its process was ended by signal {died['signal']} ({_name(died['signal'])})")
        return SubmissionFault("killed", "its process ended without an answer")

    def _used_up(self) -> bool:
        self.end()
        return self.report.cpu_seconds > 0.9 * self._home.limits.cpu_seconds

    def _answered(self, asked: Frame, answers: Mapping[str, Answer]) -> bytes:
        """Return the frame that answers a submission's question."""
        name, given = str(asked.data["ask"])[:40], asked.data.get("data")
        answer = answers.get(name)
        if answer is None:
            return channel.pack({"refused": f"'{name}' cannot be asked here"})
        plain = given if isinstance(given, dict) else {}
        try:
            tensors = channel.unpack(asked.payload, answer.expected)
            used = self.report.asked.get(name, 0) + answer.cost(tensors, plain)
        except SubmissionFault as fault:
            return channel.pack({"refused": fault.sentence})
        except ValueError as error:
            return channel.pack({"refused": str(error)})
        if answer.budget is not None and used > answer.budget:
            return channel.pack({"refused": f"{used} {answer.unit} of '{name}' asked, the budget is {answer.budget}", "budget": True})
        self.report.asked[name] = used
        try:
            told = answer.call(tensors, plain)
        except (FedTrustError, ValueError) as error:  # what was asked cannot be answered: its author's to mend
            return channel.pack({"refused": str(error)[:300], "budget": isinstance(error, QueryBudgetError)})
        return channel.pack({"answer": name}, told)

    def _finished(self, reply: Frame, expected: Expected) -> tuple[dict[str, Any], dict[str, Tensor]]:
        data = reply.data
        if "fault" in data:
            kind: Kind = next((known for known in KINDS if known == data["fault"]), "crash")
            line, text = data.get("line"), str(data.get("text"))[:300]
            raise SubmissionFault(kind, f"line {line}: {text}" if isinstance(line, int) and line > 0 else text)
        if data.get("none") is True:
            return data, {}
        return data, channel.unpack(reply.payload, expected)

    def end(self) -> Report:
        """End the game and everything it started; return what it cost."""
        if self.over:
            return self.report
        self.over = True
        waiting = Wait(self._pipes, time.monotonic() + 2 * ENDING, self._home.limits.output)
        self._home.order({"order": "end"})
        event = waiting.for_event("ended") if self._home.running else None
        if event is None:  # its supervisor does not answer: the whole sandbox goes, the next game starts another
            self._home.close()
        else:
            while read(self._pipes["outward"]):
                pass
            while (chunk := read(self._pipes["printed"])) is not None and chunk:
                waiting.printed += len(chunk)
                waiting.output += chunk
            self.report.cpu_seconds = float(event["cpu"])
            self.report.peak_bytes = int(event["peak"])
            self.report.refused = {str(k): int(v) for k, v in event["refused"].items()}
        self.report.printed += waiting.printed
        self._output += waiting.output
        self.report.output = printable(self._output[: self._home.limits.output].decode(errors="replace"))
        return self.report


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def finite(value: object) -> float | None:
    """Return a stranger's number if it is one."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good and isinstance(value, int | float) else None
