from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedtrust.errors import InputError
from fedtrust.server import State
from tests.strategies.rules_kit import context, facts, normal, verdict


def brute(rows: Tensor, start: Tensor, tau: float, iterations: int) -> tuple[Tensor, list[float]]:
    """Karimireddy et al., algorithm 2: v ← v + 1/n Σ (xᵢ − v) min(1, τ / |xᵢ − v|)."""
    point, factors = start.double(), []
    for _ in range(iterations):
        moves, factors = torch.zeros_like(point), []
        for row in rows.double():
            away = row - point
            factors.append(min(1.0, tau / max(float(away.norm()), 1e-300)))
            moves += factors[-1] * away
        point = point + moves / len(rows)
    return point, factors


@pytest.mark.parametrize("tau", [0.1, 2.0, 1e9])
@pytest.mark.parametrize("iterations", [1, 2, 7])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 3), (12, 900)])
def test_three_rounds_by_the_definition(tau: float, iterations: int, n: int, d: int) -> None:
    centre, state = torch.zeros(d), dict[str, Tensor]()
    for r in range(3):
        rows = normal(n, d, seed=r) + 1.0
        rows[0] *= 100
        wanted, factors = brute(rows, centre, tau, iterations)
        result = verdict("aggregator", "centered-clipping", rows, context(n, d, state=state), tau=tau, iterations=iterations)
        assert torch.allclose(result.value.double(), wanted, rtol=1e-5, atol=1e-5)
        assert result.trust is not None
        assert result.trust.tolist() == pytest.approx(factors, rel=1e-4)
        assert result.state is not None
        kept: State = result.state
        assert torch.equal(kept["centre"], result.value)
        centre, state = result.value, dict(kept)


def test_no_update_moves_it_by_more_than_its_share() -> None:
    rows = normal(10, 20, seed=1)
    before = verdict("aggregator", "centered-clipping", rows, tau=2.0).value
    rows[6] = 1e6
    result = verdict("aggregator", "centered-clipping", rows, tau=2.0)
    assert float((result.value - before).norm()) <= 2 * 2.0 / 10 + 1e-6
    assert result.trust is not None
    assert float(result.trust[6]) == pytest.approx(2.0 / (1e6 * 20**0.5))


def test_with_a_wide_radius_it_is_the_mean() -> None:
    rows = normal(10, 20, seed=1)
    assert torch.allclose(verdict("aggregator", "centered-clipping", rows, tau=1e9).value, rows.mean(0), atol=1e-6)


def test_rows_that_stand_on_the_centre() -> None:
    assert verdict("aggregator", "centered-clipping", torch.zeros(4, 3)).value.tolist() == [0.0] * 3


def test_a_radius_must_be_positive() -> None:
    for wrong in ({"tau": 0.0}, {"iterations": 0}):
        with pytest.raises(InputError, match="greater than"):
            facts("centered-clipping", n=5, f=0, **wrong)
