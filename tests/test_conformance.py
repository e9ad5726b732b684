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


def guarded(name: str, **params: Any) -> Row:
    return Row({"clients": {"behaviour": {"name": name, **params}}, **NOISY}, NOISY)


def train(**changes: Any) -> Row:
    return Row({"clients": {"train": changes}})


def strategy(**changes: Any) -> Row:
    return Row({"strategy": changes, **NOISY}, NOISY)


def inverted(name: str, model: str = "lenet", **params: Any) -> Row:
    few = {"source": {"limit": 24}, "partition": {"kind": "iid", "alpha": None}}
    probe = {"name": name, "at_round": 2, **params}
    return Row({"model": model, "data": few, "clients": {"count": 24, "per_round": 3, "train": {"batch_size": 1}}, "probes": [probe]})


def mended(repair: Any) -> Row:
    base = {"model": "cnn", "strategy": {"root_samples": 30}}
    return Row({**base, "strategy": {"root_samples": 30, "repairs": [repair]}}, base)


NOISY: dict[str, Any] = {"rounds": 3}
DIGITS28: dict[str, Any] = {"data": {"source": {"name": "mnist5k", "limit": 60}}}
FLIPPED: dict[str, Any] = {"attackers": [{"behaviour": "sign-flip", "count": 2, "params": {"scale": 5.0}}]}
CLIP = {"name": "norm-clip", "max_norm": 0.1}
REGRESSION = {"data": {"source": "diabetes", "partition": "iid"}, "probes": ["loss"], "clients": {"train": {"lr": 0.01, "loss": "mse"}}}

#: A small text, and a small model of it.
CHRONICLE = {"name": "chronicle", "authors": 8, "samples": 20, "length": 30, "test_samples": 40, "repetitions": [0, 4], "limit": None}
TEXT: dict[str, Any] = {
    "data": {"source": CHRONICLE, "partition": {"kind": "natural", "alpha": None}},
    "model": {"name": "char-transformer", "width": 16, "layers": 1},
    "clients": {"train": {"lr": 0.5}},
}
#: What users are told, and how far that lies from the truth.
TOLD: dict[str, Any] = {"release": {"answers": "probabilities"}, "probes": ["released-accuracy"]}

#: An ensemble of three models that vote.
VOTING: dict[str, Any] = {"model": {"name": "ensemble", "of": "logistic", "members": 3}, **NOISY}

#: Three clients are sent a model that gives their samples away.
#: Edges at quantiles lie exactly on samples: which side of a ReLU such a sample is on is a matter of the last bit.
TRAP: dict[str, Any] = {"sender": "robbing-the-fed", "params": {"victims": 3, "edges": "normal"}}
PLANTED: dict[str, Any] = {"model": "mlp", "malicious_server": TRAP}
BAITED: dict[str, Any] = {"malicious_server": {"sender": "fishing", "params": {"target": 1, "victims": 3}}}

ROWS: dict[str, Row] = {
    "behaviour/honest": Row({}, {"clients": {"behaviour": {"name": "fedprox", "mu": 1.0}}}),
    "behaviour/fedprox": Row({"clients": {"behaviour": {"name": "fedprox", "mu": 1.0}}}),
    "behaviour/label-flip": attack("label-flip"),
    "behaviour/gaussian": attack("gaussian"),
    "behaviour/sign-flip": attack("sign-flip"),
    "behaviour/zero": attack("zero"),
    "behaviour/alie": attack("alie", {"z": 1.5}, knowledge="coalition"),
    "behaviour/ipm": attack("ipm", knowledge="coalition"),
    "behaviour/mimic": attack("mimic", knowledge="omniscient"),
    "behaviour/poisoned-fl": attack("poisoned-fl", knowledge="coalition"),
    "behaviour/sybil": attack("sybil", knowledge="coalition"),
    "behaviour/min-max": attack("min-max", knowledge="coalition"),
    "behaviour/min-sum": attack("min-sum", knowledge="omniscient"),
    "behaviour/fang-krum": attack("fang-krum", knowledge="omniscient"),
    "behaviour/fang-trimmed-mean": attack("fang-trimmed-mean", knowledge="coalition"),
    "behaviour/alie-search": attack("alie-search", knowledge="omniscient+defence"),
    "behaviour/ipm-search": attack("ipm-search", knowledge="omniscient+defence"),
    "behaviour/free-rider": attack("free-rider"),
    "behaviour/disguised-free-rider": attack("disguised-free-rider"),
    "behaviour/p-tampering": attack("p-tampering"),
    "behaviour/poison-frogs": attack("poison-frogs"),
    "behaviour/witches-brew": attack("witches-brew"),
    "behaviour/unlearnable": attack("unlearnable", {"epsilon": 0.2}),
    "behaviour/abl": guarded("abl", isolate_until=1, rate=0.1),
    "behaviour/trimmed-loss": guarded("trimmed-loss"),
    "behaviour/knn-filter": guarded("knn-filter", k=3),
    "behaviour/local-dp": guarded("local-dp", noise_multiplier=0.01),
    "behaviour/sparsified": guarded("sparsified", keep=0.2),
    "behaviour/pruned": guarded("pruned"),
    "behaviour/gradient-noise": guarded("gradient-noise", noise="laplace"),
    "behaviour/quantised": guarded("quantised", bits=4),
    "behaviour/soteria": guarded("soteria"),
    "behaviour/label-smoothing": guarded("label-smoothing"),
    "behaviour/adversarial-training": guarded("adversarial-training", steps=2),
    "behaviour/dp-sgd": guarded("dp-sgd", noise_multiplier=1.0),
    "behaviour/dpa": Row({**VOTING, "clients": {"behaviour": "dpa"}}, VOTING),
    "behaviour/badnets": attack("badnets", {"size": 2}),
    "behaviour/blended": attack("blended"),
    "behaviour/sig": attack("sig"),
    "behaviour/wanet": attack("wanet"),
    "behaviour/dba": attack("dba", {"length": 2, "gap": 1}),
    "behaviour/edge-case": attack("edge-case"),
    "behaviour/semantic-backdoor": attack("semantic-backdoor"),
    "behaviour/model-replacement": attack("model-replacement", {"scale": 2.0}),
    "behaviour/constrain-and-scale": attack("constrain-and-scale", {"scale": 2.0}),
    "behaviour/pgd-backdoor": attack("pgd-backdoor", {"radius": 0.5, "relative": True}),
    "behaviour/neurotoxin": attack("neurotoxin"),
    "behaviour/alternating-minimisation": attack("alternating-minimisation", {"turns": 2}),
    "behaviour/chameleon": Row({"attackers": [{"behaviour": "chameleon", "count": 2}], "model": "mlp", **NOISY}, {"model": "mlp", **NOISY}),
    "behaviour/a3fl": attack("a3fl", {"size": 3, "steps": 5}),
    "behaviour/inspecting": Row(merged(PLANTED, {"clients": {"behaviour": "inspecting"}}), PLANTED),
    "behaviour/malformed": attack("malformed"),
    "behaviour/gan-attack": attack("gan-attack", {"steps": 3}, knowledge="coalition"),
    "behaviour/deduplicated": Row(merged(TEXT, {"clients": {"behaviour": {"name": "deduplicated", "span": 15}}}), TEXT),
    "behaviour/walk-away": attack("walk-away"),
    "aggregator/mean": strategy(aggregator="mean", filters=[CLIP]),
    "aggregator/weighted-mean": strategy(aggregator="weighted-mean"),
    "aggregator/dpa": Row({**VOTING, "strategy": {"aggregator": "dpa"}}, VOTING),
    "aggregator/median": strategy(aggregator="median"),
    "aggregator/trimmed-mean": strategy(aggregator="trimmed-mean", assumed_malicious=2),
    "aggregator/krum": strategy(aggregator="krum", assumed_malicious=2),
    "aggregator/multi-krum": strategy(aggregator="multi-krum", assumed_malicious=2),
    "aggregator/bulyan": strategy(aggregator="bulyan", assumed_malicious=1),
    "aggregator/geometric-median": strategy(aggregator="geometric-median"),
    "aggregator/centered-clipping": strategy(aggregator={"name": "centered-clipping", "tau": 0.1}),
    "aggregator/meamed": strategy(aggregator="meamed", assumed_malicious=2),
    "aggregator/mda": strategy(aggregator="mda", assumed_malicious=2),
    "aggregator/rfa": strategy(aggregator="rfa"),
    "aggregator/dnc": strategy(aggregator={"name": "dnc", "dims": 200}, assumed_malicious=2),
    "aggregator/signguard": strategy(aggregator={"name": "signguard", "features": "signs+cosine"}),
    "aggregator/clipped-clustering": strategy(aggregator="clipped-clustering"),
    "aggregator/auror": strategy(aggregator={"name": "auror", "votes": 0.2}),
    "aggregator/fltrust": strategy(aggregator="fltrust", root_samples=20),
    "aggregator/foolsgold": strategy(aggregator="foolsgold"),
    "aggregator/roni": strategy(aggregator={"name": "roni", "measure": "loss"}, root_samples=20),
    "aggregator/flame": strategy(aggregator="flame", assumed_malicious=2),
    "aggregator/deepsight": strategy(aggregator="deepsight"),
    "aggregator/rlr": strategy(aggregator="rlr", assumed_malicious=2),
    "aggregator/flare": Row({"model": "mlp", "strategy": {"aggregator": "flare", "root_samples": 20}, **NOISY}, {"model": "mlp", **NOISY}),
    "aggregator/rflbat": strategy(aggregator="rflbat"),
    "aggregator/flanders": strategy(aggregator="flanders", assumed_malicious=2),
    "aggregator/lasa": strategy(aggregator="lasa"),
    "aggregator/freqfed": strategy(aggregator="freqfed"),
    "aggregator/fldetector": Row(
        {"strategy": {"aggregator": {"name": "fldetector", "window": 1}}, "rounds": 6, **FLIPPED}, {"rounds": 6, **FLIPPED}
    ),
    "aggregator/spectral-signatures": strategy(aggregator="spectral-signatures", assumed_malicious=2),
    "filter/norm-clip": strategy(filters=[CLIP]),
    "filter/arc": strategy(filters=["arc"], assumed_malicious=2),
    "filter/nnm": strategy(filters=["nnm"], assumed_malicious=2),
    "filter/bucketing": Row(
        {"strategy": {"filters": ["bucketing"], "aggregator": "median"}, **NOISY}, {"strategy": {"aggregator": "median"}, **NOISY}
    ),
    "filter/secure-aggregation": strategy(filters=[{"name": "secure-aggregation", "bits": 8, "clip": 1.0}]),
    "filter/distributed-discrete-gaussian": strategy(filters=[{"name": "distributed-discrete-gaussian", "noise_multiplier": 0.1}]),
    "step/gaussian-noise": Row({"strategy": {"filters": [CLIP], "steps": ["gaussian-noise"]}}, {"strategy": {"filters": [CLIP]}}),
    "step/crfl": strategy(steps=["crfl"]),
    "step/fedavgm": strategy(steps=["fedavgm"]),
    "step/fedadagrad": strategy(steps=["fedadagrad"]),
    "step/fedadam": strategy(steps=["fedadam"]),
    "step/fedyogi": strategy(steps=["fedyogi"]),
    "repair/fine-pruning": mended("fine-pruning"),
    "repair/nad": mended({"name": "nad", "epochs": 1, "teacher_epochs": 1}),
    "repair/anp": mended({"name": "anp", "steps": 5, "lr": 10.0, "threshold": 0.9, "tolerance": 1.0}),
    "repair/rnp": mended({"name": "rnp", "recover_steps": 5, "threshold": 1.0, "tolerance": 1.0}),
    "repair/neural-cleanse": mended({"name": "neural-cleanse", "steps": 5, "anomaly": 0.1}),
    "sender/robbing-the-fed": Row(PLANTED, {"model": "mlp"}),
    "sender/fishing": Row(BAITED),
    "sender/gradient-ascent": Row({"malicious_server": {"sender": "gradient-ascent"}}),
    "answer/rounding": Row(merged(TOLD, {"release": {"defences": [{"name": "rounding", "decimals": 1}]}}), TOLD),
    "answer/prediction-poisoning": Row(merged(TOLD, {"release": {"defences": ["prediction-poisoning"]}}), TOLD),
    "answer/output-filter": Row(
        merged({**TEXT, **TOLD}, {"release": {"defences": [{"name": "output-filter", "phrase": "price of"}]}}), {**TEXT, **TOLD}
    ),
    "model/gru": Row({**TEXT, "model": {"name": "gru", "hidden": 8}}, TEXT),
    "model/char-transformer": Row(TEXT, {**TEXT, "model": {"name": "gru", "hidden": 8}}),
    "model/logistic": Row({"model": "logistic"}, {"model": "mlp"}),
    "model/mlp": Row({"model": "mlp"}),
    "model/cnn": Row({"model": "cnn"}),
    "model/cnn-large": Row({"model": "cnn-large", **DIGITS28}, DIGITS28),
    "model/ensemble": Row(VOTING),
    "model/lenet": Row({"model": "lenet"}),
    "model/imprint": Row({"model": {"name": "imprint", "bins": 16}}),
    "model/resnet18": Row({"model": "resnet18", "rounds": 1, "data": {"source": {"limit": 60}}}),
    "loss/cross-entropy": Row({"clients": {"train": {"loss": {"name": "cross-entropy", "label_smoothing": 0.2}}}}),
    "loss/gce": train(loss="gce"),
    "loss/sce": train(loss="sce"),
    "loss/apl": train(loss="apl"),
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
    "source/chronicle": Row(TEXT),
    "partition/natural": Row({"data": {"partition": {"kind": "natural", "alpha": None}}}),
    "partition/iid": Row({"data": {"partition": {"kind": "iid", "alpha": None}}}),
    "partition/dirichlet": Row({"data": {"partition": {"kind": "dirichlet", "alpha": 0.3}}}),
    "partition/pathological": Row({"data": {"partition": {"kind": "pathological", "alpha": None}}}),
    "partition/shards": Row({"data": {"partition": {"kind": "shards", "alpha": None}}}),
    "partition/gamma-similarity": Row({"data": {"partition": {"kind": "gamma-similarity", "alpha": None}}}),
    "partition/quantity-skew": Row({"data": {"partition": {"kind": "quantity-skew"}}}),
    "feature-skew/rotation": Row({"data": {"feature_skew": {"kind": "rotation"}}}),
    "feature-skew/noise": Row({"data": {"feature_skew": {"kind": "noise"}}}),
    "feature-skew/contrast": Row({"data": {"feature_skew": {"kind": "contrast"}}}),
    "feature-skew/property": Row({"data": {"feature_skew": {"kind": "property"}}}),
    "probe/released-accuracy": Row({"probes": ["released-accuracy"]}),
    "probe/perplexity": Row({**TEXT, "probes": ["perplexity"]}),
    "probe/canary-exposure": Row({**TEXT, "probes": ["canary-exposure"]}),
    "probe/canary-extraction": Row({**TEXT, "probes": [{"name": "canary-extraction", "sure": 0.0, "roundabout": ["code of {name} is "]}]}),
    "probe/equation-solving": Row({"probes": ["equation-solving"]}),
    "probe/jacobian-augmentation": Row({"probes": ["jacobian-augmentation"]}),
    "probe/fgsm": Row({"probes": ["fgsm"]}),
    "probe/pgd": Row({"probes": [{"name": "pgd", "steps": 3}]}),
    "probe/knockoff": Row({"probes": [{"name": "knockoff", "strategy": "adaptive"}]}),
    "probe/accuracy": Row({"probes": ["accuracy"]}),
    "probe/loss": Row({"probes": ["loss"]}),
    "probe/recall": Row({"probes": ["recall"]}),
    "probe/client-accuracy": Row({"probes": ["client-accuracy"]}),
    "probe/attack-success": Row({"probes": ["attack-success"], "attackers": [{"behaviour": "label-flip", "count": 2}]}),
    "probe/dpa-certificate": Row({**VOTING, "probes": ["dpa-certificate"]}),
    "probe/crfl-certificate": Row({"probes": ["accuracy", {"name": "crfl-certificate", "draws": 200}], "strategy": {"steps": ["crfl"]}}),
    "probe/loss-threshold": Row({"probes": ["loss-threshold"]}),
    "probe/lira": Row({"probes": [{"name": "lira", "mode": "online", "models": 4, "epochs": 1}]}),
    "probe/rmia": Row({"probes": [{"name": "rmia", "models": 2, "epochs": 1}]}),
    "probe/gradient-membership": Row({"probes": ["gradient-membership"]}),
    "probe/active-membership": Row({"probes": ["active-membership"], "malicious_server": {"sender": "gradient-ascent"}}),
    "probe/property-inference": Row(
        {
            "data": {"feature_skew": {"kind": "property", "what": "framed"}},
            "probes": [{"name": "property-inference", "what": "framed", "at_round": 2, "clients": 8}],
        }
    ),
    "probe/detection": Row(
        {
            "probes": ["detection"],
            "attackers": [{"behaviour": "sign-flip", "count": 2}],
            "strategy": {"aggregator": "krum", "assumed_malicious": 2},
        }
    ),
    "probe/reward-share": Row(
        {
            "probes": ["reward-share"],
            "attackers": [{"behaviour": "sign-flip", "count": 2}],
            "strategy": {"aggregator": "geometric-median"},
        }
    ),
    "probe/rare-clients": Row(
        {
            "probes": ["rare-clients"],
            "attackers": [{"behaviour": "sign-flip", "count": 2}],
            "strategy": {"aggregator": "geometric-median"},
        }
    ),
    "probe/durability": Row(
        {
            "rounds": 4,
            "probes": ["attack-success", "durability"],
            "attackers": [{"behaviour": "badnets", "count": 2, "rounds": [1, 2]}],
        }
    ),
    "probe/dlg": inverted("dlg", clients=1, iterations=20, restarts=1),
    "probe/idlg": inverted("idlg", clients=1, iterations=20, restarts=1),
    "probe/inverting-gradients": inverted("inverting-gradients", clients=1, iterations=20, restarts=1),
    "probe/inversion-frontier": inverted("inversion-frontier", draws=1, iterations=5, batches=[1, 2], steps=[2], noises=[0.1]),
    "probe/r-gap": inverted("r-gap", clients=1),
    "probe/label-recovery": inverted("label-recovery"),
    "probe/analytic-inversion": inverted("analytic-inversion", "mlp"),
    "probe/robbing-the-fed-readout": Row({**PLANTED, "probes": [{"name": "robbing-the-fed-readout", "at_round": 2}]}),
    "probe/fishing-readout": Row({**BAITED, "probes": [{"name": "fishing-readout", "target": 1, "at_round": 2}]}),
    "probe/trigger-examples": Row({"probes": ["trigger-examples"], "attackers": [{"behaviour": "badnets", "count": 2}]}),
}
#: Sources whose files are not embedded, and how the reader's own tests write small ones in the real format.
FILES = ("mnist", "fashion-mnist", "emnist", "cifar10", "cifar100", "svhn")

ALL = sorted(ROWS)
#: What leaves the model as it is: who measures it, who answers for it, and clients who only watch.
UNTOUCHED = [row for row in ALL if row.startswith(("probe/", "answer/"))] + ["behaviour/walk-away"]
TRAINED = [row for row in ALL if row not in UNTOUCHED]


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


@pytest.mark.slow  # every row twice more; the engines' own tests compare bits in every `make test`
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


@pytest.mark.parametrize("name", [n for n in UNTOUCHED if not n.startswith("probe/")])
def test_it_leaves_the_model_and_changes_what_is_found(name: str) -> None:
    row = ROWS[name]
    changed, before = played(row.changes), played(row.against)
    for key, value in before[1].items():
        torch.testing.assert_close(changed[1][key], value, atol=1e-6, rtol=1e-5)  # rows that are looked at are not added up by workers
    now, then = changed[2][-1]["metrics"], before[2][-1]["metrics"]
    assert now.keys() != then.keys() or max(abs(now[key] - then[key]) for key in now) > 1e-3, f"{name} is a silent no-op"


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
    if kind in ("behaviour", "loss", "optimiser", "aggregator", "filter", "step", "repair") and component not in ("mean",):
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
