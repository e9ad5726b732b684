"""Honest clients that expect poison among their own data: they isolate it, leave out what fits badly, or ask the neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.func import vmap

from fedtrust.client import Behaviour, ClientMemory, Predict, View, behaviour
from fedtrust.data.base import Task

Rounds = Annotated[int, Field(ge=0)]


def losses(criterion: Callable[[Tensor, Tensor], Tensor], output: Tensor, y: Tensor) -> Tensor:
    """Return the protocol's loss of each sample [b]; works under `torch.func.vmap`."""
    each: Tensor = vmap(lambda one, label: criterion(one.unsqueeze(0), label.unsqueeze(0)))(output, y)
    return each


@behaviour("abl", role="honest", paper="Li et al., NeurIPS 2021, section 3 (anti-backdoor learning: LGA, then GGA)")
class AntiBackdoorLearning(Behaviour):
    """Hold every loss up around `gamma`, isolate the `rate` of the own samples that sinks fastest, and unlearn those.

    Up to round `isolate_until` the loss of a sample is sign(ℓ − γ) · ℓ (local gradient ascent, for each sample as in the paper's equation
    2; its code does so for the batch as a whole). In the first round after, the client keeps the model that it is sent: the samples of
    lowest loss under that model are isolated from then on. It minimises the loss of the others and maximises that of the isolated ones
    (global gradient ascent).

    Two things differ, because rounds go on here where the paper stops after a few epochs of a small learning rate: ascent ends where a
    sample's loss reaches that of a guess, log C, and an isolated sample counts `strength` times another one (the paper gives the few
    isolated samples the weight of all others together, which is `strength` ≈ 1 / `rate`).
    """

    gamma: Annotated[float, Field(gt=0)] = 0.5
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.01
    isolate_until: Annotated[int, Field(ge=1)] = 5
    strength: Annotated[float, Field(gt=0)] = 1.0

    def check(self, task: Task) -> str | None:
        """Refuse regressions."""
        return f"tells backdoors by how fast labels are learnt, but the task is {task.called}" if task.kind != "classification" else None

    def remember(self, size: int) -> ClientMemory:
        """Return the place of the model that tells which samples are isolated [d], and whether there is one."""
        return {"model": torch.zeros(size), "kept": torch.tensor(False)}

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Mark the isolated samples with 1, from the first round after `isolate_until` on; the data stay as they are."""
        if view.round <= self.isolate_until:
            return x, y
        if not bool(view.memory["kept"]):
            view.memory.update(model=view.params.clone(), kept=torch.tensor(True))
        with torch.no_grad():
            order = losses(view.criterion, view.model(view.memory["model"], x), y).argsort(stable=True)
        return x, y, torch.zeros(len(x)).index_fill(0, order[: max(1, round(self.rate * len(x)))], 1.0)

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return the loss of the stage that the round belongs to."""
        each = losses(view.criterion, predict(x), y)
        if view.marks is None:
            return ((each - self.gamma).detach().sign() * each).mean()
        ascent = -self.strength * each.clamp(max=math.log(view.task.classes))
        return torch.where(view.marks > 0, ascent, each).mean()


@behaviour("trimmed-loss", role="honest", paper="Shen and Sanghavi, ICML 2019, algorithm 1 (iterative trimmed loss minimisation)")
class TrimmedLoss(Behaviour):
    """Leave out the share `trim` of each batch whose loss is largest: wrong labels are learnt last.

    The paper picks the samples once a pass over all data; here they are picked in every batch, at the local model of that moment. The
    first `warm_up` rounds use everything, as the paper's first model does: an untrained one cannot tell.
    """

    trim: Annotated[float, Field(gt=0, lt=1)] = 0.2
    warm_up: Rounds = 1

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return the mean of the ⌊(1 − trim) · b⌋ smallest losses, at least one."""
        if view.round <= self.warm_up:
            return view.criterion(predict(x), y)
        kept = max(1, math.floor((1 - self.trim) * len(x) + 1e-9))  # the 1e-9: 0.9 * 10 may be a little less than 9
        return losses(view.criterion, predict(x), y).topk(kept, largest=False).values.mean()


@behaviour("knn-filter", role="honest", paper="Peri et al., ECCV Workshops 2020, section 3 (deep k-NN)")
class NeighbourFilter(Behaviour):
    """Leave out own samples whose label is not the commonest among their `k` nearest own samples, in the features of the model it is sent.

    Euclidean distances between what goes into the last linear layer; a sample is no neighbour of itself, equally near ones are taken in
    their order, and a label that shares the first place is kept. The paper advises a k of about twice the number of poisons in a class.
    Classes of which a client has only a few samples are lost. The first `warm_up` rounds use everything; so does a client that would
    be left without a sample.
    """

    k: Annotated[int, Field(ge=1)] = 10
    warm_up: Rounds = 1

    def check(self, task: Task) -> str | None:
        """Refuse regressions."""
        return f"compares class labels, but the task is {task.called}" if task.kind != "classification" else None

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the samples whose neighbours agree with their label."""
        if view.round <= self.warm_up or len(x) < 2:
            return x, y
        with torch.no_grad():
            features = view.model.features(view.params, x)
        kept = agrees(features, y, self.k, view.task.classes)
        return (x[kept], y[kept]) if bool(kept.any()) else (x, y)


def agrees(features: Tensor, y: Tensor, k: int, classes: int) -> Tensor:
    """Return for each sample whether no label is commoner than its own among its `k` nearest others, bool [n]; all others if k ≥ n."""
    found = []
    for rows in torch.split(torch.arange(len(y)), 512):
        distances = torch.cdist(features[rows], features, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(rows)), rows] = -1.0  # itself first, and then left out
        near = distances.argsort(dim=1, stable=True)[:, 1 : k + 1]
        votes = F.one_hot(y[near], classes).sum(dim=1)  # [rows, classes]
        found.append(votes.gather(1, y[rows, None]).squeeze(1) == votes.amax(dim=1))
    return torch.cat(found)
