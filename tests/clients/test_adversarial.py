"""What adversarial training moves, and what its loss is, against closed forms and brute force."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.clients.behaviour_kit import IMAGES, linear, make, view

TASK = IMAGES.__class__("classification", (4,), 3, 0.0, 1.0)
X, Y = torch.tensor([[0.5, 0.02, 0.5, 0.99], [0.3, 0.6, 0.5, 0.4]]), torch.tensor([2, 0])


def weights() -> Tensor:
    return torch.randn(15, generator=torch.Generator().manual_seed(3))


def uphill(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of softmax regression's loss in its input, Wᵀ (p − 1_y), but for the mean over the batch."""
    w = weight[:12].reshape(3, 4)
    return (linear(weight)(x).softmax(1) - F.one_hot(y, 3)) @ w


def test_one_step_is_the_fast_gradient_sign_within_the_features_range() -> None:
    weight = weights()
    moved = make("adversarial-training", epsilon=0.1, steps=1).moved(linear(weight), X, Y, view(TASK))
    assert torch.allclose(moved, (X + 0.1 * uphill(weight, X, Y).sign()).clamp(0, 1))
    assert float(moved.max()) <= 1.0
    assert float(moved.min()) >= 0.0


def test_no_feature_leaves_the_ball_and_a_table_has_no_range() -> None:
    table = IMAGES.__class__("classification", (4,), 3)
    made = make("adversarial-training", epsilon=0.3, steps=5, step=0.2)
    moved = made.moved(linear(weights()), X, Y, view(table))
    assert float((moved - X).abs().max()) == pytest.approx(0.3)
    assert float(moved.min()) < 0.0


def test_steps_are_searched_one_after_another() -> None:
    weight, at = weights(), X
    for _ in range(3):
        at = (X + (at + 0.05 * uphill(weight, at, Y).sign() - X).clamp(-0.1, 0.1)).clamp(0, 1)
    moved = make("adversarial-training", epsilon=0.1, steps=3, step=0.05).moved(linear(weight), X, Y, view(TASK))
    assert torch.allclose(moved, at)


def test_the_gradient_is_that_of_the_loss_on_fixed_moved_samples() -> None:
    weight = weights().requires_grad_()
    made = make("adversarial-training", epsilon=0.1, steps=2, share=0.25)
    (found,) = torch.autograd.grad(made.loss(linear(weight), X, Y, view(TASK)), weight)
    moved = made.moved(linear(weight), X, Y, view(TASK))
    assert not moved.requires_grad
    expected = 0.25 * F.cross_entropy(linear(weight)(moved), Y) + 0.75 * F.cross_entropy(linear(weight)(X), Y)
    assert torch.allclose(found, torch.autograd.grad(expected, weight)[0], atol=1e-7)


def test_texts_are_refused() -> None:
    assert "characters" in str(make("adversarial-training").check(IMAGES.__class__("characters", (12,), 30)))
    assert make("adversarial-training").check(IMAGES) is None
