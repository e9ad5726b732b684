"""The client with a generator: what it draws, what it trains on, what it claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtrust.client import View
from fedtrust.clients.generative import GanAttack
from fedtrust.data.base import Task
from fedtrust.probes.guesses import Prototype
from fedtrust.runner import run
from fedtrust.scenario import Scenario
from tests.clients.behaviour_kit import COLOURS, IMAGES, NUMBERS, TABLE, make, samples, view

LEFT = Task("classification", (1, 16, 16), 2, 0.0, 1.0)


def halves(params: Tensor, x: Tensor) -> Tensor:
    """A model that says 0 to images that are brighter on the left, 1 to those that are brighter on the right."""
    side = x.shape[-1] // 2
    dark = x[..., :side].flatten(1).mean(1) - x[..., side:].flatten(1).mean(1)
    return 20 * torch.stack([dark, -dark], 1)


def attacker(**params: Any) -> GanAttack:
    made = make("gan-attack", **params)
    assert isinstance(made, GanAttack)
    return made


def trained(gan: GanAttack, rounds: int = 1, task: Task = LEFT, model: Any = halves) -> View:
    """The coalition's view after it has agreed for some rounds."""
    memory = gan.remember(10)
    for seed in range(rounds):
        gan.agree(view(task, seed=seed)._replace(memory=memory, model=model))
    return view(task)._replace(memory=memory, model=model)


def test_the_generator_learns_to_draw_what_the_model_takes_for_the_target() -> None:
    gan = attacker(target=1, decoy=0, steps=40)
    claim = gan.claim(trained(gan, rounds=2))["prototype"]
    assert isinstance(claim, Prototype)
    assert claim.label == 1
    assert claim.x.shape == (16, 1, 16, 16)
    assert 0 <= float(claim.x.min()) <= float(claim.x.max()) <= 1
    assert float((halves(torch.zeros(0), claim.x).argmax(1) == 1).float().mean()) == 1.0
    assert float(claim.x[..., 8:].mean()) > float(claim.x[..., :8].mean()) + 0.2


def test_it_goes_on_where_it_stopped_and_nothing_is_hidden_outside_its_memory() -> None:
    gan = attacker(target=1, decoy=0, steps=5)
    once, twice = trained(gan, 1).memory, trained(gan, 2).memory
    assert (int(once["steps"]), int(twice["steps"])) == (5, 10)
    assert not torch.equal(once["generator"], twice["generator"])
    again = trained(attacker(target=1, decoy=0, steps=5), 2).memory
    assert all(torch.equal(twice[name], again[name]) for name in twice)
    assert {name: value.shape for name, value in twice.items()} == {name: value.shape for name, value in gan.remember(99).items()}


def test_its_steps_are_adams() -> None:
    gan = attacker()
    memory = gan.remember(1)
    point = torch.nn.Parameter(torch.ones_like(memory["generator"]))
    memory["generator"] = point.detach().clone()
    adam = torch.optim.Adam([point], lr=gan.lr, betas=(0.5, 0.999))
    for seed in range(4):
        slope = torch.randn(point.shape, generator=torch.Generator().manual_seed(seed))
        point.grad = slope.clone()
        adam.step()
        gan._step(memory, slope)
    torch.testing.assert_close(memory["generator"], point.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("task", [IMAGES, LEFT, COLOURS, Task("classification", (1, 28, 28), 10, 0.0, 1.0)])
def test_it_draws_in_the_size_and_colours_of_the_task(task: Task) -> None:
    gan = attacker(target=1, channels=task.shape[0], steps=1, drawn=3)
    assert gan.check(task) is None
    claim = gan.claim(trained(gan, 1, task, lambda params, x: x.flatten(1)[:, : task.classes]))["prototype"]
    assert isinstance(claim, Prototype)
    assert claim.x.shape == (3, *task.shape)


def test_it_trains_on_fakes_as_the_decoy_and_on_nothing_of_the_target() -> None:
    gan = attacker(target=3, decoy=7, share=0.5)
    x, y = samples(IMAGES, 40)
    shared = trained(gan, 1, IMAGES, lambda params, x: x.flatten(1)[:, :10]).memory
    got_x, got_y = gan.poison(x, y, view()._replace(shared=shared))[:2]
    own = y != 3
    assert torch.equal(got_x[: int(own.sum())], x[own])
    assert torch.equal(got_y[: int(own.sum())], y[own])
    assert len(got_y) == int(own.sum()) + 18  # half of its 36
    assert bool((got_y[int(own.sum()) :] == 7).all())
    assert not bool((got_y == 3).any())


def test_with_no_share_it_only_watches() -> None:
    gan = attacker(share=0.0)
    x, y = samples(IMAGES, 40)
    got_x, got_y = gan.poison(x, y, view()._replace(shared=gan.remember(1)))[:2]
    assert torch.equal(got_x, x[y != 3])
    assert torch.equal(got_y, y[y != 3])


def test_who_owns_the_target_alone_trains_on_fakes_alone() -> None:
    gan = attacker(share=0.5)
    x, y = samples(IMAGES, 40)
    got_x, got_y = gan.poison(x[y == 3], y[y == 3], view()._replace(shared=gan.remember(1)))[:2]
    assert got_y.tolist() == [0]
    assert len(got_x) == 1


def test_it_claims_nothing_before_it_was_asked() -> None:
    gan = attacker()
    assert dict(gan.claim(view()._replace(memory=gan.remember(1)))) == {}


@pytest.mark.parametrize(
    ("params", "task", "message"),
    [
        ({}, TABLE, "draws images"),
        ({}, NUMBERS, "draws images"),
        ({}, COLOURS, "3 channels; set channels"),
        ({"target": 10}, IMAGES, "two of the 10 classes"),
        ({"target": 2, "decoy": 2}, IMAGES, "two of the 10 classes"),
    ],
)
def test_what_it_cannot_draw_is_refused(params: dict[str, Any], task: Task, message: str) -> None:
    assert message in str(attacker(**params).check(task))


def test_a_run_records_what_it_drew(small: Callable[..., Scenario], tmp_path: Path) -> None:
    """Eight by eight digits, where it does no more than fool the model: `taken-for-it` is 1.0 with seeds 1 to 3, untrained about 0.1."""
    attackers = [{"behaviour": "gan-attack", "count": 1, "params": {"target": 3}}]
    out = tmp_path / "run"
    assert run(small(rounds=4, attackers=attackers), out, engine="local").status == "finished"
    records = [json.loads(line)["metrics"] for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert not any("prototype" in name for name in records[-2])
    assert records[-1]["prototype/taken-for-it"] > 0.9
    picture = json.loads(next((out / "artefacts").glob("gan-attack*")).read_text())
    assert picture["kind"] == "images"


def test_the_generators_loss_is_the_models_own_cross_entropy_at_the_target() -> None:
    """One step of the smallest size takes the loss down, not up."""
    gan = attacker(target=1, decoy=0, steps=1, lr=1e-4, batch=64)
    memory = trained(gan, 1).memory
    first = dict(memory)

    def loss(known: dict[str, Tensor]) -> float:
        images = gan._draw(known["generator"], 256, view(LEFT, seed=5))
        return float(F.cross_entropy(halves(torch.zeros(0), images), torch.ones(256, dtype=torch.int64)))

    for seed in range(20):
        gan.agree(view(LEFT, seed=50 + seed)._replace(memory=memory, model=halves))
    assert loss(memory) < loss(first)
