from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtrust.data.base import Task
from fedtrust.errors import InputError
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.probes.base import Artefact, ProbeContext
from fedtrust.probes.guesses import Copies, Copy, score
from fedtrust.probes.stealing import _adaptive, _learn, _spread
from fedtrust.release import Form, Metered
from fedtrust.runner import run
from fedtrust.scenario import Scenario
from tests.probes.probe_kit import context, measure, numbers, says

Small = Callable[..., Scenario]
FEATURES, CLASSES = 5, 3
TASK = Task("classification", (FEATURES,), CLASSES)


class Victim:
    """A logistic regression that counts what it is asked, and answers in a form."""

    def __init__(self, form: Form = "probabilities") -> None:
        self.module = nn.Linear(FEATURES, CLASSES)
        self.layout = Layout.of(self.module)
        self.params = torch.randn(self.layout.size, generator=torch.Generator().manual_seed(5))
        self.model, self.form, self.asked = Architecture(self.module, self.layout), form, torch.zeros(0, FEATURES)

    def output(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(self.params, x)

    def __call__(self, x: Tensor) -> Tensor:
        self.asked = torch.cat([self.asked, x])
        output = self.output(x)
        return output if self.form == "logits" else output.softmax(1)

    def context(self, **given: Any) -> ProbeContext:
        return context(**{"task": TASK, "query": self, "layout": self.layout, "answers": self.form, "rng": torch.Generator(), **given})

    def teacher(self, n: int = 200) -> ProbeContext:
        x = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(6))
        test = (x, self.output(x).argmax(1))
        return context(task=TASK, query=self.output, layout=self.layout, params=self.params, model=self.model, test=test)


@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_p_plus_one_answers_are_the_parameters(form: Form) -> None:
    victim = Victim(form)
    copies = measure("equation-solving", victim.context())["equation-solving"]
    assert len(victim.asked) == FEATURES + 1
    found = score("copy", copies, victim.teacher(), victim.context())
    assert found["copy/fidelity"] == 1
    assert found["copy/queries"] == FEATURES + 1
    assert found["copy/parameter-error"] == pytest.approx(0, abs=1e-5)
    if form == "logits":
        torch.testing.assert_close(copies.items[0].params, victim.params, atol=1e-5, rtol=1e-5)
    x = torch.randn(9, FEATURES)
    torch.testing.assert_close(copies.items[0].predict(x).softmax(1), victim.output(x).softmax(1), atol=1e-5, rtol=1e-4)


def test_one_answer_less_is_not_enough_and_more_change_nothing() -> None:
    victim = Victim()
    copies = measure("equation-solving", victim.context(), queries=[FEATURES, 40, FEATURES + 1])["equation-solving"]
    assert len(victim.asked) == 40
    assert [copy.queries for copy in copies.items] == [FEATURES, FEATURES + 1, 40]
    found = score("copy", copies, victim.teacher(), victim.context())
    assert found[f"copy/fidelity/{FEATURES}"] < 1
    assert found[f"copy/fidelity/{FEATURES + 1}"] == found["copy/fidelity/40"] == 1
    errors = [score("c", copy, victim.teacher(), victim.context())["c/parameter-error"] for copy in copies.items]
    assert errors[0] > 0.1
    assert max(errors[1:]) < 1e-5
    curve = found["copy"]
    assert isinstance(curve, Artefact)
    assert [point[0] for point in curve.data["series"]["fidelity"]] == [FEATURES, FEATURES + 1, 40]
    assert curve.data["series"]["owner's"] == [[FEATURES, 1.0], [40, 1.0]]


def test_images_are_asked_within_their_range() -> None:
    task = Task("classification", (1, 2, 2), 3, 0.0, 1.0)
    asked: list[Tensor] = []

    def query(x: Tensor) -> Tensor:
        asked.append(x)
        return x.flatten(1)[:, :3].softmax(1)

    layout = Layout(("0.weight",), ((7,),))
    copies = measure("equation-solving", context(task=task, query=query, layout=layout, answers="probabilities"), queries=[30])
    assert asked[0].shape == (30, 1, 2, 2)
    assert float(asked[0].min()) >= 0
    assert float(asked[0].max()) <= 1
    copy = copies["equation-solving"].items[0]
    assert copy.params is None, "it is not the model that the thief took it for"
    torch.testing.assert_close(copy.predict(asked[0]).softmax(1), asked[0].flatten(1)[:, :3].softmax(1), atol=1e-5, rtol=1e-4)


def test_copies_are_scored_by_hand() -> None:
    """The owner says 0 1 2 2, the truth is 0 1 2 0; the copy says 0 0 2 2."""
    test = (numbers(0.0, 1.0, 2.0, 1.9), torch.tensor([0, 1, 2, 0]))
    full = context(test=test)
    copy = Copy(lambda x: says(torch.where(x == 1, 0.0, x)), 7)
    assert score("copy", copy, full, full) == {"copy/fidelity": 0.75, "copy/accuracy": 0.5, "copy/queries": 7}
    best = Copies((copy, Copy(says, 9)))
    found = score("copy", best, full, full)
    assert {key: value for key, value in found.items() if key != "copy"} == {
        "copy/fidelity": 1.0,
        "copy/accuracy": 0.75,
        "copy/queries": 9,
        "copy/fidelity/7": 0.75,
        "copy/accuracy/7": 0.5,
        "copy/fidelity/9": 1.0,
        "copy/accuracy/9": 0.75,
    }


def test_what_the_thief_had_in_hand_is_not_counted() -> None:
    test = (numbers(0.0, 1.0, 2.0, 1.9), torch.tensor([0, 1, 2, 0]))
    full = context(test=test, population=(test[0][[0, 2]], test[1][[0, 2]]))
    copy = Copy(lambda x: says(torch.where(x == 1, 0.0, x)), 7)
    assert score("copy", copy, full, full)["copy/fidelity"] == 0.5


def test_a_shift_that_softmax_does_not_see_is_no_error() -> None:
    victim = Victim()
    shifted = {k: v.clone() for k, v in victim.layout.unflatten(victim.params).items()}
    shifted["weight"] += torch.arange(5.0)
    shifted["bias"] += 3
    guess = Copy(victim.output, 1, victim.layout.flatten(shifted))
    assert score("c", guess, victim.teacher(), victim.context())["c/parameter-error"] == pytest.approx(0, abs=1e-5)
    shifted["bias"][0] += 0.3
    guess = Copy(victim.output, 1, victim.layout.flatten(shifted))
    assert score("c", guess, victim.teacher(), victim.context())["c/parameter-error"] == pytest.approx(0.2, abs=1e-5)
    with pytest.raises(ValueError, match="a copy of 2 parameters, the model has 18"):
        score("c", Copy(victim.output, 1, torch.zeros(2)), victim.teacher(), victim.context())


def test_an_answer_is_spread_over_labels_in_proportion() -> None:
    chances = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])
    labels = _spread(chances, 20, torch.Generator().manual_seed(0))
    counts = torch.stack([(labels == c).sum(1) for c in range(3)], dim=1)
    assert counts.sum(1).tolist() == [20, 20, 20]
    assert float((counts - 20 * chances).abs().max()) <= 1
    assert counts[1].tolist() == [0, 20, 0]
    single = torch.cat([_spread(chances[:1], 1, torch.Generator().manual_seed(i)) for i in range(400)])
    assert float((single == 0).double().mean()) == pytest.approx(0.5, abs=0.08)


def test_the_bandit_goes_where_it_is_rewarded() -> None:
    """By hand: with even chances for two arms, a gain of 0.4 at a rate of 0.5 moves them by 0.1 either way."""
    liking = {0: 0.0, 1: 0.0}
    _learn(liking, [0, 1], [0.5, 0.5], 0, 0.4, 0.5)
    assert liking == {0: pytest.approx(0.1), 1: pytest.approx(-0.1)}


def test_adaptive_queries_prefer_the_certain_and_never_repeat() -> None:
    """Of label 0 the model is certain, of label 1 it has no idea; both have 150 samples, and 120 are asked."""
    x = torch.arange(300.0)[:, None]
    labels = (torch.arange(300) % 2).long()

    def query(batch: Tensor) -> Tensor:
        sure = torch.tensor([[0.98, 0.01, 0.01]]).expand(len(batch), -1)
        return torch.where(batch % 2 == 0, sure, torch.full_like(sure, 1 / 3))

    shares = []
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        taken, told = _adaptive(context(query=query, population=(x, labels), answers="probabilities", rng=rng), 120)
        assert len(set(taken.flatten().tolist())) == 120
        torch.testing.assert_close(told, query(taken))
        shares.append(float((taken % 2 == 0).double().mean()))
    assert sum(shares) / 4 > 0.55


def last(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])["metrics"]
    return found


MLP: dict[str, Any] = {"model": {"name": "mlp", "hidden": [16]}, "clients": {"count": 8, "train": {"lr": 0.2, "batch_size": 16}}}


def test_the_growing_set_stays_within_its_budget_and_gets_better(small: Small, out: Path) -> None:
    thief = {"name": "jacobian-augmentation", "seeds": 20, "queries": 100, "epochs": 30}
    run(small(rounds=8, release={"answers": "label", "queries": 80}, probes=["accuracy"], **MLP), out / "none", engine="local")
    found = run(
        small(rounds=8, release={"answers": "label", "queries": 100}, probes=["accuracy", thief], **MLP), out / "one", engine="local"
    ).summary["metrics"]
    assert [key for key in found if "/fidelity/" in key] == [f"jacobian-augmentation/fidelity/{n}" for n in (20, 40, 80)]
    assert found["jacobian-augmentation/queries"] == 80
    assert found["jacobian-augmentation/fidelity"] > 0.3  # a guess: 0.1
    assert found["accuracy"] == last(out / "none")["accuracy"]


def test_a_knockoff_of_more_answers_is_a_better_one(small: Small, out: Path) -> None:
    thief = {"name": "knockoff", "queries": [10, 160], "epochs": 20}
    found = run(small(rounds=8, release={"answers": "probabilities", "queries": 160}, probes=[thief], **MLP), out, engine="local").summary[
        "metrics"
    ]
    assert found["knockoff/fidelity/160"] > found["knockoff/fidelity/10"] + 0.1
    assert found["knockoff/queries"] == 160


def test_a_thief_without_so_many_samples_says_so(small: Small, out: Path) -> None:
    with pytest.raises(InputError, match="takes 181 samples of its own and has 180"):
        run(small(probes=[{"name": "knockoff", "queries": [181]}]), out, engine="local")
    assert run(small(probes=[{"name": "knockoff", "queries": [180], "epochs": 1}]), out, engine="local").status == "finished"


def test_noise_has_no_labels_to_adapt_to() -> None:
    with pytest.raises(ValueError, match="noise has none"):
        measure("knockoff", context(), inputs="noise", strategy="adaptive")


def test_a_copy_that_asks_the_owner_is_none() -> None:
    victim = Victim()
    seen = victim.context(query=Metered(victim, None))
    with pytest.raises(ValueError, match="a copy asks the owner's model"):
        score("copy", Copy(seen.query, 0), victim.teacher(), seen)
    assert score("copy", Copy(victim.output, 0), victim.teacher(), seen)["copy/fidelity"] == 1


def test_knockoff_refuses_to_ask_nothing(small: Small) -> None:
    with pytest.raises(InputError, match="at least 1 item") as caught:
        small(probes=[{"name": "knockoff", "queries": []}])
    assert caught.value.where == "probes[0].queries"
