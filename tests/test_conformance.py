"""One row for every registered name. Each plays, twice the same, on the reference path too, changes the outcome, and refuses a misspelt
parameter. A component without a row fails `test_every_registered_name_has_a_row`."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedtrust.errors import InputError
from fedtrust.registry import KINDS, REGISTRY
from fedtrust.runner import run
from fedtrust.scenario import parse
from tests.conftest import SMALL, merged
from tests.data import test_torchvision_files as files


@dataclass(frozen=True)
class Row:
    """How a component is tried.

    Attributes:
        changes: laid over the small scenario.
        against: the scenario whose outcome it must change; by default the small one.
    """

    changes: dict[str, Any]
    against: dict[str, Any] = field(default_factory=dict)


def attack(name: str, params: dict[str, Any] | None = None, **rest: Any) -> Row:
    return Row({"attackers": [{"behaviour": name, "count": 2, "params": params or {}, **rest}], **NOISY}, NOISY)


def train(**changes: Any) -> Row:
    return Row({"clients": {"train": changes}})


def strategy(**changes: Any) -> Row:
    return Row({"strategy": changes, **NOISY}, NOISY)


NOISY: dict[str, Any] = {"rounds": 3}
DIGITS28: dict[str, Any] = {"data": {"source": {"name": "mnist5k", "limit": 60}}}
CLIP = {"name": "norm-clip", "max_norm": 0.1}
REGRESSION = {"data": {"source": "diabetes", "partition": "iid"}, "probes": ["loss"], "clients": {"train": {"lr": 0.01, "loss": "mse"}}}

ROWS: dict[str, Row] = {
    "behaviour/honest": Row({}, {"clients": {"behaviour": {"name": "fedprox", "mu": 1.0}}}),
    "behaviour/fedprox": Row({"clients": {"behaviour": {"name": "fedprox", "mu": 1.0}}}),
    "behaviour/label-flip": attack("label-flip"),
    "behaviour/gaussian": attack("gaussian"),
    "behaviour/sign-flip": attack("sign-flip"),
    "behaviour/badnets": attack("badnets", {"size": 2}),
    "behaviour/malformed": attack("malformed"),
    "aggregator/mean": strategy(aggregator="mean", filters=[CLIP]),
    "aggregator/weighted-mean": strategy(aggregator="weighted-mean"),
    "aggregator/median": strategy(aggregator="median"),
    "aggregator/trimmed-mean": strategy(aggregator="trimmed-mean", assumed_malicious=2),
    "aggregator/krum": strategy(aggregator="krum", assumed_malicious=2),
    "aggregator/multi-krum": strategy(aggregator="multi-krum", assumed_malicious=2),
    "aggregator/bulyan": strategy(aggregator="bulyan", assumed_malicious=1),
    "aggregator/geometric-median": strategy(aggregator="geometric-median"),
    "aggregator/centered-clipping": strategy(aggregator={"name": "centered-clipping", "tau": 0.1}),
    "filter/norm-clip": strategy(filters=[CLIP]),
    "filter/nnm": strategy(filters=["nnm"], assumed_malicious=2),
    "filter/bucketing": Row(
        {"strategy": {"filters": ["bucketing"], "aggregator": "median"}, **NOISY}, {"strategy": {"aggregator": "median"}, **NOISY}
    ),
    "step/gaussian-noise": Row({"strategy": {"filters": [CLIP], "steps": ["gaussian-noise"]}}, {"strategy": {"filters": [CLIP]}}),
    "step/fedavgm": strategy(steps=["fedavgm"]),
    "step/fedadagrad": strategy(steps=["fedadagrad"]),
    "step/fedadam": strategy(steps=["fedadam"]),
    "step/fedyogi": strategy(steps=["fedyogi"]),
    "model/logistic": Row({"model": "logistic"}, {"model": "mlp"}),
    "model/mlp": Row({"model": "mlp"}),
    "model/cnn": Row({"model": "cnn"}),
    "model/cnn-large": Row({"model": "cnn-large", **DIGITS28}, DIGITS28),
    "model/resnet18": Row({"model": "resnet18", "rounds": 1, "data": {"source": {"limit": 60}}}),
    "loss/cross-entropy": Row({"clients": {"train": {"loss": {"name": "cross-entropy", "label_smoothing": 0.2}}}}),
    "loss/gce": train(loss="gce"),
    "loss/sce": train(loss="sce"),
    "loss/focal": train(loss="focal"),
    "loss/mse": train(loss="mse"),
    "loss/mae": train(loss="mae"),
    "loss/huber": train(loss={"name": "huber", "delta": 0.1}),
    "optimiser/sgd": train(optimiser="sgd", weight_decay=0.1),
    "optimiser/momentum": train(optimiser="momentum"),
    "optimiser/nesterov": train(optimiser="nesterov"),
    "optimiser/adagrad": train(optimiser="adagrad"),
    "optimiser/rmsprop": train(optimiser="rmsprop", lr=0.01),
    "optimiser/adadelta": train(optimiser="adadelta", lr=1.0),
    "optimiser/adam": train(optimiser="adam", lr=0.01),
    "source/digits": Row({}, {"data": {"source": "mnist5k"}}),
    "source/mnist5k": Row({"data": {"source": {"name": "mnist5k", "limit": 300}}}),
    "source/breast-cancer": Row({"data": {"source": "breast-cancer"}}),
    "source/diabetes": Row(REGRESSION),
    "partition/iid": Row({"data": {"partition": {"kind": "iid", "alpha": None}}}),
    "partition/dirichlet": Row({"data": {"partition": {"kind": "dirichlet", "alpha": 0.3}}}),
    "partition/pathological": Row({"data": {"partition": {"kind": "pathological", "alpha": None}}}),
    "partition/shards": Row({"data": {"partition": {"kind": "shards", "alpha": None}}}),
    "partition/quantity-skew": Row({"data": {"partition": {"kind": "quantity-skew"}}}),
    "feature-skew/rotation": Row({"data": {"feature_skew": {"kind": "rotation"}}}),
    "feature-skew/noise": Row({"data": {"feature_skew": {"kind": "noise"}}}),
    "feature-skew/contrast": Row({"data": {"feature_skew": {"kind": "contrast"}}}),
    "probe/accuracy": Row({"probes": ["accuracy"]}),
    "probe/loss": Row({"probes": ["loss"]}),
    "probe/recall": Row({"probes": ["recall"]}),
    "probe/client-accuracy": Row({"probes": ["client-accuracy"]}),
    "probe/attack-success": Row({"probes": ["attack-success"], "attackers": [{"behaviour": "label-flip", "count": 2}]}),
    "probe/detection": Row(
        {
            "probes": ["detection"],
            "attackers": [{"behaviour": "sign-flip", "count": 2}],
            "strategy": {"aggregator": "krum", "assumed_malicious": 2},
        }
    ),
    "probe/trigger-examples": Row({"probes": ["trigger-examples"], "attackers": [{"behaviour": "badnets", "count": 2}]}),
}
#: Sources whose files are not embedded, and how the reader's own tests write small ones in the real format.
FILES = ("mnist", "fashion-mnist", "emnist", "cifar10", "cifar100", "svhn")

ALL = sorted(ROWS)
TRAINED = [row for row in ALL if not row.startswith("probe/")]


def scenario_of(changes: dict[str, Any]) -> dict[str, Any]:
    document = merged(SMALL, changes)
    for table in (document["data"]["partition"], document["data"]["source"]):
        if isinstance(table, dict):
            for key in [k for k, v in table.items() if v is None]:
                del table[key]
    return document


@functools.cache
def _played(document: str) -> tuple[str, dict[str, torch.Tensor], list[dict[str, Any]], str]:
    """Play a scenario once: SHA-256 of the model, the model, the records, and what artefacts it left."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        result = run(parse(json.loads(document)), out, engine="local", workers=2)
        assert result.status == "finished", result.why
        records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        left = sorted((p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in out.glob("artefacts/*"))
        return str(result.summary["model_sha256"]), load_file(out / "model.safetensors"), records, repr(left)


def played(changes: dict[str, Any]) -> tuple[str, dict[str, torch.Tensor], list[dict[str, Any]], str]:
    return _played(json.dumps(scenario_of(changes), sort_keys=True))


def test_every_registered_name_has_a_row() -> None:
    registered = {f"{e.kind}/{e.name}" for e in REGISTRY if not e.plugin}
    assert registered == set(ROWS) | {f"source/{name}" for name in FILES}
    assert {row.split("/")[0] for row in ROWS} == set(KINDS)


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_bits(name: str) -> None:
    changes = ROWS[name].changes
    digest, _, records, artefacts = played(changes)
    _played.cache_clear()
    again = played(changes)
    assert (digest, artefacts) == (again[0], again[3])
    assert [r["metrics"] for r in records] == [r["metrics"] for r in again[2]]


@pytest.mark.parametrize("name", TRAINED)
def test_it_changes_the_outcome(name: str) -> None:
    row = ROWS[name]
    assert played(row.changes)[0] != played(row.against)[0], f"{name} is a silent no-op"


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("probe/")])
def test_a_probe_measures_the_model(name: str) -> None:
    """What a probe says depends on the model it is shown."""
    _, _, records, artefacts = played(ROWS[name].changes)
    if name == "probe/trigger-examples":
        assert "badnets" in artefacts
        return
    first, last = records[1]["metrics"], records[-1]["metrics"]
    assert last
    assert first != last or name == "probe/detection"
    if name == "probe/detection":
        assert last["detection/fpr"] > 0.5  # Krum keeps one of eight


@pytest.mark.parametrize("name", TRAINED)
def test_batched_and_one_at_a_time_agree(name: str) -> None:
    """The whole run, not only one chunk: the same model on the reference path."""
    changes = ROWS[name].changes
    if name in ("model/resnet18",):
        changes = merged(changes, {"engine": {"path": "vmap"}})  # its fast path is the loop itself
    reference = played(merged(changes, {"engine": {"path": "loop"}}))[1]
    fast = played(changes)[1]
    for key, value in reference.items():
        torch.testing.assert_close(fast[key], value, atol=2e-4 if "resnet" in name else 2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", [f"source/{f}" for f in FILES] + ALL)
def test_a_misspelt_parameter_is_refused(name: str) -> None:
    kind, component = name.split("/")
    entry = REGISTRY.get(kind, component)  # type: ignore[arg-type]
    known = list(entry.schema.model_fields)
    wrong = (known[0] + "x") if known else "x"
    with pytest.raises(InputError, match=rf"no parameter '{wrong}'") as caught:
        entry.check({wrong: 1})
    if known:
        assert f"did you mean '{known[0]}'" in str(caught.value)
    if kind in ("behaviour", "loss", "optimiser", "aggregator", "filter", "step") and component not in ("mean",):
        assert entry.meta.get("paper"), f"{name} names no source"


def test_files_on_disk_are_played_too(tmp_path: Path) -> None:
    """One torchvision source through the whole engine; each reader has its own tests."""
    classes = torch.arange(10).repeat(6).numpy()
    files.write_mnist_like(tmp_path / "MNIST" / "raw", "train", "t10k", classes)
    document = merged(SMALL, {"data": {"source": {"name": "mnist"}, "root": ".", "partition": "iid"}, "clients": {"count": 3}})
    document["data"]["source"] = "mnist"
    result = run(parse(document, folder=tmp_path), tmp_path / "run", engine="local")
    assert result.status == "finished"
    assert result.summary["federation"]["samples"] == 40
