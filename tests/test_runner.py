"""The round loop: what is recorded, what a kill costs (nothing), what a fault costs (one client-round), how a run may end."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedtrust import runs
from fedtrust.client import Behaviour, View
from fedtrust.errors import InputError, RunError
from fedtrust.listener import SilentListener
from fedtrust.probes.base import ProbeContext
from fedtrust.registry import REGISTRY
from fedtrust.runner import resume, run
from fedtrust.runs import RunDirectory
from fedtrust.scenario import Scenario
from fedtrust.server import AggContext

Small = Callable[..., Scenario]

#: State in every place that a resume has to bring back: server steps, a clip, attackers, a sampled cohort.
STATEFUL: dict[str, Any] = {
    "rounds": 6,
    "clients": {"per_round": 5, "train": {"momentum": 0.9}},
    "attackers": [{"behaviour": "sign-flip", "count": 2}],
    "strategy": {"filters": ["norm-clip"], "aggregator": "trimmed-mean", "steps": ["fedadam"], "assumed_malicious": 1},
}


def lines(folder: Path, name: str = "rounds.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_what_a_run_leaves(small: Small, out: Path) -> None:
    scenario = small(**STATEFUL, probes=["accuracy", "detection"])
    result = run(scenario, out, engine="local")
    assert result.status == "finished"
    names = {p.name for p in out.iterdir()}
    assert names >= {
        "scenario.toml", "environment.json", "status.json", "rounds.jsonl", "clients.jsonl", "checkpoint.safetensors",
        "model.safetensors", "summary.json",
    }  # fmt: skip
    rounds, clients = lines(out), lines(out, "clients.jsonl")
    assert [r["round"] for r in rounds] == list(range(7))
    assert len(clients) == 6 * 5
    malicious = set(result.summary["federation"]["malicious"])
    assert len(malicious) == 2
    for record in rounds[1:]:
        assert record["counted"]
        assert len(record["cohort"]) == 5
        rows = [c for c in clients if c["round"] == record["round"]]
        assert [c["client"] for c in rows] == record["cohort"] == sorted(record["cohort"])
        assert {c["client"] for c in rows if c["malicious"]} == malicious & set(record["cohort"])
        assert all(0 <= c["trust"] <= 1 and c["norm"] > 0 for c in rows)
        assert record["train_loss"] == pytest.approx(sum(c["loss"] for c in rows) / 5)
    assert len({tuple(r["cohort"]) for r in rounds[1:]}) > 1
    card = result.summary["threats"][0]
    assert (card["knowledge"], card["capability"], card["share"]) == ("own", ["update"], 0.25)
    assert set(card["clients"]) == malicious
    model = load_file(out / "model.safetensors")
    assert sum(v.numel() for v in model.values()) == 650
    assert json.loads((out / "status.json").read_text()) == {"status": "finished", "why": ""}


class StopAfter(SilentListener):
    """Interrupt the run as Ctrl-C does, once a round has been recorded."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round_done(self, name: str, record: Any) -> None:
        if record["round"] == self.number:
            raise KeyboardInterrupt


@pytest.mark.parametrize("number", [0, 1, 5])
def test_an_interrupted_run_resumes_to_the_same_bits(small: Small, tmp_path: Path, number: int) -> None:
    scenario = small(**STATEFUL)
    whole = run(scenario, tmp_path / "whole", engine="local")
    stopped = run(scenario, tmp_path / "stopped", engine="local", listener=StopAfter(number))
    assert stopped.status == "interrupted"
    assert json.loads((tmp_path / "stopped" / "status.json").read_text())["status"] == "interrupted"
    with (tmp_path / "stopped" / "rounds.jsonl").open("a") as file:
        file.write('{"half a li')  # a kill in the middle of a write
    done = resume(tmp_path / "stopped", engine="local")
    assert done.status == "finished"
    assert done.summary["model_sha256"] == whole.summary["model_sha256"]
    assert without_times(lines(tmp_path / "stopped")) == without_times(lines(tmp_path / "whole"))
    assert lines(tmp_path / "stopped", "clients.jsonl") == lines(tmp_path / "whole", "clients.jsonl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grows(Behaviour):
    """Scale the update by the number of rounds it remembers."""

    def remember(self, size: int) -> dict[str, Tensor]:
        return {"rounds": torch.zeros(())}

    def craft(self, updates: Tensor, view: View) -> Tensor:
        view.memory["rounds"] = view.memory["rounds"] + 1
        return updates * view.memory["rounds"]


def test_what_clients_remember_survives(small: Small, tmp_path: Path, registered: Callable[..., None]) -> None:
    registered("behaviour", "grows", Grows, role="malicious", knowledge="own")
    scenario = small(rounds=4, attackers=[{"behaviour": "grows", "count": 2}])
    whole = run(scenario, tmp_path / "a", engine="local")
    run(scenario, tmp_path / "b", engine="local", listener=StopAfter(2))
    assert resume(tmp_path / "b", engine="local").summary["model_sha256"] == whole.summary["model_sha256"]
    norms = [c["norm"] for c in lines(tmp_path / "b", "clients.jsonl") if c["malicious"]]
    assert min(norms[-2:]) > 2 * max(norms[:2])


def start(scenario: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedtrust", "run", str(scenario), "--out", str(out), "--engine", "local", "--plain"]
    # The tests may run where SIGINT is ignored (nohup make test &), and a child would inherit that.
    listens = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, preexec_fn=listens)


def wait_for_round(out: Path, number: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if (out / "rounds.jsonl").exists() and (out / "rounds.jsonl").read_text().count("\n") > number:
            return
        time.sleep(0.01)
    raise AssertionError(f"no round {number}; exit code {process.poll()}")


@pytest.mark.parametrize("how", [signal.SIGKILL, *(pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGTERM, signal.SIGINT))])
def test_killed_in_the_middle(small: Small, tmp_path: Path, how: signal.Signals) -> None:
    """kill -9 at any time, and --resume, gives the bits of an undisturbed run; a polite signal is obeyed within five seconds."""
    scenario = small(**STATEFUL | {"rounds": 40})
    file = tmp_path / "scenario.toml"
    file.write_text(scenario.resolved_toml())
    whole = run(scenario, tmp_path / "whole", engine="local")
    process = start(file, tmp_path / "killed")
    wait_for_round(tmp_path / "killed", 5, process)
    process.send_signal(how)
    code = process.wait(timeout=30)
    assert code == (-9 if how == signal.SIGKILL else 130)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    done = resume(tmp_path / "killed", engine="local")
    assert done.summary["model_sha256"] == whole.summary["model_sha256"]
    assert without_times(lines(tmp_path / "killed")) == without_times(lines(tmp_path / "whole"))


FAILPOINTS = ["write", "fsync", "replace"]


@pytest.mark.parametrize("point", FAILPOINTS)
def test_a_checkpoint_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    path = tmp_path / "file"
    runs.write_atomic(path, b"old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"write": (Path, "open"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[point], full)
    with pytest.raises(RunError, match="No space left"):
        runs.write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"


def test_a_full_disk_ends_the_run_with_its_reason(small: Small, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RunDirectory, checkpoint: object) -> None:
        raise RunError("cannot write checkpoint.safetensors: No space left on device")

    monkeypatch.setattr(RunDirectory, "save", full)
    with pytest.raises(RunError, match="No space left"):
        run(small(), out, engine="local")
    assert json.loads((out / "status.json").read_text())["status"] == "failed"


def test_folders_are_never_overwritten(small: Small, out: Path) -> None:
    run(small(), out, engine="local")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(InputError, match="not empty"):
        run(small(seed=4), out, engine="local")
    with pytest.raises(InputError, match="finished; there is nothing to resume"):
        resume(out, engine="local")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("damage", ["truncate", "garbage", "records"])
def test_a_damaged_run_is_not_resumed(small: Small, out: Path, damage: str) -> None:
    run(small(**STATEFUL), out, engine="local", listener=StopAfter(3))
    checkpoint = out / "checkpoint.safetensors"
    if damage == "records":
        (out / "rounds.jsonl").write_text("")
    else:
        checkpoint.write_bytes(checkpoint.read_bytes()[:100] if damage == "truncate" else b"\0" * 100)
    with pytest.raises(InputError, match="is damaged"):
        resume(out, engine="local")


def test_resuming_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        resume(tmp_path, engine="local")


def test_a_stock_strategy_with_a_memory_is_not_resumed(small: Small, out: Path) -> None:
    run(small(strategy={"aggregator": "flwr:FedAdam"}), out, engine="local", listener=StopAfter(1))
    with pytest.raises(InputError, match="keeps state between rounds"):
        resume(out, engine="local")


def test_a_stock_strategy_without_one_is(small: Small, tmp_path: Path) -> None:
    scenario = small(strategy={"aggregator": "flwr:Krum", "assumed_malicious": 2})
    whole = run(scenario, tmp_path / "a", engine="local")
    run(scenario, tmp_path / "b", engine="local", listener=StopAfter(1))
    assert resume(tmp_path / "b", engine="local").summary["model_sha256"] == whole.summary["model_sha256"]


FAULTS = {
    "nan": "NaN in the update",
    "inf": "infinite value",
    "wrong-shape": "has shape",
    "scalar": "has shape [1]",
    "missing-key": "is missing",
    "extra-key": "unknown parameter 'backdoor'",
    "permuted-keys": "another order",
    "float64": "float64, expected float32",
    "huge-weight": "claims 1e+12 examples",
    "negative-weight": "claims -1 examples",
    "no-reply": "no reply",
    "error": "the client fell over",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_client_costs_its_round_by_name(small: Small, tmp_path: Path, fault: str) -> None:
    """The others' model is what it would be without that client, and the records say who was dropped and why."""
    broken = small(attackers=[{"behaviour": "malformed", "ids": [2], "params": {"fault": fault}}], strategy={"aggregator": "weighted-mean"})
    result = run(broken, tmp_path / "a", engine="local")
    assert result.status == "finished"
    for record in lines(tmp_path / "a")[1:]:
        assert record["valid"] == 7
        assert list(record["faults"]) == ["2"]
        assert FAULTS[fault] in record["faults"]["2"]
    dropped = [c for c in lines(tmp_path / "a", "clients.jsonl") if c["fault"]]
    assert {c["client"] for c in dropped} == {2}
    assert result.summary["warnings"]
    assert result.summary["model_sha256"] == _without_client_two(small, tmp_path)


def _without_client_two(small: Small, tmp_path: Path) -> str:
    other = small(
        attackers=[{"behaviour": "malformed", "ids": [2], "params": {"fault": "no-reply"}}], strategy={"aggregator": "weighted-mean"}
    )
    return str(run(other, tmp_path / "b", engine="local").summary["model_sha256"])


def test_a_missed_quorum_is_no_success(small: Small, out: Path) -> None:
    """Rounds that miss their quorum leave the model alone, the run goes on, and does not end well."""
    scenario = small(
        rounds=3,
        clients={"quorum": 0.75},
        attackers=[{"behaviour": "malformed", "count": 3, "rounds": [2, 2]}],
    )
    result = run(scenario, out, engine="local")
    assert result.status == "failed"
    assert "1 of 3 rounds did not count (first: round 2: 5 valid replies of 8, quorum 6)" in result.why
    rounds = lines(out)
    assert [r["counted"] for r in rounds] == [True, True, False, True]
    assert rounds[2]["delta_norm"] == 0.0
    assert rounds[2]["metrics"] == rounds[1]["metrics"]
    assert rounds[3]["delta_norm"] > 0
    assert result.summary["rounds_counted"] == 2


def test_too_few_replies_for_the_rule_is_a_missed_round(small: Small, out: Path) -> None:
    """Krum with n ≥ 2f + 3 fits the cohort, but not what is left of it."""
    scenario = small(
        strategy={"aggregator": "krum", "assumed_malicious": 2},
        attackers=[{"behaviour": "malformed", "count": 2, "rounds": [1, 1]}],
    )
    result = run(scenario, out, engine="local")
    assert result.status == "failed"
    assert "too few" in result.why
    assert "n ≥ 2f + 3" in result.why


def test_a_failing_rule_fails_the_run(small: Small, out: Path, registered: Callable[..., None]) -> None:
    def explode(updates: torch.Tensor, ctx: AggContext) -> torch.Tensor:
        return updates.mean(0) / 0

    registered("aggregator", "explode", explode)
    with pytest.raises(RunError, match=r"aggregator 'explode' returned a value that is not finite"):
        run(small(strategy={"aggregator": "explode"}), out, engine="local")
    assert json.loads((out / "status.json").read_text())["status"] == "failed"


def test_a_failing_probe_is_named(small: Small, out: Path, registered: Callable[..., None]) -> None:
    def peek(ctx: ProbeContext) -> dict[str, float]:
        return {"test": float(len(ctx.test[0]))} if ctx.test else {"x": 1 / 0}

    registered("probe", "peek", peek, role="user", when="round")
    with pytest.raises(RunError, match=r"probe 'peek' failed in round 0: ZeroDivisionError"):  # a user sees no test samples
        run(small(probes=["peek"]), out, engine="local")


def test_probes_share_the_models_output_but_not_their_randomness(small: Small, out: Path, registered: Callable[..., None]) -> None:
    seen: dict[str, list[Any]] = {"a": [], "b": []}

    def looking(name: str) -> Callable[[ProbeContext], dict[str, float]]:
        def look(ctx: ProbeContext) -> dict[str, float]:
            seen[name].append((ctx.test_output, float(torch.rand((), generator=ctx.rng))))
            return {name: seen[name][-1][1]}

        return look

    for name in seen:
        registered("probe", name, looking(name), role="teacher", when="round")
    run(small(probes=["a", "b"], rounds=1), out, engine="local")
    for (one, draw), (two, other) in zip(seen["a"], seen["b"], strict=True):
        assert torch.equal(one, two)
        assert draw != other


def test_probes_at_the_end_and_the_truth_of_each_round(small: Small, out: Path, registered: Callable[..., None]) -> None:
    """A probe for the end is asked once; who is malicious is said for the rounds in which they act, and no others.

    What was measured before is there for the teacher, and only what was.
    """
    truths: dict[int, set[int]] = {}
    ends: list[int] = []

    def truth(ctx: ProbeContext) -> dict[str, float]:
        assert ctx.truth is not None
        truths[ctx.round] = set(ctx.truth.malicious)
        assert ctx.truth.windows == (("sign-flip", 2, 3),)
        assert ctx.history == tuple({"number": 10.0 * r} for r in range(ctx.round))
        return {"number": 10.0 * ctx.round}

    def end(ctx: ProbeContext) -> dict[str, float]:
        ends.append(ctx.round)
        return {}

    registered("probe", "truth", truth, role="teacher", when="round")
    registered("probe", "end", end, role="teacher", when="end")
    attackers = [{"behaviour": "sign-flip", "ids": [2, 5], "rounds": [2, 3]}]
    strategy = {"filters": ["norm-clip"], "steps": ["fedavgm"]}
    run(small(rounds=4, probes=["truth", "end"], attackers=attackers, strategy=strategy), out, engine="local")
    assert truths == {0: set(), 1: set(), 2: {2, 5}, 3: {2, 5}, 4: set()}
    assert ends == [4]
    for record in lines(out)[1:]:
        assert record["seconds"].keys() == {"train", "aggregate", "probe", "filters[0]", "aggregator", "steps[0]"}


def test_noise_behind_a_clip_that_follows_the_data_is_refused(small: Small) -> None:
    with pytest.raises(InputError, match=r"steps\[0\].*fixed max_norm"):
        small(strategy={"filters": ["norm-clip"], "steps": ["gaussian-noise"]})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Register a component for one test."""
    REGISTRY.load()
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))
    return lambda kind, name, target, **meta: REGISTRY.add(kind, name, target, **meta) and None


def matrix(small: Small, **changes: Any) -> Scenario:
    sweep = {
        "attackers": {"none": [], "sign flip": [{"behaviour": "sign-flip", "count": 2}]},
        "strategies": {"mean": {"aggregator": "mean"}, "krum": {"aggregator": "krum", "assumed_malicious": 2}},
        "seeds": [1, 2],
    }
    return small(sweep=sweep, **changes)


class Count(SilentListener):
    """Count rounds; interrupt after so many."""

    def __init__(self, stop: int = 10**9) -> None:
        self.rounds, self.stop = 0, stop

    def round_done(self, name: str, record: Any) -> None:
        self.rounds += 1
        if self.rounds == self.stop:
            raise KeyboardInterrupt


def test_a_matrix_is_resumed_cell_by_cell(small: Small, tmp_path: Path) -> None:
    scenario = matrix(small)
    everything = Count()
    whole = run(scenario, tmp_path / "a", engine="local", listener=everything)
    assert everything.rounds == 8 * 3
    cells = whole.summary["cells"]
    assert len(cells) == 8
    assert {(c["attackers"], c["strategies"], c["seed"]) for c in cells} == {
        (a, s, n) for a in ("none", "sign flip") for s in ("mean", "krum") for n in (1, 2)
    }
    assert run(scenario, tmp_path / "b", engine="local", cells=1, listener=Count(10)).status == "interrupted"
    rest = Count()
    done = resume(tmp_path / "b", engine="local", listener=rest)
    assert rest.rounds == 24 - 10  # three cells whole, the fourth from its first round on
    assert [c["model_sha256"] for c in done.summary["cells"]] == [c["model_sha256"] for c in cells]


def test_a_failed_cell_is_marked_and_the_rest_goes_on(small: Small, out: Path, registered: Callable[..., None]) -> None:
    def picky(updates: torch.Tensor, ctx: AggContext) -> torch.Tensor:
        if ctx.params.norm() > 0 and ctx.round == 2:
            raise ValueError("not today")
        return updates.mean(0)

    registered("aggregator", "picky", picky)
    result = run(small(sweep={"strategies": ["mean", "picky", "median"]}), out, engine="local")
    assert result.status == "failed"
    assert result.why == "1 of 3 cells failed (first: none__picky__dirichlet__seed3)"
    assert [c["status"] for c in result.summary["cells"]] == ["finished", "failed", "finished"]
    assert "ValueError: not today" in result.summary["cells"][1]["why"]
    again = resume(out, engine="local")  # still fails, and does not lose the others
    assert [c["status"] for c in again.summary["cells"]] == ["finished", "failed", "finished"]


def test_a_cell_alone_gives_the_bits_it_gives_in_its_matrix(small: Small, tmp_path: Path) -> None:
    scenario = matrix(small)
    whole = run(scenario, tmp_path / "m", engine="local")
    for cell in scenario.cells()[2:4]:
        alone = run(cell.scenario, tmp_path / cell.name, engine="local")
        assert alone.summary["model_sha256"] == next(c["model_sha256"] for c in whole.summary["cells"] if c["cell"] == cell.name)


@pytest.mark.parametrize("behaviour", ["semantic-backdoor", "badnets"])
def test_what_does_not_suit_the_task_is_refused_from_python_too(behaviour: str, small: Small, out: Path) -> None:
    """The command line asks beforehand; whoever calls `run` is not to get a silent no-op."""
    scenario = small(data={"source": {"name": "breast-cancer"}}, attackers=[{"behaviour": behaviour, "count": 2}])
    with pytest.raises(InputError, match=rf"attackers\[0\]\.behaviour: '{behaviour}' cannot work here: needs images with class labels"):
        run(scenario, out, engine="local")
    assert not out.exists()
