from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtrust.data.split import limited_rows, quantile_bins, strata, stratified_rows, train_test_rows
from fedtrust.engine.seeds import stream
from fedtrust.errors import InputError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.floats(0, 1), st.integers(0, 5))
def test_stratified_rows_have_the_size_and_the_class_shares_asked_for(labels: list[int], share: float, seed: int) -> None:
    y = np.array(labels, dtype=np.int64)
    size = round(share * len(y))
    rows = stratified_rows(y, size, stream(seed, "test"))
    assert len(rows) == size == len(set(rows.tolist()))
    assert np.array_equal(rows, np.sort(rows))
    wanted = np.bincount(y, minlength=7) * size / len(y)
    assert np.abs(np.bincount(y[rows], minlength=7) - wanted).max() < 1


def test_train_and_test_rows_are_a_shuffled_partition_of_all() -> None:
    y = np.repeat(np.arange(10), 50)
    train, test = train_test_rows(y, 0.2, stream(0, "test"))
    assert (len(train), len(test)) == (400, 100)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(500))
    assert np.bincount(y[test]).tolist() == [10] * 10
    # the input is sorted by label; the output is not
    assert (np.diff(y[train]) < 0).sum() > 100
    assert (np.diff(y[test]) < 0).sum() > 25


@pytest.mark.parametrize(("fraction", "side"), [(0.001, "test"), (0.999, "training")])
def test_a_fraction_that_leaves_a_side_empty_is_refused(fraction: float, side: str) -> None:
    with pytest.raises(InputError, match=f"of 20 samples leaves no {side} sample") as caught:
        train_test_rows(np.zeros(20, dtype=np.int64), fraction, stream(0, "test"))
    assert caught.value.where == "test_fraction"


def test_quantile_bins_are_even_and_keep_ties_together() -> None:
    values = np.random.Generator(np.random.PCG64(1)).normal(size=1000)
    bins = quantile_bins(values)
    assert np.bincount(bins).tolist() == [100] * 10
    assert values[bins == 3].max() < values[bins == 4].min()
    assert len(set(quantile_bins(np.array([1.0, 1, 1, 1, 1, 1, 2, 3])).tolist()[:6])) == 1


def test_strata_are_the_labels_or_the_bins() -> None:
    y = np.array([3, 0, 1], dtype=np.int32)
    assert strata(y, True).tolist() == [3, 0, 1]
    assert strata(y, True).dtype == np.int64
    assert strata(np.array([3.0, 0.0, 1.0]), False).tolist() == quantile_bins(np.array([3.0, 0.0, 1.0])).tolist()


def test_a_limit_above_the_size_changes_nothing_and_one_below_is_stratified() -> None:
    y = np.tile(np.arange(5), 20)
    assert limited_rows(y, None, stream(0, "t")).tolist() == list(range(100))
    assert limited_rows(y, 100, stream(0, "t")).tolist() == list(range(100))
    assert np.bincount(y[limited_rows(y, 15, stream(0, "t"))]).tolist() == [3] * 5
