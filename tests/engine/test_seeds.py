"""Streams are Philox generators with the hash of their name as key."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fedtrust.engine import seeds


@pytest.mark.parametrize("name", [(3, "batches", 4, 77), (0, "x"), (2**40, "server/train", 1, 0)])
def test_a_stream_is_the_generator_that_numpy_makes_of_its_key(name: tuple[int, str, int]) -> None:
    theirs, ours = np.random.Generator(np.random.Philox(key=seeds.key(*name))), seeds.stream(*name)
    for _ in range(3):  # numbers of 32 and of 64 bits, and what is left of either
        assert theirs.integers(2**31, dtype=np.int32) == ours.integers(2**31, dtype=np.int32)
        assert np.array_equal(theirs.permutation(9), ours.permutation(9))
        assert np.array_equal(theirs.standard_normal(5), ours.standard_normal(5))


def test_streams_are_their_own() -> None:
    first, second = seeds.stream(1, "a", 2), seeds.stream(1, "a", 2)
    drawn = first.random(4)
    assert np.array_equal(second.random(4), drawn)
    assert not np.array_equal(seeds.stream(1, "a", 3).random(4), drawn)
    assert np.array_equal(pickle.loads(pickle.dumps(seeds.stream(1, "a", 2))).random(4), drawn)
