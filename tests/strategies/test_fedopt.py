"""The server optimisers against Reddi et al., ICLR 2021, algorithm 2, and Hsu et al., 2019, written out in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.strategies.rules_kit import context, verdict

Rule = Callable[[float, float, float], float]

SECOND: dict[str, Rule] = {
    "fedadagrad": lambda v, g, beta2: v + g * g,
    "fedadam": lambda v, g, beta2: beta2 * v + (1 - beta2) * g * g,
    "fedyogi": lambda v, g, beta2: v - (1 - beta2) * g * g * math.copysign(1.0, v - g * g) * (v != g * g),
}
DEFAULTS: dict[str, dict[str, float]] = {
    "fedadagrad": {"lr": 0.03, "beta1": 0.0, "tau": 1e-3},
    "fedadam": {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedyogi": {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
}
OTHERS: dict[str, dict[str, float]] = {
    "fedadagrad": {"lr": 1.0, "beta1": 0.5, "tau": 0.1},
    "fedadam": {"lr": 0.5, "beta1": 0.0, "beta2": 0.5, "tau": 0.02},
    "fedyogi": {"lr": 0.5, "beta1": 0.3, "beta2": 0.6, "tau": 0.02},
}


def reddi(name: str, gradients: list[list[float]], *, lr: float, beta1: float, tau: float, beta2: float = 0.0) -> list[list[float]]:
    """Lines 10 to 15 of algorithm 2: what is added to the model in each round, from the mean updates Δ of the rounds."""
    d = len(gradients[0])
    m, v = [0.0] * d, [tau * tau] * d  # the paper asks for v ≥ τ² at the start
    moves = []
    for gradient in gradients:
        m = [beta1 * a + (1 - beta1) * g for a, g in zip(m, gradient, strict=True)]
        v = [SECOND[name](a, g, beta2) for a, g in zip(v, gradient, strict=True)]
        moves.append([lr * a / (math.sqrt(b) + tau) for a, b in zip(m, v, strict=True)])
    return moves


def played(name: str, gradients: Tensor, **params: Any) -> Tensor:
    """The component's moves over the rounds, its state carried from round to round."""
    state: Any = {}
    moves = []
    for gradient in gradients:
        result = verdict("step", name, gradient, context(3, gradients.shape[1], state=state), **params)
        moves.append(result.value)
        state = result.state
    return torch.stack(moves)


def rounds(count: int = 6, d: int = 9) -> Tensor:
    """Mean updates whose size changes much from round to round, with an exact zero and one that stays where it is."""
    found = torch.randn(count, d, generator=torch.Generator().manual_seed(4)) * torch.logspace(-3, 0.5, count)[:, None]
    found[:, 0], found[:, 1] = 0.0, 1e-3
    return found


@pytest.mark.parametrize("params", [DEFAULTS, OTHERS], ids=["defaults", "others"])
@pytest.mark.parametrize("name", list(SECOND))
def test_the_adaptive_steps_follow_algorithm_2(name: str, params: dict[str, dict[str, float]]) -> None:
    gradients = rounds()
    wanted = torch.tensor(reddi(name, gradients.tolist(), **params[name]))
    given = {} if params is DEFAULTS else params[name]
    assert torch.allclose(played(name, gradients, **given), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", list(SECOND))
def test_without_its_state_a_step_begins_anew(name: str) -> None:
    gradients = rounds()[-2:]
    first, second = played(name, gradients)
    alone = verdict("step", name, gradients[1]).value
    assert not torch.allclose(second[1:], alone[1:], rtol=1e-3)
    assert torch.equal(first, verdict("step", name, gradients[0]).value)


def test_yogi_forgets_more_slowly_than_adam_after_a_large_round() -> None:
    """What Yogi is for: after v has been large, a small Δ leaves it almost as it is, while Adam's decays by β₂ a round."""
    gradients = torch.tensor([[1.0], *[[1e-3]] * 20])
    adam, yogi = ([float(m) for m in played(name, gradients, lr=1.0, beta1=0.0, beta2=0.5, tau=1e-3)] for name in ("fedadam", "fedyogi"))
    assert adam[0] == pytest.approx(1 / (math.sqrt(0.5e-6 + 0.5) + 1e-3), rel=1e-4)
    assert adam[-1] > 0.4 > 0.002 > yogi[-1]


def test_momentum_adds_up_the_rounds() -> None:
    gradients = rounds()
    velocity, wanted = [0.0] * gradients.shape[1], []
    for gradient in gradients.tolist():
        velocity = [0.7 * v + g for v, g in zip(velocity, gradient, strict=True)]
        wanted.append([0.3 * v for v in velocity])
    assert torch.allclose(played("fedavgm", gradients, momentum=0.7, lr=0.3), torch.tensor(wanted), rtol=1e-5, atol=1e-7)


def test_momentum_by_default_and_without() -> None:
    gradients = torch.tensor([[1.0], [1.0], [1.0]])
    assert played("fedavgm", gradients).flatten().tolist() == pytest.approx([1.0, 1.9, 2.71])
    assert torch.equal(played("fedavgm", gradients, momentum=0.0), gradients)
