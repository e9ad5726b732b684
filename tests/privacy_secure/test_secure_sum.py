"""Numbers on a grid and their sum in a group: against sums written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtrust.engine import seeds
from fedtrust.errors import TooFewError
from fedtrust.privacy import secure_sum
from fedtrust.privacy.secure_sum import Quantiser


def rng(*counters: int) -> np.random.Generator:
    return seeds.stream(11, "test", *counters)


def updates(n: int, d: int, scale: float = 0.1) -> list[np.ndarray]:
    return [rng(i).normal(0, scale, d).astype(np.float32) for i in range(n)]


@pytest.mark.parametrize(("clip", "bits"), [(1.0, 4), (1.0, 16), (8.0, 22), (0.05, 8), (3.0, 32)])
def test_a_number_moves_by_less_than_a_step_and_outliers_go_to_the_edge(clip: float, bits: int) -> None:
    grid = Quantiser(clip, bits)
    values = np.concatenate([rng().uniform(-clip, clip, 5000), [clip, -clip, 9 * clip, -9 * clip, 0.0]])
    whole = grid.encode(values, rng(1))
    assert whole.min() == 0
    assert whole.max() == 2**bits - 1
    back = grid.decode(whole, 1.0)
    assert np.abs(back - np.clip(values, -clip, clip)).max() < grid.step * (1 + 1e-9) + 1e-12
    assert (back[-4:-1] - clip * np.array([-1, 1, -1])) == pytest.approx(0, abs=1e-9)  # the edges are on the grid


def test_rounding_moves_nothing_on_average() -> None:
    """200000 roundings of a number p above a whole one: up with frequency p, within five standard errors."""
    for p in (0.0, 0.1, 0.5, 0.97):
        up = float((secure_sum.rounded(np.full(200_000, 3 + p), rng()) == 4).mean())
        assert up == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 200_000))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(n=st.integers(2, 12), d=st.integers(1, 30), bits=st.integers(2, 24), seed=st.integers(0, 1000), by_examples=st.booleans())
def test_the_sum_is_the_weighted_mean_within_a_step(n: int, d: int, bits: int, seed: int, by_examples: bool) -> None:
    grid = Quantiser(1.0, bits)
    rows = [rng(seed, i).uniform(-1, 1, d) for i in range(n)]
    weights = rng(seed).integers(1, 500, n).tolist() if by_examples else [1] * n
    size = secure_sum.group_bits(sum(weights) * grid.top)
    total = secure_sum.add(secure_sum.weighted(rows, weights, grid, rng(7)), size, count=n)
    assert total.max() <= sum(weights) * grid.top
    mean = grid.decode(total, sum(weights))
    assert np.abs(mean - np.average(rows, axis=0, weights=weights)).max() <= grid.step * (1 + 1e-9)


def test_the_sum_is_exact_in_whole_numbers() -> None:
    grid = Quantiser(8.0, 22)
    rows = updates(9, 500)
    encoded = list(secure_sum.weighted(rows, [3] * 9, grid, rng()))
    bits = secure_sum.group_bits(27 * grid.top)
    assert np.array_equal(secure_sum.add(encoded, bits, count=9), np.sum(encoded, axis=0))


def test_a_group_is_just_large_enough() -> None:
    for largest in (1, 2, 255, 256, 2**31 - 1, 2**31, 2**40):
        bits = secure_sum.group_bits(largest)
        assert 2 ** (bits - 1) <= max(largest, 1) < 2**bits
    with pytest.raises(ValueError, match="fewer bits"):
        secure_sum.group_bits(2**62)


def test_a_group_that_is_too_small_wraps_around() -> None:
    """What `group_bits` is there to prevent, and what the discrete Gaussian counts on."""
    rows = [np.array([200]), np.array([100])]
    assert secure_sum.add(rows, 8, count=2).tolist() == [44]
    assert secure_sum.centred(np.array([0, 1, 127, 128, 255]), 8).tolist() == [0, 1, 127, -128, -1]
    assert secure_sum.centred(secure_sum.add([np.array([-3]), np.array([-4])], 8, count=2), 8).tolist() == [-7]


@pytest.mark.parametrize(("left", "asked", "share", "needed"), [(4, 5, 2 / 3, 4), (6, 9, 2 / 3, 6), (5, 9, 0.51, 5), (2, 2, 1.0, 2)])
def test_how_many_must_be_left(left: int, asked: int, share: float, needed: int) -> None:
    assert secure_sum.enough(left, asked, share) == needed
    with pytest.raises(TooFewError, match=f"by {needed} of {asked} clients, and {needed - 1} are left"):
        secure_sum.enough(needed - 1, asked, share)


def test_one_row_alone_is_no_secret() -> None:
    with pytest.raises(TooFewError, match="by 2 of 1"):
        secure_sum.add([np.array([5])], 8, count=1, asked=1)
