"""The statistics of the audits against brute force: they err as rarely as they say, and see what there is to see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from fedtrust.engine import seeds
from fedtrust.privacy.accountants import COARSE, epsilon_gaussian
from fedtrust.privacy.audit import (
    Observations,
    canary_test,
    epsilon_bound,
    one_run_bound,
    one_run_p,
    one_run_test,
    scores,
    upper,
)

Floats = np.ndarray


@pytest.mark.parametrize(("hits", "trials"), [(0, 50), (3, 50), (50, 50), (499, 1000)])
def test_upper_bounds_are_clopper_and_pearsons(hits: int, trials: int) -> None:
    expected = scipy.stats.binomtest(hits, trials, alternative="less").proportion_ci(0.975, method="exact").high
    assert float(upper(hits, trials, 0.025)) == pytest.approx(expected, abs=1e-9)


def test_upper_bounds_err_as_rarely_as_they_say() -> None:
    drawn = seeds.stream(0, "test").binomial(200, 0.1, size=20_000)
    assert 0.02 < float((upper(drawn, 200, 0.05) < 0.1).mean()) <= 0.05


def test_an_error_rate_proves_the_epsilon_of_randomised_response() -> None:
    """Which answers with error 1 / (1 + e^ε), and no mechanism of that ε with less."""
    for epsilon in (0.1, 1.0, 5.0):
        error = 1 / (1 + math.exp(epsilon))
        assert float(epsilon_bound(error, error, 0.0)) == pytest.approx(epsilon)
        assert float(epsilon_bound(error, error, 0.01)) < epsilon
    assert float(epsilon_bound(0.5, 0.5, 0.0)) == 0.0
    assert float(epsilon_bound(0.7, 0.9, 0.0)) == 0.0
    assert float(epsilon_bound(0.01, 0.9, 0.0)) == pytest.approx(math.log(10))  # one direction says more than the other
    assert float(epsilon_bound(0.9, 0.01, 0.0)) == pytest.approx(math.log(10))


def gaussian(mu: float, trials: int, releases: int, seed: int) -> Observations:
    """What a Gaussian mechanism lets out whose canary is `mu` standard deviations away, over all releases together."""
    rng = seeds.stream(seed, "test/gaussian")
    without, present = rng.standard_normal((2, trials, releases))
    return Observations(without, present + mu / releases**0.5)


def claim_of(mu: float, releases: int):  # type: ignore[no-untyped-def]
    return lambda delta: epsilon_gaussian(releases**0.5 / mu, releases, delta, grid=COARSE)


@pytest.mark.parametrize(("mu", "releases"), [(1.0, 1), (2.0, 3)])
def test_a_gaussian_mechanism_is_what_it_claims(mu: float, releases: int) -> None:
    """Which is as tight as can be: every canary is told apart as well as ε allows."""
    alarms, bounds = 0, []
    for seed in range(100):
        found = canary_test("", "", gaussian(mu, 1000, releases, seed), claim_of(mu, releases), 1e-5, 0.05)
        alarms += not found.passed
        assert found.sharpest is not None
        bounds.append(found.sharpest[2] / found.sharpest[1])
    assert alarms <= 3
    assert float(np.median(bounds)) > 0.35


@pytest.mark.parametrize(("mu", "releases"), [(1.0, 1), (2.0, 3)])
def test_a_mechanism_with_two_thirds_of_its_noise_is_not(mu: float, releases: int) -> None:
    found = [canary_test("", "", gaussian(1.5 * mu, 2000, releases, seed), claim_of(mu, releases), 1e-5, 0.01) for seed in range(10)]
    assert sum(not f.passed for f in found) >= 9
    assert all("claimed ε" in f.said for f in found)


def test_the_direction_of_a_canary_is_learnt() -> None:
    """Noise that cancels between two releases is seen through, whatever its size."""
    rng = seeds.stream(0, "test/cancel")
    shared = 100 * rng.standard_normal((2, 500, 1))
    without, present = np.concatenate([shared, -shared], axis=2) + rng.standard_normal((2, 500, 2))
    seen = Observations(without, present + 4.0)
    learn, test = Observations(seen.without[:250], seen.present[:250]), Observations(seen.without[250:], seen.present[250:])
    low, high = scores(learn, test.without), scores(learn, test.present)
    assert float((low < np.median([*low, *high])).mean()) > 0.99


def brute_p(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The same theorem, term by term."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    pmf = [math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
    tail = sum(pmf[right:])
    worst = max((sum(pmf[right - i : right]) / i for i in range(1, right + 1)), default=0.0)
    return min(1.0, tail + 2 * canaries * delta * worst)


@pytest.mark.parametrize("delta", [0.0, 1e-4])
@pytest.mark.parametrize(("canaries", "guesses", "right"), [(100, 30, 30), (100, 30, 24), (40, 40, 20), (40, 0, 0)])
def test_the_p_value_of_one_run(canaries: int, guesses: int, right: int, delta: float) -> None:
    for epsilon in (0.0, 0.5, 2.0):
        assert one_run_p(canaries, guesses, right, epsilon, delta) == pytest.approx(
            brute_p(canaries, guesses, right, epsilon, delta), abs=1e-10
        )
    bound = one_run_bound(canaries, guesses, right, delta, 0.05)
    assert (bound > 0) == (brute_p(canaries, guesses, right, 0.0, delta) <= 0.05)
    if bound:
        assert brute_p(canaries, guesses, right, bound, delta) <= 0.05 < brute_p(canaries, guesses, right, bound + 0.002, delta)


def test_impossible_guesses_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be right 4 times"):
        one_run_p(10, 3, 4, 1.0, 0.0)


def test_one_run_errs_as_rarely_as_it_says_and_sees_something() -> None:
    """Randomised response on every coin: ε is known exactly."""
    rng, epsilon, alarms, bounds = seeds.stream(0, "test/response"), 1.0, 0, []
    for _ in range(200):
        coins = rng.random(400) < 0.5
        told = coins ^ (rng.random(400) < 1 / (1 + math.exp(epsilon)))
        found = one_run_test("", "", told + 1e-3 * rng.random(400), coins, epsilon, 0.0, 0.05)
        alarms += not found.passed
        bounds.append(found.bound)
    assert alarms <= 20  # the guesses among the many alike are drawn by lot: 10 expected at most
    assert float(np.median([b for b in bounds if b is not None])) > 0.1
    loud = one_run_test("", "", 3.0 * coins + rng.standard_normal(400), coins, epsilon, 1e-5, 0.05)
    assert not loud.passed
