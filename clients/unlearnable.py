"""A client that protects its data: noise that leaves nothing to learn from them."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad

from fedtrust.client import Behaviour, ClientMemory, View, behaviour
from fedtrust.clients.clean_label import in_range, span
from fedtrust.data.base import Task


@behaviour("unlearnable", protects=True, paper="Huang et al., ICLR 2021, section 3 (error-minimising noise)")
class Unlearnable(Behaviour):
    """Add noise within `epsilon` that minimises the loss, so that the model finds nothing left to learn from the own samples.

    Nobody is attacked: a client protects its data against being learnt from, and labels stay right. In reports such clients are honest
    ones, and a server that distrusts them gives a false alarm. The min-min game of the paper's equation 3 is played on a copy of the
    model: `alternations` times `train_steps` steps of SGD on the noisy samples, in batches of 32 in the samples' order, then
    `noise_steps` steps of size `epsilon` / 10 against the sign of the loss's gradient in the noise; it ends early when the copy
    misjudges less than `enough` of the noisy samples. `mode`: a noise for each sample or one for each class. `epsilon` counts in widths
    of the value range.

    `made` says on which model: `once`, the first that it is sent while it acts (the same noise in all rounds after, as data that were
    published once); or `anew`, each one that it is sent.
    """

    mode: Literal["sample", "class"] = "sample"
    made: Literal["once", "anew"] = "anew"
    epsilon: Annotated[float, Field(gt=0, le=1)] = 8 / 255
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    alternations: Annotated[int, Field(ge=1)] = 2
    train_steps: Annotated[int, Field(ge=0)] = 5
    noise_steps: Annotated[int, Field(ge=1)] = 10
    lr: Annotated[float, Field(gt=0)] = 0.1
    enough: Annotated[float, Field(ge=0, lt=1)] = 0.01

    def check(self, task: Task) -> str | None:
        """Refuse regressions."""
        return f"minimises the error of a classifier, but the task is {task.called}" if task.kind != "classification" else None

    def remember(self, size: int) -> ClientMemory:
        """Return the place of the model that the noise is made on [d], if that is one of an earlier round."""
        return {"model": torch.zeros(size), "seen": torch.tensor(False)} if self.made == "once" else {}

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the data with `fraction` of the own samples, evenly spread, protected."""
        params = view.params
        if self.made == "once":
            if not bool(view.memory["seen"]):
                view.memory.update(model=view.params.clone(), seen=torch.tensor(True))
            params = view.memory["model"]
        count = max(1, round(self.fraction * len(x)))
        own = torch.arange(count) * len(x) // count  # the same in every round
        noise = self.noise(x[own], y[own], params, view)
        return x.index_copy(0, own, in_range(x[own] + noise, view.task)), y

    def noise(self, x: Tensor, y: Tensor, params: Tensor, view: View) -> Tensor:
        """Return the noise of each sample [b, *shape], within `epsilon` and such that the sum stays in the task's range."""
        bound = self.epsilon * span(view.task)
        of = torch.arange(len(x)) if self.mode == "sample" else y  # which noise is whose
        noise = x.new_zeros(len(x) if self.mode == "sample" else view.task.classes, *x.shape[1:])

        def loss(params: Tensor, noise: Tensor, x: Tensor, y: Tensor, of: Tensor) -> Tensor:
            return view.criterion(view.model(params, in_range(x + noise[of], view.task)), y)

        batches = itertools.cycle(slice(start, start + 32) for start in range(0, len(x), 32))
        for _ in range(self.alternations):
            for batch in itertools.islice(batches, self.train_steps):
                params = params - self.lr * grad(loss)(params, noise, x[batch], y[batch], of[batch])
            for _ in range(self.noise_steps):
                noise = (noise - bound / 10 * grad(loss, 1)(params, noise, x, y, of).sign()).clamp(-bound, bound)
            wrong = view.model(params, in_range(x + noise[of], view.task)).argmax(dim=1) != y
            if float(wrong.double().mean()) < self.enough:
                break
        return (in_range(x + noise[of], view.task) - x).detach()
