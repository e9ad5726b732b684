from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from fedtrust.strategies.bulyan import choose, nearest_window
from fedtrust.strategies.distances import squared_distances
from tests.strategies.rules_kit import normal, refusal, verdict


def brute_choice(rows: Tensor, f: int) -> list[int]:
    """El Mhamdi et al., section 4, first part: Krum's choice out of what is left, θ = n − 2f times."""
    values = rows.double()
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        scores = {}
        for i in left:
            distances = sorted(float((values[i] - values[j]).square().sum()) for j in left if j != i)
            near = max(len(left) - f - 2, 1)
            scores[i] = (round(sum(distances[:near]), 9), round(sum(distances), 9), i)
        best = min(left, key=lambda i: scores[i])
        chosen.append(best)
        left.remove(best)
    return chosen


def brute_around_median(rows: Tensor, kept: int) -> tuple[list[float], list[list[bool]]]:
    """The second part: in each coordinate the mean of the `kept` values nearest to the median, and which rows those are of."""
    means, used = [], []
    for column in rows.double().T.tolist():
        centre = statistics.median(column)
        nearest = sorted(range(len(column)), key=lambda i: (abs(column[i] - centre), column[i]))[:kept]
        means.append(sum(column[i] for i in nearest) / kept)
        used.append([i in nearest for i in range(len(column))])
    return means, used


CASES = [(3, 0, 5), (7, 1, 4), (9, 1, 1), (11, 2, 6), (16, 3, 9), (23, 5, 20), (30, 6, 3)]


@pytest.mark.parametrize(("n", "f", "d"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_bulyan_by_its_definition(n: int, f: int, d: int, seed: int) -> None:
    rows = normal(n, d, seed=100 * n + seed)
    rows[:f] *= 3.0
    chosen = brute_choice(rows, f)
    assert choose(squared_distances(rows), f) == chosen
    means, used = brute_around_median(rows[sorted(chosen)], n - 4 * f)
    result = verdict("aggregator", "bulyan", rows, f=f)
    assert result.value.tolist() == pytest.approx(means, abs=1e-5)
    assert result.trust is not None
    trust = torch.zeros(n)
    trust[sorted(chosen)] = torch.tensor(used).float().mean(0)
    assert torch.allclose(result.trust, trust)


def test_without_attackers_it_is_the_mean() -> None:
    rows = normal(6, 5, seed=1)
    assert torch.allclose(verdict("aggregator", "bulyan", rows).value, rows.mean(0), atol=1e-6)


def test_krum_is_asked_again_after_each_choice() -> None:
    """Once 3 and 5 of the close four are gone, the other two's neighbours are far: the rows around −11 come before them. Asked only
    once, Krum ranks the four first."""
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [9.0], [-9.0], [10.0], [-10.0], [11.0]])
    f = 2
    once = torch.tensor([sum(sorted((float(a - b) ** 2 for b in rows), key=float)[1 : 11 - f - 1]) for a in rows])
    ranked = once.argsort(stable=True)[: 11 - 2 * f].tolist()
    iterated = choose(squared_distances(rows), f)
    assert iterated == brute_choice(rows, f)
    assert iterated != ranked


@pytest.mark.parametrize(("n", "kept"), [(1, 1), (5, 5), (5, 1), (9, 3), (10, 2), (33, 7), (64, 60)])
def test_the_window_around_the_median(n: int, kept: int) -> None:
    values = normal(n, 200, seed=n).sort(dim=0).values.T.contiguous()
    values[:50] = (4 * values[:50]).round()  # ties
    begin = nearest_window(values.numpy(), kept)
    for row, first in zip(values.double(), begin.tolist(), strict=True):
        off = (row - float(statistics.median(row.tolist()))).abs()
        inside = torch.zeros(n, dtype=torch.bool)
        inside[first : first + kept] = True
        assert inside.sum() == kept
        if kept < n:
            assert float(off[inside].max()) <= float(off[~inside].min()) + 1e-6


def test_of_two_values_equally_far_the_smaller_is_kept() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0], [-3.0, 1.0, 2.0], [0.0, 1.0, 5.0]]).numpy()
    assert nearest_window(values, 2).tolist() == [0, 1, 0]


@pytest.mark.parametrize("f", [1, 2, 4])
def test_attackers_that_krum_lets_through_at_the_end_are_trimmed(f: int) -> None:
    """Of the last 2f + 1 rows the f copies are the closest to each other: one is chosen, and no coordinate uses it."""
    n = 4 * f + 3
    rows = normal(n, 30, seed=f)
    rows[:f] = 1e6
    result = verdict("aggregator", "bulyan", rows, f=f)
    assert result.trust is not None
    assert not result.trust[:f].any()
    assert float(result.value.abs().max()) < 4


def test_huge_values_do_not_overflow() -> None:
    assert verdict("aggregator", "bulyan", torch.full((7, 3), 3e38), f=1).value.tolist() == pytest.approx([3e38] * 3)


@pytest.mark.parametrize(("n", "f"), [(2, 0), (6, 1), (10, 2)])
def test_too_few_updates_are_refused(n: int, f: int) -> None:
    with pytest.raises(ValueError, match=rf"n ≥ 4f \+ 3, got n = {n}, f = {f}"):
        verdict("aggregator", "bulyan", normal(n, 3, seed=0), f=f)
    assert "n ≥ 4f + 3" in str(refusal("bulyan", n=n, f=f))
    assert refusal("bulyan", n=n + 1, f=f) is None
