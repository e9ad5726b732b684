from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from fedtrust.client import Reply
from fedtrust.errors import InputError
from tests.clients.behaviour_kit import LAYOUT, TABLE, linear, make, samples, view


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 2, 1, 0, 0])


def weights(seed: int) -> Tensor:
    return torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed))


def test_the_honest_client_changes_nothing() -> None:
    honest, seen = make("honest"), view(TABLE)
    x, y = samples(TABLE, 5)
    same_x, same_y = honest.poison(x, y, seen)
    assert same_x is x
    assert same_y is y
    updates = torch.randn(2, LAYOUT.size)
    assert honest.craft(updates, seen) is updates
    reply = Reply({"weight": updates}, 5)
    assert honest.reply(reply, seen) is reply
    assert honest.goal(x, y, TABLE) is None
    assert honest.remember(10) == {}


def test_the_honest_loss_is_that_of_the_protocol() -> None:
    x, y = batch()
    w = weights(2)
    wanted = 0.0
    for row, label in zip((x @ w[:12].view(3, 4).T + w[12:]).tolist(), y.tolist(), strict=True):
        wanted += math.log(sum(math.exp(v) for v in row)) - row[label]
    assert float(make("honest").loss(linear(w), x, y, view(TABLE))) == pytest.approx(wanted / len(y), rel=1e-5)


@pytest.mark.parametrize("mu", [0.01, 1.0, 25.0])
def test_fedprox_adds_half_mu_times_the_squared_distance(mu: float) -> None:
    """Li et al., MLSys 2020, equation 2."""
    x, y = batch()
    local, world = weights(3), weights(4)
    plain = float(F.cross_entropy(linear(local)(x), y))
    distance = sum((a - b) ** 2 for a, b in zip(local.tolist(), world.tolist(), strict=True))
    proximal = make("fedprox", mu=mu).loss(linear(local), x, y, view(TABLE, params=world))
    assert float(proximal) == pytest.approx(plain + mu / 2 * distance, rel=1e-5)


def test_the_gradient_of_fedprox_points_back_to_the_global_model() -> None:
    """It is the plain gradient plus mu times (w − w_global)."""
    x, y = batch()
    local, world, mu = weights(3), weights(4), 0.7
    seen = view(TABLE, params=world)
    proximal = grad(lambda w: make("fedprox", mu=mu).loss(linear(w), x, y, seen))(local)
    plain = grad(lambda w: make("honest").loss(linear(w), x, y, seen))(local)
    assert torch.allclose(proximal - plain, mu * (local - world), atol=1e-5)
    assert torch.allclose(grad(lambda w: make("fedprox", mu=mu).loss(linear(w), x, y, view(TABLE, params=local)))(local), plain, atol=1e-6)


def test_fedprox_under_vmap_is_fedprox_for_each_client() -> None:
    x, y = batch()
    both, world = torch.stack([weights(5), weights(6)]), weights(4)
    seen, fedprox = view(TABLE, params=world), make("fedprox", mu=2.0)
    together = vmap(lambda w: fedprox.loss(linear(w), x, y, seen))(both)
    alone = torch.stack([fedprox.loss(linear(w), x, y, seen) for w in both])
    assert torch.allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize("mu", [0.0, -1.0, float("nan"), float("inf"), "0.1", True])
def test_mu_must_be_a_positive_number(mu: object) -> None:
    with pytest.raises(InputError, match=r"^mu: "):
        make("fedprox", mu=mu)
