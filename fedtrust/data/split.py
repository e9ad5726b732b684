"""Fixed, stratified choices of rows, shared by the sources and by `build`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedtrust.data.base import IntArray
from fedtrust.errors import InputError

#: How many bins stand in for the classes of a regression.
BINS = 10


def strata(y: npt.NDArray[Any], classification: bool) -> IntArray:
    """Return what to stratify by: the labels, or for a regression the quantile bin of each target.

    Args:
        y: targets [n].
        classification: whether they are labels.

    Returns:
        int64 [n].
    """
    return y.astype(np.int64) if classification else quantile_bins(y)


def quantile_bins(values: npt.NDArray[Any], bins: int = BINS) -> IntArray:
    """Return for each value the index of its quantile bin, int64 [n] in 0 … bins − 1; equal values share a bin."""
    edges = np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1])  # [bins - 1]
    return np.searchsorted(edges, values, side="right").astype(np.int64)


def stratified_rows(labels: IntArray, size: int, rng: np.random.Generator) -> IntArray:
    """Return `size` random rows whose class shares are those of `labels`, up to one sample a class (largest remainder).

    Args:
        labels: class of each row, [n].
        size: how many rows, 0 … n.
        rng: where the choice within a class comes from.

    Returns:
        Sorted rows, int64 [size].
    """
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # integers throughout: a quota of 2.9999999 would take one sample less on some machines
    take, rest = np.divmod(counts * size, len(labels))
    largest = np.argsort(-rest, kind="stable")[: size - int(take.sum())]
    take[largest] += 1
    chosen = [rng.permutation(np.flatnonzero(which == c))[:count] for c, count in enumerate(take)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def train_test_rows(labels: IntArray, test_fraction: float, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Return (train, test) rows, disjoint, stratified and shuffled, that together are all rows.

    Raises:
        InputError: the fraction leaves one side empty.
    """
    total = len(labels)
    size = round(total * test_fraction)
    if not 0 < size < total:
        raise InputError(f"{test_fraction} of {total} samples leaves no {'test' if size == 0 else 'training'} sample", "test_fraction")
    test = stratified_rows(labels, size, rng)
    train = np.setdiff1d(np.arange(total), test)
    return rng.permutation(train).astype(np.int64), rng.permutation(test)


def limited_rows(labels: IntArray, limit: int | None, rng: np.random.Generator) -> IntArray:
    """Return at most `limit` rows of `labels`, stratified and in their old order; all of them where `limit` is `None`."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    return stratified_rows(labels, limit, rng)
