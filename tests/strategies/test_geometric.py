from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedtrust.strategies import distances, geometric
from fedtrust.strategies.distances import centred_gram
from fedtrust.strategies.geometric import over_updates, weiszfeld
from tests.strategies.rules_kit import context, normal, verdict


def plain(rows: Tensor, weights: Tensor, smoothing: float, iterations: int) -> Tensor:
    """Smoothed Weiszfeld in the space of the rows, each distance from the iterate itself; the start as `weiszfeld` documents it."""
    wide = rows.double()
    centre = wide.quantile(0.5, dim=0)
    typical = float((wide - centre).norm(dim=1).quantile(0.5))
    point, least = centre, typical
    for _ in range(iterations):
        pull = weights / (wide - point).norm(dim=1).clamp(min=least)
        point, least = (pull[:, None] * wide).sum(0) / pull.sum(), smoothing * typical
    return point


def spread(rows: Tensor, point: Tensor, weights: Tensor | None = None) -> float:
    """What the geometric median makes smallest."""
    distances = (rows.double() - point.double()).norm(dim=1)
    return float((distances if weights is None else weights * distances).sum())


@pytest.mark.parametrize("exact", [0, 1 << 31])
@pytest.mark.parametrize(("n", "d"), [(3, 1), (5, 2), (12, 40), (31, 600)])
@pytest.mark.parametrize("iterations", [1, 2, 3, 10, 200])
def test_the_iterates_are_those_of_weiszfeld(n: int, d: int, iterations: int, exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "EXACT", exact)
    rows = normal(n, d, seed=n) + 0.5
    rows[0] *= 30
    weights = torch.arange(1.0, n + 1)
    equal = verdict("aggregator", "geometric-median", rows, iterations=iterations, tolerance=0.0, smoothing=1e-3)
    assert torch.allclose(equal.value.double(), plain(rows, torch.ones(n), 1e-3, iterations), atol=1e-5)
    ctx = context(n, d, weights=weights)
    uneven = verdict("aggregator", "geometric-median", rows, ctx, iterations=iterations, tolerance=0.0, smoothing=1e-3, weighted=True)
    assert torch.allclose(uneven.value.double(), plain(rows, weights, 1e-3, iterations), atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "d"), [(4, 2), (7, 3), (20, 50)])
def test_no_point_nearby_has_a_smaller_sum_of_distances(n: int, d: int, seed: int) -> None:
    rows = normal(n, d, seed=10 * n + seed)
    value = verdict("aggregator", "geometric-median", rows).value
    best = spread(rows, value)
    for size in (1e-1, 1e-2, 1e-3):
        for step in normal(60, d, seed=seed, scale=size):
            assert spread(rows, value.double() + step) > best - 1e-6
    assert best <= min(spread(rows, row) for row in rows) + 1e-6
    assert best < spread(rows, rows.mean(0))


def test_known_geometric_medians() -> None:
    """Of four points that span a convex quadrilateral: where its diagonals cross. Of an odd number on a line: the middle one."""
    square = torch.tensor([[-1.0, 0.0], [3.0, 0.0], [0.0, -2.0], [0.0, 5.0]]) + 7
    assert verdict("aggregator", "geometric-median", square).value.tolist() == pytest.approx([7.0, 7.0], abs=1e-4)
    line = torch.tensor([[0.0], [1.0], [2.0], [50.0], [1000.0]])
    assert verdict("aggregator", "geometric-median", line).value.item() == pytest.approx(2.0, abs=1e-3)


def test_a_start_on_a_row_that_is_not_the_answer_is_left() -> None:
    """Row 0 is the median of each coordinate, where the iteration starts; the others' pull on it is more than one row's."""
    rows = torch.tensor([[0.0, 0.0], [0.0, -7.0], [8.0, 2.0], [7.0, 1.0], [-3.0, -5.0]])
    assert rows.median(0).values.tolist() == [0.0, 0.0]
    assert float((rows[1:] / rows[1:].norm(dim=1, keepdim=True)).sum(0).norm()) > 2
    point = rows.double().mean(0)
    for _ in range(20_000):
        pull = 1 / (rows.double() - point).norm(dim=1)
        point = (pull[:, None] * rows).sum(0) / pull.sum()
    value = verdict("aggregator", "geometric-median", rows).value
    assert float(value.norm()) > 1
    assert torch.allclose(value.double(), point, atol=1e-4)


def test_weights_count_only_when_asked_for() -> None:
    rows, weights = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 1.0, 5.0])
    ctx = context(3, 1, weights=weights)
    assert verdict("aggregator", "geometric-median", rows, ctx).value.item() == pytest.approx(1.0, abs=1e-4)
    assert verdict("aggregator", "geometric-median", rows, ctx, weighted=True).value.item() == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize("agree", [4, 7])
def test_a_majority_that_agrees_decides(agree: int) -> None:
    rows = normal(7, 20, seed=1)
    rows[:agree] = rows[0].clone()
    result = verdict("aggregator", "geometric-median", rows)
    assert torch.allclose(result.value, rows[0], atol=1e-5)
    assert result.trust is not None
    assert result.trust[:agree].tolist() == [1.0] * agree
    assert float(result.trust[agree:].sum()) < 1e-4


def test_trust_falls_with_the_distance() -> None:
    rows = normal(9, 30, seed=2)
    rows[4] = 1e6
    result = verdict("aggregator", "geometric-median", rows)
    assert result.trust is not None
    order = (rows.double() - result.value).norm(dim=1).argsort()
    assert torch.equal(result.trust.argsort(descending=True), order)
    assert float(result.trust[4]) < 1e-4
    assert float(result.trust.max()) == 1.0


def test_it_stops_when_nothing_is_gained() -> None:
    gram, weights = centred_gram(normal(10, 50, seed=3)), torch.full((10,), 0.1, dtype=torch.float64)
    rough, quick = weiszfeld(gram, weights, 1e-6, 1000, 1e-2)
    fine, slow = weiszfeld(gram, weights, 1e-6, 1000, 1e-12)
    assert 1 <= quick < slow < 1000
    assert float(fine.sum()) == pytest.approx(1.0)
    assert weiszfeld(gram, weights, 1e-6, 2, 0.0)[1] == 2
    assert not torch.allclose(rough, fine, atol=1e-6)


def test_values_near_the_end_of_float32() -> None:
    rows = torch.full((5, 2), 1e37)
    rows[0] = 3e38
    assert verdict("aggregator", "geometric-median", rows).value.tolist() == pytest.approx([1e37, 1e37])


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 rows of 2000 numbers count as many long ones; the search starts from 8 x 32 of the numbers."""
    monkeypatch.setattr(geometric, "MANY_ROWS", 20)
    monkeypatch.setattr(geometric, "_COLUMNS", 256)
    monkeypatch.setattr(geometric, "_PIECES", 8)


def many_long_rows(what: str) -> Tensor:
    rows = normal(40, 2000, seed=5) + 0.5
    if what == "outliers":
        rows[:12] = rows[:12] * 50 + 300
    elif what == "outliers that the start does not see":
        rows[:12, 100:200] += 1000.0
    elif what == "a coalition":
        rows[:15] = rows[0] + 1e-3 * normal(15, 2000, seed=6)
    elif what == "two camps":  # the sum of distances hardly changes between them
        rows = rows * 1e-2 + torch.where(torch.arange(40) < 20, -1.0, 1.0)[:, None]
        rows[0] += 1.5
    elif what == "most are one":
        rows[:25] = rows[0].clone()
    return rows


MANY_LONG_ROWS = {
    "all alike": True,
    "outliers": True,
    "outliers that the start does not see": False,
    "a coalition": False,
    "two camps": False,
    "most are one": True,
}


@pytest.mark.parametrize("what", MANY_LONG_ROWS)
def test_many_long_rows_have_the_same_geometric_median(what: str, few_are_many: None) -> None:
    """Whether going over the rows finds it in time, or their products have to."""
    rows = many_long_rows(what)
    for weights in (torch.ones(40), torch.arange(1.0, 41)):
        share = weights.double() / weights.double().sum()
        shares, _ = weiszfeld(centred_gram(rows, exact=True), share, 1e-6, 1000, 1e-14)
        expected = (shares[:, None] * rows.double()).sum(0)
        found = over_updates(rows, share, 1e-6, 1000, 1e-12)
        if weights[0] == weights[1]:
            assert (found is not None) == MANY_LONG_ROWS[what]
        value = verdict("aggregator", "geometric-median", rows, context(40, 2000, weights=weights), weighted=True).value
        assert found is None or value.equal(found[1])
        assert spread(rows, value, share) < spread(rows, expected, share) * (1 + 1e-7)
        assert spread(rows, value, share) < spread(rows, rows.mean(0), share)


def test_rows_that_are_all_alike_in_every_way_do_not_divide_by_nothing(few_are_many: None) -> None:
    rows = torch.cat([torch.eye(2000)[:20], -torch.eye(2000)[:20]])
    assert verdict("aggregator", "geometric-median", rows).value.abs().max() < 1e-6


def test_the_most_iterations_over_many_long_rows_are_those_asked_for(few_are_many: None) -> None:
    rows, share = many_long_rows("outliers that the start does not see"), torch.full((40,), 1 / 40, dtype=torch.float64)
    points = []
    for most in (1, 3, 8):
        found = over_updates(rows, share, 1e-6, most, 0.0)
        assert found is not None
        points.append(spread(rows, found[1]))
    assert points == sorted(points, reverse=True)
    assert len(set(points)) == 3


@pytest.mark.parametrize("what", ["few", "short", "beyond float32"])
def test_some_rows_are_left_to_their_products(what: str, few_are_many: None) -> None:
    rows = {"few": normal(20, 2000, seed=7), "short": normal(40, 1000, seed=7)}.get(what, normal(40, 2000, seed=7) * 1e25)
    share = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    assert over_updates(rows, share, 1e-6, 1000, 1e-12) is None
    assert torch.isfinite(verdict("aggregator", "geometric-median", rows).value).all()


def literal_rfa(rows: Tensor, weights: Tensor, nu: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Pillutla et al., algorithm 2, in the space of the rows; and the last weights."""
    wide, alpha = rows.double(), weights.double() / weights.double().sum()
    point, beta = (alpha[:, None] * wide).sum(0), alpha
    for _ in range(iterations):
        beta = alpha / torch.stack([(row - point).norm().clamp(min=nu) for row in wide])
        point = (beta[:, None] * wide).sum(0) / beta.sum()
    return point, beta


@pytest.mark.parametrize(("n", "d", "nu", "iterations"), [(2, 1, 1e-6, 1), (5, 3, 1e-6, 3), (12, 400, 1e-6, 3), (9, 4, 2.0, 5)])
def test_rfa_is_the_short_run_with_sample_weights(n: int, d: int, nu: float, iterations: int) -> None:
    rows, weights = normal(n, d, seed=n), torch.arange(1.0, n + 1)
    rows[0] *= 50
    point, beta = literal_rfa(rows, weights, nu, iterations)
    result = verdict("aggregator", "rfa", rows, context(n, d, weights=weights), nu=nu, iterations=iterations)
    assert torch.allclose(result.value.double(), point, atol=1e-5)
    assert result.trust is not None
    wanted = beta / weights
    assert torch.allclose(result.trust.double(), wanted / wanted.max(), atol=1e-5)


def test_rfa_ends_at_the_geometric_median_if_it_may() -> None:
    rows = normal(11, 5, seed=5)
    rows[0] = 1e4
    far = verdict("aggregator", "rfa", rows, iterations=3).value
    near = verdict("aggregator", "rfa", rows, iterations=300).value
    exact = verdict("aggregator", "geometric-median", rows).value
    assert torch.allclose(near, exact, atol=1e-3)
    assert float((rows.mean(0) - exact).norm()) > 50 * float((far - exact).norm()) > 50 * 1e-3


def test_rfa_does_not_stay_with_a_client_that_sends_nothing() -> None:
    """A start at zero, as the algorithm has it for models, would stand on such a row and never leave it."""
    rows = normal(8, 30, seed=6) + 5
    rows[3] = 0
    assert float(verdict("aggregator", "rfa", rows).value.mean()) > 4
