"""Record-level differential privacy of a client's local steps: DP-SGD (Abadi et al., CCS 2016, algorithm 1) as one object.

The object draws the batches, bounds what a record can do to a step, adds the noise and says what it costs, so that an ε can only be
reported for the sampling that really happened. Neighbours are two data sets of a client of which one has one record more
(add-or-remove-one). A client's number of samples is public: it is registered with the server, and q and the denominator rest on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtrust.privacy.accountants import FINE, Method, epsilon_poisson


@dataclass(frozen=True)
class RecordMechanism:
    """What one client does to protect its records: Poisson batches, a flat clip of every record's gradient, Gaussian noise.

    Attributes:
        samples: the client's number of samples n.
        batch_size: the expected batch, at most n: each record is in each batch with probability q = batch_size / n.
        clip: the bound C on the L2 norm of a record's gradient over all layers together.
        noise_multiplier: σ; the noise on the sum of a batch has a standard deviation of σ·C in each coordinate.
    """

    samples: int
    batch_size: int
    clip: float
    noise_multiplier: float

    @property
    def expected(self) -> float:
        """The expected batch q·n, the denominator of every step: the true size of a batch would say who is in it."""
        return float(min(self.batch_size, self.samples))

    @property
    def probability(self) -> float:
        """The probability q of a record to be in a batch."""
        return self.expected / self.samples

    def draw(self, steps: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return who is in each batch, [steps, largest batch], filled up with -1; a batch may be empty."""
        inside = rng.random((steps, self.samples)) < self.probability  # always, for q = 1: draws are below 1
        batches = np.full((steps, max(1, int(inside.sum(axis=1).max(initial=0)))), -1, dtype=np.int64)
        for row, taken in zip(batches, inside, strict=True):
            rows = np.flatnonzero(taken)
            row[: len(rows)] = rows
        return batches

    def bounded(self, gradients: Tensor, taken: Tensor) -> Tensor:
        """Return the sum of the clipped gradients of those in the batch.

        Args:
            gradients: one a record, [..., s, d]; one whose norm is not finite counts as zero, or it would tell on its record.
            taken: whether a record is in the batch, bool [..., s].

        Returns:
            [..., d]; one record more changes it by at most `clip` in L2 norm.
        """
        norms = torch.linalg.vector_norm(gradients, dim=-1)
        finite = torch.isfinite(norms)
        if not bool(finite.all()):
            gradients = torch.where(finite.unsqueeze(-1), gradients, 0.0)
        factors = torch.where(taken & finite, self.clip / norms.clamp(min=self.clip), 0.0)
        return torch.einsum("...s,...sd->...d", factors, gradients)

    def noise(self, size: int, rng: np.random.Generator) -> Tensor:
        """Return the noise of one step [size], float32; drawn in float64 from a generator of 128 bits.

        Samples of a floating-point Gaussian leak by their low bits (Mironov, CCS 2012); that is left out here, as in Opacus' default.
        """
        return torch.from_numpy(self.noise_multiplier * self.clip * rng.standard_normal(size)).float()

    def release(self, total: Tensor, noise: Tensor) -> Tensor:
        """Return the gradient of a step [..., d], from the sum of the batch and the noise, [..., d] each."""
        return (total + noise) / self.expected

    def epsilon(self, steps: int, delta: float, *, method: Method = "pld", grid: float = FINE) -> float:
        """Return the ε at `delta` of so many steps (add-or-remove-one)."""
        return epsilon_poisson(self.probability, self.noise_multiplier, steps, delta, method=method, grid=grid) if steps else 0.0
