"""Ray workers: the same bits as this process, whatever their number, and a dead worker costs nothing but time."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtrust.engine import workers
from fedtrust.engine.cohort import Chunk, ClientTask
from fedtrust.engine.workers import RayExecutor
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY
from fedtrust.runner import run
from fedtrust.scenario import Scenario, load
from fedtrust.setup import build

Small = Callable[..., Scenario]
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own sockets and deprecations


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for the module: starting it takes longer than the tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = RayExecutor(2)
    yield
    first.close()


def test_any_engine_and_any_number_of_workers_give_the_same_bits(small: Small, tmp_path: Path) -> None:
    scenario = small(
        model="cnn",
        clients={"count": 12, "per_round": 9, "train": {"momentum": 0.9}},
        attackers=[{"behaviour": "label-flip", "count": 2}, {"behaviour": "sign-flip", "count": 1, "knowledge": "coalition"}],
        strategy={"aggregator": "multi-krum", "assumed_malicious": 3, "steps": ["fedadam"]},
    )
    digests = {}
    for engine, count in (("local", 1), ("local", 2), ("local", 3), ("ray", 1), ("ray", 2)):
        result = run(scenario, tmp_path / f"{engine}{count}", engine=engine, workers=count)
        assert result.status == "finished"
        assert json.loads((tmp_path / f"{engine}{count}" / "environment.json").read_text())["engine"].startswith(f"{engine}, {count}")
        digests[engine, count] = result.summary["model_sha256"]
    assert len(set(digests.values())) == 1, digests


PLUGIN = '''
from __future__ import annotations
import torch
from fedtrust.client import Behaviour, behaviour
from fedtrust.server import Verdict, aggregator


@behaviour("ipm")
class InnerProduct(Behaviour):
    """Send -tau times the mean of the updates in view (Xie et al., UAI 2019, section 3)."""
    tau: float = 2.0

    def poison(self, x, y, view):
        return x.flip(-1), y

    def loss(self, predict, x, y, view):
        return view.criterion(predict(x), y) + 0.001 * predict.params.square().sum()

    def craft(self, updates, view):
        seen = updates if view.others is None else view.others
        return (-self.tau * seen.mean(0)).expand_as(updates)


@aggregator("norm-median")
def norm_median(updates, ctx, *, scale: float = 1.0):
    """Clip each update to `scale` times the median norm, then average."""
    norms = updates.norm(dim=1, keepdim=True).clamp(min=1e-12)
    factor = (scale * norms.median() / norms).clamp(max=1)
    return Verdict((factor * updates).mean(0), trust=factor.squeeze(1))
'''

SCENARIO = """
title = "a student's attack against a student's defence"
rounds = 2
[data]
source = { name = "digits", limit = 300 }
[model]
name = "logistic"
[clients]
count = 8
[[attackers]]
behaviour = "students:InnerProduct"
count = 2
knowledge = "omniscient"
params = { tau = 3.0 }
[strategy]
aggregator = { name = "students:norm-median", scale = 1.5 }
"""


def test_code_from_a_loose_file_runs_on_both_engines(tmp_path: Path) -> None:
    """DESIGN's two student examples (the attack given a data and a loss hook as well, so that workers run its code)."""
    (tmp_path / "students.py").write_text(PLUGIN)
    (tmp_path / "scenario.toml").write_text(SCENARIO)
    scenario = load(tmp_path / "scenario.toml", allow_plugins=["students"])
    results = {e: run(scenario, tmp_path / e, engine=e, workers=2) for e in ("local", "ray")}
    assert [r.status for r in results.values()] == ["finished"] * 2
    assert results["local"].summary["model_sha256"] == results["ray"].summary["model_sha256"]
    assert not [f for r in (tmp_path / "ray" / "rounds.jsonl").read_text().splitlines() for f in json.loads(r).get("faults", {})]
    assert results["ray"].summary["threats"][0]["knowledge"] == "omniscient"
    assert (tmp_path / "ray" / "students.py").read_text() == PLUGIN  # the code is part of what was run


DEADLY = '''
import os, time
from fedtrust.client import Behaviour, behaviour


@behaviour("deadly")
class Deadly(Behaviour):
    """Take the worker down, or never come back."""
    flag: str = ""
    how: str = "exit"

    def poison(self, x, y, view):
        if self.how == "hang":
            time.sleep(600)
        elif self.how == "always" or not os.path.exists(self.flag):
            open(self.flag, "w").close()
            os._exit(1)
        return x, y
'''


def deadly(tmp_path: Path, how: str) -> Scenario:
    (tmp_path / "deadly.py").write_text(DEADLY)
    params = f'{{ flag = "{tmp_path / "flag"}", how = "{how}" }}'
    text = SCENARIO.replace('"students:InnerProduct"', '"deadly:Deadly"').replace("{ tau = 3.0 }", params)
    text = text.replace('{ name = "students:norm-median", scale = 1.5 }', '"mean"').replace("rounds = 2", "rounds = 1")
    (tmp_path / "scenario.toml").write_text(text)
    return load(tmp_path / "scenario.toml", allow_plugins=["deadly"])


def test_a_dead_worker_is_replaced_and_its_clients_tried_again(tmp_path: Path) -> None:
    result = run(deadly(tmp_path, "once"), tmp_path / "out", engine="ray", workers=2)
    record = json.loads((tmp_path / "out" / "rounds.jsonl").read_text().splitlines()[1])
    assert (tmp_path / "flag").exists()
    assert (result.status, record["valid"], record["faults"]) == ("finished", 8, {})


def test_who_kills_every_worker_is_dropped_by_name(tmp_path: Path) -> None:
    result = run(deadly(tmp_path, "always"), tmp_path / "out", engine="ray", workers=2)
    record = json.loads((tmp_path / "out" / "rounds.jsonl").read_text().splitlines()[1])
    malicious = {str(c) for c in result.summary["federation"]["malicious"]}
    assert malicious <= set(record["faults"])
    assert all("the worker failed" in reason for reason in record["faults"].values())


def test_a_worker_past_its_deadline_is_given_up(small: Small, tmp_path: Path) -> None:
    scenario = deadly(tmp_path, "hang")
    setup = build(scenario)
    executor = RayExecutor(1, deadline=3.0, retries=0)
    executor._deadline = 60.0
    executor.open(setup.world)
    executor._deadline = 3.0
    hang, honest = setup.roster.groups[0].behaviour, REGISTRY.make("behaviour", "honest")
    chunks = [Chunk(1, setup.params, {}, (ClientTask(c, b, {}),)) for c, b in ((0, hang), (1, honest))]
    began = time.monotonic()
    results = executor.run(chunks[:1])
    assert time.monotonic() - began < 20
    assert "no answer within 3 s" in results[0].faults[0]
    executor._deadline = 60.0
    assert executor.run(chunks[1:])[0].clients == (1,)  # full capacity is back
    executor.close()


def test_a_worker_that_is_shot_costs_only_time(small: Small, tmp_path: Path) -> None:
    setup = build(small())
    executor = RayExecutor(1)
    executor.open(setup.world)
    import ray

    chunk = Chunk(1, setup.params, {}, tuple(ClientTask(c, setup.roster.honest, {}) for c in range(3)))
    before = executor.run([chunk])[0].updates
    pid = ray.get(executor._actors[0].pid.remote())
    os.kill(pid, signal.SIGKILL)
    after = executor.run([chunk])[0]
    executor.close()
    assert not after.faults
    assert bool((before == after.updates).all())


@pytest.mark.parametrize(("engine", "count", "message"), [("spark", 1, "unknown engine"), ("local", 0, "at least one worker")])
def test_engines_that_do_not_exist(engine: str, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        workers.make(engine, count, None, 1.0, 0)


def test_a_cluster_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="nothing answers at 127"):
        workers._reachable("127.0.0.1:1")
    workers._reachable("auto")
    with pytest.raises(InputError, match="goes with --engine ray"):
        workers.make("local", 1, "127.0.0.1:1", 1.0, 0)


def test_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def pick(**changes: Any) -> tuple[str, str]:
        return workers.pick("auto", changes.get("clients", 10), changes.get("address"))

    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(workers.threads, "cores", lambda: 2)
    assert pick()[0] == "local"
    assert pick(address="auto")[0] == "ray"
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 4)
    assert pick() == ("ray", "4 GPUs: one worker each")
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(workers.threads, "cores", lambda: 64)
    assert pick(clients=1000)[0] == "ray"
    assert pick(clients=10)[0] == "local"
