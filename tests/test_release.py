"""How users are answered: forms, defences in their order, budgets; and what a scenario may ask for."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrust.errors import InputError, RunError
from fedtrust.observers import observer_cards
from fedtrust.probes.base import ProbeContext, Result, probe
from fedtrust.registry import REGISTRY
from fedtrust.release import AnswerContext, Form, Metered, QueryBudgetError, Release, answer, log_probabilities
from fedtrust.runner import run
from fedtrust.scenario import Scenario, check, parse
from tests.conftest import SMALL, merged

Small = Callable[..., Scenario]
OUTPUT = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, -1.0]])
NOTHING: Any = None


def answers(release: Release) -> Tensor:
    return release.answers(OUTPUT, torch.zeros(2, 1), lambda: NOTHING)


def test_the_forms_of_an_answer() -> None:
    assert torch.equal(answers(Release()), OUTPUT)
    torch.testing.assert_close(answers(Release("probabilities")), OUTPUT.softmax(1))
    assert answers(Release("label")).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_defences_work_one_after_another_before_the_label_is_read_off() -> None:
    def halve_second(p: Tensor, x: Tensor, ctx: AnswerContext) -> Tensor:
        return p * torch.tensor([1.0, 0.1, 1.0])

    def double(p: Tensor, x: Tensor, ctx: AnswerContext) -> Tensor:
        return p.mul_(2)

    told = Release("probabilities", None, {"halve": halve_second, "double": double})
    torch.testing.assert_close(answers(told), OUTPUT.softmax(1) * torch.tensor([2.0, 0.2, 2.0]))
    assert answers(Release("label", None, {"halve": halve_second})).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("wrong", [lambda p: p[:, :2], lambda p: p - 1, lambda p: p / 0])
def test_a_defence_that_answers_nonsense_is_named(wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="output defence 'odd' answers"):
        answers(Release("probabilities", None, {"odd": lambda p, x, ctx: wrong(p)}))


def test_every_sample_counts_and_beyond_the_budget_nothing_is_answered() -> None:
    seen: list[int] = []

    def model(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    ask = Metered(model, 5)
    ask(torch.zeros(2, 1))
    ask(torch.zeros(3, 1))
    with pytest.raises(QueryBudgetError, match=r"6 samples asked, but a user may ask 5 \(release.queries"):
        ask(torch.zeros(1, 1))
    assert seen == [2, 3]
    assert ask.asked == 5
    free = Metered(model, None)
    free(torch.zeros(1000, 1))
    assert free.asked == 1000


def test_nobody_turns_the_counter_back() -> None:
    ask = Metered(lambda x: x, 5)
    ask(torch.zeros(4, 1))
    for name in ("asked", "_asked", "_answer", "_budget", "budget"):
        with pytest.raises(AttributeError, match="cannot be changed"):
            setattr(ask, name, 0)
    assert ask.asked == 4
    with pytest.raises(QueryBudgetError):
        ask(torch.zeros(2, 1))


def test_what_a_user_takes_for_log_probabilities() -> None:
    wanted = OUTPUT.log_softmax(1)
    torch.testing.assert_close(log_probabilities(OUTPUT, "logits"), wanted)
    torch.testing.assert_close(log_probabilities(OUTPUT.softmax(1), "probabilities"), wanted)
    rounded = torch.tensor([[0.9, 0.1, 0.0]])
    torch.testing.assert_close(log_probabilities(rounded, "probabilities").exp(), torch.tensor([[0.9, 0.1, 0.05]]))
    torch.testing.assert_close(log_probabilities(torch.tensor([[0.0, 1.0]]), "label").exp(), torch.tensor([[0.5, 1.0]]))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[ProbeContext]:
    """A user and a teacher who only look; what they saw."""
    seen: list[ProbeContext] = []

    def look(ctx: ProbeContext, *, queries: int = 7) -> Result:
        seen.append(ctx)
        return {"told": float(ctx.query(torch.zeros(queries, *ctx.task.shape)).sum())}

    def watch(ctx: ProbeContext) -> Result:
        seen.append(ctx)
        return {}

    REGISTRY.load()
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))
    probe("look", role="user", when="end")(look)
    probe("watch", when="end")(watch)
    return seen


@pytest.mark.parametrize("form", ["logits", "probabilities", "label"])
def test_a_user_is_answered_in_that_form_and_a_teacher_sees_both(small: Small, out: Path, looks: list[ProbeContext], form: Form) -> None:
    assert run(small(release={"answers": form, "queries": 20}, probes=["look", "watch"]), out, engine="local").status == "finished"
    user, teacher = looks
    assert (user.answers, user.queries) == (form, 20)
    assert isinstance(user.query, Metered)
    assert user.query.asked == 7
    assert user.released is None
    assert teacher.test is not None
    assert teacher.released is not None
    x = teacher.test[0][:5]
    output = teacher.query(x)
    wanted = {"logits": output, "probabilities": output.softmax(1), "label": torch.eye(10)[output.argmax(1)]}[form]
    torch.testing.assert_close(user.query(x), wanted)
    torch.testing.assert_close(teacher.released(x), wanted)
    with pytest.raises(QueryBudgetError):
        user.query(teacher.test[0][:9])


def test_equal_queries_get_noise_of_their_own_and_a_second_run_the_same(
    small: Small, tmp_path: Path, looks: list[ProbeContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output defence draws anew for each query, each user and each round; a run that is played again draws the same."""

    def shaken(probabilities: Tensor, x: Tensor, ctx: AnswerContext) -> Tensor:
        return probabilities + torch.rand(probabilities.shape, generator=ctx.rng)

    told: list[Tensor] = []

    def ask(ctx: ProbeContext) -> Result:
        told.extend(ctx.query(torch.zeros(3, *ctx.task.shape)) for _ in range(2))
        return {}

    answer("shaken")(shaken)
    probe("ask", role="user")(ask)
    probe("ask-too", role="user")(ask)
    spec: dict[str, Any] = {"release": {"answers": "probabilities", "defences": ["shaken"]}, "probes": ["ask", "ask-too", "accuracy"]}
    for number in range(2):
        run(small(**spec), tmp_path / str(number), engine="local")
    first, second = told[: len(told) // 2], told[len(told) // 2 :]
    assert len(first) == 3 * 2 * 2  # rounds 0 to 2, two users, two queries
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    noise = [rows - rows.mean(1, keepdim=True) for rows in first]
    assert all((a - b).abs().max() > 0.05 for a, b in itertools.combinations(noise, 2))


def test_a_user_who_asks_too_much_fails_by_name(small: Small, out: Path, looks: list[ProbeContext]) -> None:
    document = merged(SMALL, {"release": {"queries": 6}, "probes": ["look"]})
    with pytest.raises(RunError, match="probe 'look' failed in round 2: QueryBudgetError: 7 samples asked, but a user may ask 6"):
        run(parse(document), out, engine="local")


@pytest.mark.parametrize(
    ("release", "probes", "why"),
    [
        ({"answers": "words"}, [], r"release.answers: .*'logits', 'probabilities' or 'label'"),
        ({"queries": 0}, [], "release.queries: should be greater than or equal to 1"),
        ({"answer": "label"}, [], "release.answer: unknown key 'answer'.*did you mean 'answers'"),
        ({"defences": ["rounding"]}, [], r"release.defences\[0\]: 'rounding' works on probabilities; set release.answers"),
        ({"answers": "label", "defences": ["rounding"]}, [], r"release.defences\[0\]: 'rounding' would do nothing"),
        ({"answers": "probabilities", "defences": ["roundin"]}, [], r"release.defences\[0\]: unknown answer 'roundin'.*'rounding'"),
        ({"answers": "probabilities", "defences": [{"name": "rounding", "decimal": 1}]}, [], r"defences\[0\].decimal: .*'decimals'"),
        ({"answers": "probabilities", "defences": ["rounding", "rounding"]}, [], r"defences\[1\]: 'rounding' stands there twice"),
        ({"queries": 60}, [{"name": "knockoff", "queries": [50, 70]}], r"probes\[0\].queries: a user may ask 60 .*not 70"),
    ],
)
def test_terms_that_make_no_sense_are_refused(release: dict[str, Any], probes: list[Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse(merged(SMALL, {"release": release, **({"probes": probes} if probes else {})}))


def test_a_filter_of_texts_is_not_for_images(small: Small) -> None:
    with pytest.raises(InputError, match=r"release.defences\[0\]: 'output-filter' is for characters; 'digits' is a classification"):
        check(small(release={"answers": "probabilities", "defences": ["output-filter"]}))


def test_the_terms_are_written_out_and_stand_on_the_threat_card(small: Small) -> None:
    scenario = small(release={"answers": "probabilities", "queries": 90, "defences": ["rounding"]}, probes=["accuracy", "equation-solving"])
    text = scenario.resolved_toml()
    assert '[release]\nanswers = "probabilities"\nqueries = 90\ndefences = [{ name = "rounding", decimals = 2 }]' in text
    assert parse(tomllib.loads(text)) == scenario
    (card,) = observer_cards(scenario)
    assert card["capability"] == ["queries the model about 90 samples at most (told: probabilities, through rounding)"]
    assert card["role"] == "user of the model"


def test_released_accuracy_is_that_of_what_is_told(small: Small, tmp_path: Path) -> None:
    def measured(name: str, **release: Any) -> dict[str, float]:
        run(small(release=release, probes=["accuracy", "released-accuracy"]), tmp_path / name, engine="local")
        found: dict[str, float] = json.loads((tmp_path / name / "rounds.jsonl").read_text().splitlines()[-1])["metrics"]
        return found

    plain, told = measured("plain"), measured("told", answers="probabilities")
    assert plain["released-accuracy"] == plain["accuracy"] == told["released-accuracy"]
    assert plain["released-accuracy/distortion"] == 0
    assert told["released-accuracy/distortion"] == pytest.approx(0, abs=1e-6)
    rounded = measured("rounded", answers="probabilities", defences=[{"name": "rounding", "decimals": 1}])
    assert 0.01 < rounded["released-accuracy/distortion"] < 10 * 0.05
    label = measured("label", answers="label")
    assert label["released-accuracy"] == plain["accuracy"]
    poisoned = measured("poisoned", answers="probabilities", defences=[{"name": "prediction-poisoning", "budget": 0.4}])
    assert poisoned["released-accuracy"] == plain["accuracy"], "the likeliest class stays the likeliest"
    assert 0.2 < poisoned["released-accuracy/distortion"] <= 0.4 + 1e-5
