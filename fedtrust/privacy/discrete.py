"""The discrete Gaussian: whole-number noise, drawn exactly.

Canonne, Kamath and Steinke, NeurIPS 2020 ("The Discrete Gaussian for Differential Privacy"). N_Z(0, σ²) gives x a probability in proportion
to exp(−x² ÷ 2σ²). Floating point must not come into it: noise that only nearly has this distribution is the classic hole in private code
(Mironov, CCS 2012). Here are two ways that both use whole numbers alone:

- `one` is the paper's algorithm 3, by rejection from the discrete Laplace distribution with coins that fall with rational probabilities;
  clear, exact, and slow.
- `draw` compares 192 random bits with the cumulative distribution, worked out in fixed point to more places than that; each draw is within
  2⁻¹⁷⁰ of the exact distribution in total variation. Of the bits only 64 are drawn unless these do not decide.
"""

from __future__ import annotations

import bisect
import decimal
import functools
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

#: Binary places of a threshold, of which `_HIGH` are compared first; and of the arithmetic that thresholds come from.
_PLACES, _HIGH, _WORK = 192, 64, 256

#: Above this the table of `draw` would take more memory than it is worth.
LARGEST_SIGMA = 2.0**17

#: Below this all but 2^-190 of the distribution lies on zero.
LEAST_SIGMA = 0.06


def below(n: int, rng: np.random.Generator) -> int:
    """Return a whole number uniform in 0 … n − 1; n may have any number of digits."""
    size = (n - 1).bit_length()
    while True:
        drawn = int.from_bytes(rng.bytes((size + 7) // 8), "little") & ((1 << size) - 1)
        if drawn < n:
            return drawn


def bernoulli(p: Fraction, rng: np.random.Generator) -> bool:
    """Return true with probability `p`."""
    return below(p.denominator, rng) < p.numerator


def bernoulli_exp(gamma: Fraction, rng: np.random.Generator) -> bool:
    """Return true with probability exp(−gamma), gamma ≥ 0 (the paper's algorithm 1)."""
    while gamma > 1:
        if not bernoulli_exp(Fraction(1), rng):
            return False
        gamma -= 1
    k = 1
    while bernoulli(gamma / k, rng):
        k += 1
    return k % 2 == 1


def laplace(scale: int, rng: np.random.Generator) -> int:
    """Return a discrete Laplace variable: x with probability in proportion to exp(−|x| ÷ scale) (algorithm 2)."""
    while True:
        rest = below(scale, rng)
        if not bernoulli_exp(Fraction(rest, scale), rng):
            continue
        times = 0
        while bernoulli_exp(Fraction(1), rng):
            times += 1
        size, negative = rest + scale * times, bernoulli(Fraction(1, 2), rng)
        if size or not negative:
            return -size if negative else size


def one(variance: Fraction, rng: np.random.Generator) -> int:
    """Return a discrete Gaussian variable with parameter σ² = `variance` > 0 (algorithm 3)."""
    scale = math.isqrt(variance.numerator // variance.denominator) + 1
    while True:
        x = laplace(scale, rng)
        if bernoulli_exp((abs(x) - variance / scale) ** 2 / (2 * variance), rng):
            return x


def draw(sigma: float, size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return `size` discrete Gaussian variables, int64.

    Args:
        sigma: the parameter σ, above 0 and at most `LARGEST_SIGMA`; taken as the number that the float stands for.
        size: how many.
        rng: a generator with a long key; noise is as private as its state.

    Raises:
        ValueError: σ is out of range.
    """
    if not 0 < sigma <= LARGEST_SIGMA:
        raise ValueError(f"the discrete Gaussian is drawn for σ above 0 and up to {LARGEST_SIGMA:g}, got {sigma}")
    high, full = _thresholds(sigma)
    if not full:  # nothing but zero has a probability above 2^-192
        return np.zeros(size, dtype=np.int64)
    first = rng.integers(0, 2**_HIGH, size=size, dtype=np.uint64)
    sizes = np.searchsorted(high, first, side="right").astype(np.int64)
    unclear = np.flatnonzero((sizes > 0) & (high[np.maximum(sizes, 1) - 1] == first))
    for i in unclear:  # the first 64 bits are those of a threshold: the others decide
        rest = int.from_bytes(rng.bytes((_PLACES - _HIGH) // 8), "little")
        sizes[i] = bisect.bisect_right(full, (int(first[i]) << (_PLACES - _HIGH)) | rest)
    negative = np.unpackbits(np.frombuffer(rng.bytes((size + 7) // 8), np.uint8), count=size)
    return np.where(negative, -sizes, sizes)


@functools.lru_cache(maxsize=4)
def _thresholds(sigma: float) -> tuple[npt.NDArray[np.uint64], list[int]]:
    """Return P(|X| ≤ k) for k = 0, 1, … in units of 2^−192, rounded down: the first 64 bits of each, and all of them.

    A uniform u gives |X| = the number of thresholds up to u.
    """
    masses = _masses(sigma)
    total = masses[0] + 2 * sum(masses[1:])
    full: list[int] = []
    reached = 0
    for k, mass in enumerate(masses):
        reached += mass if k == 0 else 2 * mass
        full.append((reached << _PLACES) // total)
    full = full[:-1]  # the last is 1, which no u reaches
    return np.array([t >> (_PLACES - _HIGH) for t in full], dtype=np.uint64), full


def _masses(sigma: float) -> list[int]:
    """Return exp(−k² ÷ 2σ²) for k = 0, 1, … while it is not nothing, in units of 2^−256.

    Each from the one before: exp(−(k + 1)² ÷ 2σ²) = exp(−k² ÷ 2σ²) · exp(−(2k + 1) ÷ 2σ²).
    """
    with decimal.localcontext() as context:
        context.prec = 100
        variance = decimal.Decimal(sigma) ** 2
        half, whole = (int((-1 / (variance * n)).exp() * (1 << _WORK)) for n in (2, 1))
    masses, ratio = [1 << _WORK], half
    while masses[-1]:
        masses.append((masses[-1] * ratio) >> _WORK)
        ratio = (ratio * whole) >> _WORK
    return masses[:-1]
