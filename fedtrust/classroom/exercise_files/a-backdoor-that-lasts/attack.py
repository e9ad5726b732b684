"""My backdoor. This one stamps the trigger into half of its clients' data and does nothing else; it runs, and is soon forgotten."""

from __future__ import annotations

import torch

from fedtrust import Behaviour, behaviour

TARGET, SIZE = 0, 2


@behaviour("my-backdoor", knowledge="coalition")
class MyBackdoor(Behaviour):
    """Poison the data; leave the update as training gives it."""

    fraction: float = 0.5
    scale: float = 1.0

    def poison(self, x, y, view):
        """Return the data that a client trains on, from its own x [b, 1, 8, 8] and y [b]."""
        chosen = torch.rand(len(x), generator=view.rng) < self.fraction
        x, y = x.clone(), y.clone()
        x[chosen, :, -SIZE:, -SIZE:] = 1.0
        y[chosen] = TARGET
        return x, y

    def craft(self, updates, view):
        """Return what the coalition sends [k, d], from what training gave [k, d]."""
        return self.scale * updates
