"""Scenarios that are right: what is read, what is written, which cells a sweep has."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import jsonschema
import pytest

from fedtrust import scenario
from fedtrust.errors import InputError
from fedtrust.scenario import Ref, Scenario, load, parse
from fedtrust.scenario_io import Document, key_lines, slugs
from fedtrust.scenario_toml import value

FULL = """\
title = "Ein \\"Test\\" 标签 \\u0007"
week = "backdoor"
description = \"\"\"two
lines\"\"\"
rounds = 20
seed = 9007199254740993

[data]
source = "digits"
partition = { kind = "dirichlet", alpha = 1e-3, min_samples = 1 }
feature_skew = "rotation"

[model]
name = "mlp"
hidden = [16, 8]

[clients]
count = 40
per_round = 20
quorum = 1
behaviour = { name = "fedprox", mu = 1 }
train = { optimiser = "sgd", lr = 1e-5, momentum = 0.9, batch_size = 20, epochs = 2, loss = { name = "gce", q = 0.5 } }

[[attackers]]
behaviour = "label-flip"
share = 0.2
rounds = [5, 20]
params = { mode = "random" }

[[attackers]]
behaviour = "badnets"
ids = [3, 1]

[strategy]
assumed_malicious = 4
root_samples = 10
filters = [{ name = "norm-clip", max_norm = 1.5 }]
aggregator = { name = "multi-krum", m = 3 }
steps = ["gaussian-noise", { name = "fedadam", lr = 0.1 }]

[[probes]]
name = "loss"

[[probes]]
name = "detection"
threshold = 0.25

[engine]
path = "vmap"

[sweep]
seeds = [1, 2]
partitions = ["iid"]

[sweep.attackers]
none = []
"label flip" = [{ behaviour = "label-flip", count = 3 }]

[sweep.strategies]
plain = { filters = [], steps = [], aggregator = "mean" }
base = {}
flower = { filters = [], steps = [], aggregator = { name = "flwr:FedAdam", eta = 0.1 } }
"""

SMALL = """\
title = "small"
rounds = 3
data = { source = { name = "digits", limit = 240 } }
model = "logistic"
clients = { count = 10 }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDTRUST_DATA", raising=False)
    (tmp_path / "full.toml").write_text(FULL, encoding="utf-8")
    (tmp_path / "small.toml").write_text(SMALL, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["full.toml", "small.toml"])
def test_the_resolved_file_is_the_same_scenario(name: str, folder: Path) -> None:
    first = load(name)
    text = first.resolved_toml()
    (folder / "again.toml").write_text(text, encoding="utf-8")
    second = load("again.toml")
    assert second == first
    assert second.resolved_toml() == text
    for cell in first.cells():
        (folder / "cell.toml").write_text(cell.scenario.resolved_toml(), encoding="utf-8")
        assert load("cell.toml") == cell.scenario


def test_every_default_is_written_out(folder: Path) -> None:
    made = load("small.toml")
    assert made.clients.behaviour == Ref(name="honest")
    assert made.clients.train.loss == Ref(name="cross-entropy", params={"label_smoothing": 0.0})
    assert made.clients.train.optimiser_params["momentum"] == 0.0
    assert made.strategy.aggregator == Ref(name="mean")
    assert made.probes == [Ref(name="accuracy")]
    written = tomllib.loads(made.resolved_toml())
    assert written["data"]["source"] == {"name": "digits", "test_fraction": 0.2, "limit": 240, "draw": 0}
    assert written["clients"]["train"]["nesterov"] is False
    assert written["engine"] == {"path": "auto", "precision": "float32", "deadline": 600.0, "retries": 1}
    assert load("full.toml").attackers[1].knowledge in ("own", "coalition", "omniscient", "omniscient+defence")


def test_defaults_follow_the_task_and_the_attackers(folder: Path) -> None:
    regression = load("small.toml", ["data.source=diabetes"])
    assert regression.clients.train.loss == Ref(name="mse")
    assert regression.probes == [Ref(name="loss")]
    attacked = load("small.toml", ["attackers=[{behaviour='sign-flip', count=1}]"])
    assert [p.name for p in attacked.probes] == ["accuracy", "attack-success"]
    swept = load("small.toml", ["sweep.attackers.x=[{behaviour='sign-flip', count=1}]"])
    assert [p.name for p in swept.probes] == ["accuracy", "attack-success"]


def test_a_scenario_cannot_be_changed(folder: Path) -> None:
    made = load("small.toml")
    with pytest.raises(ValueError, match="frozen"):
        made.rounds = 4  # type: ignore[misc]


def test_cells(folder: Path) -> None:
    made = load("full.toml")
    cells = made.cells()
    assert len(cells) == 2 * 3 * 1 * 2
    assert [c.name for c in cells[:3]] == ["none__plain__iid__seed1", "none__plain__iid__seed2", "none__base__iid__seed1"]
    assert cells[-1].name == "label-flip__flower__iid__seed2"
    assert cells[-1].labels == {"attackers": "label flip", "strategies": "flower", "partitions": "iid", "seed": 2}
    last = cells[-1].scenario
    assert (last.seed, last.sweep, last.data.partition.name) == (2, None, "iid")
    assert [a.count for a in last.attackers] == [3]
    assert last.origin == made.origin
    base = next(c.scenario for c in cells if c.labels["strategies"] == "base")
    assert base.strategy == made.strategy
    plain = cells[0].scenario.strategy
    assert (plain.aggregator.name, plain.filters, plain.assumed_malicious, plain.root_samples) == ("mean", [], 4, 10)
    assert list(made.axes()) == ["attackers", "strategies", "partitions", "seeds"]


def test_one_cell_without_a_sweep(folder: Path) -> None:
    made = load("small.toml", ["attackers=[{behaviour='sign-flip', count=1}]", "seed=3"])
    (cell,) = made.cells()
    assert cell.name == "sign-flip__mean__iid__seed3"
    assert cell.scenario == made


def test_names_of_cells_are_safe_and_differ() -> None:
    labels = ["a b", "A  b", "a/b", "..", "", "标签翻转", "x" * 300, "é" * 200]
    made = slugs(labels)
    assert len(set(made.values())) == len(labels)
    for name in made.values():
        assert name.strip(".")
        assert "/" not in name
        assert "__" not in name
        assert len(name.encode()) <= 60
    assert made["标签翻转"] == "标签翻转"


def test_overrides(folder: Path) -> None:
    made = load(
        "full.toml",
        [
            "rounds=30",
            "title=no quotes needed",
            "clients.train.lr=1",
            "attackers[0].share=0.1",
            "attackers.1.ids=[7]",
            "strategy.filters[0].max_norm=2.5",
            "strategy.aggregator=median",
            "data.source.limit=600",
            "engine.deadline=3",
            "sweep.attackers.'label flip'[0].count=2",
        ],
    )
    assert (made.rounds, made.title, made.clients.train.lr, made.engine.deadline) == (30, "no quotes needed", 1.0, 3.0)
    assert (made.attackers[0].share, made.attackers[1].ids) == (0.1, [7])
    assert made.strategy.filters == [Ref(name="norm-clip", params={"max_norm": 2.5})]
    assert made.strategy.aggregator == Ref(name="median")
    assert made.data.source.params["limit"] == 600
    assert made.sweep is not None
    assert made.sweep.attackers["label flip"][0].count == 2


def test_a_share_is_rounded_half_up(folder: Path) -> None:
    sizes = [
        parse(tomllib.loads(SMALL) | {"attackers": [{"behaviour": "sign-flip", "share": s}]}).attackers[0].size(10)
        for s in (0.05, 0.14, 0.15, 0.25)
    ]
    assert sizes == [1, 1, 2, 3]


def test_data_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist = ["data.source=mnist", "data.root=sub/files"]
    assert load("small.toml", mnist).data.source.params["root"] == str((folder / "sub/files").resolve())
    assert load("small.toml", mnist, data_root="/else/where").data.source.params["root"] == "/else/where"
    monkeypatch.setenv("FEDTRUST_DATA", "/env/where")
    made = load("small.toml", ["data.source=mnist"])
    assert made.data.source.params["root"] == "/env/where"
    assert load("small.toml", ["data.source=mnist"], data_root="/x").data.source.params["root"] == "/x"
    assert "/env" not in made.resolved_toml()
    assert load("small.toml").data.source.params.get("root") is None


def test_check_tells_the_sizes(folder: Path) -> None:
    facts = scenario.check(load("small.toml", ["sweep.partitions=['iid', 'dirichlet']", "sweep.seeds=[1, 2]"]))
    text = "\n".join(facts)
    assert "240 training and" in text
    assert "partition 'iid', seed 1: 24 to 24 samples a client" in text
    assert "partition 'dirichlet', seed 2" in text
    assert "4 runs of 3 rounds, 10 of 10 clients a round" in text


def test_check_finds_a_model_that_does_not_fit(folder: Path) -> None:
    with pytest.raises(InputError, match=r"--set model: .*images"):
        scenario.check(load("small.toml", ["data.source=breast-cancer", "model=cnn"]))
    with pytest.raises(InputError, match=r"clients.train.loss: 'cross-entropy' is for classification"):
        scenario.check(load("small.toml", ["data.source=diabetes", "clients.train.loss=cross-entropy"]))
    with pytest.raises(InputError, match=r"--set probes: probes\[0\]: 'accuracy' measures a classification"):
        scenario.check(load("small.toml", ["data.source=diabetes", "probes=['accuracy']"]))


def test_schema_accepts_what_load_accepts(folder: Path) -> None:
    made = scenario.schema()
    jsonschema.Draft202012Validator.check_schema(made)
    validator = jsonschema.Draft202012Validator(made)
    for name in ("full.toml", "small.toml"):
        validator.validate(tomllib.loads((folder / name).read_text(encoding="utf-8")))
        validator.validate(tomllib.loads(load(name).resolved_toml()))
    for wrong in ({"model": "cnm"}, {"round": 3}, {"strategy": {"aggregator": {"name": "median", "f": 1}}}, {"rounds": 0}):
        assert not validator.is_valid(tomllib.loads(SMALL) | wrong), wrong
    assert json.dumps(made)


def test_equal_means_the_same_words_not_the_same_folder(folder: Path) -> None:
    os.mkdir("other")
    (folder / "other/small.toml").write_text(SMALL, encoding="utf-8")
    first, second = load("small.toml"), load("other/small.toml")
    assert first == second
    assert first.origin != second.origin
    assert first != load("small.toml", ["seed=1"])
    assert first != "small"


def test_a_mark_in_front_and_windows_lines_are_read(folder: Path) -> None:
    (folder / "w.toml").write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load("w.toml") == load("small.toml")


def test_lines_of_keys() -> None:
    lines = key_lines('a = """\nb = 1\n"""\n[[t]]\nc = [\n  1, # d = 2\n  "e = 3",\n]\n[[t]]\n"x y".z = 1\n[t.u]\nv = 1\n')
    first = {("a",): 1, ("t", 0): 4, ("t", 0, "c"): 5}
    assert lines == first | {("t", 1): 9, ("t", 1, "x y", "z"): 10, ("t", 1, "u"): 11, ("t", 1, "u", "v"): 12}


@pytest.mark.parametrize(
    "given", [0, -1, 1.0, 1e-05, 1e22, -0.0, True, "", 'a"\\\n\t\x00\x7f', [], [1, [2.5]], {}, {"a b": {"c": "d"}, "": [True]}, 2**70]
)
def test_a_value_as_toml(given: object) -> None:
    assert tomllib.loads(f"x = {value(given)}") == {"x": given}
    assert type(tomllib.loads(f"x = {value(given)}")["x"]) is type(given)


def test_a_document_is_not_changed_by_reading_it(folder: Path) -> None:
    document = tomllib.loads(FULL)
    parse(document)
    assert document == tomllib.loads(FULL)
    assert Document.read(folder / "full.toml").data == document


def test_scenarios_can_be_made_in_python() -> None:
    made = Scenario(title="x", rounds=1, data={"source": "digits"}, model="mlp", clients={"count": 2})  # type: ignore[arg-type]
    assert made.model == Ref(name="mlp")
    assert made.origin is None
    assert made.cells()[0].name == "none__mean__iid__seed0"
