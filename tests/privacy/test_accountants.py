"""The accountants: DESIGN's table, what bounds what, and what is refused."""

from __future__ import annotations

import math

import pytest

from fedtrust.privacy.accountants import (
    COARSE,
    FINE,
    LEAST_NOISE,
    Release,
    epsilon_fixed,
    epsilon_gaussian,
    epsilon_of,
    epsilon_poisson,
    noise_for,
)

# q, σ, T, δ, ε by PLD, ε by RDP, n of N = 1000, its ε
TABLE = [
    (1, 1, 1, 1e-5, 4.3772, 4.7285, None, None),
    (1, 4, 100, 1e-5, 13.2067, 14.1322, None, None),
    (0.01, 1, 1000, 1e-5, 1.8282, 2.1014, 10, 3.5761),
    (0.04, 1.5, 2250, 1e-5, 6.7688, 7.3293, 40, 17.328),
    (256 / 60000, 1.1, 14062, 1e-5, 2.3817, 2.5966, 4, 4.8775),
    (0.1, 1, 100, 1e-5, 7.0466, 7.9039, 100, 14.054),
    (0.05, 0.8, 200, 1e-6, 8.8657, 9.9053, 50, 15.366),
    (0.001, 0.6, 10000, 1e-6, 3.1522, 3.9992, 1, 4.7249),
    (0.5, 2, 50, 1e-3, 6.9811, 7.9924, 500, 18.021),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "pld", "rdp", "n", "fixed"), TABLE)
def test_the_table_of_the_design(q, sigma, steps, delta, pld, rdp, n, fixed):
    assert epsilon_poisson(q, sigma, steps, delta) == pytest.approx(pld, abs=0.02)
    assert epsilon_poisson(q, sigma, steps, delta, method="rdp") == pytest.approx(rdp, abs=0.02)
    if n is not None:
        assert epsilon_fixed(n, 1000, sigma, steps, delta) == pytest.approx(fixed, abs=0.02)


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "pld", "rdp", "n", "fixed"), TABLE)
def test_a_wide_grid_is_never_below_the_narrow_one_and_close_to_it(q, sigma, steps, delta, pld, rdp, n, fixed):
    fine, coarse = (epsilon_poisson(q, sigma, steps, delta, grid=grid) for grid in (FINE, COARSE))
    assert fine - 1e-6 <= coarse <= fine + 0.02


def test_one_gaussian_release_is_the_closed_form():
    """Balle and Wang, ICML 2018, theorem 8: δ(ε) = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ)."""

    def cdf(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    for sigma in (0.7, 1.0, 3.0):
        epsilon = epsilon_gaussian(sigma, 1, 1e-5)
        delta = cdf(1 / (2 * sigma) - epsilon * sigma) - math.exp(epsilon) * cdf(-1 / (2 * sigma) - epsilon * sigma)
        assert delta == pytest.approx(1e-5, rel=0.01)


def test_the_closed_form_is_what_the_privacy_loss_distribution_gives():
    from dp_accounting.pld import privacy_loss_distribution

    for sigma, steps, delta in ((1.0, 1, 1e-5), (4.0, 100, 1e-5), (0.6, 3, 1e-3), (20.0, 2, 1e-6)):
        made = privacy_loss_distribution.from_gaussian_mechanism(sigma / math.sqrt(steps), value_discretization_interval=1e-4)
        assert epsilon_gaussian(sigma, steps, delta) == pytest.approx(made.get_epsilon_for_delta(delta), abs=1e-3)


@pytest.mark.parametrize("q", [1.0, 0.3])
def test_next_to_no_noise_has_a_large_finite_epsilon_and_is_soon_said(q):
    epsilon = epsilon_poisson(q, 0.01, 3, 1e-5)
    assert 10_000 < epsilon < 25_000
    assert epsilon <= epsilon_poisson(q, 0.01, 3, 1e-5, method="rdp") * 1.01
    assert epsilon_poisson(q, 1e-6, 3, 1e-5) > 1e11


def test_so_much_noise_that_delta_covers_all_costs_nothing():
    assert epsilon_gaussian(1e5, 1, 1e-3) == 0.0


def test_rdp_is_never_below_pld():
    for q in (0.02, 0.3, 1.0):
        for sigma in (0.8, 2.0):
            for steps in (1, 30):
                pld, rdp = (epsilon_poisson(q, sigma, steps, 1e-5, method=m, grid=COARSE) for m in ("pld", "rdp"))
                assert pld <= rdp + 1e-9


@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_epsilon_rises_with_sampling_and_steps_and_falls_with_noise_and_delta(method):
    def epsilon(q=0.2, sigma=1.0, steps=20, delta=1e-5):
        return epsilon_poisson(q, sigma, steps, delta, method=method, grid=COARSE)

    here = epsilon()
    assert epsilon(q=0.3) > here
    assert epsilon(steps=21) > here
    assert epsilon(sigma=1.1) < here
    assert epsilon(delta=1e-4) < here


def test_fixed_cohorts_cost_more_the_larger_they_are_and_as_much_as_a_plain_release_when_all_take_part():
    steps = [epsilon_fixed(n, 100, 1.0, 10, 1e-5) for n in (5, 20, 60)]
    assert steps == sorted(steps)
    assert epsilon_fixed(100, 100, 1.0, 10, 1e-5) == pytest.approx(epsilon_gaussian(1.0, 10, 1e-5, method="rdp"), rel=1e-9)


def test_different_releases_compose():
    both = {Release(1.0): 2, Release(2.0): 4}
    same = 1 / math.sqrt(2 * 1.0**-2 + 4 * 2.0**-2)  # Gaussian releases add up in 1/σ²
    assert epsilon_of(both, 1e-5) == pytest.approx(epsilon_gaussian(same, 1, 1e-5), abs=2e-3)
    mixed = {Release(1.0, 0.1): 20, Release(2.0): 1}
    parts = [epsilon_of({release: count}, 1e-5) for release, count in mixed.items()]
    assert max(parts) < epsilon_of(mixed, 1e-5) < epsilon_of(mixed, 1e-5, method="rdp")


def test_nothing_released_costs_nothing_and_no_noise_everything():
    assert epsilon_of({}, 1e-5) == 0.0
    assert epsilon_poisson(0.1, 1.0, 0, 1e-5) == 0.0
    assert epsilon_poisson(0.1, 0.0, 1, 1e-5) == math.inf


@pytest.mark.parametrize("target", [0.5, 3.0, 20.0])
def test_noise_for_a_target_keeps_it_and_wastes_little(target):
    def spent(sigma):
        return epsilon_poisson(0.2, sigma, 10, 1e-5, grid=COARSE)

    sigma = noise_for(target, spent)
    assert spent(sigma) <= target < spent(0.995 * sigma)


def test_a_target_that_little_noise_already_keeps_gets_the_least():
    assert noise_for(1e6, lambda sigma: 1 / sigma) == pytest.approx(LEAST_NOISE, rel=2e-3)


@pytest.mark.parametrize(
    ("releases", "delta", "message"),
    [
        ({Release(1.0, 0.0): 1}, 1e-5, "probability"),
        ({Release(1.0, 1.5): 1}, 1e-5, "probability"),
        ({Release(-1.0): 1}, 1e-5, "noise multiplier"),
        ({Release(math.nan): 1}, 1e-5, "noise multiplier"),
        ({Release(1.0, cohort=(5, 4)): 1}, 1e-5, "between 1 and N"),
        ({Release(1.0): 1}, 0.0, "delta"),
        ({Release(1.0): 1, Release(1.0, cohort=(2, 4)): 1}, 1e-5, "different neighbouring"),
        ({Release(1.0, cohort=(2, 4)): 1}, 1e-5, "not known"),
    ],
)
def test_what_cannot_be_meant_is_refused(releases, delta, message):
    with pytest.raises(ValueError, match=message):
        epsilon_of(releases, delta)


def test_a_target_must_be_reachable():
    with pytest.raises(ValueError, match="above 0"):
        noise_for(0.0, lambda sigma: 1.0)
    with pytest.raises(ValueError, match="no noise up to"):
        noise_for(0.5, lambda sigma: 1.0)
