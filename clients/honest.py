"""Clients that follow the protocol."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, Predict, View, behaviour


@behaviour("honest", role="honest", paper="McMahan et al., AISTATS 2017, algorithm 1 (ClientUpdate)")
class Honest(Behaviour):
    """Train on the own data with the protocol's loss and send the result."""


@behaviour("fedprox", role="honest", paper="Li et al., MLSys 2020, algorithm 2")
class FedProx(Behaviour):
    """Add `mu / 2 * ||w - w_global||²` to the loss, so that clients with odd data drift less."""

    mu: Annotated[float, Field(gt=0)] = 0.01

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return the protocol's loss plus the proximal term."""
        drift = predict.params - view.params  # [d]
        return view.criterion(predict(x), y) + 0.5 * self.mu * drift.square().sum()
