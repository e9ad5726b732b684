"""What a run makes of devices: the same bits wherever it is played and however often it is killed, and records that say what happened."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fedtrust.client import Behaviour, View
from fedtrust.engine import seeds
from fedtrust.engine.prepare import local_steps
from fedtrust.listener import SilentListener
from fedtrust.registry import REGISTRY
from fedtrust.runner import resume, run
from fedtrust.scenario import Scenario

Small = Callable[..., Scenario]
HARD: dict[str, Any] = {
    "speed": {"median": 20.0, "sigma": 0.8, "jitter": 0.3},
    "bandwidth": {"median": 5000.0, "sigma": 0.5},
    "availability": {"mean": 0.7, "amplitude": 0.25, "period": 30, "unit": "seconds"},
    "dropout": 0.15,
    "deadline": 4.0,
    "late": "partial",
    "over_select": 0.4,
}


def lines(folder: Path, name: str = "rounds.jsonl") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in found]


def hard(small: Small, system: dict[str, Any] = HARD, **changes: Any) -> Scenario:
    clients = {"count": 16, "per_round": 6, "quorum": 0.3, "train": {"epochs": 2, "batch_size": 8}, "system": system}
    return small(**{"rounds": 8, "clients": clients, "attackers": [{"behaviour": "sign-flip", "count": 3}]} | changes)


def test_a_world_without_trouble_has_the_bits_of_one_without_devices(small: Small, tmp_path: Path) -> None:
    plain = run(small(clients={"per_round": 5}), tmp_path / "a", engine="local")
    easy = run(small(clients={"per_round": 5, "system": {"speed": 10.0, "deadline": 1e9}}), tmp_path / "b", engine="local")
    assert easy.summary["model_sha256"] == plain.summary["model_sha256"]
    for name in ("rounds.jsonl", "clients.jsonl"):
        for one, two in zip(lines(tmp_path / "a", name), lines(tmp_path / "b", name), strict=True):
            assert one.items() <= two.items()
    assert "virtual_seconds" not in plain.summary
    assert easy.summary["virtual_seconds"] > 0
    # and the cohort is McMahan's uniform draw from the stream of its name
    drawn = seeds.stream(3, "cohort", 1).choice(8, size=5, replace=False)
    assert lines(tmp_path / "a")[1]["cohort"] == sorted(drawn.tolist())


class StopAfter(SilentListener):
    """Interrupt the run once a round has been recorded."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round_done(self, name: str, record: Any) -> None:
        if record["round"] == self.number:
            raise KeyboardInterrupt


@pytest.mark.parametrize("number", [0, 3, 7])
def test_the_clock_survives_an_interruption(small: Small, tmp_path: Path, number: int) -> None:
    """Availability follows the clock here, so a clock that started again would give other cohorts."""
    whole = run(hard(small), tmp_path / "whole", engine="local")
    assert run(hard(small), tmp_path / "b", engine="local", listener=StopAfter(number)).status == "interrupted"
    done = resume(tmp_path / "b", engine="local")
    assert done.summary["model_sha256"] == whole.summary["model_sha256"]
    for name in ("rounds.jsonl", "clients.jsonl"):
        assert lines(tmp_path / "b", name) == lines(tmp_path / "whole", name)
    rounds = lines(tmp_path / "b")
    clocks = [r["clock"] for r in rounds]
    assert clocks[0] == 0.0
    for before, after in itertools.pairwise(rounds):
        assert after["duration"] > 0
        assert after["clock"] == round(before["clock"] + after["duration"], 6)
    assert done.summary["virtual_seconds"] == clocks[-1]


@pytest.mark.filterwarnings("ignore")  # Ray's own sockets and deprecations
@pytest.mark.parametrize(
    ("aggregator", "places"),
    [pytest.param("mean", [("local", 1), ("ray", 2)], marks=pytest.mark.slow), ("median", [("local", 1), ("local", 3)])],
)
def test_any_engine_and_any_number_of_workers_give_the_same_bits(small: Small, tmp_path: Path, aggregator: str, places: Any) -> None:
    found = []
    for engine, count in places:
        folder = tmp_path / f"{engine}{count}"
        result = run(hard(small, strategy={"aggregator": aggregator}), folder, engine=engine, workers=count)
        assert result.summary["fates"]["partial"] > 0 < result.summary["fates"]["dropped-out"]
        found.append((result.summary["model_sha256"], lines(folder), lines(folder, "clients.jsonl")))
    assert found[0] == found[1]


@pytest.mark.parametrize("late", ["partial", "late"])
def test_what_the_records_say(small: Small, out: Path, late: str) -> None:
    system = {**HARD, "late": "drop" if late == "late" else "partial"}
    result = run(hard(small, system), out, engine="local")
    rounds, clients = lines(out)[1:], lines(out, "clients.jsonl")
    seen: Counter[str] = Counter()
    for record in rounds:
        rows = {r["client"]: r for r in clients if r["round"] == record["round"]}
        assert sorted(rows) == record["cohort"]
        assert len(record["cohort"]) <= 9  # 6 wanted, 40 % more asked
        assert record["reachable"] == 16 - len(record["unreachable"])
        assert not set(record["unreachable"]) & set(record["cohort"])
        assert record["quorum"] == max(1, math.ceil(0.3 * min(6, len(record["cohort"]))))
        assert record["duration"] <= 4.0
        for client, row in rows.items():
            seen[row["fate"]] += 1
            assert (row["fault"] is None) == (row["fate"] in ("replied", "partial")) == (str(client) not in record["faults"])
            assert (row["norm"] is None) == (row["fault"] is not None) == (row["steps"] == 0)
            whole = local_steps(row["examples"], 8, 2)
            assert row["fate"] != "replied" or row["steps"] == whole
            assert row["fate"] != "partial" or (1 <= row["steps"] < whole and row["virtual_seconds"] <= 4.0)
            if row["fate"] != "replied":
                assert client in record["fates"][row["fate"]]
    assert seen.keys() == {"replied", late, "dropped-out", "surplus"}
    assert {k: n for k, n in result.summary["fates"].items() if n} == {"asked": sum(seen.values()), **seen}
    assert result.summary["warnings"] == []  # what was asked for is no warning


def test_a_night_does_not_count_and_does_not_end_the_run(small: Small, out: Path) -> None:
    system = {"availability": {"mean": 0.5, "amplitude": 0.5, "period": 400, "unit": "seconds", "spread": 0}, "speed": 1.0, "idle": 100.0}
    result = run(small(rounds=14, clients={"count": 3, "system": system}), out, engine="local")
    rounds = lines(out)[1:]
    empty = [r for r in rounds if not r["cohort"]]
    assert 0 < len(empty) < 14
    assert all((r["counted"], r["why"], r["valid"], r["duration"]) == (False, "nobody could be reached", 0, 100.0) for r in empty)
    assert any(r["counted"] for r in rounds[rounds.index(empty[0]) :])  # morning comes
    assert result.status == "failed"
    assert result.why.endswith(f"(first: round {empty[0]['round']}: nobody could be reached)")


def test_the_quorum_counts_those_who_left(small: Small, out: Path) -> None:
    result = run(small(rounds=6, clients={"count": 8, "quorum": 0.75, "system": {"dropout": 0.45}}), out, engine="local")
    rounds = lines(out)[1:]
    assert {r["quorum"] for r in rounds} == {6}  # of the 8 that were asked, whoever left
    assert {r["counted"] for r in rounds} == {r["valid"] >= 6 for r in rounds}
    missed = next(r for r in rounds if not r["counted"])
    assert missed["why"] == f"{missed['valid']} valid replies of 8, quorum 6"
    assert missed["delta_norm"] == 0.0
    assert result.status == "failed"


@pytest.mark.parametrize("aggregator", ["mean", "median", "flwr:FedAvg"])
def test_rounds_in_which_everybody_leaves(small: Small, out: Path, aggregator: str) -> None:
    clients = {"count": 3, "system": {"dropout": 0.9, "speed": 10.0}}
    result = run(small(rounds=6, clients=clients, strategy={"aggregator": aggregator}), out, engine="local")
    rounds = lines(out)
    alone = [r for r in rounds[1:] if len(r["fates"]["dropped-out"]) == 3]
    assert alone
    assert all((r["counted"], r["why"]) == (False, "0 valid replies of 3, quorum 2") for r in alone)
    assert all(r["duration"] > 0 for r in alone)  # until the last connection broke
    assert result.status == "failed"


@pytest.mark.parametrize("aggregator", ["krum", "flwr:Krum"])
def test_too_few_reachable_for_the_rule_is_no_crash(small: Small, out: Path, aggregator: str) -> None:
    strategy = {"aggregator": aggregator, "assumed_malicious": 2}
    clients = {"count": 20, "per_round": 7, "quorum": 0.1, "system": {"availability": 0.3}}
    result = run(small(rounds=8, clients=clients, strategy=strategy), out, engine="local")
    rounds = lines(out)[1:]
    assert min(len(r["cohort"]) for r in rounds) < 7 == max(len(r["cohort"]) for r in rounds)
    assert len(rounds) == 8
    if aggregator == "krum":
        assert [r["counted"] for r in rounds] == [len(r["cohort"]) == 7 for r in rounds]
        assert "are too few" in result.why


def test_a_stock_strategy_sees_the_same_replies(small: Small, tmp_path: Path) -> None:
    models = []
    for name in ("flwr:FedAvg", "weighted-mean"):
        folder = tmp_path / name.replace(":", "-")
        result = run(hard(small, strategy={"aggregator": name}), folder, engine="local")
        models.append(lines(folder)[-1]["metrics"]["accuracy"])
        assert result.summary["fates"]["partial"] > 0
    assert models[0] == pytest.approx(models[1], abs=0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts(Behaviour):
    """Remember how often it crafted, and how large its coalition was."""

    def remember(self, size: int) -> dict[str, Tensor]:
        return {"sent": torch.zeros(20)}

    def craft(self, updates: Tensor, view: View) -> Tensor:
        view.memory["sent"] = view.memory["sent"].clone()
        for member in view.coalition:
            view.memory["sent"][member] += 1
        return updates


def test_an_attacker_that_is_not_there_attacks_nothing(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))
    REGISTRY.add("behaviour", "counts", Counts, role="malicious", knowledge="coalition", paper="")
    run(hard(small, attackers=[{"behaviour": "counts", "count": 4}]), tmp_path / "a", engine="local")
    rows = [r for r in lines(tmp_path / "a", "clients.jsonl") if r["malicious"]]
    there = Counter(r["client"] for r in rows if r["fault"] is None)
    assert len(rows) > sum(there.values()) > 0
    with safe_open(str(tmp_path / "a" / "checkpoint.safetensors"), framework="pt") as file:
        key = next(k for k in file.keys() if k.startswith("memory") and k.split("\x1f")[1] == "0")  # noqa: SIM118
        sent = file.get_tensor(key)
    assert {c: int(n) for c, n in enumerate(sent) if n} == dict(there)
