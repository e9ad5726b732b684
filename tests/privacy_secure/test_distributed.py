"""The distributed discrete Gaussian: its halves fit together, its noise is what it says, and its price is theorem 1's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import hadamard as explicit

from fedtrust.engine import seeds
from fedtrust.privacy import secure_sum
from fedtrust.privacy.accountants import epsilon_gaussian
from fedtrust.privacy.distributed import DiscreteGaussianSum, epsilon_of_rho, hadamard, tau


def rng(*counters: int) -> np.random.Generator:
    return seeds.stream(31, "distributed", *counters)


def mechanism(size: int = 100, clients: int = 10, clip: float = 1.0, noise: float = 1.0, bits: int = 16, beta: float = math.exp(-0.5)):
    return DiscreteGaussianSum(size, clients, clip, noise, bits, beta)


def summed(by: DiscreteGaussianSum, rows: list[np.ndarray], *key: int) -> np.ndarray:
    """What the server gets of these rows [d]."""
    signs = by.signs(rng(0, *key))
    encoded = [by.encode(row, signs, rng(1, i, *key), rng(2, i, *key)) for i, row in enumerate(rows)]
    return by.decode(secure_sum.add(encoded, by.bits, count=len(rows)), signs)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_transform_is_the_matrix_and_its_own_inverse(size: int) -> None:
    values = rng().normal(size=size)
    assert hadamard(values) == pytest.approx(explicit(size) @ values / math.sqrt(size), abs=1e-12)
    assert hadamard(hadamard(values)) == pytest.approx(values, abs=1e-12)


def test_turning_keeps_the_length_up_to_the_clip_and_spreads_it() -> None:
    by = mechanism(size=1000, clip=2.0)
    signs = by.signs(rng())
    spike = np.zeros(1000)
    spike[3] = 1.5
    turned = by.turn(spike, signs)
    assert len(turned) == 1024
    assert np.linalg.norm(turned) == pytest.approx(1.5)
    assert np.abs(turned).max() == pytest.approx(1.5 / 32)  # every coordinate has its share
    assert np.linalg.norm(by.turn(5 * spike, signs)) == pytest.approx(2.0)
    assert not by.turn(np.zeros(1000), signs).any()


def test_without_noise_the_sum_comes_back() -> None:
    """Noise of a millionth of the clip: what is left of error is the grid's. End to end, against the float sum of the clipped rows."""
    by = mechanism(size=200, clients=8, noise=1e-6, bits=20)
    rows = [rng(5, i).normal(0, 0.2, 200) for i in range(8)]
    clipped = [row * min(1, 1 / np.linalg.norm(row)) for row in rows]
    assert all(np.linalg.norm(row) > 1 for row in rows)
    error = summed(by, rows) - np.sum(clipped, axis=0)
    assert np.linalg.norm(error) < 3 * by.gamma * math.sqrt(8 * by.padded)
    assert np.linalg.norm(error) > 0


@pytest.mark.parametrize("beta", [0.0, math.exp(-0.5)])
def test_it_is_unbiased_and_its_error_is_the_noises(beta: float) -> None:
    """600 sums of the same rows: their mean is the true sum, their spread n·σ² + rounding, within five standard errors."""
    by, n, times = mechanism(size=60, clients=5, noise=0.5, bits=10, beta=beta), 5, 600
    rows = [rng(6, i).normal(0, 0.05, 60) for i in range(n)]
    found = np.array([summed(by, rows, t) for t in range(times)]) - np.sum(rows, axis=0)
    std = 0.5  # noise_multiplier × clip
    assert np.abs(found.mean(axis=0)).max() < 5 * std * 1.1 / math.sqrt(times)
    assert found.std() == pytest.approx(math.sqrt(std**2 + n * by.gamma**2 / 6), rel=0.02)  # E[p (1 − p)] = 1/6


def test_each_client_adds_its_share_of_noise() -> None:
    by = mechanism(size=4096, clients=16, noise=2.0, bits=16)
    signs = by.signs(rng())
    alone = by.encode(np.zeros(4096), signs, rng(1), rng(2)) * by.gamma
    assert alone.std() == pytest.approx(2.0 / 4, rel=0.05)
    assert by.local_noise == pytest.approx(0.5)


@pytest.mark.parametrize("beta", [0.0, 0.1, math.exp(-0.5)])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_no_rounding_is_longer_than_the_sensitivity(beta: float, bits: int) -> None:
    by = mechanism(size=500, clients=4, bits=bits, beta=beta)
    signs = by.signs(rng())
    for i in range(20):
        row = rng(8, i).normal(size=500) * (10 if i % 2 else 0.1)
        assert np.linalg.norm(by.round(by.turn(row, signs) / by.gamma, rng(9, i))) <= by.norm
    assert by.norm * by.gamma >= 1.0  # never below the clip


def test_conditional_rounding_throws_away_what_is_too_long() -> None:
    """A vector of halves is as long as any rounding makes it: a bound in the middle is exceeded, and a vector beyond it refused."""
    by = mechanism(size=64, clients=2, bits=8)
    values = np.full(64, 0.5)
    free = [float(np.linalg.norm(secure_sum.rounded(values, rng(i)))) for i in range(200)]
    object.__setattr__(by, "norm", float(np.median(free)))
    assert max(float(np.linalg.norm(by.round(values, rng(i)))) for i in range(200)) <= by.norm < max(free)
    with pytest.raises(RuntimeError, match="longer than the clip"):
        by.round(np.full(64, 100.0), rng())


def test_the_grid_fits_the_sum_into_the_group() -> None:
    """γ solves the paper's equation; rows that all point one way, the worst case, do not wrap around."""
    by = mechanism(size=300, clients=12, noise=0.8, bits=10)
    n, c, k = 12, 1.0, 4.0
    right = 2 * k * math.sqrt((c * n) ** 2 / by.padded + (by.gamma**2 / 4 + by.local_noise**2) * n) / by.gamma
    assert right == pytest.approx(2**10)
    same = rng(3).normal(size=300)
    same /= np.linalg.norm(same)
    error = summed(by, [same] * 12) - 12 * same
    assert error.std() < 1.2 * math.sqrt(0.8**2 + 12 * by.gamma**2 / 6)  # a wrapped coordinate would be off by 2^10 γ


def test_a_group_too_small_wraps_around_and_is_seen() -> None:
    """The check above can fail: with k far too small coordinates do wrap."""
    same = np.ones(300) / math.sqrt(300)
    errors = [summed(DiscreteGaussianSum(300, 12, 1.0, 0.05, 10, spread=k), [same] * 12) - 12 * same for k in (0.7, 4.0)]
    narrow, wide = (math.sqrt(np.mean(error**2)) for error in errors)
    assert narrow > 5 * 0.05 > wide > 0.9 * 0.05


def test_theorem_1_by_hand() -> None:
    """A coarse grid, on which every term counts: n = 3, D = 8, σ/γ and β as they come, numbers by the paper's formulas."""
    by = mechanism(size=8, clients=3, noise=0.3, bits=6, beta=0.2)
    s, c, d = by.local_noise / by.gamma, 1 / by.gamma, 8
    t = 10 * (math.exp(-2 * math.pi**2 * s**2 / 2) + math.exp(-2 * math.pi**2 * s**2 * 2 / 3))
    assert tau(s, 3) == pytest.approx(t, rel=1e-12)
    squared = min(c**2 + d / 4 + math.sqrt(2 * math.log(5)) * (c + math.sqrt(d) / 2), (c + math.sqrt(d)) ** 2)
    first = math.sqrt(squared / (3 * s**2) + t * d / 2)
    second = math.sqrt(squared) / (math.sqrt(3) * s) + t * math.sqrt(d)
    assert by.rho(3) == pytest.approx(0.5 * min(first, second) ** 2, rel=1e-12)
    assert by.rho(0) == math.inf


def test_tau_is_not_left_out() -> None:
    """With noise of less than a step a sum of discrete Gaussians is far from one, and that is paid for."""
    assert tau(0.3, 10) > 1
    assert tau(3.0, 10) < 1e-30
    assert tau(5.0, 1) == 0
    coarse = DiscreteGaussianSum(64, 10, 1.0, 0.5, 5, spread=2.0)
    plain = 0.5 * (coarse.norm / (math.sqrt(10) * coarse.local_sigma)) ** 2
    assert coarse.local_sigma < 1.5
    assert coarse.rho(10) > plain


def test_on_a_fine_grid_it_costs_what_the_gaussian_does() -> None:
    """ρ → 1 ÷ 2z², and ε is that of the Gaussian mechanism by Rényi divergences."""
    by = mechanism(size=1000, clients=30, noise=2.0, bits=18)
    assert by.rho(30) == pytest.approx(1 / 8, rel=1e-3)
    assert by.rho(30) > 1 / 8
    for sigma, rounds in ((1.0, 1), (4.0, 100), (2.0, 10)):
        rho = rounds / (2 * sigma**2)
        assert epsilon_of_rho(rho, 1e-5) == pytest.approx(epsilon_gaussian(sigma, rounds, 1e-5, method="rdp"), abs=0.02)
        assert epsilon_of_rho(rho, 1e-5) > epsilon_gaussian(sigma, rounds, 1e-5)


def test_who_does_not_add_noise_makes_it_dearer() -> None:
    by = mechanism(clients=10)
    prices = [by.rho(noisy) for noisy in (10, 8, 5, 1)]
    assert prices == sorted(prices)
    assert prices[2] == pytest.approx(2 * prices[0], rel=1e-3)


def test_the_price_rises_with_delta_and_rho() -> None:
    assert epsilon_of_rho(0.0, 1e-5) == 0
    assert epsilon_of_rho(math.inf, 1e-5) == math.inf
    assert epsilon_of_rho(0.5, 1e-6) > epsilon_of_rho(0.5, 1e-5) > epsilon_of_rho(0.4, 1e-5) > 0
    rho = 0.5
    assert epsilon_of_rho(rho, 1e-5) < rho + 2 * math.sqrt(rho * math.log(1e5))  # Bun and Steinke's simple bound
    with pytest.raises(ValueError, match="delta"):
        epsilon_of_rho(0.5, 1.0)


@pytest.mark.parametrize(("bits", "clients", "why"), [(4, 100, "4 bits are too few"), (24, 4, "use fewer bits")])
def test_what_does_not_fit_is_refused(bits: int, clients: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mechanism(bits=bits, clients=clients)
