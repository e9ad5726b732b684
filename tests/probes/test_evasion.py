"""Fooling a finished model: on a linear model the best move is known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrust.data.base import Task
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.probes import evasion
from fedtrust.probes.base import ProbeContext
from tests.probes.probe_kit import context, measure

FEATURES, N = 6, 400
MODULE = nn.Linear(FEATURES, 2)
LAYOUT = Layout.of(MODULE)
PARAMS = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(1))
MODEL = Architecture(MODULE, LAYOUT)


def teacher(low: float | None = None, high: float | None = None, spread: float = 1.0, **given: Any) -> ProbeContext:
    def output(x: Tensor) -> Tensor:
        with torch.no_grad():
            return MODEL(PARAMS, x)

    x = spread * torch.randn(N, FEATURES, generator=torch.Generator().manual_seed(2))
    x = x if low is None else x.clamp(low, high)
    task = Task("classification", (FEATURES,), 2, low, high)
    y = output(x).argmax(1)
    y[:40] = 1 - y[:40]  # forty that the model gets wrong by itself
    base: dict[str, Any] = {"task": task, "query": output, "released": output, "params": PARAMS, "model": MODEL, "test": (x, y)}
    return context(**(base | given))


def margins() -> Tensor:
    """How far, in L∞, each test sample lies from the boundary of the linear model: |margin| / ‖w₁ − w₀‖₁."""
    weight = LAYOUT.unflatten(PARAMS)["weight"]
    x = teacher().test[0]
    out = MODEL(PARAMS, x).detach()
    return (out[:, 1] - out[:, 0]).abs() / (weight[1] - weight[0]).abs().sum()


@pytest.mark.parametrize("eps", [0.05, 0.2])
@pytest.mark.parametrize(("name", "params"), [("fgsm", {}), ("pgd", {"steps": 10})])
def test_of_a_linear_model_just_those_nearer_than_eps_to_the_boundary_are_fooled(name: str, params: dict[str, Any], eps: float) -> None:
    expected = float((margins()[40:] < eps).double().mean())
    assert measure(name, teacher(), eps=eps, samples=N, **params)[f"{name}/evaded"] == pytest.approx(expected, abs=0.005)
    assert 0.05 < expected < 0.9


def test_only_samples_that_the_model_gets_right_are_tried_and_no_more_than_asked_for() -> None:
    ctx = teacher()
    x, y = evasion.right(ctx, N)
    assert len(x) == N - 40
    assert bool((ctx.query(x).argmax(1) == y).all())
    few = evasion.right(teacher(), 7)[0]
    assert len(few) == 7
    assert all(bool((row == x).all(1).any()) for row in few)


def test_what_users_are_answered_decides() -> None:
    """An output defence that says class 0 whatever is asked leaves only samples of class 0, and nobody can fool it."""
    stubborn = teacher(released=lambda x: F.one_hot(torch.zeros(len(x), dtype=torch.int64), 2).float())
    assert set(evasion.right(stubborn, N)[1].tolist()) == {0}
    assert measure("pgd", stubborn, eps=1.0)["pgd/evaded"] == 0.0


def test_moved_samples_stay_in_the_ball_and_in_the_range_of_a_feature() -> None:
    ctx = teacher(0.0, 1.0)
    x = ctx.test[0]
    moved = evasion.inside(ctx, x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), x, 0.1)
    assert float((moved - x).abs().max()) == pytest.approx(0.1)
    assert (float(moved.min()), float(moved.max())) == (0.0, 1.0)


def test_gradients_are_each_samples_own() -> None:
    ctx = teacher()
    x, y = evasion.right(ctx, 5)
    weight = LAYOUT.unflatten(PARAMS)["weight"]
    expected = (ctx.query(x).softmax(1) - F.one_hot(y, 2)) @ weight
    assert torch.allclose(evasion.gradient(ctx, x, y), expected, atol=1e-6)
    weights = torch.tensor([[1.0, 0.0]] * 5)
    assert torch.allclose(evasion.slope(ctx, x, lambda output: (weights * output).sum()), weight[0].expand(5, -1))
