"""Backdoors that learn before they train: Chameleon's contrastive adaptation, A3FL's trigger and how its coalition shares it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtrust.client import Behaviour, ClientMemory, View, behaviour
from fedtrust.clients.backdoor_learned import last_layer, supervised_contrast
from fedtrust.data import triggers
from fedtrust.data.base import Task
from fedtrust.engine.cohort import Chunk, ClientTask, train
from fedtrust.errors import InputError
from fedtrust.probes.base import ProbeContext, probe
from fedtrust.registry import REGISTRY
from fedtrust.runner import run
from fedtrust.scenario import Scenario, check
from fedtrust.setup import build
from fedtrust.views import crafting_view, in_loss
from tests.clients.behaviour_kit import COLOURS, IMAGES, make, samples, view

Small = Callable[..., Scenario]


def test_the_contrastive_loss_against_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(7, 5, generator=generator), torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 3.0, 1.0])
    y = torch.tensor([0, 1, 0, 1, 2, 1, 0])  # class 2 has nobody to be near to
    z = (features / features.norm(dim=1, keepdim=True)).double()
    total, anchors = 0.0, 0
    for i in range(7):
        others = [a for a in range(7) if a != i]
        companions = [a for a in others if y[a] == y[i]]
        if not companions:
            continue
        scale = sum(float((z[i] @ z[a] / 0.3).exp()) for a in others)
        mean = sum(float(-((z[i] @ z[p] / 0.3).exp() / scale).log()) for p in companions) / len(companions)
        total, anchors = total + float(weight[i]) * mean, anchors + 1
    assert float(supervised_contrast(features, y, 0.3, weight)) == pytest.approx(total / anchors, rel=1e-5)
    gradient = torch.func.grad(lambda f: supervised_contrast(f, y, 0.3, weight))(features)
    assert bool(gradient.isfinite().all())
    assert float(supervised_contrast(features[:2], y[:2], 0.3, weight[:2])) == 0


def coalition_view(scenario: Scenario, name: str, memory: ClientMemory) -> View:
    """What the coalition of clients 0 to 3 knows before anybody has trained."""
    setup = build(scenario)
    members = [ClientTask(c, make(name), {}) for c in range(4)]
    nothing = torch.zeros(0, len(setup.params))
    return crafting_view(setup.world, 3, setup.params, {}, members, "coalition", memory, nothing, None, 8, "agree")


def test_chameleon_draws_triggered_images_to_the_target(small: Small) -> None:
    """The encoder moves, the classifier does not; the loss that it minimises falls; triggered images come nearer to the target's."""
    here = coalition_view(small(model="mlp"), "chameleon", {})
    x, y = here.data()  # type: ignore[misc]
    chameleon = make("chameleon", target=1, size=2, fraction=0.5, steps=40)
    here = here._replace(memory=chameleon.remember(here.layout.size))
    new_x, new_y = chameleon.poison(x, y, here)[:2]
    classifier, moved = here.memory["classifier"] > 0, here.memory["moved"]
    assert int(classifier.sum()) == 64 * 10 + 10
    assert bool(classifier[-650:].all())
    assert bool((moved[classifier] == 0).all())
    assert float(moved[~classifier].norm()) > 0.1

    def contrast(params: Tensor) -> float:
        weight = torch.where(new_y == 1, 2.0, 1.0)
        return float(supervised_contrast(here.model.features(params, new_x), new_y, 0.1, weight))

    def nearness(params: Tensor) -> float:
        """How much more triggered images resemble the target's (facilitators) than their own class (interferers)."""
        clean, stamped = (F.normalize(here.model.features(params, part), dim=1) for part in (x, triggers.pixel_patch(x, size=2)))
        centres = torch.stack([clean[y == c].mean(0) for c in range(10)])
        others = y != 1
        return float((stamped[others] * (centres[1] - centres[y[others]])).sum(1).mean())

    after = here.params + moved
    assert contrast(after) < contrast(here.params) - 0.2
    assert nearness(after) > nearness(here.params) + 0.05


@pytest.mark.parametrize("path", ["loop", "vmap"])
def test_chameleon_trains_the_classifier_on_the_adapted_encoder(small: Small, path: Any) -> None:
    """The same as plain training of the last layer alone on the features of the adapted encoder."""
    world = dataclasses.replace(build(small(model="mlp", clients={"train": {"momentum": 0.9}})).world, path=path)
    chameleon = make("chameleon", size=2, steps=3)
    start = world.layout.vector(world.module)
    tasks = tuple(ClientTask(c, chameleon, chameleon.remember(world.layout.size)) for c in range(3))
    result = train(world, Chunk(1, start, {}, tasks))
    assert not result.faults
    for update, memory in zip(result.updates, result.memories, strict=True):
        classifier = memory["classifier"] > 0
        torch.testing.assert_close(update[~classifier], memory["moved"][~classifier], atol=1e-6, rtol=0.0)
        assert float(update[classifier].norm()) > 0.05

    class Frozen(type(chameleon)):  # type: ignore[misc]
        """Minimises the loss of the adapted model in all parameters, and undoes what the encoder did after every step."""

        def loss(self, predict: Any, x: Tensor, y: Tensor, view: View) -> Tensor:
            begun = (predict.params - view.params).detach().abs().sum() > 0
            shift = torch.where(begun, 0.0, 1.0) * view.memory["moved"]  # before the first step it is not there yet
            return view.criterion(view.model(predict.params + shift, x), y)

    frozen = dataclasses.dataclass(frozen=True, kw_only=True)(Frozen)(size=2, steps=3)
    tasks = tuple(ClientTask(c, frozen, frozen.remember(world.layout.size)) for c in range(3))
    other = train(world, Chunk(1, start, {}, tasks))
    torch.testing.assert_close(other.updates, result.updates, atol=1e-5, rtol=1e-4)


def test_chameleon_needs_an_encoder(small: Small) -> None:
    attack = {"attackers": [{"behaviour": "chameleon", "count": 2}]}
    with pytest.raises(InputError, match=r"attackers\[0\]\.behaviour: 'chameleon' cannot work here: .* no encoder to adapt"):
        check(small(model="logistic", **attack))
    check(small(model="mlp", **attack))


def test_chameleon_spares_the_last_layer_of_every_member_of_an_ensemble(small: Small) -> None:
    here = coalition_view(small(model={"name": "ensemble", "of": "mlp", "members": 2}), "chameleon", {})
    classifier = last_layer(here)
    inside = {name: bool(classifier[where].all()) for name, where in here.layout.slices.items() if bool(classifier[where].any())}
    assert inside == {f"members.{i}.5.{part}": True for i in (0, 1) for part in ("weight", "bias")}


def missed(here: View, params: Tensor, trigger: Tensor) -> float:
    """The loss of a model on images with this trigger, towards class 4."""
    x, y = here.data()  # type: ignore[misc]
    return float(here.criterion(here.model(params, triggers.pasted(x, trigger)), torch.full_like(y, 4)))


def agreed(small: Small, **params: Any) -> tuple[View, Tensor]:
    a3fl = make("a3fl", target=4, size=3, **params)
    here = coalition_view(small(model="mlp"), "a3fl", a3fl.remember(0))
    a3fl.agree(here)
    return here, here.memory["trigger"]


def test_the_learned_trigger_has_a_lower_loss_than_its_start(small: Small) -> None:
    here, trigger = agreed(small)
    assert trigger.shape == (3, 3, 3)
    assert 0 <= float(trigger.min()) <= float(trigger.max()) <= 1
    grey = torch.full((1, 3, 3), 0.5)
    assert missed(here, here.params, trigger[:1]) < missed(here, here.params, grey) - 0.02
    again, same = agreed(small)
    assert torch.equal(trigger, same)
    assert torch.equal(here.params, again.params)


def test_one_step_of_the_search_by_hand(small: Small) -> None:
    """sign of the gradient of L(global) + lambda cos L(adversarial), both on the whole of the coalition's data."""
    here, trigger = agreed(small, steps=1, batch_size=10_000, balance=3.0, unlearn_steps=2, unlearn_lr=0.5, trigger_lr=0.1)
    x, y = here.data()  # type: ignore[misc]
    grey = torch.full((1, 3, 3), 0.5)
    hardened = here.params.clone()
    for _ in range(2):
        at = hardened.clone().requires_grad_()
        here.criterion(here.model(at, triggers.pasted(x, grey)), y).backward()
        assert at.grad is not None
        hardened = hardened - 0.5 * at.grad
    cosine = float((hardened @ here.params) / (hardened.norm() * here.params.norm()))
    pattern, wanted = grey.clone().requires_grad_(), torch.full_like(y, 4)
    losses = [here.criterion(here.model(p, triggers.pasted(x, pattern)), wanted) for p in (here.params, hardened)]
    (losses[0] + 3.0 * cosine * losses[1]).backward()
    assert pattern.grad is not None
    torch.testing.assert_close(trigger[:1], grey - 0.1 * pattern.grad.sign())
    plain = agreed(small, steps=1, batch_size=10_000, balance=0.0, trigger_lr=0.1)[1]
    assert not torch.equal(plain[:1], trigger[:1])  # the adversarial model has its say


def test_against_the_unlearnt_model_it_does_better_than_without(small: Small) -> None:
    strong = {"unlearn_steps": 20, "unlearn_lr": 0.3, "renew": 10, "steps": 60}
    here, robust = agreed(small, balance=5.0, **strong)
    _, plain = agreed(small, balance=0.0, **strong)
    x, y = here.data()  # type: ignore[misc]
    found = []
    for trigger in (robust[:1], plain[:1]):
        params = here.params
        for _ in range(20):
            at = params.detach().requires_grad_()
            here.criterion(here.model(at, triggers.pasted(x, trigger)), y).backward()
            assert at.grad is not None
            params = at.detach() - 0.3 * at.grad
        found.append(missed(here, params, trigger))
    assert found[0] < found[1]


def test_a3fl_trains_and_is_judged_by_what_was_agreed() -> None:
    x, y = samples(COLOURS, 10)
    behaviour, trigger = make("a3fl", target=2, size=2, fraction=0.4), torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))
    here = view(COLOURS, shared={"trigger": trigger})
    new_x, new_y = behaviour.poison(x, y, here)[:2]
    touched = (new_x != x).flatten(1).any(1)
    assert int(touched.sum()) == 4
    assert torch.equal(new_x[touched], triggers.pasted(x[touched], trigger))
    assert bool((new_y[touched] == 2).all())
    goal = behaviour.goal_now(x, y, COLOURS, {"trigger": trigger})
    assert goal is not None
    assert torch.equal(goal[0], triggers.pasted(x, trigger))
    before = behaviour.goal(x, y, COLOURS)
    assert before is not None
    assert torch.equal(before[0], triggers.pasted(x, torch.full((3, 2, 2), 0.5)))
    with pytest.raises(ValueError, match="agreed on nothing"):
        behaviour.poison(x, y, view(COLOURS))
    assert "three channels" in str(behaviour.check(Task("classification", (4, 8, 8), 5, 0.0, 1.0)))
    assert behaviour.check(IMAGES) is None
    assert "9 × 9" in str(make("a3fl", size=9).check(IMAGES))


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    REGISTRY.load()
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))


SEEN: list[tuple[int, tuple[int, ...], float]] = []


def conferring(fails: int = 0) -> None:
    """Register an adversary that agrees on the number of the round, wants class 1 and then, in time, class 2."""

    @behaviour("conferring", knowledge="coalition")
    class Conferring(Behaviour):
        """Writes down what it is shown."""

        def remember(self, size: int) -> ClientMemory:
            return {"word": torch.zeros(())}

        def agree(self, view: View) -> None:
            assert view.data is not None
            assert view.others is None
            assert len(view.data()[0]) > 0
            if view.round == fails:
                raise RuntimeError("they fell out")
            SEEN.append((view.round, view.coalition, float(view.memory["word"])))
            view.memory["word"] = torch.tensor(float(view.round))

        def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
            assert view.shared is not None
            assert float(view.shared["word"]) == view.round
            assert float(view.memory["word"]) == 0  # its own memory is another
            return x, y

        def goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor]:
            return x, torch.full_like(y, 1)

        def goal_now(self, x: Tensor, y: Tensor, task: Task, memory: ClientMemory) -> tuple[Tensor, Tensor]:
            return x, torch.full_like(y, 2 if float(memory["word"]) >= 2 else 1)


@pytest.mark.usefixtures("_own_registry")
def test_a_coalition_agrees_before_its_members_train_and_its_goal_follows(small: Small, out: Path) -> None:
    conferring()

    @probe("wanted")
    def wanted(ctx: ProbeContext) -> dict[str, float]:
        """What the adversary wants now."""
        assert ctx.truth is not None
        return {"wanted": float(ctx.truth.goals[0].y.unique())}

    SEEN.clear()
    scenario = small(rounds=3, attackers=[{"behaviour": "conferring", "ids": [5, 2], "rounds": [1, 3]}], probes=["wanted"])
    assert run(scenario, out, engine="local").status == "finished"
    assert SEEN == [(1, (2, 5), 0.0), (2, (2, 5), 1.0), (3, (2, 5), 2.0)]
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [r["metrics"]["wanted"] for r in rounds] == [1.0, 1.0, 2.0, 2.0]
    assert not any(r["faults"] for r in rounds[1:])


@pytest.mark.usefixtures("_own_registry")
def test_a_coalition_that_falls_out_loses_its_round_and_nobody_elses(small: Small, out: Path) -> None:
    conferring(fails=2)
    SEEN.clear()
    scenario = small(rounds=3, attackers=[{"behaviour": "conferring", "ids": [5, 2]}], clients={"quorum": 0.5})
    assert run(scenario, out, engine="local").status == "finished"
    rows = [json.loads(line) for line in (out / "clients.jsonl").read_text().splitlines()]
    faults = {(r["round"], r["client"]): r["fault"] for r in rows if r["fault"]}
    assert faults == {(2, c): "agree: RuntimeError: they fell out" for c in (2, 5)}
    assert SEEN == [(1, (2, 5), 0.0), (3, (2, 5), 1.0)]  # what failed is not remembered


def test_what_is_shared_is_not_seen_inside_the_loss() -> None:
    """Clients of one chunk may belong to nobody's coalition."""
    assert in_loss(view(shared={"word": torch.ones(())})).shared is None


def test_who_agrees_needs_to_know_the_coalition() -> None:
    with pytest.raises(InputError, match="agrees on something, so it needs knowledge 'coalition'"):

        @behaviour("lonely-talker")
        class Lonely(Behaviour):
            """Agrees with itself."""

            def agree(self, view: View) -> None:
                return None

            def craft(self, updates: Tensor, view: View) -> Tensor:
                return -updates


def test_data_poisoners_who_agree_leave_training_to_honest_software(small: Small, out: Path) -> None:
    """A3FL against clients that train by FedProx: poisoned, and still proximal."""
    attackers = [{"behaviour": "a3fl", "count": 2, "params": {"size": 3, "steps": 2}}]
    scenario = small(rounds=2, attackers=attackers, clients={"behaviour": {"name": "fedprox", "mu": 5.0}})
    plain = small(rounds=2, attackers=attackers)
    digests = [run(s, out / str(i), engine="local") for i, s in enumerate((scenario, plain))]
    assert all(d.status == "finished" for d in digests)
    assert digests[0].summary["model_sha256"] != digests[1].summary["model_sha256"]
    rows = [json.loads(line) for line in (out / "0" / "clients.jsonl").read_text().splitlines()]
    assert not any(r["fault"] for r in rows)
    norms = [[json.loads(line)["norm"] for line in (out / str(i) / "clients.jsonl").read_text().splitlines()] for i in (0, 1)]
    bad = [i for i, r in enumerate(rows) if r["malicious"]]
    assert all(norms[0][i] < norms[1][i] for i in bad[:2])  # round 1: the same model, data and trigger; held back by the term
