"""What a server computes from an update: the gradient in it, and what a guess would give, against plain PyTorch training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fedtrust.models.losses import cross_entropy
from fedtrust.probes.inversion_update import acts, as_one, imitated, loss_of, mean_gradient, seen, target
from tests.probes.inversion_kit import DIGITS, Play, recipe, samples

RECIPES: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({"batch_size": 4}, 4),
    ({"batch_size": 8}, 3),  # the batch is filled up from further passes: 3, 3 and 2 times
    ({"batch_size": 2, "epochs": 3}, 4),
    ({"batch_size": 3, "epochs": 2}, 4),
    ({"optimiser": "momentum", "momentum": 0.9, "batch_size": 2, "epochs": 2}, 4),
    ({"optimiser": "nesterov", "momentum": 0.5, "batch_size": 1, "epochs": 2}, 2),
    ({"optimiser": "sgd", "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1, "batch_size": 2}, 4),
]


@pytest.mark.parametrize(("changes", "n"), RECIPES)
def test_an_imitated_client_does_what_the_client_did(changes: dict[str, Any], n: int) -> None:
    """The true samples, in the order in which the client took them, give the very update, whatever the recipe of the SGD family."""
    play = Play("lenet", DIGITS, [samples(DIGITS, n)], recipe(**changes))
    ctx = play.seen()
    (what,) = seen(ctx, 4)
    made = imitated(play.model, ctx.criterion, what, play.how, *play.data[0])
    torch.testing.assert_close(made, target(what, play.how), atol=2e-6, rtol=1e-3)


def test_the_mean_gradient_of_one_step_is_the_gradient() -> None:
    x, y = samples(DIGITS, 5)
    play = Play("lenet", DIGITS, [(x, y)], recipe("momentum", batch_size=5, momentum=0.9, weight_decay=0.5))
    (what,) = seen(play.seen(), 1)
    params = play.start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(play.model(params, x), y), params)
    torch.testing.assert_close(mean_gradient(what, play.how), gradient, atol=1e-5, rtol=1e-3)


def test_several_steps_taken_for_one_keep_their_mean_gradient() -> None:
    play = Play("lenet", DIGITS, [samples(DIGITS, 4)], recipe("momentum", momentum=0.9, epochs=2))
    (what,) = seen(play.seen(), 1)
    one = as_one(what, play.how)
    assert what.steps == 8
    assert one.steps == 1
    torch.testing.assert_close(mean_gradient(one, play.how), mean_gradient(what, play.how))


def test_soft_labels_give_the_expected_loss() -> None:
    output = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    soft = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
    written_out = -(soft * output.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss_of(cross_entropy, output, soft), written_out)
    hard = torch.tensor([0, 3, 1])
    torch.testing.assert_close(loss_of(cross_entropy, output, hard), loss_of(cross_entropy, output, torch.eye(4)[hard]))


def test_behind_secure_aggregation_there_is_one_row_of_everybody() -> None:
    play = Play("lenet", DIGITS, [samples(DIGITS, 2, s) for s in range(3)], recipe(batch_size=2))
    ctx = play.seen(clients=(), updates=play.updates.mean(0, keepdim=True))
    (what,) = seen(ctx, 1)
    assert (what.client, what.samples, what.steps) == (None, 6, 1)
    x, y = (torch.cat([pair[i] for pair in play.data]) for i in (0, 1))
    torch.testing.assert_close(imitated(play.model, ctx.criterion, what, play.how, x, y), target(what, play.how), atol=1e-6, rtol=1e-3)


def test_other_optimisers_are_refused() -> None:
    play = Play("logistic", DIGITS, [samples(DIGITS, 1)], recipe("adam"))
    with pytest.raises(ValueError, match="is 'adam'"):
        mean_gradient(seen(play.seen(), 1)[0], play.how)


def test_an_observer_acts_in_its_round_and_says_if_there_was_none() -> None:
    ctx = Play("logistic", DIGITS, [samples(DIGITS, 1)], recipe()).seen(round=2)
    assert acts(ctx, 2)
    assert not acts(ctx, 3)
    with pytest.raises(ValueError, match="the last round was 2"):
        acts(dataclasses.replace(ctx, final=True), 3)


def test_nothing_is_seen_where_no_reply_was_used() -> None:
    ctx = Play("logistic", DIGITS, [samples(DIGITS, 1)], recipe()).seen(updates=None)
    assert seen(ctx, 3) == []
