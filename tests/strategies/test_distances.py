from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrust.strategies import blocks, distances
from fedtrust.strategies.distances import centred_gram, squared_distances
from fedtrust.strategies.krum import krum_scores
from tests.strategies.rules_kit import normal

#: How many products are done in float64: all, as in small rounds, or none, as in the largest.
WIDE, NARROW = 1 << 31, 0


def brute(rows: Tensor) -> Tensor:
    """Squared distances by their definition, from the float32 rows as they are."""
    wide = rows.double()
    return torch.stack([(wide - row).square().sum(1) for row in wide])


def worst(got: Tensor, rows: Tensor) -> float:
    """The largest relative error of a squared distance."""
    wanted = brute(rows)
    return float(((got - wanted).abs() / wanted.clamp(min=1e-300)).fill_diagonal_(0).max())


@pytest.fixture(params=[(WIDE, 1e-9), (NARROW, 1e-5)], ids=["float64", "float32"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Both ways to multiply, with what they promise."""
    monkeypatch.setattr(distances, "EXACT", request.param[0])
    return float(request.param[1])


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1e-6), (1.0, 1e-6), (1e3, 1e-6), (1e3, 1e-4), (1e3, 1e-2), (0.0, 1e-25), (0.0, 1e25)])
@pytest.mark.parametrize("huge", [False, True])
def test_small_differences_around_a_far_point_survive(tolerance: float, offset: float, scale: float, huge: bool) -> None:
    rows = normal(13, 3000, seed=1, scale=scale) + offset
    if huge:
        rows[5] = 1e6
    assert worst(squared_distances(rows), rows) < tolerance


def test_float32_distances_as_others_compute_them_do_not_survive_that() -> None:
    rows = normal(30, 3000, seed=1, scale=1e-4) + 1e3
    assert worst(torch.cdist(rows, rows).double().square(), rows) > 0.1
    mixed = normal(30, 3000, seed=1, scale=1e-3)
    mixed[5] = 1e6
    mixed -= mixed.mean(0)
    assert worst(torch.cdist(mixed, mixed).double().square(), mixed) > 0.1


@pytest.mark.parametrize("bad", [range(0, 130, 4), range(40), range(64)])
def test_a_sample_of_the_rows_that_misleads(tolerance: float, bad: range) -> None:
    """The centre is read off every fourth row here; whoever knows that can move it, but gains nothing."""
    rows = normal(130, 300, seed=9, scale=1e-3) + 2.0
    rows[list(bad)] += 1e4
    rows[bad[0]] = 1e6
    assert worst(squared_distances(rows), rows) < tolerance


def test_rows_that_are_close_to_each_other_but_far_from_the_centre(tolerance: float) -> None:
    """Two camps, and a coalition within one that sends nearly the same: around any one centre their differences would cancel."""
    rows = normal(24, 2000, seed=2, scale=1e-2)
    rows[::2] += 1e3
    rows[1::2] -= 1e3
    rows[0:8:2] = rows[0] + normal(4, 2000, seed=3, scale=1e-3)
    assert worst(squared_distances(rows), rows) < tolerance


@pytest.mark.parametrize("growth", [1.0, 1.3])
def test_rows_on_a_line(tolerance: float, growth: float) -> None:
    """Whatever the centre, some neighbours are close to each other and far from it."""
    steps = torch.arange(60.0) if growth == 1.0 else growth ** torch.arange(60.0)
    rows = steps[:, None] * normal(1, 500, seed=4)
    assert worst(squared_distances(rows), rows) < tolerance


def test_rows_so_arranged_that_new_centres_would_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then float64 does it all: never more than two matrices' worth of new centres."""
    monkeypatch.setattr(distances, "EXACT", 0)
    monkeypatch.setattr(distances, "_NEAR", 1.9)  # nearly every pair counts as too close
    used: list[bool] = []
    true_gram = centred_gram

    def spy(updates: Tensor, rows: Tensor | None = None, centre: int | None = None, **how: Any) -> Tensor:
        used.append(bool(how["exact"]))
        return true_gram(updates, rows, centre, **how)

    monkeypatch.setattr(distances, "centred_gram", spy)
    rows = normal(20, 300, seed=5)
    assert worst(squared_distances(rows), rows) < 1e-9
    assert used == [False, False, False, True]


def test_distances_are_symmetric_and_copies_have_equal_ones(tolerance: float) -> None:
    rows = normal(211, 700, seed=6)
    rows[[3, 110, 209]] = rows[57].clone()
    got = squared_distances(rows)
    assert torch.equal(got, got.T)
    assert not got.diagonal().any()
    for copy in (3, 110, 209):
        assert torch.equal(got[copy], got[57])
        assert got[copy, 57] == 0
    assert int((got == 0).sum()) == 211 + 4 * 3
    scores = krum_scores(rows, 40)
    assert scores[3] == scores[57] == scores[110] == scores[209]


def test_values_near_the_ends_of_float32(tolerance: float) -> None:
    """Differences that overflow float32, squares that do, squares that vanish, all beside a row of zeros."""
    rows = torch.tensor([[3e38, 1.0], [-3e38, 1.0], [0.0, 0.0], [0.0, 1e-30], [1e25, 0.0]])
    got = squared_distances(rows)
    assert bool(torch.isfinite(got).all())
    assert float(got[2, 3]) == pytest.approx(1e-60, rel=1e-4)
    assert float(got[0, 1]) == pytest.approx(36e76, rel=1e-4)
    assert float(got[2, 4]) == pytest.approx(1e50, rel=1e-4)


def test_the_gram_matrix_by_its_definition(tolerance: float) -> None:
    rows = normal(9, 400, seed=7)
    around = rows.double() - rows.double().quantile(0.5, dim=0)
    assert torch.allclose(centred_gram(rows), around @ around.T, rtol=1e-5, atol=1e-4)
    some, other = torch.tensor([1, 4, 8]), rows[[1, 4, 8]].double() - rows[3].double()
    assert torch.allclose(centred_gram(rows, some, 3), other @ other.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_the_blocks_add_up(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    rows = normal(6, 231, seed=8)
    whole = centred_gram(rows, exact=exact)
    for name, value in (("NARROWEST", 10), ("SORTED", 60), ("MULTIPLIED", 600)):
        monkeypatch.setattr(blocks, name, value)
    assert torch.allclose(centred_gram(rows, exact=exact), whole, rtol=1e-6, atol=1e-5)
