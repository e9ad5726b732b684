"""Gradient inversion in closed form and by search: what must come out exactly, and labels."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrust.data.base import Task
from fedtrust.probes.guesses import LabelCounts, Reconstructions
from fedtrust.probes.inversion_analytic import neighbours, several, single
from fedtrust.probes.inversion_labels import by_mean_output, counted, labels_of
from fedtrust.probes.inversion_update import seen
from fedtrust.probes.scores_images import assigned
from tests.probes.inversion_kit import DIGITS, TABLE, Play, recipe, samples
from tests.probes.probe_kit import measure


def worst(found: Any, play: Play) -> float:
    """The PSNR in dB of the client's sample that came out worst, best match."""
    assert isinstance(found, Reconstructions)
    assert found.items
    values = []
    for item in found.items:
        assert item.client is not None
        truth = play.data[item.client][0]
        guess = item.x.clamp(0, 1) if play.task.image else item.x
        assert len(guess) == len(truth)
        values.append(float(assigned(guess, truth, 1.0)[2].min()))
    return min(values)


@pytest.mark.parametrize(("model", "task"), [("logistic", DIGITS), ("mlp", DIGITS), ("logistic", TABLE), ("mlp", TABLE)])
def test_analytic_inversion_is_exact_for_a_single_sample(model: str, task: Task) -> None:
    """Geiping et al., proposition 3.1."""
    play = Play(model, task, [samples(task, 1, s) for s in range(5)], recipe())
    found = measure("analytic-inversion", play.seen(), clients=5)["analytic-inversion"]
    assert len(found.items) == 5
    assert worst(found, play) > 60
    assert all(torch.equal(item.y, play.data[item.client][1]) for item in found.items)


def test_rectified_units_give_samples_of_a_batch_away_and_a_linear_model_only_mixtures() -> None:
    play = Play("mlp", DIGITS, [samples(DIGITS, 3)], recipe(batch_size=3), hidden=[512])
    found = measure("analytic-inversion", play.seen())["analytic-inversion"].items[0].x
    assert float(assigned(found, play.data[0][0], 1.0)[2].max()) > 60
    mixed = Play("logistic", DIGITS, [samples(DIGITS, 3)], recipe(batch_size=3))
    found = measure("analytic-inversion", mixed.seen())["analytic-inversion"].items[0].x
    assert float(assigned(found.clamp(0, 1), mixed.data[0][0], 1.0)[2].max()) < 30


def test_a_convolutional_model_is_refused_by_the_closed_form() -> None:
    ctx = Play("cnn", DIGITS, [samples(DIGITS, 1)], recipe()).seen()
    with pytest.raises(ValueError, match="begins otherwise"):
        measure("analytic-inversion", ctx)


def test_single_weighs_rows_by_how_much_they_moved() -> None:
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([1.0, 1e-9, -0.5])
    weight = bias[:, None] * x + torch.tensor([0.0, 1e-6, 0.0])[:, None]  # the faint row is all noise
    torch.testing.assert_close(single(weight, bias), x, atol=1e-5, rtol=1e-5)
    assert not single(torch.zeros(3, 6), torch.zeros(3)).any()


def test_rows_that_agree_are_found_among_mixtures() -> None:
    a, b = torch.rand(2, 10, generator=torch.Generator().manual_seed(0))
    weight = torch.stack([0.3 * a, -0.2 * a, 0.1 * b, 0.4 * b, 0.5 * (a + 2 * b), 0.7 * (2 * a + b)])
    bias = torch.tensor([0.3, -0.2, 0.1, 0.4, 1.5, 2.1])
    found = several(weight, bias, 2)
    assert {tuple((row * 1e3).round().int().tolist()) for row in found} == {tuple((row * 1e3).round().int().tolist()) for row in (a, b)}
    assert several(torch.zeros(3, 4), torch.zeros(3), 2).shape == (0, 4)


def test_neighbouring_bins_differ_by_the_sample_between_them() -> None:
    """Three samples, edges between them: written-out sums, the units in any order."""
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    upstream = torch.tensor([0.2, -0.5, 0.3])
    active = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1.0]])  # [units, samples]: nobody between the second and the third edge
    bias, weight = active @ upstream, (active * upstream) @ x
    places = torch.tensor([2, 0, 3, 1])  # in which row of the layer each unit stands, by rising edge
    rows = places.argsort()
    found = neighbours(weight[rows], bias[rows], places)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn", "lenet"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_label_of_a_single_sample_is_always_right(model: str, epochs: int) -> None:
    """iDLG: under cross-entropy the label's bias alone has a negative gradient."""
    play = Play(model, DIGITS, [samples(DIGITS, 1, s) for s in range(20)], recipe(epochs=epochs))
    ctx = play.seen()
    for one in seen(ctx, 20):
        assert torch.equal(labels_of(ctx, one, 1), play.data[one.client or 0][1])


@pytest.mark.parametrize("n", [4, 8, 32])
def test_label_counts_of_a_batch_on_an_untrained_model(n: int) -> None:
    play = Play("lenet", DIGITS, [samples(DIGITS, n, s) for s in range(4)], recipe(batch_size=n))
    found = measure("label-recovery", play.seen())["label-recovery"]
    assert isinstance(found, LabelCounts)
    assert sorted(found.counts) == [0, 1, 2, 3]
    right = 0
    for client, counts in found.counts.items():
        assert int(counts.sum()) == n
        right += int(torch.minimum(counts, torch.bincount(play.data[client][1], minlength=10)).sum())
    assert right >= 0.9 * 4 * n


def test_label_counts_written_out() -> None:
    uniform = torch.zeros(5, 4)  # an untrained model: p̄ = 1/4
    counts = torch.tensor([3, 0, 1, 4])
    gradient = 0.25 - counts / 8
    assert by_mean_output(gradient, uniform, 8).tolist() == counts.tolist()
    assert counted(torch.tensor([1.4, -2.0, 2.6, 0.0]), 4).tolist() == [1, 0, 3, 0]
    assert counted(torch.tensor([-1.0, -1.0]), 3).sum() == 3


@pytest.mark.parametrize("name", ["dlg", "idlg", "inverting-gradients"])
def test_a_search_finds_the_digit_behind_one_gradient(name: str) -> None:
    """A smooth network without pooling, one sample, one step: all three end far above 20 dB."""
    play = Play("lenet", DIGITS, [samples(DIGITS, 1, s) for s in (0, 1)], recipe())
    found = measure(name, play.seen(), clients=2, iterations=150, restarts=1)
    assert worst(found[name], play) > 35
    assert all(torch.equal(item.y, play.data[item.client][1]) for item in found[name].items)
    assert found[f"{name}/mismatch"] < 1e-4


@pytest.mark.parametrize("name", ["idlg", "inverting-gradients"])
def test_local_steps_are_played_on_the_guess(name: str) -> None:
    """One sample, three steps at a high rate: played step by step it is found, taken for one gradient it is found less well."""
    play = Play("lenet", DIGITS, [samples(DIGITS, 1, 4)], recipe(lr=1.0, epochs=3))
    played, plain = (worst(measure(name, play.seen(), restarts=1, iterations=100, unroll=u)[name], play) for u in (True, False))
    assert played > 25
    assert played > plain + 5


def test_noise_on_the_update_is_noise_on_the_picture() -> None:
    play = Play("lenet", DIGITS, [samples(DIGITS, 1)], recipe())
    values = []
    for noise in (0.0, 1e-3, 1e-1):
        ctx = play.seen()
        shaken = play.updates + noise * play.updates.norm() * torch.randn(play.updates.shape, generator=torch.Generator().manual_seed(1))
        values.append(worst(measure("idlg", dataclasses.replace(ctx, updates=shaken), restarts=1)["idlg"], play))
    assert values[0] > values[1] + 10 > values[2] + 15


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_a_convolutional_network_is_inverted_layer_by_layer(activation: str) -> None:
    play = Play("lenet", DIGITS, [samples(DIGITS, 1), samples(DIGITS, 2), samples(DIGITS, 1, 5)], recipe(), activation=activation)
    found = measure("r-gap", play.seen(), clients=2)["r-gap"]
    assert [item.client for item in found.items] == [0, 2]  # a client with two samples is passed over
    assert worst(found, play) > 40


@pytest.mark.parametrize(("model", "params"), [("cnn", {}), ("mlp", {}), ("lenet", {"activation": "relu"})])
def test_r_gap_refuses_what_it_cannot_invert(model: str, params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="made otherwise"):
        measure("r-gap", Play(model, DIGITS, [samples(DIGITS, 1)], recipe(), **params).seen())


def test_the_frontier_falls_with_batches_and_noise() -> None:
    play = Play("lenet", DIGITS, [samples(DIGITS, 1)], recipe())
    own: tuple[Tensor, Tensor] = samples(DIGITS, 40, 9)
    found = measure(
        "inversion-frontier", play.seen(population=own), attack="idlg", draws=1, batches=[1, 8], steps=[2], noises=[0.01], iterations=60
    )
    assert found["inversion-frontier/batch-1"] > 60
    assert found["inversion-frontier/batch-1"] > found["inversion-frontier/batch-8"] + 20
    assert found["inversion-frontier/batch-1"] > found["inversion-frontier/noise-0.01"] + 20
    assert found["inversion-frontier/steps-2"] > found["inversion-frontier/steps-2-as-one"]
    assert [row[:3] for row in found["inversion-frontier"].data["rows"]] == [
        ["1", "1", "none"],
        ["8", "1", "none"],
        ["1", "2", "none"],
        ["1", "2, taken for one", "none"],
        ["1", "1", "0.01"],
    ]
