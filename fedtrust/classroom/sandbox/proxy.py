"""What stands for a submission in a run: a behaviour, a server rule, an audit, an evasion. The submission itself runs in its sandbox.

A failing submission never ends the run: by default a behaviour that failed does not attack (its clients send what training gave), and a
rule that failed is plain FedAvg; what went wrong is in `Playing.faults`. With `strict` the `SubmissionFault` is raised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedtrust.classroom.sandbox import crossing
from fedtrust.classroom.sandbox.audits import SandboxedAudit, SandboxedEvasion, query_answer
from fedtrust.classroom.sandbox.channel import Expect
from fedtrust.classroom.sandbox.faults import SubmissionFault
from fedtrust.classroom.sandbox.game import Answer, finite
from fedtrust.classroom.sandbox.submission import BUDGETS, Playing, Role, Submission
from fedtrust.client import KNOWLEDGE, Behaviour, ClientMemory, Knowledge, View
from fedtrust.data.base import Task
from fedtrust.server import AggContext, Verdict

#: Values that a memory or a state may have beyond those of the round's updates.
_SPARE = 1_000_000


# ------------------------------------------------------------------------------------------------------------------------------ attacks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandboxedBehaviour(Behaviour):
    """A behaviour whose hooks are played in a sandbox; made by `sandboxed_behaviour`, which knows which hooks there are.

    `remember`, `agree`, `poison`, `craft` and `goal` cross; `goal` gets the test inputs with -1 for every label. `loss`, `per_sample` and
    `project` run inside the engine's batched training, `reply` and `claim` belong to the host: a submission that overrides one is refused.
    Where the engine runs on other processes, each that poisons data starts a sandbox of its own.
    """

    playing: Playing
    strict: bool = False
    hooks: ClassVar[tuple[str, ...]] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self.playing, type(self).hooks, type(self).needs_knowledge, self.strict)

    def _safe(self, call: Callable[[], Any], instead: Any) -> Any:
        try:
            return call()
        except SubmissionFault:
            if self.strict:
                raise
            return instead

    def _remember(self, size: int) -> ClientMemory:
        def played() -> ClientMemory:
            expected = {"memory.*": Expect((), most=16 * size + _SPARE, called="memory")}
            return _without("memory", self.playing.call("remember", {"size": size}, {}, expected)[1])

        made: ClientMemory = self._safe(played, {})
        return made

    def _agree(self, view: View) -> None:
        def played() -> None:
            plain, tensors, _ = crossing.of_view(view, self.playing.names)
            _, told = self.playing.call("agree", plain, tensors, _memory(view), self._answers(view))
            view.memory.update(_without("memory", told))

        self._safe(played, None)

    def _poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        def played() -> tuple[Tensor, Tensor]:
            plain, tensors, _ = crossing.of_view(view, self.playing.names)
            wanted = {
                "x": Expect((None, *x.shape[1:]), x.dtype, most=4 * max(x.numel(), 1), called="the x of its poison"),
                "y": Expect((None, *y.shape[1:]), y.dtype, most=4 * max(y.numel(), 1), called="the y of its poison"),
            }
            _, told = self.playing.call("poison", plain, {**tensors, "x": x, "y": y}, {**wanted, **_memory(view)}, self._answers(view))
            self._sound(told["x"], told["y"], view.task)
            view.memory.update(_without("memory", told))
            return told["x"], told["y"]

        made: tuple[Tensor, Tensor] = self._safe(played, (x, y))
        return made

    def _craft(self, updates: Tensor, view: View) -> Tensor:
        def played() -> Tensor:
            plain, tensors, order = crossing.of_view(view, self.playing.names)
            wanted = {"updates": Expect(tuple(updates.shape), called="what its craft returned"), **_memory(view)}
            _, told = self.playing.call("craft", plain, {**tensors, "updates": updates[order]}, wanted, self._answers(view))
            view.memory.update(_without("memory", told))
            return crossing.back(told["updates"], order)

        made: Tensor = self._safe(played, updates)
        return made

    def _goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor] | None:
        def played() -> tuple[Tensor, Tensor] | None:
            wanted = {
                "x": Expect(tuple(x.shape), x.dtype, called="the x of its goal"),
                "y": Expect(tuple(y.shape), y.dtype, called="the y of its goal"),
            }
            data, told = self.playing.call("goal", {}, {"x": x, "y": torch.full_like(y, -1)}, wanted)
            if data.get("none") is True:
                return None
            self._sound(told["x"], told["y"], task)
            return told["x"], told["y"]

        made: tuple[Tensor, Tensor] | None = self._safe(played, None)
        return made

    def _sound(self, x: Tensor, y: Tensor, task: Task) -> None:
        """Refuse samples that are none of the task's; noted as a fault like any other bad answer."""
        why = ""
        if len(x) != len(y) or len(x) == 0:
            why = f"it returned {len(x)} samples and {len(y)} labels"
        elif task.kind != "regression" and not 0 <= int(y.min()) <= int(y.max()) < task.classes:
            why = f"it returned labels from {int(y.min())} to {int(y.max())}, the classes are 0 to {task.classes - 1}"
        if why:
            fault = SubmissionFault("reply", why)
            self.playing.report.faults.append(fault)
            raise fault

    def _answers(self, view: View) -> dict[str, Answer]:
        rule = view.defence
        if rule is None:
            return {}
        size, most = len(view.params), max(64, 4 * view.cohort)
        return {
            "defence": Answer(
                lambda tensors, data: {"delta": rule(tensors["updates"])},
                {"updates": Expect((None, size), most=most * size, called="what it asked the defence")},
                self.playing.budgets["defence"],
            )
        }


def _memory(view: View) -> dict[str, Expect]:
    return {f"memory.{name}": Expect(tuple(value.shape), value.dtype, called=f"memory '{name}'") for name, value in view.memory.items()}


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


_CLASSES: dict[tuple[tuple[str, ...], Knowledge], type[SandboxedBehaviour]] = {}


def _made(playing: Playing, hooks: tuple[str, ...], knowledge: Knowledge, strict: bool) -> SandboxedBehaviour:
    """Return a behaviour of a class with just these hooks, so that the engine leaves out the others as it does for anybody."""
    cls = _CLASSES.get((hooks, knowledge))
    if cls is None:
        given = {hook: getattr(SandboxedBehaviour, f"_{hook}") for hook in hooks}
        body = {**given, "hooks": hooks, "needs_knowledge": knowledge, "__module__": __name__, "__doc__": SandboxedBehaviour.__doc__}
        cls = _CLASSES[hooks, knowledge] = type("SandboxedBehaviour", (SandboxedBehaviour,), body)
    return cls(playing=playing, strict=strict)


def sandboxed_behaviour(playing: Playing, *, strict: bool = False) -> SandboxedBehaviour:
    """Return the behaviour that a submission holds; its `needs_knowledge` is what the submission declares.

    Raises:
        SubmissionFault: it cannot be loaded, cannot work on the task, or uses hooks that cannot be played in a sandbox.
        RunError: no sandbox comes up.
    """
    about = playing.open()
    hooks = about.get("hooks")
    known = ("remember", "agree", "poison", "craft", "goal")
    if not isinstance(hooks, list) or not all(hook in known for hook in hooks) or about.get("knowledge") not in KNOWLEDGE:
        raise SubmissionFault("unusable", "it does not say what it does")
    if about.get("reason"):
        raise SubmissionFault("unusable", f"it says that it cannot work here: {str(about['reason'])[:200]}")
    return _made(playing, tuple(hook for hook in known if hook in hooks), about["knowledge"], strict)


# ----------------------------------------------------------------------------------------------------------------------------- defences


def sandboxed_aggregator(playing: Playing, *, strict: bool = False) -> Callable[[Tensor, AggContext], Verdict]:
    """Return the server rule `(updates [n, d], ctx) -> Verdict` that a submission holds.

    What it returns is checked as a pipeline checks any rule: delta float32 [d], finite; trust in [0, 1], one value a row.

    Raises:
        SubmissionFault: it cannot be loaded.
        RunError: no sandbox comes up.
    """
    playing.open()

    def rule(updates: Tensor, ctx: AggContext) -> Verdict:
        try:
            return _aggregated(playing, updates, ctx)
        except SubmissionFault:
            if strict:
                raise
            weights = ctx.weights / ctx.weights.sum()
            return Verdict(weights @ updates)

    return rule


def _aggregated(playing: Playing, updates: Tensor, ctx: AggContext) -> Verdict:
    n, d = updates.shape
    plain, tensors, order = crossing.of_context(updates, ctx, playing.names)

    def train(given: Mapping[str, Tensor], data: Mapping[str, Any]) -> Mapping[str, Tensor]:
        return {"update": ctx.train(given["x"], given["y"], given.get("params"), data.get("epochs"))}

    answers = {}
    if ctx.root is not None:
        x, y = ctx.root
        asked = {
            "x": Expect((None, *x.shape[1:]), x.dtype, most=4 * x.numel(), called="the x of its training"),
            "y": Expect((None, *y.shape[1:]), y.dtype, most=4 * y.numel(), called="the y of its training"),
            "params": Expect((d,), required=False, called="the params of its training"),
        }
        answers["train"] = Answer(train, asked, playing.budgets["train"], _epochs(ctx.task), "gradient evaluations")
    wanted = {
        "delta": Expect((d,), called="the change of the model that it returned"),
        "trust": Expect((n,), required=False, called="its trust"),
        "state.*": Expect((), most=4 * n * d + _SPARE, called="state"),
    }
    data, told = playing.call("aggregate", plain, tensors, wanted, answers)
    trust = told.get("trust")
    if trust is not None and not bool(((trust >= 0) & (trust <= 1 + 1e-6)).all()):
        fault = SubmissionFault("reply", "its trust is not between 0 and 1")
        playing.report.faults.append(fault)
        raise fault
    state = _without("state", told) if data.get("state") is True else None
    said = data.get("numbers")
    numbers = {str(k)[:60]: v for k, given in (said if isinstance(said, dict) else {}).items() if (v := finite(given)) is not None}
    return Verdict(told["delta"], None if trust is None else crossing.back(trust, order), state, numbers=numbers)


def _epochs(task: Task) -> Callable[[Mapping[str, Tensor], Mapping[str, Any]], int]:
    """Return what a training costs: a gradient evaluation a sample and epoch; refuses what is no training."""

    def cost(tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> int:
        epochs, x, y = data.get("epochs"), tensors["x"], tensors["y"]
        if epochs is not None and (not isinstance(epochs, int) or isinstance(epochs, bool) or not 1 <= epochs <= 1000):
            raise ValueError("epochs should be a whole number from 1 to 1000")
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"{len(x)} samples and {len(y)} labels")
        if task.kind != "regression" and not 0 <= int(y.min()) <= int(y.max()) < task.classes:
            raise ValueError(f"labels from {int(y.min())} to {int(y.max())}, the classes are 0 to {task.classes - 1}")
        return len(x) * (epochs or 1)

    return cost


__all__ = [
    "BUDGETS",
    "Playing",
    "Role",
    "SandboxedAudit",
    "SandboxedBehaviour",
    "SandboxedEvasion",
    "Submission",
    "query_answer",
    "sandboxed_aggregator",
    "sandboxed_behaviour",
]
