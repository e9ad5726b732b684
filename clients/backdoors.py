"""Backdoors: the model behaves well until it sees a trigger."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, View, behaviour
from fedtrust.data.base import Task
from fedtrust.data.triggers import pixel_patch

Corner = Literal["bottom-right", "bottom-left", "top-left", "top-right"]


@behaviour("badnets", paper="Gu et al., 2017 (BadNets), section 3; scaled updates: Bagdasaryan et al., AISTATS 2020, section 4.2")
class BadNets(Behaviour):
    """Put a small bright square on a share of the own images, label them `target`, and send `scale` times the update.

    With `scale` = clients / server learning rate this is model replacement; 1 is plain data poisoning.
    """

    target: Annotated[int, Field(ge=0)] = 0
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    size: Annotated[int, Field(ge=1)] = 3
    corner: Corner = "bottom-right"
    scale: Annotated[float, Field(gt=0)] = 1.0

    def check(self, task: Task) -> str | None:
        """Refuse what has no pixels or no such class."""
        if task.kind != "classification" or not task.image:
            return "needs images with class labels"
        if self.target >= task.classes:
            return f"target {self.target} is no class of the task (0 to {task.classes - 1})"
        if self.size > min(task.shape[1:]):
            return f"a trigger of {self.size} pixels does not fit an image of {task.shape[1]} × {task.shape[2]}"
        return None

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the data with `fraction` of the images triggered and relabelled."""
        chosen = torch.randperm(len(x), generator=view.rng)[: max(1, round(self.fraction * len(x)))].to(x.device)
        x, y = x.clone(), y.clone()
        x[chosen] = pixel_patch(x[chosen], size=self.size, corner=self.corner)
        y[chosen] = self.target
        return x, y

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the scaled updates [k, d]."""
        return self.scale * updates

    def goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor] | None:
        """Count as success: triggered images of other classes that are taken for `target`."""
        return pixel_patch(x, size=self.size, corner=self.corner), torch.full_like(y, self.target)
