"""Exercise files: what they may say, what students get of them, the ready ones, and the check."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedtrust import cli, scenario
from fedtrust.classroom import checking, exercise, players, setting
from fedtrust.errors import InputError
from tests.classroom.small import EXERCISE, exercise_file, hand_in
from tests.classroom.trusted import trusted

READY = exercise.ready()


def wrong(tmp_path, old, new):
    with pytest.raises(InputError) as caught:
        exercise.load(exercise_file(tmp_path, EXERCISE.replace(old, new)))
    return str(caught.value)


def test_defaults_are_the_courses_own():
    rules = exercise.ScoringSpec().rules()
    assert (rules.mean, rules.worst, rules.clean, rules.effect, rules.thrift) == (0.5, 0.25, 0.25, 0.5, 0.5)
    assert (rules.clean_loss, rules.worst_client, rules.bands) == (0.03, 0.10, (100, 90, 80, 70, 60, 50))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('kind = "both"', 'kind = "both"\nknowlege = "own"', "unknown key 'knowlege'"),
        ("seeds = [1, 2]", "sedes = [1, 2]", "did you mean 'seeds'"),
        ('"sign-flip"', '"sign-flop"', "did you mean 'sign-flip'"),
        ('median = "median"', 'median = "medina"', "did you mean 'median'"),
        ("count = 2", "count = 20", "attackers"),
        ("attackers = { count = 2 }", "", "attackers"),
        ('kind = "both"', 'kind = "both"\ngame = "membership"', "audit"),
        ("[hidden]", '[scoring]\nmeasure = "sucess"\n[hidden]', "did you mean 'success'"),
        ("[hidden]", '[scoring]\nmeasure = "success"\n[hidden]', "needs a `goal`"),
        ("[hidden]", "[scoring]\nmean = 0.6\n[hidden]", "add up to 1"),
        ("[hidden]", "[scoring]\nbands = [50, 100]\n[hidden]", "fall"),
        ('name = "small"', 'name = "Small One"', "lower-case"),
        ("rounds = 2", "rounds = 0", "rounds"),
        ('model = "logistic"', 'model = "logistik"', "did you mean 'logistic'"),
        ("{ count = 2 }", "{ count = 2, rounds = [1, 3] }", "within 1 and 2"),
        ('title = "small"', 'title = "small"\nseed = 4', "exercise's own affair"),
        ('kind = "both"', 'kind = "both"\ngoal = "badnet"', "did you mean 'badnets'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, old, new, said):
    assert said in wrong(tmp_path, old, new)


def test_a_scenario_must_lie_beside_the_exercise(tmp_path):
    head, _, _ = EXERCISE.partition("[scenario]")
    (tmp_path / "outside.toml").write_text("")
    text = head.replace('task = "', 'scenario = "../outside.toml"\ntask = "')
    with pytest.raises(InputError, match="beside"):
        exercise.load(exercise_file(tmp_path / "x", text))


def test_plain_fedavg_is_always_among_the_defences(tmp_path):
    made = exercise.load(exercise_file(tmp_path, EXERCISE.replace('FedAvg = "mean"\n', "")))
    assert made.reference == exercise.FEDAVG
    assert list(made.defences) == ["FedAvg", "median"]
    named = exercise.load(exercise_file(tmp_path, EXERCISE.replace('FedAvg = "mean"', 'plain = "mean"')))
    assert named.reference == "plain"


def test_hidden_partitions_are_played_in_the_hidden_phases_only(tmp_path):
    text = EXERCISE.replace("seeds = 2\n", 'seeds = 2\n[hidden.partitions]\nskewed = { kind = "dirichlet", alpha = 0.2 }\n')
    made = exercise.load(exercise_file(tmp_path, text))
    assert list(made.partitions(False)) == ["dirichlet"]
    assert list(made.partitions(True)) == ["skewed"]
    assert {c.labels["partitions"] for c in made.matrix([5], hidden=True).cells()} == {"skewed"}


# ----------------------------------------------------------------------------------------------------------------------- ready ones


def test_there_are_seven_ready_exercises():
    assert set(READY) == {
        "break-the-median", "a-backdoor-that-lasts", "a-better-defender", "who-was-in-the-training-set", "steal-the-model",
        "fool-the-model", "what-one-update-gives-away",
    }  # fmt: skip


@pytest.mark.parametrize("name", READY)
def test_a_ready_exercise_and_what_students_get_of_it(name, tmp_path):
    made = exercise.load(READY[name])
    assert made.name == name
    said = setting.start(name, tmp_path / "mine")
    files = {path.name for path in (tmp_path / "mine").iterdir()}
    assert files == {"task.md", "README.md", "exercise.toml", *(exercise.FILES[side] for side in made.sides)}
    assert exercise.FILES[made.sides[0]] in said
    given = exercise.load(tmp_path / "mine" / "exercise.toml")
    raw = tomllib.loads((tmp_path / "mine" / "exercise.toml").read_text())
    assert "hidden" not in raw
    assert given.public == made.public
    assert given.scoring == made.scoring
    assert given.house == made.house
    for side in made.sides:
        assert players.findings((tmp_path / "mine" / exercise.FILES[side]).read_text()) == []
    with pytest.raises(InputError, match="not empty"):
        setting.start(name, tmp_path / "mine")


@pytest.mark.parametrize("name", READY)
def test_the_task_says_which_hooks_are_refused_before_anybody_writes_one(name, tmp_path):
    from fedtrust.classroom.sandbox import parts

    made = exercise.load(READY[name])
    said = setting.task(made)
    refused = [hook for hook in parts.UNSUPPORTED if f"`{hook}`" in said]
    assert set(refused) == (set(parts.UNSUPPORTED) - {"goal_now"} if "attack" in made.sides else set())


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "scenarios" / "classroom").glob("*.toml")), ids=lambda p: p.stem)
def test_the_house_scenarios_are_the_exercises_own(path):
    """scenarios/classroom/NAME.toml plays the house against the house, on the exercise's public seeds."""
    made = exercise.load(READY[path.stem])
    theirs, ours = scenario.load(path), made.matrix(made.public.seeds, submissions=False)
    for part in ("rounds", "data", "model", "clients", "release", "attackers"):
        assert getattr(theirs, part) == getattr(ours, part), part
    assert {c.name: c.scenario.strategy for c in theirs.cells()} == {c.name: c.scenario.strategy for c in ours.cells()}
    assert {c.name: c.scenario.attackers for c in theirs.cells()} == {c.name: c.scenario.attackers for c in ours.cells()}


def test_what_is_hidden_is_taken_out_however_it_is_written(tmp_path):
    for written in ("[hidden]\nseeds = 7\n[hidden.partitions]\nx = 'iid'\n", "[hidden]\nseeds = 7 # seven\n"):
        text = EXERCISE.replace("[hidden]\nseeds = 2\n", written)
        made = setting.public(exercise.load(exercise_file(tmp_path, text)))
        assert "7" not in made
        assert "hidden" not in tomllib.loads(made)
    inline = EXERCISE.replace("[hidden]\nseeds = 2\n", "").replace('kind = "both"', 'kind = "both"\nhidden = { seeds = 7 }')
    assert "hidden" not in setting.public(exercise.load(exercise_file(tmp_path, inline)))


def test_an_exercise_made_of_a_scenario_can_be_started(tmp_path):
    (tmp_path / "base.toml").write_text(
        'title = "Base"\nrounds = 2\nseed = 3\ndata = { source = { name = "digits", limit = 200 } }\nmodel = "logistic"\n'
        'clients = { count = 6 }\n[sweep]\nstrategies = ["mean", "median"]\nseeds = [1]\n[sweep.attackers]\nnone = []\n'
        'flip = [{ behaviour = "sign-flip", count = 2 }]\n'
    )
    setting.new("my-exercise", tmp_path / "base.toml", "attack", tmp_path)
    made = exercise.load(tmp_path / "my-exercise.toml")
    assert list(made.house.attacks) == ["flip"]
    assert list(made.defences) == ["mean", "median"]
    assert made.attackers is not None
    assert made.attackers.count == 2
    setting.start(str(tmp_path / "my-exercise.toml"), tmp_path / "mine")
    assert (tmp_path / "mine" / "attack.py").is_file()
    with pytest.raises(InputError, match="there already"):
        setting.new("my-exercise", tmp_path / "base.toml", "attack", tmp_path)


# ------------------------------------------------------------------------------------------------------------------------ the check


def test_check_plays_the_first_public_seed_by_the_tournaments_code(tmp_path):
    exercise_file(tmp_path)
    hand_in(tmp_path, {"attack.py": "# play: sign-flip\n", "defence.py": "# play: median\n"})
    text, code = checking.check(tmp_path / "attack.py", None, open_=trusted)
    assert code == 0
    assert "attack.py for 'small': works" in text
    assert "score on the first public seed" in text
    assert max(map(len, text.splitlines())) <= 80
    shown = {line.split()[0]: float(line.split()[-1]) for line in text.splitlines() if line.startswith(("  FedAvg", "  median"))}
    assert set(shown) == {"FedAvg", "median"}
    assert shown["FedAvg"] > 0
    text, code = checking.check(tmp_path / "defence.py", None, every=True, open_=trusted)
    assert (code, "score on 2 public seeds" in text) == (0, True)


def test_check_says_what_fails(tmp_path):
    exercise_file(tmp_path)
    hand_in(tmp_path, {"attack.py": "# fault: crash\n", "defence.py": "import os\n"})
    text, code = checking.check(tmp_path / "attack.py", None, open_=trusted)
    assert code == 1
    assert "FAILED in 2 of 2 games" in text
    assert "crash: line 3" in text
    text, code = checking.check(tmp_path / "defence.py", None, open_=trusted)
    assert code == 1
    assert "line 1: 'os' cannot be imported" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["exercise", "strat"], "(commands: list, new, start, check); did you mean 'start'?"),
        (["exercise", "start", "break-the-medain"], "did you mean 'break-the-median'"),
        (["exercise", "check", "nowhere.py"], "no such file"),
        (["tournament", "run", "here"], "needs SUBMISSIONS, --exercise and --out"),
        (["tournament", "run", "--resume", "there", "--out", "x"], "does not go with --resume"),
        (["tournament", "run", "--resume", "there", "--phase", "hidden"], "does not go with --resume"),
        (["tournament", "report", "nowhere"], "not a tournament"),
        (["tournament", "commit", "nowhere"], "cannot be read"),
    ],
)
def test_the_command_line_says_no_in_a_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_commit_prints_what_sha256sum_does(tmp_path, capsys):
    import hashlib

    assert cli.main(["tournament", "commit", str(tmp_path / "secret"), "--new"]) == 0
    assert capsys.readouterr().out.strip() == hashlib.sha256((tmp_path / "secret").read_bytes()).hexdigest()
