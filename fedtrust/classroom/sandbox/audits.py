"""What stands for an audit or an evasion that was handed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedtrust.classroom.sandbox import crossing
from fedtrust.classroom.sandbox.channel import Expect, Expected
from fedtrust.classroom.sandbox.game import Answer
from fedtrust.classroom.sandbox.submission import Playing
from fedtrust.data.base import Task
from fedtrust.probes.base import ProbeContext


class SandboxedAudit:
    """What an audit finds out, played in a sandbox. `ctx` is what the role may see (`views.probe_view`), never a teacher's.

    Raises, in every method:
        SubmissionFault: it failed.
    """

    def __init__(self, playing: Playing) -> None:
        self.playing = playing

    def score(self, ctx: ProbeContext) -> Tensor:
        """Return how likely each of `ctx.candidates` is a member, float32 [q]."""
        if ctx.candidates is None:
            raise ValueError("there are no candidates to score")
        wanted = {"scores": Expect((len(ctx.candidates[0]),), called="its scores")}
        return self._asked("score", ctx, wanted)["scores"]

    def reconstruct(self, ctx: ProbeContext, most: int) -> tuple[Tensor, Tensor | None]:
        """Return what it believes was trained on: samples [m, *shape], and their labels [m] if it says any.

        `most` is how many there can be; up to twice as many come back, for the caller to refuse in its own words.
        """
        shape, most = ctx.task.shape, 2 * most
        kind = torch.int64 if ctx.task.kind == "characters" else torch.float32
        wanted = {
            "x": Expect((None, *shape), kind, most=most * torch.Size(shape).numel(), called="what it reconstructed"),
            "y": Expect((None,), torch.int64, most=most, required=False, called="the labels of what it reconstructed"),
        }
        told = self._asked("reconstruct", ctx, wanted)
        return told["x"], told.get("y")

    def steal(self, ctx: ProbeContext) -> Tensor:
        """Return the parameters [d] of its copy of the model, in the exercise's architecture."""
        if ctx.layout is None:
            raise ValueError("there is no model to copy")
        return self._asked("steal", ctx, {"params": Expect((ctx.layout.size,), called="the copy of the model")})["params"]

    def _asked(self, op: str, ctx: ProbeContext, wanted: Expected) -> dict[str, Tensor]:
        plain, tensors = crossing.of_probe(ctx, self.playing.names)
        budget = self.playing.budgets["query"] if ctx.queries is None else ctx.queries
        return self.playing.call(op, plain, tensors, wanted, {"query": query_answer(ctx.query, ctx.task, budget)})[1]


#: From samples x [n, *shape] and either labels [n] or weights [n, C] to the gradient in x: of the cross-entropy, or of
#: (weights · output).sum().
Slope = Callable[[Tensor, Tensor], Tensor]


class SandboxedEvasion:
    """An evasion `perturb(x, y, query) -> x`, played in a sandbox."""

    def __init__(self, playing: Playing) -> None:
        self.playing = playing

    def perturb(
        self,
        x: Tensor,
        y: Tensor,
        query: Callable[[Tensor], Tensor],
        task: Task,
        *,
        eps: float,
        rng: torch.Generator,
        slope: Slope | None = None,
        params: Tensor | None = None,
    ) -> Tensor:
        """Return the changed samples [n, *shape]; whether they are near enough is the caller's to check.

        Args:
            x: samples [n, *shape].
            y: their labels [n].
            query: the model; each sample counts against the budget `query`.
            task: what is learnt.
            eps: how far a feature may be moved; told to the submission.
            rng: where the call's randomness is drawn from.
            slope: the model's gradients, if the attacker has them; each sample counts against the budget `gradient`.
            params: the model itself [d], if the attacker has it.
        """
        tensors = {"x": x, "y": y, **({} if params is None else {"params": params})}
        wanted = {"x": Expect(tuple(x.shape), x.dtype, called="what its perturb returned")}
        answers = {"query": query_answer(query, task, self.playing.budgets["query"])}
        if slope is not None:
            answers["gradient"] = gradient_answer(slope, task, self.playing.budgets["gradient"])
        return self.playing.call("perturb", {"eps": eps, "random": crossing.draw(rng)}, tensors, wanted, answers)[1]["x"]


def query_answer(query: Callable[[Tensor], Tensor], task: Task, budget: int | None) -> Answer:
    """Return the answer to questions about samples; each sample counts."""
    expected = {"x": _samples(task, budget, "what it asked the model")}
    return Answer(
        lambda tensors, data: {"output": query(tensors["x"]).detach().float()},
        expected,
        budget,
        lambda tensors, data: len(tensors["x"]),
        "samples",
    )


def gradient_answer(slope: Slope, task: Task, budget: int | None) -> Answer:
    """Return the answer to questions for gradients; each sample counts."""
    most = max(1, min(budget or 10_000, 10_000))
    expected = {
        "x": _samples(task, budget, "what it asked gradients at"),
        "y": Expect((None,), torch.int64, most=most, required=False, called="the labels of its gradients"),
        "weights": Expect((None, task.classes), most=most * task.classes, required=False, called="the weights of its gradients"),
    }

    def cost(tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> int:
        of = tensors.get("y", tensors.get("weights"))
        if of is None or ("y" in tensors and "weights" in tensors) or len(of) != len(tensors["x"]):
            raise ValueError("a gradient needs a label [n] or weights [n, C] for each of its samples")
        if "y" in tensors and len(of) and not 0 <= int(of.min()) <= int(of.max()) < task.classes:
            raise ValueError(f"labels from {int(of.min())} to {int(of.max())}, the classes are 0 to {task.classes - 1}")
        return len(of)

    def told(tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Mapping[str, Tensor]:
        return {"gradient": slope(tensors["x"], tensors["y"] if "y" in tensors else tensors["weights"]).detach().float()}

    return Answer(told, expected, budget, cost, "gradient evaluations")


def _samples(task: Task, budget: int | None, called: str) -> Expect:
    kind = torch.int64 if task.kind == "characters" else torch.float32
    most = max(1, min(budget or 10_000, 10_000)) * max(1, torch.Size(task.shape).numel())
    return Expect((None, *task.shape), kind, most=most, called=called)
