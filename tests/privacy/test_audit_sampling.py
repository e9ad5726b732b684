"""Samplers that are what they claim, and samplers that are nearly so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedtrust.engine import seeds
from fedtrust.privacy.audit_sampling import cohort_test, noise_test, poisson_test
from fedtrust.privacy.samplers import Fixed, Poisson, RoundRobin, Sampler

Rng = np.random.Generator
Inside = npt.NDArray[np.bool_]


def poisson(rng: Rng) -> Inside:
    return rng.random((1000, 40)) < 0.25


def fixed(rng: Rng) -> Inside:
    return np.stack([np.isin(np.arange(40), rng.permutation(40)[:10]) for _ in range(1000)])


def in_turn(rng: Rng) -> Inside:
    """Sizes as with Poisson sampling, but everybody is in equally often."""
    sizes, order, place = rng.binomial(40, 0.25, 1000), np.arange(40_000) % 40, 0
    inside = np.zeros((1000, 40), dtype=bool)
    for row, size in zip(inside, sizes, strict=True):
        row[order[place : place + size]] = True
        place += size
    return inside


def favourite(rng: Rng) -> Inside:
    inside = poisson(rng)
    inside[:, 3] |= rng.random(1000) < 0.15
    return inside


def households(rng: Rng) -> Inside:
    """Two by two: each unit with the right probability, but not by itself."""
    return np.repeat(rng.random((1000, 20)) < 0.25, 2, axis=1)


def more_often(rng: Rng) -> Inside:
    return rng.random((1000, 40)) < 0.27


def test_poisson_sampling_passes() -> None:
    assert [s for s in range(40) if not poisson_test("", poisson(seeds.stream(s, "test")), 0.25, 0.01).passed] == []


@pytest.mark.parametrize("draw", [fixed, in_turn, favourite, households, more_often])
def test_what_only_looks_like_it_does_not(draw: Callable[[Rng], Inside]) -> None:
    for seed in range(5):
        found = poisson_test("batches", draw(seeds.stream(seed, "test")), 0.25, 0.01)
        assert not found.passed
        assert "expected 10 ± 2.74" in found.said


def test_everybody_is_everybody() -> None:
    inside = np.ones((50, 9), dtype=bool)
    assert poisson_test("", inside, 1.0, 0.01).passed
    inside[7, 3] = False
    assert not poisson_test("", inside, 1.0, 0.01).passed


@pytest.mark.parametrize("sampler", [Poisson(30, 6, 2), Fixed(30, 6, 2), Fixed(6, 6, 2), RoundRobin(30, 6, 2), RoundRobin(7, 3, 2)])
def test_the_samplers_of_the_server_pass(sampler: Sampler) -> None:
    assert cohort_test(sampler, 1000, 0.01).passed


def test_a_sampler_that_draws_otherwise_does_not() -> None:
    class Half(Fixed):
        def draw(self, round_number: int) -> list[int]:
            return super().draw(round_number)[: self.per_round // 2]

    class First(Fixed):
        def draw(self, round_number: int) -> list[int]:
            return list(range(self.per_round)) if round_number % 10 == 0 else super().draw(round_number)

    class Shuffled(RoundRobin):
        def draw(self, round_number: int) -> list[int]:
            return Fixed(self.count, self.per_round, self.seed).draw(round_number)

    for sampler in (Half(30, 6, 2), First(30, 6, 2), Shuffled(30, 6, 2)):
        assert not cohort_test(sampler, 1000, 0.01).passed


def test_noise_is_held_against_its_size_and_its_kind() -> None:
    rows = torch.from_numpy(seeds.stream(0, "test").standard_normal((12, 1600))).float()
    assert noise_test(rows, 1.0, 1.0, 0.01).passed
    assert noise_test(3 * rows, 1.0, 1.0, 0.01).passed  # more than claimed protects no less
    assert not noise_test(rows, 1.1, 1.0, 0.01).passed
    again = rows.clone()
    again[7] = -again[2]
    assert not noise_test(again, 1.0, 1.0, 0.01).passed
    mixed = rows.clone()
    mixed[7] = 0.3 * rows[2] + 0.91**0.5 * rows[7]
    assert not noise_test(mixed, 1.0, 1.0, 0.01).passed
    silent = rows.clone()
    silent[5] = 0.0
    assert not noise_test(silent, 1.0, 1.0, 0.01).passed
