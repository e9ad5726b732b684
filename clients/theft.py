"""Clients who take the model with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtrust.client import Behaviour, ClientMemory, View, behaviour
from fedtrust.probes.guesses import Copy, Guess


@behaviour(
    "walk-away", claims=True, paper="the white-box baseline that Tramèr et al., USENIX Security 2016, section 1, set queries against"
)
class WalkAway(Behaviour):
    """Take part honestly, keep the model that was sent last, and leave: no query, no loss, and nothing that a server could see.

    What every theft by queries is measured against. The copy is the model as the clients were sent it in the thief's last round, so it
    misses what the server made of that round.
    """

    def remember(self, size: int) -> ClientMemory:
        """Return where the model that it was sent is kept [size]."""
        return {"model": torch.zeros(size)}

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Send what training gave, and keep the model."""
        view.memory["model"] = view.params.clone()
        return updates

    def claim(self, view: View) -> Mapping[str, Guess]:
        """Return the model that it kept; nothing if it was never asked."""
        kept = view.memory.get("model")
        if kept is None or not bool(kept.any()):
            return {}
        model = view.model

        def predict(x: Tensor) -> Tensor:
            with torch.no_grad():
                return model(kept, x)

        return {"walk-away": Copy(predict, 0, kept)}
