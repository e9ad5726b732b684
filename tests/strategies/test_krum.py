from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedtrust.strategies import blocks
from fedtrust.strategies.distances import squared_distances
from fedtrust.strategies.krum import krum_scores
from tests.strategies.rules_kit import normal, refusal, verdict


def brute_scores(rows: Tensor, neighbours: int) -> list[float]:
    """Blanchard et al., section 4: for each row the sum of its squared distances to the `neighbours` closest other rows."""
    values = rows.double().tolist()
    scores = []
    for i, one in enumerate(values):
        distances = []
        for j, other in enumerate(values):
            if i != j:
                distances.append(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)))
        scores.append(sum(sorted(distances)[:neighbours]))
    return scores


def ranking(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))


CASES = [(4, 0, 3), (5, 1, 4), (7, 2, 10), (10, 2, 1), (12, 4, 6), (20, 4, 30)]


@pytest.mark.parametrize(("n", "f", "d"), CASES)
def test_scores_and_choice_of_krum(n: int, f: int, d: int) -> None:
    rows = normal(n, d, seed=n * 100 + f)
    scores = brute_scores(rows, n - f - 2)
    assert krum_scores(rows, f).tolist() == pytest.approx(scores, rel=1e-6)
    result = verdict("aggregator", "krum", rows, f=f)
    best = ranking(scores)[0]
    assert torch.equal(result.value, rows[best])
    assert result.trust is not None
    assert result.trust.tolist() == [float(i == best) for i in range(n)]


@pytest.mark.parametrize(("n", "f", "d"), CASES)
@pytest.mark.parametrize("m", [None, 1, 3])
def test_the_choice_of_multi_krum(n: int, f: int, d: int, m: int | None) -> None:
    rows = normal(n, d, seed=n * 100 + f + 7)
    chosen = ranking(brute_scores(rows, n - f - 2))[: n - f if m is None else m]
    result = verdict("aggregator", "multi-krum", rows, f=f, m=m)
    assert torch.allclose(result.value.double(), rows[chosen].double().mean(0), atol=1e-6)
    assert result.trust is not None
    assert result.trust.nonzero().flatten().tolist() == sorted(chosen)
    assert set(result.trust.tolist()) <= {0.0, 1.0}


def test_the_number_of_neighbours_is_that_of_the_paper() -> None:
    """With n = 6 and f = 1 the paper sums 3 neighbours: the middle of the four that agree wins. With n − f − 1 = 4, as some libraries
    sum, every score holds the way to the far pair, and the row on the rim next to them would win."""
    rows = torch.tensor([[0.0], [0.1], [0.21], [0.3], [10.0], [10.0]])
    paper, others = ranking(brute_scores(rows, 3))[0], ranking(brute_scores(rows, 4))[0]
    assert (paper, others) == (1, 3)
    assert torch.equal(verdict("aggregator", "krum", rows, f=1).value, rows[paper])


@pytest.mark.parametrize(("n", "f"), [(2, 0), (4, 1), (6, 2)])
def test_too_few_updates_are_refused(n: int, f: int) -> None:
    with pytest.raises(ValueError, match=f"n = {n}, f = {f}"):
        verdict("aggregator", "krum", normal(n, 3, seed=0), f=f)
    for name in ("krum", "multi-krum"):
        assert "n ≥ 2f + 3" in str(refusal(name, n=n, f=f))
        assert refusal(name, n=n + 1, f=f) is None


@pytest.mark.parametrize("m", [0, -1, 11])
def test_a_selection_that_cannot_be_made_is_refused(m: int) -> None:
    assert f"m = {m}" in str(refusal("multi-krum", n=10, f=2, m=m))
    assert refusal("multi-krum", n=10, f=2, m=10) is None


def test_distances_survive_a_huge_row_and_a_far_centre() -> None:
    """A Gram matrix in float32, or one centred on the mean, loses the differences of the honest rows here."""
    rows = normal(9, 40, seed=5, scale=1e-3) + 1.0
    rows[4] = 1e6
    wide = rows.double()
    wanted = (wide[:, None] - wide[None]).square().sum(2)
    assert torch.allclose(squared_distances(rows), wanted, rtol=1e-9, atol=1e-15)


def test_distances_of_values_near_the_end_of_float32_are_finite() -> None:
    assert bool(torch.isfinite(squared_distances(torch.tensor([[3e38], [-3e38], [0.0]]))).all())


def test_blocks_of_coordinates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(6, 23, seed=3)
    whole = squared_distances(rows)
    monkeypatch.setattr(blocks, "NARROWEST", 5)
    monkeypatch.setattr(blocks, "MULTIPLIED", 1)
    assert torch.allclose(squared_distances(rows), whole, rtol=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_equal_scores_go_to_the_smallest_client(seed: int) -> None:
    """With n = 3, f = 0 the two closest rows have each other as the only neighbour: their scores are the same by definition."""
    rows = normal(3, 1 + seed, seed=seed)
    pairs = {(i, j): float((rows[i].double() - rows[j].double()).square().sum()) for i, j in ((0, 1), (0, 2), (1, 2))}
    first = min(pairs, key=lambda pair: pairs[pair])[0]
    assert torch.equal(verdict("aggregator", "krum", rows).value, rows[first])


@pytest.mark.parametrize("seed", range(40))
def test_copies_of_a_row_have_the_same_score_as_the_row(seed: int) -> None:
    n, d = 7 + seed % 5, 3 + seed
    rows = normal(n, d, seed=seed)
    rows[n - 1] = rows[n - 3] = rows[1]  # f = 1: the copies are each other's nearest
    scores = krum_scores(rows, 1)
    assert scores[1] == scores[n - 1] == scores[n - 3]
    chosen = verdict("aggregator", "multi-krum", rows, f=1, m=2).trust
    assert chosen is not None
    if float(scores.min()) == float(scores[1]):
        assert chosen.nonzero().flatten().tolist() == [1, n - 3]
