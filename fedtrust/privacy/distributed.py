"""The distributed discrete Gaussian: every client adds a little whole-number noise, and only the noised sum is ever seen.

Kairouz, Liu and Steinke, ICML 2021 ("The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation"). A client
clips its vector to L2 norm c, turns it (random signs, then a Walsh–Hadamard transform, padded with zeros to a power of two, so that no
coordinate stands out), divides it by γ, rounds every coordinate up or down at random until the norm is within a bound fixed beforehand
(conditional rounding), and adds discrete Gaussian noise. The sum is taken modulo 2^bits by secure aggregation, and turned back.

What it costs is the paper's theorem 1: a sum of discrete Gaussians is not quite one, by τ. Neighbours: one client's vector replaced by
zeros; who takes part is known, so no sampling helps. Concentrated differential privacy adds up over the rounds that a client was in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedtrust.privacy.discrete import LARGEST_SIGMA, LEAST_SIGMA, draw
from fedtrust.privacy.secure_sum import Floats, Integers, centred, rounded

Doubles = npt.NDArray[np.float64]

#: Conditional rounding is tried at most so often: each try succeeds with probability at least 1 − β.
_TRIES = 10_000


@dataclass(frozen=True)
class DiscreteGaussianSum:
    """The mechanism for one round.

    Attributes:
        size: d, of a client's vector.
        clients: n, how many add noise if all that were asked reply; the noise of each is made for that.
        clip: c, the largest L2 norm of a vector.
        noise_multiplier: standard deviation of all noise together ÷ c.
        bits: of the group in which the sum is taken.
        beta: β, the probability with which a rounding may be thrown away; a little bias for less sensitivity. 0 keeps every rounding.
        spread: k, how many standard deviations of a coordinate of the sum must fit into the group.
    """

    size: int
    clients: int
    clip: float
    noise_multiplier: float
    bits: int
    beta: float = math.exp(-0.5)
    spread: float = 4.0

    def __post_init__(self) -> None:
        if 2.0 ** (2 * self.bits) <= self.clients * self.spread**2:
            raise ValueError(f"{self.bits} bits are too few for the sum of {self.clients} clients")
        if self.local_sigma > LARGEST_SIGMA:
            raise ValueError(f"{self.bits} bits make a grid so fine that the noise is {self.local_sigma:.3g} steps; use fewer bits")
        if self.local_sigma < LEAST_SIGMA:
            raise ValueError(f"the noise is {self.local_sigma:.3g} steps of the grid, so next to none; use more bits or more noise")

    @property
    def padded(self) -> int:
        """The length of what is rounded: d up to the next power of two."""
        return 1 << (self.size - 1).bit_length()

    @cached_property
    def gamma(self) -> float:
        """γ, the grid's step: the smallest with which `spread` deviations of a turned, rounded and noised coordinate of the sum fit.

        The paper's choice (section 4.2 and equation 61, ρ = 1): 2^bits · γ = 2k √((nc)² ÷ D + n (γ² ÷ 4 + σ²)).
        """
        n, k = self.clients, self.spread
        variance = (n * self.clip) ** 2 / self.padded + n * self.local_noise**2
        return 2 * k * math.sqrt(variance / (2.0 ** (2 * self.bits) - n * k**2))

    @property
    def local_noise(self) -> float:
        """σ, the standard deviation of one client's noise, in the units of the update."""
        return self.noise_multiplier * self.clip / math.sqrt(self.clients)

    @property
    def local_sigma(self) -> float:
        """The parameter of one client's discrete Gaussian, in steps of the grid: σ ÷ γ."""
        return self.local_noise / self.gamma

    @cached_property
    def norm(self) -> float:
        """The largest L2 norm that a rounded vector may have, in steps of the grid: the sensitivity."""
        clip, size = self.clip / self.gamma, self.padded
        loose = clip + math.sqrt(size)
        if not self.beta:
            return loose
        tight = clip**2 + size / 4 + math.sqrt(2 * math.log(1 / self.beta)) * (clip + math.sqrt(size) / 2)
        return min(loose, math.sqrt(tight))

    # The client's half

    def encode(self, row: Floats, signs: Doubles, rounding: np.random.Generator, noise: np.random.Generator) -> Integers:
        """Return what a client puts into the masked sum [D]: whole numbers, noise included.

        Args:
            row: its update [d].
            signs: the round's signs, known to all.
            rounding: its own generator, for the rounding.
            noise: its own generator, for the noise.
        """
        return self.round(self.turn(row, signs) / self.gamma, rounding) + draw(self.local_sigma, self.padded, noise)

    def turn(self, row: Floats, signs: Doubles) -> Doubles:
        """Return the clipped row [d], turned [D]: as long as it was, spread over all coordinates."""
        padded = np.zeros(self.padded)
        padded[: self.size] = row
        length = float(np.linalg.norm(padded))
        return hadamard(padded * signs * min(1.0, self.clip / length if length else 1.0))

    def round(self, values: Doubles, rng: np.random.Generator) -> Integers:
        """Return the values [D] as whole numbers with a norm of at most `norm`."""
        for _ in range(_TRIES):
            found = rounded(values, rng)
            if float(np.square(found, dtype=np.float64).sum()) <= self.norm**2:
                return found
        raise RuntimeError(f"no rounding of {_TRIES} is within the bound: the values are longer than the clip")

    # The server's half

    def signs(self, rng: np.random.Generator) -> Doubles:
        """Return a round's random signs [D]; they hide nothing and are told to everybody."""
        return np.where(rng.random(self.padded) < 0.5, -1.0, 1.0)

    def decode(self, total: Integers, signs: Doubles) -> Doubles:
        """Return the noised sum of the updates [d] from the sum in the group [D]."""
        turned = hadamard(self.gamma * centred(total, self.bits).astype(np.float64))
        return (turned * signs)[: self.size]

    # What it costs

    def rho(self, noisy: int) -> float:
        """Return ρ of one round's zero-concentrated differential privacy: theorem 1's ε² ÷ 2.

        Args:
            noisy: how many clients' noise is counted on, of those in the sum.
        """
        if noisy < 1:
            return math.inf
        return 0.5 * self.scale(noisy) ** 2

    def scale(self, noisy: int) -> float:
        """Return theorem 1's ε of one round (ε² ÷ 2 is its zero-concentrated differential privacy)."""
        sigma, size = self.local_sigma, self.padded
        far = tau(sigma, noisy)
        reach = self.norm / (math.sqrt(noisy) * sigma)
        return min(math.sqrt(reach**2 + far * size / 2), reach + far * math.sqrt(size))


def tau(sigma: float, count: int) -> float:
    """Return τ = 10 Σ_{k=1}^{n−1} exp(−2π²σ² k ÷ (k + 1)): how far a sum of n discrete Gaussians is from one (theorem 1)."""
    return 10 * sum(math.exp(-2 * (math.pi * sigma) ** 2 * k / (k + 1)) for k in range(1, count))


def epsilon_of_rho(rho: float, delta: float) -> float:
    """Return an ε at `delta` that ρ-zero-concentrated differential privacy implies.

    Canonne, Kamath and Steinke, NeurIPS 2020, corollary 13: the best α > 1 in δ = exp((α − 1)(αρ − ε)) ÷ (α − 1) · (1 − 1 ÷ α)^α.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    if rho <= 0 or math.isinf(rho):
        return max(0.0, rho)

    def at(exponent: float) -> float:
        over = math.exp(exponent)  # α − 1
        alpha = over + 1
        return alpha * rho - (math.log(delta * over) - alpha * math.log1p(-1 / alpha)) / over

    # Every α gives a valid ε. Around the best α of the simple bound ρ + 2 √(ρ log(1 ÷ δ)) there is one minimum: thirds are cut off.
    around = 0.5 * math.log(math.log(1 / delta) / rho)
    low, high = around - 6, around + 6
    while high - low > 1e-9:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if at(left) < at(right) else (left, high)
    return max(0.0, at((low + high) / 2))


def hadamard(values: Doubles) -> Doubles:
    """Return the Walsh–Hadamard transform of values [D] ÷ √D, D a power of two: an orthogonal matrix that is its own inverse."""
    result = values.astype(np.float64, copy=True)
    half = 1
    while half < len(result):
        pairs = result.reshape(-1, 2, half)
        first, second = pairs[:, 0].copy(), pairs[:, 1]
        pairs[:, 0] += second
        np.subtract(first, second, out=second)
        half *= 2
    result /= math.sqrt(len(result))
    return result
