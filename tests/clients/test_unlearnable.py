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
from fedtrust.clients.unlearnable import Unlearnable
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.models.build import build
from fedtrust.report import write
from fedtrust.runner import run
from fedtrust.scenario import Scenario
from tests.clients.behaviour_kit import IMAGES, NUMBERS, make, samples, view


def sent(model: str = "mlp", factor: float = 2.0) -> View:
    module = build(model, {}, IMAGES, 1)
    layout = Layout.of(module)
    return view(params=factor * layout.vector(module))._replace(layout=layout, model=Architecture(module, layout))


def unlearnable(**params: Any) -> Unlearnable:
    made = make("unlearnable", **params)
    assert isinstance(made, Unlearnable)
    return made


@pytest.mark.parametrize("mode", ["sample", "class"])
@pytest.mark.parametrize(("fraction", "count"), [(1.0, 40), (0.5, 20), (0.3, 12), (0.001, 1)])
def test_a_share_of_the_samples_gets_noise_within_the_bound_and_no_other_label(mode: str, fraction: float, count: int) -> None:
    x, y = samples(IMAGES, 40)
    before = (x.clone(), y.clone())
    new_x, new_y = unlearnable(mode=mode, fraction=fraction, epsilon=0.15).poison(x, y, sent())
    assert torch.equal(x, before[0])
    assert torch.equal(new_y, before[1])
    touched = (new_x != x).flatten(1).any(1)
    assert touched.nonzero().flatten().tolist() == [i * 40 // count for i in range(count)]
    assert float((new_x - x).abs().max()) == pytest.approx(0.15, abs=1e-6)
    assert 0.0 <= float(new_x.min()) <= float(new_x.max()) <= 1.0


@pytest.mark.parametrize("mode", ["sample", "class"])
def test_the_noise_lowers_the_loss(mode: str) -> None:
    here = sent()
    x, y = samples(IMAGES, 50)
    noisy, _ = unlearnable(mode=mode, epsilon=0.2, train_steps=0).poison(x, y, here)
    before, after = (float(F.cross_entropy(here.model(here.params, part), y)) for part in (x, noisy))
    assert after < before - 0.3


def by_hand(
    x: Tensor, y: Tensor, here: View, *, mode: str, epsilon: float, alternations: int, train_steps: int, noise_steps: int
) -> Tensor:
    """The min-min game one sample and one step at a time, with plain autograd."""
    params = here.params.clone()
    noise = torch.zeros(len(x) if mode == "sample" else 10, *x.shape[1:])
    of = list(range(len(x))) if mode == "sample" else y.tolist()
    batches, turn = [range(i, min(i + 32, len(x))) for i in range(0, len(x), 32)], 0
    for _ in range(alternations):
        for _ in range(train_steps):
            rows = list(batches[turn % len(batches)])
            turn += 1
            leaf = params.clone().requires_grad_()
            noisy = torch.stack([(x[i] + noise[of[i]]).clamp(0, 1) for i in rows])
            (slope,) = torch.autograd.grad(F.cross_entropy(here.model(leaf, noisy), y[rows]), leaf)
            params = params - 0.1 * slope
        for _ in range(noise_steps):
            slopes = torch.zeros_like(noise)
            for i in range(len(x)):
                one = noise[of[i]].clone().requires_grad_()
                (slope,) = torch.autograd.grad(F.cross_entropy(here.model(params, (x[i] + one).clamp(0, 1)[None]), y[i : i + 1]), one)
                slopes[of[i]] += slope
            noise = (noise - epsilon / 10 * slopes.sign()).clamp(-epsilon, epsilon)
    return torch.stack([(x[i] + noise[of[i]]).clamp(0, 1) for i in range(len(x))])


@pytest.mark.parametrize("mode", ["sample", "class"])
@pytest.mark.parametrize(("alternations", "train_steps", "noise_steps"), [(1, 0, 4), (2, 3, 3), (1, 3, 12)])
def test_the_game_by_hand(mode: str, alternations: int, train_steps: int, noise_steps: int) -> None:
    here = sent("logistic")
    x, y = samples(IMAGES, 40)
    game = {"alternations": alternations, "train_steps": train_steps, "noise_steps": noise_steps}
    found, _ = unlearnable(mode=mode, epsilon=0.1, enough=0.0, **game).poison(x, y, here)
    expected = by_hand(x, y, here, mode=mode, epsilon=0.1, **game)
    assert float(((found - expected).abs() < 1e-5).double().mean()) > 0.98  # a slope of almost 0 may change its sign


def test_class_noise_is_one_for_a_class() -> None:
    x, y = samples(IMAGES, 40)
    x = 0.3 + 0.4 * x
    change = unlearnable(mode="class", epsilon=0.1).poison(x, y, sent())[0] - x
    for c in range(10):
        torch.testing.assert_close(change[y == c], change[y == c][:1].expand(4, *IMAGES.shape), atol=1e-6, rtol=0)
    assert not torch.allclose(change[0], change[1], atol=1e-3)


def test_it_ends_early_where_the_noise_is_enough() -> None:
    here, (x, y) = sent(), samples(IMAGES, 40)
    one = unlearnable(epsilon=0.2, alternations=1).poison(x, y, here)[0]
    assert torch.equal(unlearnable(epsilon=0.2, alternations=5, enough=0.99).poison(x, y, here)[0], one)
    assert not torch.equal(unlearnable(epsilon=0.2, alternations=5, enough=0.0).poison(x, y, here)[0], one)


def test_noise_made_once_stays_and_noise_made_anew_follows_the_model() -> None:
    x, y = samples(IMAGES, 20)
    first, later = sent(), sent(factor=-1.0)
    anew, once = unlearnable(epsilon=0.1), unlearnable(epsilon=0.1, made="once")
    assert anew.remember(7) == {}
    assert not torch.equal(anew.poison(x, y, first)[0], anew.poison(x, y, later)[0])
    memory = once.remember(first.layout.size)
    shapes = {name: value.shape for name, value in memory.items()}
    made = once.poison(x, y, first._replace(memory=memory))[0]
    assert torch.equal(made, anew.poison(x, y, first)[0])
    assert torch.equal(once.poison(x, y, later._replace(memory=memory))[0], made)
    assert {name: value.shape for name, value in memory.items()} == shapes


def test_who_protects_itself_is_an_honest_client_to_the_truth(small: Callable[..., Scenario], tmp_path: Path) -> None:
    """Krum shuts it out: a false alarm. It is no attacker in the records, on the threat card or for the probe; a label flipper is."""
    attackers = [{"behaviour": "unlearnable", "ids": [1, 2]}, {"behaviour": "label-flip", "ids": [4]}]
    strategy = {"aggregator": "krum", "assumed_malicious": 1}
    done = run(small(attackers=attackers, strategy=strategy, probes=["accuracy", "detection"]), tmp_path / "run", engine="local")
    assert done.status == "finished"
    rows = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    assert {(r["client"], r["behaviour"]) for r in rows if r["malicious"]} == {(4, "label-flip")}
    assert {r["client"] for r in rows if r["behaviour"] == "unlearnable"} == {1, 2}
    assert done.summary["federation"]["malicious"] == [4]
    cards = {card["behaviour"]: card for card in done.summary["threats"]}
    assert cards["unlearnable"]["role"] == "client that protects itself"
    assert [cards[name]["malicious"] for name in ("unlearnable", "label-flip")] == [False, True]
    last = [r for r in rows if r["round"] == 2]
    out = [r for r in last if r["trust"] == 0 and r["client"] != 4]  # Krum keeps one of eight
    assert done.summary["metrics"]["detection/excluded-honest"] == pytest.approx(len(out) / 7)
    assert len(out) >= 6


def test_the_report_does_not_count_it_among_the_attackers(small: Callable[..., Scenario], tmp_path: Path) -> None:
    attackers = [{"behaviour": "unlearnable", "ids": [1, 2]}]
    run(small(rounds=1, attackers=attackers, strategy={"assumed_malicious": 2}), tmp_path / "run", engine="local")
    text = write(tmp_path / "run").read_text("utf-8")
    assert "client that protects itself" in text
    assert "there are 2" not in text


def test_regressions_are_refused() -> None:
    assert "regression" in str(unlearnable().check(NUMBERS))
    assert unlearnable().check(IMAGES) is None
