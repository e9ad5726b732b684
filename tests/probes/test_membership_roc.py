"""ROC curves and their intervals, against pairs counted one by one and against the values of the textbooks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtrust.probes import roc

#: Scores with many ties, and who is a member; at least one of each.
GAMES = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40).filter(lambda g: len({m for _, m in g}) == 2)


def split(game: list[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([float(s) for s, _ in game]), torch.tensor([m for _, m in game])


@settings(deadline=None)
@given(GAMES)
def test_the_area_is_the_share_of_pairs_in_the_right_order(game: list[tuple[int, bool]]) -> None:
    inside, outside = [s for s, m in game if m], [s for s, m in game if not m]
    pairs = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside) / (len(inside) * len(outside))
    assert roc.auc(*split(game)) == pytest.approx(pairs)


@settings(deadline=None)
@given(GAMES)
def test_rates_and_accuracy_are_those_of_the_best_threshold(game: list[tuple[int, bool]]) -> None:
    inside, outside = [s for s, m in game if m], [s for s, m in game if not m]
    found = [(sum(b >= t for b in outside) / len(outside), sum(a >= t for a in inside) / len(inside)) for t in range(7)]
    assert roc.best_accuracy(*split(game)) == pytest.approx(max((tpr + 1 - fpr) / 2 for fpr, tpr in found))
    at = roc.tpr_at(*split(game), 0.25)
    if len(outside) < 4:
        assert at is None
    else:
        assert at is not None
        assert at.value == pytest.approx(max(tpr for fpr, tpr in found if fpr <= 0.25))
        assert at.low <= at.value <= at.high


def test_a_curve_runs_from_nobody_to_all_and_never_falls() -> None:
    member = torch.tensor([True, False] * 50)
    fpr, tpr = roc.curve(torch.randn(100, generator=torch.Generator().manual_seed(1)), member)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert bool((fpr.diff() >= 0).all())
    assert bool((tpr.diff() >= 0).all())
    assert len(roc.curve(torch.zeros(100), member).fpr) == 2  # one threshold: all or nobody


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"), [(0, 10, 0.0, 0.3085), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0), (1, 200, 0.0001266, 0.02754)]
)
def test_clopper_and_pearson(hits: int, of: int, low: float, high: float) -> None:
    assert roc.clopper_pearson(hits, of) == pytest.approx((low, high), rel=1e-3, abs=1e-9)


def test_the_interval_of_an_area_solves_newcombes_equation() -> None:
    low, high = roc.auc_interval(0.7, 30, 50)
    for theta in (low, high):
        mean = 40.0
        spread = theta * (1 - theta) * (1 + (mean - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))) / 1500
        assert abs(theta - 0.7) == pytest.approx(1.959964 * spread**0.5, rel=1e-6)
    assert low < 0.7 < high


def test_a_perfect_separation_is_no_certainty_and_more_clients_know_more() -> None:
    few, many = roc.auc_interval(1.0, 4, 4), roc.auc_interval(1.0, 400, 400)
    assert few.high == many.high == 1.0
    assert few.low < 0.75 < 0.97 < many.low
    assert roc.auc_interval(0.0, 4, 4) == pytest.approx((0.0, 1 - few.low))


def test_the_interval_covers_the_true_area() -> None:
    """Normal scores a deviation apart have the area Φ(1/√2) = 0.760; of 95 % intervals about 95 % hold it (measured: 95.5 %)."""
    rng, held = torch.Generator().manual_seed(4), 0
    member = torch.arange(120) < 50
    for _ in range(400):
        low, high = roc.auc_interval(roc.auc(torch.randn(120, generator=rng) + member.float(), member), 50, 70)
        held += low <= 0.7602 <= high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize(
    ("scores", "member", "message"),
    [
        ([0.0, 1.0], [True], "scores \\[2\\] for candidates \\[1\\]"),
        ([0.0, float("nan")], [True, False], "1 of 2 scores are not finite"),
        ([0.0, 1.0], [True, True], "2 of 2 candidates are members"),
    ],
)
def test_what_cannot_be_scored_is_refused(scores: list[float], member: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roc.auc(torch.tensor(scores), torch.tensor(member))
