from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.strategies.rules_kit import context, normal, verdict


def brute_weighted_mean(rows: Tensor, weights: list[float]) -> list[float]:
    """McMahan et al., algorithm 1: the sum over k of n_k / n times w_k, exactly rounded."""
    total = math.fsum(weights)
    return [math.fsum(w * v for w, v in zip(weights, column, strict=True)) / total for column in rows.double().T.tolist()]


@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (7, 5), (20, 33)])
def test_the_mean_is_the_mean(n: int, d: int) -> None:
    rows = normal(n, d, seed=n)
    result = verdict("aggregator", "mean", rows)
    assert result.value.tolist() == pytest.approx(brute_weighted_mean(rows, [1.0] * n), abs=1e-6)
    assert result.trust is None


def test_the_mean_does_not_look_at_the_number_of_samples() -> None:
    rows = normal(4, 3, seed=0)
    weighted = context(4, 3, weights=torch.tensor([1.0, 100.0, 1.0, 1.0]))
    assert torch.equal(verdict("aggregator", "mean", rows, weighted).value, verdict("aggregator", "mean", rows).value)


@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0, 4.0], [600.0, 1.0, 1.0, 1.0], [7.0, 7.0, 7.0, 7.0]])
def test_the_weighted_mean_weighs_by_samples(weights: list[float]) -> None:
    rows = normal(4, 6, seed=1)
    result = verdict("aggregator", "weighted-mean", rows, context(4, 6, weights=torch.tensor(weights)))
    assert result.value.tolist() == pytest.approx(brute_weighted_mean(rows, weights), abs=1e-6)


def test_only_the_proportions_of_the_weights_count() -> None:
    rows = normal(3, 4, seed=2)
    small, large = (
        verdict("aggregator", "weighted-mean", rows, context(3, 4, weights=factor * torch.tensor([1.0, 2.0, 5.0]))).value
        for factor in (1.0, 1024.0)
    )
    assert torch.equal(small, large)
