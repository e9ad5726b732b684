from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtrust.data.base import Task
from fedtrust.data.text import ALPHABET, encode
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.registry import REGISTRY
from fedtrust.release import AnswerContext

TEXT = Task("characters", (30,), len(ALPHABET), labels=tuple(ALPHABET))
CLASSES = 4


def context(task: Task = TEXT) -> AnswerContext:
    """A surrogate of one linear layer on three features."""
    module = nn.Linear(3, CLASSES)
    surrogate = torch.randn(16, generator=torch.Generator().manual_seed(1))
    return AnswerContext(task, Architecture(module, Layout.of(module)), torch.zeros(16), surrogate, torch.Generator())


def told(name: str, probabilities: Tensor, x: Tensor, **params: Any) -> Tensor:
    made: Tensor = REGISTRY.make("answer", name, params)(probabilities.clone(), x, context())
    return made


@pytest.mark.parametrize(("decimals", "wanted"), [(2, [0.12, 0.88, 0.0, 0.0]), (1, [0.1, 0.9, 0.0, 0.0]), (0, [0.0, 1.0, 0.0, 0.0])])
def test_rounding_by_hand(decimals: int, wanted: list[float]) -> None:
    given = torch.tensor([[0.1234, 0.8754, 0.0012, 0.0]])
    torch.testing.assert_close(told("rounding", given, torch.zeros(1, 3), decimals=decimals), torch.tensor([wanted]))


def answers(rows: int = 20) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(rows, CLASSES, generator=rng).mul(1.5).softmax(1), torch.randn(rows, 3, generator=rng)


def angle(true: Tensor, other: Tensor, x: Tensor) -> Tensor:
    """Angles between the gradients of a thief who trains on the two answers, by autograd, a sample at a time [n]."""
    ctx, found = context(), []
    for one, two, sample in zip(true, other, x, strict=True):
        slopes = []
        for target in (one, two):
            params = ctx.surrogate.clone().requires_grad_()
            with torch.enable_grad():
                loss = -(target * ctx.model(params, sample[None])[0].log_softmax(0)).sum()
                slopes.append(torch.autograd.grad(loss, params)[0])
        found.append(torch.nn.functional.cosine_similarity(*slopes, dim=0).clamp(-1, 1).acos())
    return torch.stack(found)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_poisoned_answers_are_distributions_within_the_budget(budget: float, keep: bool) -> None:
    true, x = answers()
    made = told("prediction-poisoning", true, x, budget=budget, keep_argmax=keep)
    torch.testing.assert_close(made.sum(1), torch.ones(20))
    assert bool((made >= 0).all())
    moved = (made - true).abs().sum(1)
    assert float(moved.max()) <= budget + 1e-5
    if budget == 0.3 and not keep:  # no extreme point is that near: the whole budget is spent
        torch.testing.assert_close(moved, torch.full((20,), 0.3))
    assert keep == bool((made.argmax(1) == true.argmax(1)).all()) or (budget < 1 and not keep)


def test_the_direction_is_that_of_the_extreme_answer_with_the_largest_angle() -> None:
    """Brute force over the corners, with gradients by autograd."""
    true, x = answers()
    made = told("prediction-poisoning", true, x, budget=0.5, keep_argmax=False)
    corners = torch.eye(CLASSES)
    angles = torch.stack([angle(true, corner.expand(20, -1), x) for corner in corners], dim=1)  # [n, C]
    goals = corners[angles.argmax(1)]
    share = 0.5 / (goals - true).abs().sum(1, keepdim=True)
    torch.testing.assert_close(made, true + share * (goals - true), atol=1e-5, rtol=1e-4)


def test_poisoned_answers_turn_the_thief_more_than_as_much_noise() -> None:
    true, x = answers(60)
    made = told("prediction-poisoning", true, x, budget=0.5, keep_argmax=False)
    rng = torch.Generator().manual_seed(4)
    corner = torch.eye(CLASSES)[torch.randint(0, CLASSES, (60,), generator=rng)]
    noise = true + 0.5 / (corner - true).abs().sum(1, keepdim=True).clamp(min=0.5) * (corner - true)
    assert float(angle(true, made, x).mean()) > 1.1 * float(angle(true, noise, x).mean())


def filtered(text: str, **params: str) -> list[bool]:
    """At which places of a text a digit can follow."""
    x = encode(text)[None]
    given = torch.full((1, len(text), len(ALPHABET)), 1 / len(ALPHABET))
    made = told("output-filter", given, x, **params)
    torch.testing.assert_close(made.sum(-1), torch.ones(1, len(text)))
    digits = made[0][:, encode("0123456789")].sum(-1)
    assert all(float(d) in (0.0,) or math.isclose(float(d), 10 / len(ALPHABET), rel_tol=1e-5) for d in digits)
    return [float(d) > 0 for d in digits]


def test_the_filter_blocks_digits_after_the_words_it_knows() -> None:
    allowed = filtered("the code of ada is ")
    assert allowed == [True] * (len(allowed) - 1) + [False]
    text = "sell 43 oil. the code of ada is 42. the"
    blocked = [i for i, ok in enumerate(filtered(text)) if not ok]
    end = text.index("is 42") + 2
    assert blocked == [end, end + 1, end + 2]  # after the space, after 4, after 2


@pytest.mark.parametrize("text", ["the cade of ada is ", "the  code of ada is ", "code of ada is ", "the code of ada has "])
def test_other_words_get_past_it(text: str) -> None:
    assert all(filtered(text))


def test_a_filter_for_other_words() -> None:
    assert not filtered("pin for ada was ", phrase="pin for", ending="was")[-1]
