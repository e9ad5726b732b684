"""The discrete Gaussian, both ways of drawing it, against its probabilities worked out here."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedtrust.engine import seeds
from fedtrust.privacy import discrete


def rng(*counters: int) -> np.random.Generator:
    return seeds.stream(23, "discrete", *counters)


def pmf(sigma: float, reach: int) -> np.ndarray:
    """P(x) for x = −reach … reach by the definition."""
    x = np.arange(-reach, reach + 1)
    mass = np.exp(-(x.astype(np.float64) ** 2) / (2 * sigma**2))
    return mass / mass.sum()


def fit(drawn: np.ndarray, sigma: float) -> float:
    """The p-value of a chi² test against the exact probabilities; tails of less than five expected draws are one cell each."""
    reach = max(2, math.ceil(12 * sigma))
    expected = pmf(sigma, reach) * len(drawn)
    counts = np.bincount(np.clip(drawn, -reach, reach) + reach, minlength=2 * reach + 1)
    keep = expected >= 5
    first, last = keep.argmax(), len(keep) - keep[::-1].argmax()

    def cells(values: np.ndarray) -> np.ndarray:
        return np.array([values[:first].sum(), *values[first:last], values[last:].sum()])

    seen, wanted = cells(counts), cells(expected)
    filled = wanted > 1e-9
    return float(stats.chisquare(seen[filled], wanted[filled] * seen[filled].sum() / wanted[filled].sum()).pvalue)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 3.7, 40.0])
def test_the_fast_draw_has_the_exact_distribution(sigma: float) -> None:
    drawn = discrete.draw(sigma, 400_000, rng())
    assert fit(drawn, sigma) > 1e-4


@pytest.mark.parametrize("sigma", [0.5, 2.25])
def test_the_papers_algorithm_has_the_exact_distribution(sigma: float) -> None:
    generator = rng(1)
    drawn = np.array([discrete.one(Fraction(sigma) ** 2, generator) for _ in range(3000)])
    assert fit(drawn, sigma) > 1e-4


def test_the_chi2_test_sees_a_wrong_distribution() -> None:
    """A rounded normal of the same σ, and a σ two percent off, are both found out."""
    assert fit(np.rint(rng().normal(0, 0.7, 400_000)).astype(np.int64), 0.7) < 1e-12
    assert fit(discrete.draw(1.02, 400_000, rng()), 1.0) < 1e-12


@pytest.mark.parametrize("sigma", [0.4, 1.0, 100.0, 5000.0])
def test_its_moments(sigma: float) -> None:
    """Mean 0; variance as its probabilities have it, at most σ² (Canonne et al., corollary 9); symmetric; within five standard errors."""
    n = 400_000
    drawn = discrete.draw(sigma, n, rng(4)).astype(np.float64)
    reach = math.ceil(12 * sigma)
    x = np.arange(-reach, reach + 1, dtype=np.float64)
    variance = float((pmf(sigma, reach) * x**2).sum())
    fourth = float((pmf(sigma, reach) * x**4).sum())
    assert variance <= sigma**2 * (1 + 1e-12)
    assert abs(drawn.mean()) < 5 * math.sqrt(variance / n)
    assert abs((drawn**2).mean() - variance) < 5 * math.sqrt((fourth - variance**2) / n)
    assert abs((drawn > 0).mean() - (drawn < 0).mean()) < 5 / math.sqrt(n)


def test_the_coins() -> None:
    """exp(−γ) by the paper's algorithm 1, below and above 1; the discrete Laplace distribution by algorithm 2."""
    generator = rng(2)
    for gamma in (Fraction(0), Fraction(1, 3), Fraction(1), Fraction(9, 4)):
        share = np.mean([discrete.bernoulli_exp(gamma, generator) for _ in range(4000)])
        p = math.exp(-gamma)
        assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 4000) + 1e-12)
    drawn = np.array([discrete.laplace(3, generator) for _ in range(4000)])
    x = np.arange(-30, 31)
    p = np.exp(-np.abs(x) / 3)
    expected = p / p.sum() * 4000
    keep = expected >= 5
    seen = np.array([(drawn == k).sum() for k in x[keep]])
    assert stats.chisquare(np.append(seen, 4000 - seen.sum()), np.append(expected[keep], 4000 - expected[keep].sum())).pvalue > 1e-4


def test_uniform_whole_numbers_of_any_length() -> None:
    generator = rng(3)
    small = np.bincount([discrete.below(6, generator) for _ in range(6000)], minlength=6)
    assert stats.chisquare(small).pvalue > 1e-4
    large = 3 * 2**200
    drawn = [discrete.below(large, generator) for _ in range(300)]
    assert max(drawn) < large
    assert 0.4 < np.mean([x > large // 2 for x in drawn]) < 0.6
    assert discrete.below(1, generator) == 0


class Stuck:
    """A generator whose first 64 bits are always those of a threshold, and whose other bits are as given."""

    def __init__(self, first: int, rest: bytes) -> None:
        self._first, self._rest = first, rest

    def integers(self, low: int, high: int, size: int, dtype: Any) -> np.ndarray:
        return np.full(size, self._first, dtype=dtype)

    def bytes(self, count: int) -> bytes:
        return self._rest[:1] * count


@pytest.mark.parametrize("k", [0, 1, 5])
def test_where_64_bits_do_not_decide_more_are_drawn(k: int) -> None:
    high, full = discrete._thresholds(2.0)
    first = int(high[k])
    assert full[k] >> 128 == first
    below = discrete.draw(2.0, 1, Stuck(first, b"\x00"))  # type: ignore[arg-type]
    above = discrete.draw(2.0, 1, Stuck(first, b"\xff"))  # type: ignore[arg-type]
    assert abs(int(below[0])) == k
    assert abs(int(above[0])) == k + 1


def test_the_thresholds_are_the_cumulative_probabilities() -> None:
    for sigma in (0.3, 2.0, 55.5):
        _, full = discrete._thresholds(sigma)
        mass = pmf(sigma, math.ceil(20 * sigma) + 2)
        middle = len(mass) // 2
        for k in range(min(len(full), 8)):
            exact = mass[middle - k : middle + k + 1].sum()
            assert full[k] / 2**192 == pytest.approx(exact, rel=1e-12)
        assert all(a <= b < 2**192 for a, b in itertools.pairwise(full))


@pytest.mark.parametrize("sigma", [0.0, -1.0, 2.0**18, math.nan])
def test_what_is_no_parameter(sigma: float) -> None:
    with pytest.raises(ValueError, match="drawn for σ above 0"):
        discrete.draw(sigma, 3, rng())


def test_the_same_stream_gives_the_same_noise_and_another_other() -> None:
    first, again, other = (discrete.draw(9.0, 100, rng(c)) for c in (1, 1, 2))
    assert np.array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_a_width_with_nothing_beside_zero_draws_zeros() -> None:
    assert not discrete.draw(1e-6, 50, seeds.stream(23, "discrete", 99)).any()
    assert discrete.draw(discrete.LEAST_SIGMA, 50, seeds.stream(23, "discrete", 99)).max() <= 1
