"""Honest clients that train on samples made to fool their own model (adversarial training)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, Predict, View, behaviour
from fedtrust.data.base import Task


@behaviour(
    "adversarial-training",
    role="honest",
    paper="Madry et al., ICLR 2018, sections 2 and 4 (PGD); by federated clients: Zizzo, Rawat, Sinn and Buesser, 2020 (FAT)",
)
class AdversarialTraining(Behaviour):
    """Train on samples that were moved within an L∞ ball round the true ones so that the client's own model gets them wrong.

    In every step each sample of the batch goes `steps` signed gradient steps uphill on the protocol's loss, each of `step` (by default the
    papers' 2.5 · `epsilon` / `steps`), is put back into the ball of radius `epsilon` and into the range of a feature, and the loss there is
    what is minimised; `share` of it, the rest is the loss on the samples as they are (Madry et al.: 1; Goodfellow et al., ICLR 2015,
    section 6: 0.5). The gradient goes through the loss and not through the search. The papers begin at a random point of the ball; a
    batched loss has no randomness, so the search begins at the sample itself.
    """

    epsilon: Annotated[float, Field(gt=0)] = 0.1
    steps: Annotated[int, Field(ge=1, le=100)] = 7
    step: Annotated[float, Field(gt=0)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 1.0

    def check(self, task: Task) -> str | None:
        """Refuse texts: a character cannot be moved a little."""
        return "moves features a little, and characters cannot be moved" if task.kind == "characters" else None

    def moved(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return the samples [b, *shape] where the search leaves them; no gradient leads back."""
        frozen, low, high = predict.frozen(), view.task.low, view.task.high
        uphill = torch.func.grad(lambda at: view.criterion(frozen(at), y))
        step = self.step or 2.5 * self.epsilon / self.steps
        at = x
        for _ in range(self.steps):
            away = (at + step * uphill(at).sign() - x).clamp(-self.epsilon, self.epsilon)
            at = (x + away).clamp(low, high) if low is not None else x + away
        return at.detach()

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return the loss on the moved samples, and on the others where `share` leaves them something."""
        hard = view.criterion(predict(self.moved(predict, x, y, view)), y)
        return hard if self.share == 1 else self.share * hard + (1 - self.share) * view.criterion(predict(x), y)
