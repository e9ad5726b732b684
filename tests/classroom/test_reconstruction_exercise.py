"""The exercise in which a curious server makes samples of the updates: what it sees, how it is scored, what is refused."""

from __future__ import annotations

import pytest
import torch
from small import exercise_file, hand_in

from fedtrust.classroom import exercise, folder, leaderboard, players, setting, submissions, tournament
from fedtrust.classroom.sandbox import backends
from fedtrust.errors import InputError
from fedtrust.probes import scores_images
from fedtrust.setup import build

NAME = "what-one-update-gives-away"
READY = exercise.find(NAME).read_text()


def text(**changes: str) -> str:
    made = READY.replace("seeds = [1, 2, 3]", "seeds = [1]").replace("iterations = 150", "iterations = 5")
    for old, new in changes.items():
        made = made.replace(old, new)
    return made


def test_what_is_recovered_lies_between_nothing_and_a_hundredth_of_the_range():
    assert scores_images.recovered(torch.tensor([10.0, 40.0, 90.0, -3.0]), 4) == pytest.approx((0.25 + 1 + 1 + 0) / 4)
    assert scores_images.recovered(torch.tensor([40.0]), 4) == 0.25  # three were not even guessed
    assert scores_images.recovered(torch.zeros(0), 0) == 0.0


def test_who_saw_nothing_gets_what_the_mean_of_all_samples_gets(tmp_path):
    made = exercise.load(exercise_file(tmp_path, text()))
    data = build(next(iter(made.matrix([1]).cells())).scenario).world.data
    span = data.task.high - data.task.low
    errors = (data.x - data.x.mean(0)).flatten(1).double().square().mean(1)
    wanted = (10 * torch.log10(span**2 / errors) / 40).mean()
    assert scores_images.blind(data) == pytest.approx(float(wanted), abs=1e-6)
    assert 0.15 < scores_images.blind(data) < 0.4


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
    "wrong.py": "import torch\n\ndef reconstruct(ctx):\n    return torch.zeros(24, 3)\n",
}


@sandboxed
def test_a_tournament_of_reconstructions(tmp_path):
    made = exercise.load(exercise_file(tmp_path / "x", text()))
    about = folder.create(tmp_path / "out", made, submissions.found(hand_in(tmp_path / "in", FILES), made.sides), "public")
    tournament.run(tmp_path / "out", players.sandboxed, count=1)
    found = {o.attack: o for o in folder.outcomes(tmp_path / "out")}
    assert set(found) == {"closed form", "inverting gradients", *(name.removesuffix(".py") for name in FILES)}
    assert {name: o.fault.kind for name, o in found.items() if o.fault} == {"many": "reply", "odd": "reply", "wrong": "reply"}
    assert "24 samples and 3 labels" in found["odd"].fault.sentence
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
