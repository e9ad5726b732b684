"""Evasions: what an exercise may say of them, how they are judged, and the whole way through the sandbox (slow)."""

from __future__ import annotations

import json

import pytest

from fedtrust.classroom import checking, exercise, folder, leaderboard, players, setting, submissions, tournament
from fedtrust.classroom.judging import judge
from fedtrust.classroom.sandbox import backends
from fedtrust.classroom.scoring import Fault, Field, Outcome
from fedtrust.errors import InputError
from tests.classroom.small import EXERCISE, exercise_file, hand_in

EVADE = """
name = "evade"
title = "Evade"
kind = "evasion"
access = "gradients"
task = "Fool the model."

[budget]
gradients = 1000
queries = 200
eps = 0.3

[public]
seeds = [1]

[house.audits]
FGSM = { name = "fgsm", eps = 0.3, samples = 100 }

[house.defences]
plain = "mean"
hardened = { aggregator = "mean", behaviour = { name = "adversarial-training", epsilon = 0.3, steps = 2 } }

[scenario]
title = "evade"
rounds = 5
data = { source = { name = "digits", limit = 500 } }
model = { name = "mlp", hidden = [32] }
clients = { count = 4, train = { lr = 0.2, momentum = 0.9, batch_size = 16, epochs = 2 } }
"""


def test_access_is_for_evasions_only(tmp_path):
    with pytest.raises(InputError, match="no evasion"):
        exercise.load(exercise_file(tmp_path, EXERCISE.replace('kind = "both"', 'kind = "both"\naccess = "gradients"')))
    with pytest.raises(InputError, match="access"):
        exercise.load(exercise_file(tmp_path, EVADE.replace('"gradients"', '"gradient"')))


def test_every_evasion_meets_every_model_and_nobody_plays_for_nothing(tmp_path):
    made = exercise.load(exercise_file(tmp_path, EVADE))
    assert list(made.models) == ["plain", "hardened"]
    field = folder.field_of(made, [])
    assert [(c.attack, c.defence) for row in tournament.plan(field, ["iid"], 1) for c in row] == [("FGSM", "plain"), ("FGSM", "hardened")]
    alone = exercise.load(exercise_file(tmp_path, EVADE.partition("[house.defences]")[0] + "[scenario]" + EVADE.partition("[scenario]")[2]))
    assert alone.models == {}
    assert [c.defence for row in tournament.plan(folder.field_of(alone, []), ["iid"], 1) for c in row] == ["-"]


def test_an_evasions_worth_is_the_mean_over_the_models_and_a_broken_budget_fools_nobody():
    who = Field({"ann": False, "bob": False}, {"plain": True, "hardened": True}, side="evasion", budget={"gradients": 100.0})
    cells = [
        Outcome(name, model, "iid", seed, measure=value, fault=fault, costs={"evasion": {"gradients": 50.0}})
        for seed in (0, 1)
        for name, model, value, fault in (
            ("ann", "plain", 0.9, None),
            ("ann", "hardened", 0.3, None),
            ("bob", "plain", 1.0, None),
            ("bob", "hardened", None, Fault("evasion", "budget", "it moved a feature by 0.4, eps is 0.3")),
        )
    ]
    board = judge(who, cells)
    ann, bob = board.lines["evasion"]
    assert (ann.name, ann.effect, ann.cost) == ("ann", pytest.approx(0.6), 0.5)
    assert ann.score == pytest.approx(0.5 * 0.6 + 0.5 * 0.6 * 0.5)
    assert (bob.effect, bob.penalty) == (pytest.approx(0.5), pytest.approx(0.1))
    assert board.pairs == {
        ("ann", "plain"): pytest.approx(0.9),
        ("ann", "hardened"): pytest.approx(0.3),
        ("bob", "plain"): 1.0,
        ("bob", "hardened"): 0.0,
    }


@pytest.mark.parametrize(
    ("access", "said"),
    [("answers", "its answers"), ("gradients", "`query.gradient(x, y)`"), ("parameters", "`query.params`")],
)
def test_the_task_says_what_is_known_how_far_features_may_move_and_which_models_are_met(access, said, tmp_path):
    text = setting.task(exercise.load(exercise_file(tmp_path, EVADE.replace('"gradients"', f'"{access}"', 1))))
    assert said in text
    assert "- The models: plain, hardened." in text
    assert "moved by more than 0.3" in text


# --------------------------------------------------------------------------------------------------------------------- in the sandbox

sandboxed = pytest.mark.skipif(not any(f.works for f in backends.available()), reason="no sandbox works on this machine")

STEP = """
import torch

def perturb(x, y, query):
    return (x + query.eps * query.gradient(x, y).sign()).clamp(query.task.low, query.task.high)
"""
FILES = {
    "step.py": STEP,
    "logits.py": STEP.replace("query.gradient(x, y)", "query.gradient(x, -torch.nn.functional.one_hot(y, 10).float())"),
    "far.py": STEP.replace("query.eps *", "2 * query.eps *"),
    "outside.py": STEP.replace(".clamp(query.task.low, query.task.high)", ""),
    "greedy.py": STEP.replace("    return", "    for _ in range(11):\n        query.gradient(x, y)\n    return"),
    "nosy.py": "def perturb(x, y, query):\n    return query.model(x)\n",
    "idle.py": "def perturb(x, y, query):\n    return x\n",
}


@pytest.mark.slow
@sandboxed
def test_a_tournament_of_evasions(tmp_path):
    made = exercise.load(exercise_file(tmp_path / "x", EVADE))
    about = folder.create(tmp_path / "out", made, submissions.found(hand_in(tmp_path / "in", FILES), made.sides), "public")
    tournament.run(tmp_path / "out", players.sandboxed, count=1)
    found = {(o.attack, o.defence): o for o in folder.outcomes(tmp_path / "out")}
    assert len(found) == 2 * (len(FILES) + 1)
    step = found["step", "plain"]
    assert step.measure == pytest.approx(found["FGSM", "plain"].measure, abs=0.15)  # the same attack, on other samples
    assert step.measure > found["step", "hardened"].measure + 0.1
    assert step.costs["evasion"]["gradients"] <= 100
    assert found["logits", "plain"].measure > 0.3
    assert found["idle", "plain"].measure == 0.0
    faults = {name: found[name, "plain"].fault for name in ("far", "outside", "greedy", "nosy")}
    assert {name: fault.kind for name, fault in faults.items()} == {
        "far": "budget", "outside": "budget", "greedy": "budget", "nosy": "crash"
    }  # fmt: skip
    assert "moved a feature by 0.6, eps is 0.3" in faults["far"].sentence
    assert "left the range from 0 to 1" in faults["outside"].sentence
    assert "gradient evaluations of 'gradient' asked, the budget is 1000" in faults["greedy"].sentence
    page = leaderboard.write(tmp_path / "out").read_text()
    assert "Evasion × model" in page
    told = json.loads((tmp_path / "out" / "report" / "leaderboard.json").read_text())
    assert {(p["attack"], p["defence"]) for p in told["pairs"]} == set(found)
    assert "Fooled, model by model" in (tmp_path / "out" / "report" / "entries" / "step.html").read_text()
    assert tournament.board(about, list(found.values())).lines["evasion"][-1].score == 0.0


@pytest.mark.slow
@sandboxed
@pytest.mark.parametrize(
    ("access", "code", "said"),
    [
        ("answers", "query.gradient(x, y)", "'gradient' cannot be asked here"),
        ("gradients", "query.model(x)", "'NoneType' object is not callable"),
        ("parameters", "query.gradient(x, y)", ""),
        ("parameters", "query.model(x) - query(x)", ""),
    ],
)
def test_what_the_exercise_does_not_grant_is_not_there(access, code, said, tmp_path):
    exercise_file(tmp_path, EVADE.replace('"gradients"', f'"{access}"', 1).replace("rounds = 5", "rounds = 1"))
    text = f"def perturb(x, y, query):\n    made = {code}\n    assert made.abs().max() < 10\n    return x\n"
    (tmp_path / "evasion.py").write_text(text)
    told, failed = checking.check(tmp_path / "evasion.py", None)
    assert failed == (1 if said else 0)
    assert said in told
