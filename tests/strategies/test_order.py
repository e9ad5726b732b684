from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from fedtrust.errors import InputError
from fedtrust.strategies import blocks
from tests.strategies.rules_kit import normal, refusal, verdict


def brute_median(rows: Tensor) -> list[float]:
    """Yin et al., definition 1: the median of each coordinate."""
    return [statistics.median(column) for column in rows.double().T.tolist()]


def brute_trimmed(rows: Tensor, b: int) -> list[float]:
    """Yin et al., definition 2: without the b largest and b smallest values of each coordinate, the mean of the rest."""
    kept = [sorted(column)[b : len(rows) - b] for column in rows.double().T.tolist()]
    return [math.fsum(values) / len(values) for values in kept]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 10, 11])
def test_the_median_of_odd_and_even_numbers(n: int) -> None:
    rows = normal(n, 17, seed=n)
    assert torch.equal(verdict("aggregator", "median", rows).value, torch.tensor(brute_median(rows)))


def test_the_median_by_hand() -> None:
    rows = torch.tensor([[1.0, 5.0], [2.0, -1.0], [4.0, 0.0], [100.0, 0.0]])
    assert verdict("aggregator", "median", rows).value.tolist() == [3.0, 0.0]
    assert verdict("aggregator", "median", rows[:3]).value.tolist() == [2.0, 0.0]


def test_the_middle_of_two_huge_values_does_not_overflow() -> None:
    assert verdict("aggregator", "median", torch.tensor([[3e38], [2e38]])).value.item() == pytest.approx(2.5e38)


@pytest.mark.parametrize(("n", "b"), [(1, 0), (3, 1), (5, 2), (10, 0), (10, 3), (10, 4), (11, 5)])
def test_the_trimmed_mean(n: int, b: int) -> None:
    rows = normal(n, 13, seed=n + b)
    wanted = pytest.approx(brute_trimmed(rows, b), abs=1e-6)
    assert verdict("aggregator", "trimmed-mean", rows, trim=b).value.tolist() == wanted
    assert verdict("aggregator", "trimmed-mean", rows, f=b).value.tolist() == wanted


def test_trim_overrides_the_assumed_number_of_attackers() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [94.0]])
    assert verdict("aggregator", "trimmed-mean", rows, f=1, trim=0).value.item() == 20.0
    assert verdict("aggregator", "trimmed-mean", rows, f=1).value.item() == 2.0


def test_huge_values_among_the_kept_do_not_overflow() -> None:
    assert verdict("aggregator", "trimmed-mean", torch.full((4, 2), 3e38), trim=1).value.tolist() == pytest.approx([3e38, 3e38])


@pytest.mark.parametrize(("n", "b"), [(4, 2), (2, 1), (5, 3)])
def test_a_trim_that_leaves_nothing_is_refused(n: int, b: int) -> None:
    with pytest.raises(ValueError, match=f"cannot drop {b} values from each end of {n}"):
        verdict("aggregator", "trimmed-mean", normal(n, 2, seed=0), trim=b)


def test_the_scenario_check_refuses_the_same() -> None:
    assert "n > 2·5" in str(refusal("trimmed-mean", n=10, f=5))
    assert refusal("trimmed-mean", n=11, f=5) is None
    assert refusal("trimmed-mean", n=10, f=5, trim=1) is None
    assert "n > 2·5" in str(refusal("trimmed-mean", n=10, f=0, trim=5))
    with pytest.raises(InputError, match="greater than or equal to 0"):
        refusal("trimmed-mean", n=10, f=0, trim=-1)


def test_blocks_of_coordinates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(7, 23, seed=3)
    whole = [verdict("aggregator", name, rows, f=2).value for name in ("median", "trimmed-mean")]
    monkeypatch.setattr(blocks, "NARROWEST", 5)
    monkeypatch.setattr(blocks, "SORTED", 1)
    parts = [verdict("aggregator", name, rows, f=2).value for name in ("median", "trimmed-mean")]
    assert torch.equal(torch.stack(whole), torch.stack(parts))
