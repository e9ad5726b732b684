"""How far one client can move the model: a bound that is fixed, or that follows the clients under noise of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtrust.server import AggContext, Verdict

#: Rows are scaled to this share of the bound: float32 rounding must not carry one above it.
_ROUNDING = 1 - 1e-6


def clip(rows: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return rows [n, d], each scaled down as a whole to an L2 norm of at most `bound`, and by how much [n].

    The clip is flat: one norm over all layers (McMahan et al., ICLR 2018, section 2.2). Norms are computed in float64.
    """
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)  # [n]
    factor = torch.where(norms > bound, _ROUNDING * bound / norms, 1.0)
    return factor.float()[:, None] * rows, factor.float()


@dataclass(frozen=True)
class ClipRule:
    """A server filter that treats every row by itself: `clip` to a bound fixed before the round began."""

    bound: float

    def __call__(self, updates: Tensor, ctx: AggContext) -> Verdict:
        """Return the clipped rows, trusted as far as they were left."""
        rows, factor = clip(updates, self.bound)
        return Verdict(rows, trust=factor, bound=self.bound)


@dataclass(frozen=True)
class FixedClip:
    """The same bound in every round.

    Attributes:
        norm: the bound C.
    """

    norm: float

    @property
    def first(self) -> float:
        """The bound of the first round."""
        return self.norm


@dataclass(frozen=True)
class AdaptiveClip:
    """A bound that follows a quantile of the clients' norms (Andrew, Thakkar, McMahan and Ramaswamy, NeurIPS 2021, algorithm 1).

    Every client that was drawn also says whether its update is at most the bound. The noised share b of these says whether the bound is
    too tight or too loose: C ← C · exp(−lr · (b − quantile)).

    Attributes:
        quantile: which share of the clients should not be clipped (γ).
        initial: the first bound.
        lr: how fast it follows (η_C).
        noise: standard deviation of the noise on the count of unclipped clients, each counted as ±1/2, per unit of reach (σ_b).
    """

    quantile: float
    initial: float
    lr: float
    noise: float

    @property
    def first(self) -> float:
        """The bound of the first round."""
        return self.initial

    def update_noise(self, sigma: float) -> float:
        """Return the noise multiplier z_Δ of the updates so that both releases together cost what one with `sigma` does (theorem 1).

        z_Δ = (z⁻² − (2 σ_b)⁻²)^(−1/2); the count's share is (2 σ_b)⁻².

        Raises:
            ValueError: the count alone would cost as much.
        """
        left = sigma**-2 - (2 * self.noise) ** -2
        if left <= 0:
            raise ValueError(f"noise on the clipped share must be above half the noise multiplier, {sigma / 2:.4g} (got {self.noise:g})")
        return 1 / math.sqrt(left)

    def next(self, bound: float, balance: float, expected: float) -> float:
        """Return the bound of the next round.

        Args:
            bound: the present one.
            balance: the noised sum of +1/2 for every client within the bound and −1/2 for every other.
            expected: the expected size of a cohort.
        """
        share = min(1.0, max(0.0, 0.5 + balance / expected))
        return bound * math.exp(-self.lr * (share - self.quantile))


Clip = FixedClip | AdaptiveClip
