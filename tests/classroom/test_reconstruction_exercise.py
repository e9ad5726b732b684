"""The exercise in which a curious server makes samples of the updates: what it sees, how it is scored, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import exercise_file, hand_in
from trusted import trusted

from fedtrust.classroom import cells, exercise, folder, leaderboard, players, setting, submissions, tournament
from fedtrust.classroom.sandbox import backends
from fedtrust.errors import InputError
from fedtrust.probes import scores_images
from fedtrust.setup import build
from tests.probes.probe_kit import context

NAME = "what-one-update-gives-away"
READY = exercise.find(NAME).read_text()


def text(**changes: str) -> str:
    made = READY.replace("seeds = [1, 2, 3]", "seeds = [1]").replace("iterations = 150", "iterations = 5")
    for old, new in changes.items():
        made = made.replace(old, new)
    return made


def created(tmp_path: Path, made: exercise.Exercise, files: dict[str, str]) -> folder.About:
    return folder.create(tmp_path / "out", made, submissions.found(hand_in(tmp_path / "in", files), made.sides), "public")


def test_what_is_recovered_lies_between_nothing_and_a_hundredth_of_the_range():
    assert scores_images.recovered(torch.tensor([10.0, 40.0, 90.0, -3.0]), 4) == pytest.approx((0.25 + 1 + 1 + 0) / 4)
    assert scores_images.recovered(torch.tensor([40.0]), 4) == 0.25  # three were not even guessed
    assert scores_images.recovered(torch.zeros(0), 0) == 0.0


def test_who_saw_nothing_gets_what_typical_samples_get(tmp_path):
    made = exercise.load(exercise_file(tmp_path, text()))
    data = build(next(iter(made.matrix([1]).cells())).scenario).world.data
    full = context(data=data, clients=(0, 2), task=data.task, test=(data.x_test, data.y_test))
    x = torch.cat([data.client(c)[0] for c in (0, 2)])
    errors = (x - data.x_test.mean(0)).flatten(1).double().square().mean(1)
    mean = float((10 * torch.log10(1 / errors) / 40).mean())  # digits lie in [0, 1]
    assert mean - 1e-6 <= scores_images.blind(full) < 0.5


def test_the_samples_follow_the_seed_in_an_audit_and_in_nothing_else(tmp_path):
    made = exercise.load(exercise_file(tmp_path, text()))
    table = cells.Table(made, [7, 8], hidden=True)
    where = next(iter(table.partitions))
    seats = [cells.Planned("x", "", where, place) for place in (0, 1)]
    drawn = [build(table.scenario(seat, attack=True, defence=False)).world.data.x for seat in seats]
    assert not torch.equal(*drawn)
    fight = exercise.load(exercise.find("break-the-median"))
    kept = cells.Table(fight, [7, 8], hidden=True)._scenarios.values()
    assert all(one.data.source.params["draw"] == 0 for one in kept)


def test_what_the_scenarios_own_probes_recover_is_nobodys_score(tmp_path):
    probes = 'probes = [{ name = "analytic-inversion", clients = 6 }]\nrounds = 1\n'
    made = exercise.load(exercise_file(tmp_path / "x", text().replace("rounds = 1\n", probes)))
    created(tmp_path, made, {"idle.py": "# fault: crash\n"})
    tournament.run(tmp_path / "out", trusted, count=1)
    found = {o.attack: o for o in folder.outcomes(tmp_path / "out")}
    assert found["idle"].measure is None
    assert found["closed form"].measure > found["closed form"].chance + 0.2
    assert not found["closed form"].note


def test_a_house_that_measures_nothing_says_so(tmp_path):
    wrong = text().replace('"closed form" = { name = "analytic-inversion", clients = 6 }', '"closed form" = "loss-threshold"')
    late = wrong.replace("iterations = 5, ", "iterations = 5, at_round = 7, ")
    made = exercise.load(exercise_file(tmp_path / "x", late))
    about = created(tmp_path, made, {"idle.py": "# fault: crash\n"})
    tournament.run(tmp_path / "out", trusted, count=1)
    lines = {line.name: line for line in tournament.board(about, folder.outcomes(tmp_path / "out")).lines["audit"]}
    assert lines["closed form"].gate == "nothing was measured"
    assert "`at_round` is 7, but the last round was 1" in lines["inverting gradients"].gate
    assert "zero: nothing was measured" in leaderboard.write(tmp_path / "out").read_text()


def test_a_ready_exercise_is_not_its_students_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting.start(NAME, None)
    assert exercise.find(NAME) == exercise.READY / NAME / "exercise.toml"
    assert exercise.find(f"./{NAME}") == Path(NAME) / "exercise.toml"


def test_a_measure_belongs_to_its_game(tmp_path):
    with pytest.raises(InputError, match=r"scoring.measure of this game is one of recovered, not 'auc'"):
        exercise.load(exercise_file(tmp_path, READY.replace('measure = "recovered"', 'measure = "auc"')))
    with pytest.raises(InputError, match="membership or stealing or reconstruction"):
        exercise.load(exercise_file(tmp_path, READY.replace('game = "reconstruction"\n', "")))
    assert exercise.load(exercise_file(tmp_path, READY.replace('measure = "recovered"', ""))).measure == "recovered"


def test_without_a_template_of_its_own_an_exercise_gets_the_games(tmp_path):
    made = exercise.load(exercise_file(tmp_path, READY))
    assert "def reconstruct(ctx)" in setting.template(made, "audit", tmp_path / "elsewhere")


# --------------------------------------------------------------------------------------------------------------------- in the sandbox

sandboxed = pytest.mark.skipif(not any(f.works for f in backends.available()), reason="no sandbox works on this machine")

CLOSED = """
import torch

def reconstruct(ctx):
    assert len(ctx.clients) == len(ctx.updates) == len(ctx.sent) == 6 and sum(ctx.examples.values()) == 24
    assert ctx.recipe.lr == 0.1 and ctx.recipe.batch_size == 4
    assert all(getattr(ctx, f) is None for f in ("data", "test", "truth", "member", "candidates", "population", "history", "released"))
    found = []
    for update in ctx.updates:
        layers = ctx.layout.unflatten(update)
        weight, bias = (layers[f"{list(layers)[0].split('.')[0]}.{part}"] for part in ("weight", "bias"))
        rows = weight[bias.abs() > 1e-7] / bias[bias.abs() > 1e-7][:, None]
        fits = rows[((rows > -0.01) & (rows < 1.01)).all(1)]
        new = []
        for row in fits:
            if all((row - other).abs().max() > 0.02 for other in new):
                new.append(row)
        found += new[:4] + [torch.full((64,), 0.3)] * (4 - len(new))
    return torch.stack(found).reshape(-1, *ctx.task.shape)
"""
GREY = exercise.find(NAME).with_name("audit.py").read_text()
FILES = {
    "closed.py": CLOSED,
    "grey.py": GREY,
    "labelled.py": GREY.replace("return torch.full", "return (torch.full").rstrip() + ", torch.zeros(24, dtype=torch.int64))\n",
    "many.py": GREY.replace("count = sum", "count = 1 + sum"),
    "odd.py": GREY.replace("return torch.full", "return (torch.full").rstrip() + ", torch.zeros(3, dtype=torch.int64))\n",
    "empty.py": "import torch\n\ndef reconstruct(ctx):\n    return torch.zeros(0, *ctx.task.shape)\n",
    "none.py": "def reconstruct(ctx):\n    return None\n",
    "label.py": GREY.replace("return torch.full", "return (torch.full").rstrip() + ", torch.full((24,), 10))\n",
    "scores.py": "def score(ctx):\n    return ctx.updates\n",
    "found.py": """
import torch
from fedtrust.probes.base import probe
from fedtrust.probes.guesses import Reconstruction, Reconstructions

@probe("mine", role="curious-server")
def mine(ctx):
    return {"mine": Reconstructions((Reconstruction(3, torch.rand(2, *ctx.task.shape), torch.tensor([1, 2])),))}
""",
    "nothing.py": """
from fedtrust.probes.base import probe
from fedtrust.probes.guesses import Reconstructions

@probe("nothing", role="curious-server")
def nothing(ctx):
    return {"nothing": Reconstructions(())}
""",
    "wrong.py": "import torch\n\ndef reconstruct(ctx):\n    return torch.zeros(24, 3)\n",
}


@sandboxed
def test_a_tournament_of_reconstructions(tmp_path):
    made = exercise.load(exercise_file(tmp_path / "x", text()))
    about = created(tmp_path, made, FILES)
    tournament.run(tmp_path / "out", players.sandboxed, count=1)
    found = {o.attack: o for o in folder.outcomes(tmp_path / "out")}
    assert set(found) == {"closed form", "inverting gradients", *(name.removesuffix(".py") for name in FILES)}
    faults = {name: o.fault for name, o in found.items() if o.fault}
    assert {name: fault.kind for name, fault in faults.items()} == {
        "many": "reply", "odd": "reply", "wrong": "reply", "none": "reply", "label": "reply", "scores": "unusable"
    }  # fmt: skip
    for name, said in (
        ("odd", "24 samples and 3 labels"), ("many", "25 samples, the most is 24"), ("label", "labels from 10 to 10, the classes are"),
        ("none", "returned NoneType; expected samples [m, *shape], or a pair"), ("scores", "it has no function `reconstruct(ctx)`"),
    ):  # fmt: skip
        assert said in faults[name].sentence
    assert {name: o.note for name, o in found.items() if o.note and not o.fault} == {}
    assert found["nothing"].measure == 0.0
    assert 0 < found["found"].measure < 2 / 24
    chance = found["grey"].chance
    assert found["empty"].measure == 0.0
    assert found["grey"].measure == found["labelled"].measure < chance  # the mean of all digits is nearer than grey
    assert found["closed"].measure > chance + 0.2  # what some unit sees alone comes out exactly
    assert found["closed"].measure == pytest.approx(found["closed form"].measure, abs=0.25)
    board = tournament.board(about, list(found.values()))
    scores = {line.name: line.score for line in board.lines["audit"]}
    assert scores["closed"] > 0.2
    assert scores["grey"] == scores["empty"] == scores["many"] == 0.0
    assert "Audits" in leaderboard.write(tmp_path / "out").read_text()
