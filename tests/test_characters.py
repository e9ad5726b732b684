"""A character model goes through the whole engine: every component works on it, or says why not before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY, Kind
from fedtrust.runner import run
from fedtrust.scenario import check, parse
from tests.conftest import merged

#: A text, a model and clients that train in a fraction of a second.
TEXT: dict[str, Any] = {
    "title": "text",
    "rounds": 2,
    "seed": 3,
    "data": {
        "source": {"name": "chronicle", "authors": 8, "samples": 12, "length": 30, "test_samples": 24, "repetitions": [2], "canaries": 1}
    },
    "model": {"name": "gru", "embedding": 4, "hidden": 8},
    "clients": {"count": 8, "train": {"lr": 0.5, "batch_size": 6}},
}


def refused(out: Path, changes: dict[str, Any]) -> str:
    """Play the text with changes, every reply counted; or return why it was refused before anything ran."""
    try:
        scenario = parse(merged(TEXT, changes))
        check(scenario)
    except InputError as error:
        return str(error)
    assert run(scenario, out, engine="local").status == "finished"
    last = json.loads((out / "rounds.jsonl").read_text().splitlines()[-1])
    assert last["counted"], last["why"]
    assert not last["faults"]
    assert last["metrics"]
    return ""


def names(kind: Kind, role: str = "") -> list[str]:
    entries = [e for e in REGISTRY if e.kind == kind and not e.plugin and not e.meta.get("broken")]
    return sorted(e.name for e in entries if not role or e.meta["role"] == role)


def test_the_engine_trains_a_text_and_measures_it_by_character(out: Path) -> None:
    assert refused(out, {"rounds": 6, "clients": {"train": {"optimiser": "adam", "lr": 0.02}}, "probes": ["accuracy", "loss"]}) == ""
    first, *_, last = (json.loads(line)["metrics"] for line in (out / "rounds.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"] - 0.5
    assert first["accuracy"] < 0.15 < last["accuracy"]


#: Attacks on labels: a text has none.
CLASSES = ("label-flip", "poison-frogs", "sybil", "unlearnable", "witches-brew")


@pytest.mark.parametrize("name", names("behaviour", "malicious"))
def test_every_attack_works_on_a_text_or_says_why_not(name: str, out: Path) -> None:
    group = {"behaviour": name, "count": 3, "knowledge": "omniscient+defence"}
    why = refused(out, {"attackers": [group], "strategy": {"assumed_malicious": 2}})
    assert why == "" or why.startswith("attackers[0].behaviour: ")
    if name in CLASSES:
        assert "but the task is a character model" in why
    if name in ("gaussian", "sign-flip", "alie", "min-max", "fang-krum", "free-rider", "p-tampering", "walk-away"):
        assert why == ""


@pytest.mark.parametrize("name", names("behaviour", "honest"))
def test_every_honest_behaviour_works_on_a_text_or_says_why_not(name: str, out: Path) -> None:
    noise = {"noise_multiplier": 0.1} if name in ("dp-sgd", "local-dp") else {}
    why = refused(out, {"clients": {"behaviour": {"name": name, **noise}}})
    assert why == "" or (why.startswith("clients.behaviour: ") and name not in ("honest", "fedprox", "deduplicated", "dp-sgd"))


RULES: list[tuple[Kind, str]] = [(kind, name) for kind in ("filter", "aggregator", "step", "repair") for name in names(kind)]


@pytest.mark.parametrize(("kind", "name"), RULES)
def test_every_rule_works_on_a_text_or_says_why_not(kind: Kind, name: str, out: Path) -> None:
    clip = {"name": "norm-clip", "max_norm": 1.0}
    spec: dict[str, dict[str, Any]] = {
        "filter": {"filters": [name]},
        "aggregator": {"aggregator": name},
        "step": {"filters": [clip], "steps": [name]},
        "repair": {"repairs": [name]},
    }
    why = refused(out, {"strategy": {**spec[kind], "assumed_malicious": 1, "root_samples": 10}})
    assert why == "" or why.startswith("strategy.")
    if name == "deepsight":
        assert why == "strategy.aggregator: 'deepsight' is for classification or regression; 'chronicle' is a character model"
    if name in ("mean", "median", "krum", "flame", "fltrust", "foolsgold", "roni", "norm-clip", "nnm", "gaussian-noise", "fedadam"):
        assert why == ""
    assert why or kind != "repair"


@pytest.mark.parametrize("name", names("probe"))
def test_every_probe_measures_a_text_or_says_why_not(name: str) -> None:
    task = REGISTRY.get("probe", name).meta.get("task")
    if task is None or "characters" in ((task,) if isinstance(task, str) else task):
        return
    params = {p: 0 for p, f in REGISTRY.get("probe", name).schema.model_fields.items() if f.is_required()}
    with pytest.raises(InputError, match=r"probes\[0\]: .*; 'chronicle' is a character model"):
        check(parse(merged(TEXT, {"probes": [{"name": name, **params}]})))


@pytest.mark.parametrize("model", ["gru", "char-transformer"])
@pytest.mark.parametrize("loss", names("loss"))
def test_every_loss_trains_a_text(loss: str, model: str, out: Path) -> None:
    small = {"gru": {"hidden": 8}, "char-transformer": {"width": 8, "heads": 2, "layers": 1}}[model]
    document = {**TEXT, "model": {"name": model, **small}, "clients": {"count": 8, "train": {"loss": loss}}, "rounds": 1}
    scenario = parse(document)
    check(scenario)
    assert run(scenario, out, engine="local").status == "finished"


@pytest.mark.parametrize("name", [n for n in names("model") if n not in ("gru", "char-transformer")])
def test_models_of_images_and_tables_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^model: "):
        check(parse({**TEXT, "model": name}))


@pytest.mark.parametrize("name", names("feature-skew"))
def test_a_text_has_no_features_to_skew(name: str) -> None:
    with pytest.raises(InputError, match=r"data\.feature_skew: a text has no features"):
        check(parse(merged(TEXT, {"data": {"feature_skew": name}})))


SPOILT = [lambda x, y: (x + 100, y), lambda x, y: (x, y[:, :4]), lambda x, y: (x, -y - 1), lambda x, y: (x.float(), y)]


@pytest.mark.parametrize("made", SPOILT)
def test_a_text_that_a_behaviour_spoils_costs_its_clients_the_round(made: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = REGISTRY.get("behaviour", "p-tampering").target
    monkeypatch.setattr(cls, "poison", lambda self, x, y, view: made(x, y))
    scenario = parse(merged(TEXT, {"attackers": [{"behaviour": "p-tampering", "ids": [2, 5]}]}))
    run(scenario, out, engine="local")
    last = json.loads((out / "rounds.jsonl").read_text().splitlines()[-1])
    assert set(last["faults"]) == {"2", "5"}
    assert all("returned" in why for why in last["faults"].values())
