"""What stands for an audit or an evasion that was handed in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedtrust.classroom.sandbox import crossing
from fedtrust.classroom.sandbox.channel import Expect, Expected
from fedtrust.classroom.sandbox.host import Answer
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
        """Return what it believes was trained on: samples [m, *shape], at most `most`, and their labels [m] if it says any."""
        shape = ctx.task.shape
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
            params: the model itself [d], if the attacker has it.
        """
        tensors = {"x": x, "y": y, **({} if params is None else {"params": params})}
        wanted = {"x": Expect(tuple(x.shape), x.dtype, called="what its perturb returned")}
        answers = {"query": query_answer(query, task, self.playing.budgets["query"])}
        return self.playing.call("perturb", {"eps": eps, "random": crossing.draw(rng)}, tensors, wanted, answers)[1]["x"]


def query_answer(query: Callable[[Tensor], Tensor], task: Task, budget: int | None) -> Answer:
    """Return the answer to questions about samples; each sample counts."""
    kind = torch.int64 if task.kind == "characters" else torch.float32
    size = max(1, torch.Size(task.shape).numel())
    expected = {"x": Expect((None, *task.shape), kind, most=max(1, min(budget or 10_000, 10_000)) * size, called="what it asked the model")}
    return Answer(
        lambda tensors, data: {"output": query(tensors["x"]).detach().float()},
        expected,
        budget,
        lambda tensors, data: len(tensors["x"]),
        "samples",
    )
