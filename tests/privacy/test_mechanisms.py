"""The central mechanisms: who is drawn, how far one client reaches, what is added, what is noted, and what it costs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedtrust.errors import InputError, RunError
from fedtrust.privacy import banded
from fedtrust.privacy.accountants import COARSE, epsilon_fixed, epsilon_gaussian, epsilon_poisson
from fedtrust.privacy.clipping import AdaptiveClip, FixedClip, clip
from fedtrust.privacy.mechanisms import LEDGER, BandedMechanism, Mechanism
from fedtrust.privacy.samplers import Fixed, Poisson, RoundRobin


def plain(kind: type = Poisson, count: int = 50, per_round: int = 10, **changes: Any) -> Mechanism:
    made = Mechanism(sampler=kind(count, per_round, 3), clip=FixedClip(0.5), sigma=1.5, delta=1e-5, rounds=20, seed=3)
    return dataclasses.replace(made, **changes)


def correlated(count: int = 20, per_round: int = 5, rounds: int = 12, bands: int = 4, sigma: float = 1.5) -> BandedMechanism:
    sampler = RoundRobin(count, per_round, 3)
    return BandedMechanism(sampler=sampler, clip=FixedClip(0.5), sigma=sigma, delta=1e-5, rounds=rounds, seed=3, bands=bands)


def rows(n: int, d: int = 8, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(n))


# Samplers


def test_poisson_draws_each_client_by_itself_with_q():
    sampler = Poisson(40, 10, 1)
    cohorts = [sampler.draw(t) for t in range(1, 2001)]
    inside = np.zeros((2000, 40))
    for t, cohort in enumerate(cohorts):
        assert cohort == sorted(set(cohort))
        inside[t, cohort] = 1
    assert abs(inside.mean() - 0.25) < 0.005  # standard error 0.0015
    assert np.abs(inside.mean(0) - 0.25).max() < 0.05
    assert inside.sum(1).var() == pytest.approx(40 * 0.25 * 0.75, rel=0.12)  # binomial: fixed cohorts have none
    together = np.corrcoef(inside.T) - np.eye(40)
    assert abs(together.mean()) < 0.01


def test_poisson_cohorts_may_be_empty_and_whole():
    assert any(not Poisson(3, 1, 1).draw(t) for t in range(1, 50))
    assert Poisson(3, 3, 1).draw(1) == [0, 1, 2]


def test_fixed_draws_exactly_n_uniformly():
    sampler = Fixed(40, 10, 1)
    counts = np.zeros(40)
    for t in range(1, 1001):
        cohort = sampler.draw(t)
        assert len(set(cohort)) == 10
        counts[cohort] += 1
    assert np.abs(counts / 1000 - 0.25).max() < 0.06


def test_round_robin_takes_everybody_in_turn():
    sampler = RoundRobin(10, 4, 1)
    drawn = list(itertools.chain.from_iterable(sampler.draw(t) for t in range(1, 6)))
    assert sorted(drawn) == sorted([*range(10)] * 2)
    of = {c: [t - 1 for t in range(1, 6) if c in sampler.draw(t)] for c in range(10)}
    assert {tuple(v) for v in of.values()} == set(sampler.participations(5))
    assert sampler.separation(5) == min(b - a for v in of.values() for a, b in itertools.pairwise(v))


@pytest.mark.parametrize("kind", [Poisson, Fixed, RoundRobin])
def test_a_cohort_depends_on_seed_and_round_only(kind):
    assert kind(30, 10, 1).draw(4) == kind(30, 10, 1).draw(4)
    assert [kind(30, 10, 1).draw(t) for t in range(1, 9)] != [kind(30, 10, 2).draw(t) for t in range(1, 9)]


def test_impossible_cohorts_are_refused():
    with pytest.raises(ValueError, match="between 1 and 3"):
        Poisson(3, 4, 1)


# The clip


def test_the_clip_is_flat_and_never_exceeded():
    given = rows(200, 50, scale=10.0)
    clipped, factor = clip(given, 0.7)
    assert float(clipped.double().norm(dim=1).max()) <= 0.7
    assert torch.allclose(clipped, factor[:, None] * given)
    assert torch.allclose(clipped.norm(dim=1), torch.full((200,), 0.7), rtol=1e-5)


def test_the_clip_leaves_short_rows_alone():
    given = torch.cat([rows(5, scale=1e-3), torch.zeros(1, 8)])
    clipped, factor = clip(given, 0.7)
    assert torch.equal(clipped, given)
    assert torch.equal(factor, torch.ones(6))


# What is released


def test_the_release_is_the_fixed_denominator_mean_plus_noise_of_the_promised_size():
    for kind, reach in ((Poisson, 1), (Fixed, 2)):
        made = plain(kind)
        given = rows(7, 4000)
        released = made.apply(given, 1, {})
        sent = clip(given, 0.5)[0].sum(0)
        noise = 10 * released.mean - sent
        assert float(noise.std()) == pytest.approx(1.5 * 0.5 * reach, rel=0.04)
        assert abs(float(noise.mean())) < 0.06


def test_the_denominator_does_not_tell_the_size_of_the_cohort():
    quiet = plain(sigma=1e-9)
    one = rows(1)
    for n in (1, 4, 12):
        mean = quiet.apply(one.expand(n, -1), 1, {}).mean
        assert torch.allclose(mean, n * clip(one, 0.5)[0][0] / 10, atol=1e-6)


def test_an_empty_cohort_still_releases_noise():
    released = plain().apply(torch.zeros(0, 500), 1, {})
    assert float((10 * released.mean).std()) == pytest.approx(1.5 * 0.5, rel=0.15)
    assert len(released.state["ledger"]) == 1


def test_one_client_more_moves_the_sum_by_at_most_the_clip():
    quiet = plain(sigma=1e-9)
    given = torch.cat([rows(6), 1e12 * torch.ones(1, 8)])
    more, less = (10 * quiet.apply(part, 1, {}).mean for part in (given, given[:6]))
    assert float((more - less).norm()) <= 0.5 * (1 + 1e-5)


def test_noise_is_fresh_in_every_round_and_with_every_seed_and_the_same_when_asked_again():
    made = plain()
    noises = [made.noise(t, 50) for t in range(1, 5)] + [plain(seed=4).noise(1, 50)]
    assert all(not np.allclose(a, b) for a, b in itertools.combinations(noises, 2))
    assert np.array_equal(made.noise(1, 50), noises[0])


def test_the_noise_is_gaussian():
    from scipy import stats

    assert stats.kstest(plain().noise(1, 20_000), "norm").pvalue > 1e-3


def test_the_ledger_says_what_was_released_and_no_round_is_released_twice():
    made = plain()
    state: Any = {}
    for t in (1, 2, 3):
        state = made.apply(rows(4), t, state).state
    entries = [dict(zip(LEDGER, row, strict=True)) for row in made.ledger(state).tolist()]
    assert [e["round"] for e in entries] == [1, 2, 3]
    assert entries[0] == {"round": 1, "sigma": 1.5, "per_round": 10, "count": 50, "clip": 0.5, "std": 0.75}
    for again in (1, 3, 5):
        with pytest.raises(RunError, match="cannot be released"):
            made.apply(rows(4), again, state)


def test_a_ledger_of_another_mechanism_is_refused():
    made = plain()
    state = made.apply(rows(4), 1, {}).state
    made.check(state)
    for other in (plain(sigma=1.6), plain(count=51), plain(per_round=9)):
        with pytest.raises(InputError, match="not one of this mechanism"):
            other.check(state)


def test_updates_of_clients_that_were_not_drawn_are_refused():
    made = plain()
    cohort = tuple(made.cohort(2))
    made.belongs(2, cohort[1:])
    outside = next(c for c in range(50) if c not in cohort)
    with pytest.raises(RunError, match=f"client {outside} .*did not draw"):
        made.belongs(2, (*cohort, outside))


# What it costs


def test_the_epsilon_is_that_of_the_sampling_that_happens():
    assert plain().epsilon(20) == pytest.approx(epsilon_poisson(0.2, 1.5, 20, 1e-5))
    assert plain(Fixed).epsilon(20) == pytest.approx(epsilon_fixed(10, 50, 1.5, 20, 1e-5))
    assert plain(Fixed).methods == ("rdp",)
    assert plain(Fixed, per_round=50).epsilon(20) == pytest.approx(epsilon_gaussian(1.5, 20, 1e-5))
    assert plain().sampler.relation == "add-or-remove-one"
    assert plain(Fixed).sampler.relation == "replace-one"


def test_spent_follows_the_ledger():
    made = plain()
    state: Any = {}
    assert made.spent(state) == 0.0
    spent = []
    for t in (1, 2, 3):
        state = made.apply(rows(4), t, state).state
        spent.append(made.spent(state))
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(epsilon_poisson(0.2, 1.5, 3, 1e-5, grid=COARSE))


# The adaptive clip


def adaptive(**changes: Any) -> AdaptiveClip:
    return dataclasses.replace(AdaptiveClip(quantile=0.5, initial=0.1, lr=0.2, noise=1.0), **changes)


def test_the_count_of_unclipped_clients_pays_its_share():
    """Both releases together are one Gaussian release of σ: 1/z² = 1/z_Δ² + 1/(2σ_b)² (Andrew et al., theorem 1)."""
    rule = adaptive(noise=1.2)
    assert pytest.approx(rule.update_noise(1.5) ** -2 + (2 * 1.2) ** -2) == 1.5**-2
    made = plain(clip=rule)
    assert made.std(0.1) == pytest.approx(rule.update_noise(1.5) * 0.1)
    assert made.epsilon(20) == pytest.approx(plain().epsilon(20))
    with pytest.raises(ValueError, match="above half the noise multiplier"):
        plain(clip=adaptive(noise=0.75))


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.8])
def test_the_bound_finds_the_quantile_of_the_norms(quantile):
    made = plain(count=2000, per_round=1000, sigma=0.5, rounds=200, clip=adaptive(quantile=quantile, noise=20.0))
    norms = torch.linspace(0.5, 3.0, 1000)
    given = torch.nn.functional.normalize(rows(1000), dim=1) * norms[:, None]
    state: Any = {}
    for t in range(1, 121):
        state = made.apply(given, t, state).state
    assert made.bound(state) == pytest.approx(float(norms.quantile(quantile)), rel=0.08)


def test_the_noise_follows_the_bound():
    made = plain(clip=adaptive(initial=4.0, noise=2.0))
    state = made.apply(rows(10, scale=1e-3), 1, {}).state
    assert made.bound(state) < 4.0  # everybody lies within it
    entries = made.ledger(made.apply(rows(10), 2, state).state)
    assert entries[1, 4] == pytest.approx(made.bound(state))
    assert entries[1, 5] / entries[0, 5] == pytest.approx(float(entries[1, 4] / entries[0, 4]))


def test_nobody_in_a_round_says_nothing_about_the_norms():
    rule = adaptive()
    assert rule.next(0.3, 0.0, 10) == pytest.approx(0.3)  # half of them within the bound, as is wanted
    assert rule.next(0.3, 5.0, 10) < 0.3 < rule.next(0.3, -5.0, 10)


# DP-FTRL


def prefix(size: int) -> np.ndarray:
    return np.tril(np.ones((size, size)))


def toeplitz(column: np.ndarray, size: int) -> np.ndarray:
    made = np.zeros((size, size))
    for k, value in enumerate(column[:size]):
        made += np.diag(np.full(size - k, value), -k)
    return made


def test_the_square_root_is_one():
    column = banded.square_root(9)
    assert np.allclose(toeplitz(column, 9) @ toeplitz(column, 9), prefix(9))


@pytest.mark.parametrize("bands", [1, 3, 7])
def test_the_inverse_is_one(bands):
    column = banded.square_root(bands)
    assert np.allclose(toeplitz(column, 7) @ toeplitz(banded.inverse(column, 7), 7), np.eye(7))


def test_the_sensitivity_is_the_largest_movement_of_one_client():
    """Against a brute force over what a client may send in the rounds it is in."""
    column, parts = banded.square_root(3), [(0, 2, 5), (1, 4)]
    encoder = toeplitz(column, 6)
    found = banded.sensitivity(column, parts, 6)
    rng = np.random.default_rng(0)
    worst = 0.0
    for part in parts:
        same = np.zeros((6, 4))
        same[list(part), 0] = 1
        worst = max(worst, np.linalg.norm(encoder @ same))
        for _ in range(2000):
            sent = np.zeros((6, 4))
            for t in part:
                direction = rng.standard_normal(4)
                sent[t] = direction / np.linalg.norm(direction) * rng.random() ** 0.2
            assert np.linalg.norm(encoder @ sent) <= found + 1e-9
    assert found == pytest.approx(worst)


def test_bands_that_do_not_reach_to_the_next_part_cost_the_root_of_the_number_of_parts():
    column = banded.square_root(4)
    assert banded.sensitivity(column, [(0, 4, 8)], 12) == pytest.approx(math.sqrt(3) * np.linalg.norm(column))


def test_the_encoder_sees_independent_noise_of_the_promised_size():
    """C (C⁻¹ z) is z: what is released is a function of C x + z."""
    made = correlated()
    noises = np.stack([made.noise(t, 3000) for t in range(1, 13)])
    seen = toeplitz(banded.square_root(4), 12) @ noises
    assert np.allclose(seen.std(1), 1.0, atol=0.06)
    assert np.abs(np.corrcoef(seen) - np.eye(12)).max() < 0.08


def test_correlated_noise_disturbs_the_sum_of_all_rounds_less_at_the_same_price():
    wide, narrow = correlated(count=60, bands=12), correlated(count=60, bands=1)
    assert wide.epsilon(12) == pytest.approx(narrow.epsilon(12))

    def disturbance(made: BandedMechanism) -> float:
        noise = made.std(1.0) * np.stack([made.noise(t, 2000) for t in range(1, 13)])
        return float(noise.cumsum(0)[-1].std())

    assert disturbance(wide) < 0.75 * disturbance(narrow)


def test_all_rounds_are_one_release_and_the_first_cost_less():
    made = correlated(sigma=2.0)
    assert made.epsilon(12) == pytest.approx(epsilon_gaussian(2.0, 1, 1e-5))
    curve = [made.epsilon(t, grid=COARSE) for t in range(13)]
    assert curve == sorted(curve)
    assert curve[0] == 0.0
    assert curve[3] < curve[12]


def test_rounds_beyond_the_plan_are_refused():
    with pytest.raises(RunError, match="beyond the 12"):
        correlated().noise(13, 4)
