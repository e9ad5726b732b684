"""Data poisoning without a trigger: clients that train honestly on wrong labels, or on right ones badly chosen."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, ClientMemory, View, behaviour
from fedtrust.data.base import Task
from fedtrust.errors import InputError


@behaviour(
    "label-flip",
    paper="Biggio et al., ACML 2011; Fang et al., USENIX Security 2020, section 5.1; label noise: Han et al., NeurIPS 2018, section 4",
)
class LabelFlip(Behaviour):
    """Train on wrong labels.

    `mode` says which: `mirror` turns class y into `classes - 1 - y` (Fang et al.), `next` into y + 1, the last into 0 (asymmetric or pair
    noise), `targeted` turns `source` into `target` only, `random` draws another class for every sample (symmetric noise). `fraction` of the
    samples are flipped. What is drawn (which ones, and in mode `random` their labels) is drawn once for each client, as where a data set is
    spoilt before training; `redraw` draws anew in each round.
    """

    mode: Literal["mirror", "next", "targeted", "random"] = "mirror"
    source: Annotated[int, Field(ge=0)] | None = None
    target: Annotated[int, Field(ge=0)] | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    redraw: bool = False

    def __post_init__(self) -> None:
        given = self.source is not None and self.target is not None
        if self.mode == "targeted" and (not given or self.source == self.target):
            raise InputError("mode 'targeted' needs two different classes, source and target", "source")
        if self.mode != "targeted" and (self.source is not None or self.target is not None):
            raise InputError(f"source and target belong to mode 'targeted', not '{self.mode}'", "source")
        if self.redraw and self.mode != "random" and self.fraction == 1:
            raise InputError(f"nothing is drawn in mode '{self.mode}' where every sample is flipped", "redraw")

    def check(self, task: Task) -> str | None:
        """Refuse regressions and classes that do not exist."""
        if task.kind != "classification":
            return f"flips class labels, but the task is {task.called}"
        if max(self.source or 0, self.target or 0) >= task.classes:
            return f"the task has classes 0 to {task.classes - 1} only"
        return None

    def remember(self, size: int) -> ClientMemory:
        """Return what a client draws from in every round: a seed [1], below 0 as long as there is none."""
        drawn = (self.mode == "random" or self.fraction < 1) and not self.redraw
        return {"seed": torch.full((1,), -1, dtype=torch.int64)} if drawn else {}

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the same samples with wrong labels."""
        rng = self._source(view)
        wrong = self._flipped(y, view.task, rng)
        if self.fraction < 1:
            spared = torch.randperm(len(y), generator=rng)[max(1, round(self.fraction * len(y))) :].to(y.device)
            wrong = wrong.index_copy(0, spared, y[spared])
        return x, wrong

    def _source(self, view: View) -> torch.Generator | None:
        """Return what is drawn from: the same numbers in every round where the client remembers a seed."""
        if "seed" not in view.memory:
            return view.rng
        if int(view.memory["seed"]) < 0:
            view.memory["seed"] = torch.randint(0, 2**62, (1,), generator=view.rng)
        return torch.Generator().manual_seed(int(view.memory["seed"]))

    def _flipped(self, y: Tensor, task: Task, rng: torch.Generator | None) -> Tensor:
        if self.mode == "mirror":
            return task.classes - 1 - y
        if self.mode == "next":
            return (y + 1) % task.classes
        if self.source is not None and self.target is not None:
            return y.masked_fill(y.eq(self.source), self.target)
        shift = torch.randint(1, task.classes, y.shape, generator=rng).to(y.device)
        return (y + shift) % task.classes

    def goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor] | None:
        """Count as success: the wrong class that the labels were turned into. Random flipping aims at none."""
        if self.mode == "random":
            return None
        return x, self._flipped(y, task, None)


@behaviour(
    "p-tampering",
    paper="Mahloujifar, Diochnos and Mahmoody, ALT 2018 (p-tampering), and Mahloujifar, Mahmoody and Mohammed, ICML 2019, algorithm 1",
)
class PTampering(Behaviour):
    """Replace each sample with probability `p` by another of the own samples, with its right label: the poison is clean.

    A tampered sample is the worst of the true one and `draws` random ones. The papers bias the choice towards what raises the expected
    badness of the model that is learnt; here badness is the loss of the model on the client's own samples, and what a candidate does to it
    is reckoned to first order, by the inner product of its gradient at the global model with that of this loss: a step of training on the
    chosen one lowers the loss least, or raises it most. Drawn anew in each round, as an online adversary would.
    """

    p: Annotated[float, Field(gt=0, le=1)] = 0.5
    draws: Annotated[int, Field(ge=1)] = 8

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return as many samples, some in place of others."""
        n = len(y)
        tampered = torch.rand(n, generator=view.rng) < self.p
        genuine = torch.arange(n)
        candidates = torch.cat([genuine[:, None], torch.randint(0, n, (n, self.draws), generator=view.rng)], dim=1)
        worst = candidates.gather(1, progress(x, y, view)[candidates].argmin(dim=1, keepdim=True)).squeeze(1)
        chosen = torch.where(tampered, worst, genuine).to(x.device)
        return x[chosen], y[chosen]


def progress(x: Tensor, y: Tensor, view: View) -> Tensor:
    """Return for each sample how much a small step on it lowers the mean loss of all, [n]: the inner product of the two gradients.

    With weights w on the samples' losses, the gradient G(w) of their sum is linear in w, and so is ⟨G(w), g⟩: its derivative by w are all
    the products at once.
    """
    with torch.enable_grad():
        params = view.params.detach().clone().requires_grad_()
        weights = torch.ones(len(y), requires_grad=True)
        output = view.model(params, x)
        # One by one: the criterion only tells a mean, and under vmap torch would import its symbolic algebra for seconds.
        losses = torch.stack([view.criterion(output[i : i + 1], y[i : i + 1]) for i in range(len(y))])
        (goal,) = torch.autograd.grad(losses.mean(), params, retain_graph=True)
        (total,) = torch.autograd.grad((weights * losses).sum(), params, create_graph=True)
        (products,) = torch.autograd.grad((total * goal).sum(), weights)
    return products.detach()
