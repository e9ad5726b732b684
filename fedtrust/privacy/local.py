"""Local client-level differential privacy: a client noises its own update, because it trusts nobody."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtrust.privacy.accountants import FINE, Method, epsilon_gaussian
from fedtrust.privacy.clipping import clip


@dataclass(frozen=True)
class LocalMechanism:
    """The Gaussian mechanism on one client's update: clip, noise, account.

    Whoever sees the noised update cannot tell well which data the client has: neighbours are any two data sets of that client
    (replace-one), so an update moves by up to 2C. No sampling helps: the observer sees who took part.

    Attributes:
        clip: C, the L2 bound on the update.
        sigma: the noise multiplier; the noise has a standard deviation of σ · 2C in each coordinate.
    """

    clip: float
    sigma: float

    @property
    def std(self) -> float:
        """The standard deviation of the noise in each coordinate."""
        return self.sigma * 2 * self.clip

    def release(self, updates: Tensor, rng: np.random.Generator) -> Tensor:
        """Return noised updates [k, d] of clients that act alike, each clipped to C before."""
        rows, _ = clip(updates, self.clip)
        return (rows.double() + torch.from_numpy(self.std * rng.standard_normal(tuple(rows.shape)))).float()

    def epsilon(self, rounds: int, delta: float, *, method: Method = "pld", grid: float = FINE) -> float:
        """Return the ε at `delta` of having sent an update in so many rounds."""
        return epsilon_gaussian(self.sigma, rounds, delta, method=method, grid=grid)
