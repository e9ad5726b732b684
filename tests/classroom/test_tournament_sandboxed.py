"""The whole way through the sandbox: the ready templates, a tournament with faulty submissions, an evasion. Slow: sandboxes start."""

from __future__ import annotations

import json

import pytest

from fedtrust.classroom import checking, exercise, folder, leaderboard, players, setting, submissions, tournament
from fedtrust.classroom.sandbox import backends
from tests.classroom.small import exercise_file, hand_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(f.works for f in backends.available()), reason="no sandbox works on this machine"),
]

STUDENTS = {
    "ann/attack.py": "def craft(updates, view):\n    return (-4.0 * updates).contiguous()\n",
    "ann/defence.py": "def aggregate(updates, ctx):\n    return updates.mean(0)\n",
    "nan/attack.py": "import torch\n\ndef craft(updates, view):\n    return torch.full_like(updates, float('nan'))\n",
    "raises/defence.py": "def aggregate(updates, ctx):\n    raise ValueError('no idea')\n",
    "shape/defence.py": "def aggregate(updates, ctx):\n    return updates.mean(0)[:5]\n",
    "loops/attack.py": "def craft(updates, view):\n    while True:\n        pass\n",
    "knows/attack.py": "def craft(updates, view):\n    return updates + view.others.mean(0)\n",
    "static/attack.py": "import os\n\ndef craft(updates, view):\n    return updates\n",
}
HASTY = "[budget]\ncall_seconds = 1.0\n\n[public]"


def test_a_tournament_of_sandboxed_submissions(tmp_path):
    path = exercise_file(tmp_path / "x")
    path.write_text(path.read_text().replace("[public]", HASTY).replace("seeds = [1, 2]", "seeds = [1]"))
    made = exercise.load(path)
    about = folder.create(tmp_path / "out", made, submissions.found(hand_in(tmp_path / "in", STUDENTS), made.sides), "public")
    assert tournament.run(tmp_path / "out", players.sandboxed, count=2).status == "finished"
    found = folder.outcomes(tmp_path / "out")
    cells = {(o.attack, o.defence): o for o in found}
    kinds = {name: cells[name, "FedAvg"].fault for name in ("nan", "loops", "knows", "static")}
    assert {name: fault.kind for name, fault in kinds.items()} == {
        "nan": "not-finite", "loops": "timeout", "knows": "crash", "static": "unusable"
    }  # fmt: skip
    assert "line 2" in kinds["knows"].sentence
    assert "line 1: 'os'" in kinds["static"].sentence
    assert {name: cells[None, name].fault.kind for name in ("raises", "shape")} == {"raises": "crash", "shape": "reply"}
    assert "no idea" in cells[None, "raises"].fault.sentence
    # what crosses into the sandbox and back is what the house computes, but for the order in which rows are added up
    assert cells[None, "ann"].accuracy == pytest.approx(cells[None, "FedAvg"].accuracy, abs=0.02)
    assert cells["ann", "FedAvg"].accuracy < cells[None, "FedAvg"].accuracy - 0.2
    assert cells["ann", "FedAvg"].costs["attack"]["calls"] == 2
    board = tournament.board(about, found)
    assert [ln.name for ln in board.lines["attack"] if ln.score > 0 and not ln.house] == ["ann"]
    page = leaderboard.write(tmp_path / "out").read_text()
    assert "ann leads the attacks" in page
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("name", exercise.ready())
def test_every_template_runs_as_it_is(name, tmp_path):
    setting.start(name, tmp_path / "mine")
    made = exercise.load(tmp_path / "mine" / "exercise.toml")
    text, code = checking.check(tmp_path / "mine" / exercise.FILES[made.sides[0]], None)
    assert code == 0, text
    assert "score on the first public seed" in text


EVASION = """
name = "evade"
title = "Evade"
kind = "evasion"
task = "Fool the model."
[budget]
queries = 200
eps = 0.4
[public]
seeds = [1]
[scenario]
title = "evade"
rounds = 4
data = { source = { name = "digits", limit = 300 } }
model = "logistic"
clients = { count = 6, train = { lr = 0.3, batch_size = 16 } }
"""
FGSM = """
import torch

def perturb(x, y, query):
    return (x + query.eps * torch.sign(0.5 - x)).clamp(0, 1)
"""


def test_an_evasion_is_measured_and_kept_within_its_bounds(tmp_path):
    made = exercise.load(exercise_file(tmp_path / "x", EVASION))
    files = {
        "grey.py": FGSM,
        "far.py": FGSM.replace("query.eps", "0.9"),
        "asks.py": "def perturb(x, y, query):\n    for _ in range(10):\n        query(x)\n    return x\n",
        "idle.py": "def perturb(x, y, query):\n    return x\n",
    }
    folder.create(tmp_path / "out", made, submissions.found(hand_in(tmp_path / "in", files), made.sides), "public")
    tournament.run(tmp_path / "out", players.sandboxed, count=1)
    found = {o.attack: o for o in folder.outcomes(tmp_path / "out")}
    assert found["grey"].measure > 0.2
    assert found["idle"].measure == 0.0
    assert (found["far"].fault.kind, found["asks"].fault.kind) == ("budget", "budget")
    assert "moved a feature by" in found["far"].fault.sentence
