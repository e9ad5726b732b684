"""Data poisoning without a trigger: clients that train honestly on wrong labels."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, View, behaviour
from fedtrust.data.base import Task
from fedtrust.errors import InputError


@behaviour(
    "label-flip",
    paper="Biggio et al., ICML 2012; Fang et al., USENIX Security 2020, section 5.1",
)
class LabelFlip(Behaviour):
    """Train on wrong labels.

    `mode` says which: `mirror` turns class y into `classes - 1 - y` (Fang et al.), `targeted` turns `source` into `target` only,
    `random` draws another class for every sample anew each round. `fraction` of the samples, drawn anew each round, are flipped.
    """

    mode: Literal["mirror", "targeted", "random"] = "mirror"
    source: Annotated[int, Field(ge=0)] | None = None
    target: Annotated[int, Field(ge=0)] | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        given = self.source is not None and self.target is not None
        if self.mode == "targeted" and (not given or self.source == self.target):
            raise InputError("mode 'targeted' needs two different classes, source and target", "source")
        if self.mode != "targeted" and (self.source is not None or self.target is not None):
            raise InputError(f"source and target belong to mode 'targeted', not '{self.mode}'", "source")

    def check(self, task: Task) -> str | None:
        """Refuse regressions and classes that do not exist."""
        if task.kind != "classification":
            return "flips class labels, but the task is a regression"
        if max(self.source or 0, self.target or 0) >= task.classes:
            return f"the task has classes 0 to {task.classes - 1} only"
        return None

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the same samples with wrong labels."""
        wrong = self._flipped(y, view.task, view.rng)
        if self.fraction < 1:
            spared = torch.randperm(len(y), generator=view.rng)[max(1, round(self.fraction * len(y))) :].to(y.device)
            wrong = wrong.index_copy(0, spared, y[spared])
        return x, wrong

    def _flipped(self, y: Tensor, task: Task, rng: torch.Generator | None) -> Tensor:
        if self.mode == "mirror":
            return task.classes - 1 - y
        if self.source is not None and self.target is not None:
            return y.masked_fill(y.eq(self.source), self.target)
        shift = torch.randint(1, task.classes, y.shape, generator=rng).to(y.device)
        return (y + shift) % task.classes

    def goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor] | None:
        """Count as success: the wrong class that the labels were turned into. Random flipping aims at none."""
        if self.mode == "random":
            return None
        return x, self._flipped(y, task, None)
