"""Cells side by side: the same bits as alone, really at once, and what an interruption, a failure or a full disk costs (one cell)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fedtrust import matrix, records, runner
from fedtrust.client import Behaviour, View
from fedtrust.errors import InputError, RunError
from fedtrust.listener import SilentListener
from fedtrust.probes.base import ProbeContext
from fedtrust.registry import REGISTRY
from fedtrust.runner import resume, run
from fedtrust.runs import RunDirectory
from fedtrust.scenario import Scenario
from fedtrust.server import AggContext
from fedtrust.setup import build

Small = Callable[..., Scenario]
Registered = Callable[..., None]

#: Matrix products on both sides: what one thread and two threads multiply differs in its last bits.
SWEEP: dict[str, Any] = {
    "model": "mlp",
    "clients": {"train": {"momentum": 0.9}},
    "sweep": {
        "attackers": {"none": [], "sign flip": [{"behaviour": "sign-flip", "count": 2}]},
        "strategies": {"krum": {"aggregator": "krum", "assumed_malicious": 2}, "adam": {"aggregator": "mean", "steps": ["fedadam"]}},
        "seeds": [1, 2],
    },
}
#: Seconds that whoever waits for another cell waits before the test fails.
LONG = 60.0


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Registered:
    """Register a component for one test."""
    REGISTRY.load()
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))

    def add(kind: Any, name: str, target: Any, **meta: Any) -> None:
        REGISTRY.add(kind, name, target, **({"role": "malicious", "knowledge": "own"} if kind == "behaviour" else {}) | meta)

    return add


def hashes(summary: Mapping[str, Any]) -> dict[str, str]:
    return {c["cell"]: c["model_sha256"] for c in summary["cells"]}


def recorded(folder: Path) -> tuple[list[Any], list[Any]]:
    """Everything but the times that a cell recorded."""
    directory = RunDirectory(folder)
    return [{k: v for k, v in r.items() if k != "seconds"} for r in directory.records("rounds.jsonl")], directory.records("clients.jsonl")


def status(folder: Path) -> str:
    return str(json.loads((folder / "status.json").read_text())["status"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_bits_of_a_cell_do_not_depend_on_what_runs_beside_it(small: Small, tmp_path: Path) -> None:
    scenario = small(**SWEEP)
    one = run(scenario, tmp_path / "1", engine="local", cells=1, workers=2).summary
    assert one["status"] == "finished"
    assert len(set(hashes(one).values())) > 4
    for width, workers in ((2, 2), (3, 2), (8, 3)):
        many = run(scenario, tmp_path / str(width), engine="local", cells=width, workers=workers).summary
        assert hashes(many) == hashes(one)
        for name in hashes(one):
            assert recorded(tmp_path / str(width) / "cells" / name) == recorded(tmp_path / "1" / "cells" / name)
    for cell in scenario.cells()[3:5]:
        alone = run(cell.scenario, tmp_path / cell.name, engine="local", workers=1)
        assert alone.summary["model_sha256"] == hashes(one)[cell.name]
        assert recorded(tmp_path / cell.name) == recorded(tmp_path / "1" / "cells" / cell.name)


@pytest.mark.slow
def test_on_ray_cells_side_by_side_give_the_same_bits(small: Small, tmp_path: Path) -> None:
    scenario = small(**SWEEP | {"sweep": {"strategies": ["krum", "mean"], "seeds": [1, 2]}})
    local = run(scenario, tmp_path / "local", engine="local", cells=1).summary
    ray = run(scenario, tmp_path / "ray", engine="ray", workers=2, cells=3).summary
    assert ray["status"] == "finished"
    assert len(set(hashes(ray).values())) == 4
    assert hashes(ray) == hashes(local)


def meeting(count: int, seconds: float = LONG) -> tuple[Callable[[ProbeContext], dict[str, float]], set[int]]:
    """Return a probe that waits in round 1 until so many cells are there, and where it finds the addresses of their test samples."""
    barrier, addresses = threading.Barrier(count, timeout=seconds), set[int]()

    def meet(ctx: ProbeContext) -> dict[str, float]:
        if ctx.round == 1:
            assert ctx.test is not None
            addresses.add(ctx.test[0].data_ptr())
            barrier.wait()
        return {}

    return meet, addresses


@pytest.mark.parametrize("count", [2, 3])
def test_cells_are_played_at_the_same_time_on_the_same_samples(small: Small, out: Path, registered: Registered, count: int) -> None:
    meet, addresses = meeting(count)
    registered("probe", "meeting", meet, role="teacher", when="round")
    scenario = small(probes=["accuracy", "meeting"], sweep={"seeds": list(range(count))})
    assert run(scenario, out, engine="local", workers=1, cells=count).status == "finished"
    assert len(addresses) == 1


def test_one_cell_at_once_never_meets_another(small: Small, out: Path, registered: Registered) -> None:
    registered("probe", "meeting", meeting(2, 0.2)[0], role="teacher", when="round")
    result = run(small(probes=["meeting"], sweep={"seeds": [1, 2]}), out, engine="local", cells=1)
    assert [c["status"] for c in result.summary["cells"]] == ["failed", "failed"]
    assert "BrokenBarrierError" in result.summary["cells"][0]["why"]


trained_together: list[threading.Barrier] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waits(Behaviour):
    """Wait for a client of another cell."""

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        trained_together[-1].wait()
        return x, y


def test_the_workers_train_chunks_of_several_cells_at_once(small: Small, out: Path, registered: Registered) -> None:
    """And with as many threads of their own as they should, whatever the servers of other cells set."""
    registered("behaviour", "waits", Waits)
    trained_together.append(threading.Barrier(2, timeout=LONG))
    scenario = small(
        rounds=1, clients={"count": 3}, attackers=[{"behaviour": "waits", "count": 1}], sweep={"seeds": [1, 2]}, engine={"deadline": LONG}
    )
    result = run(scenario, out, engine="local", workers=2)  # by default as many cells as workers
    assert result.status == "finished"
    assert all(not r["faults"] for c in hashes(result.summary) for r in recorded(out / "cells" / c)[0][1:])


class Late(SilentListener):
    """Hold the first cell back until the last one is done."""

    def __init__(self) -> None:
        self.last, self.done = threading.Event(), list[str]()

    def cell_done(self, name: str, summary: Any) -> None:
        self.done.append(name)
        if name.endswith("seed3"):
            self.last.set()


def test_the_summary_keeps_the_order_of_the_file(small: Small, out: Path, registered: Registered) -> None:
    listener = Late()

    def slow(ctx: ProbeContext) -> dict[str, float]:
        if ctx.round == 1 and ctx.data is not None and len(held) == 0:
            held.append(1)
            assert listener.last.wait(LONG)
        return {}

    held: list[int] = []
    registered("probe", "slow", slow, role="teacher", when="round")
    result = run(small(probes=["slow"], sweep={"seeds": [1, 2, 3]}), out, engine="local", workers=1, cells=2, listener=listener)
    assert listener.done[-1] != "none__mean__dirichlet__seed3"
    assert sorted(listener.done) == [c["cell"] for c in result.summary["cells"]]
    assert [c["seed"] for c in json.loads((out / "summary.json").read_text())["cells"]] == [1, 2, 3]


class Jealous(SilentListener):
    """Fail if two threads call at once; interrupt after so many rounds."""

    def __init__(self, stop: int = 10**9) -> None:
        self.lock, self.stop, self.rounds, self.started = threading.Lock(), stop, 0, Counter[str]()

    def cell_started(self, name: str, labels: Any, rounds: int, done_rounds: int) -> None:
        self.started[name] += 1

    def round_done(self, name: str, record: Any) -> None:
        assert self.lock.acquire(blocking=False)
        time.sleep(0.002)
        self.rounds += 1
        self.lock.release()
        if self.rounds == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 11, 20])
def test_interrupted_in_the_middle_it_goes_on_cell_by_cell(small: Small, tmp_path: Path, stop: int) -> None:
    scenario = small(**SWEEP)
    whole = run(scenario, tmp_path / "whole", engine="local").summary
    result = run(scenario, tmp_path / "b", engine="local", cells=3, workers=2, listener=Jealous(stop))
    assert result.status == status(tmp_path / "b") == "interrupted"
    assert not [t for t in threading.enumerate() if t.name.startswith("fedtrust-")]
    left = {c.name: tmp_path / "b" / "cells" / c.name for c in scenario.cells()}
    saved = {name: RunDirectory(folder).restore() for name, folder in left.items()}
    played = {name: 0 if checkpoint is None else checkpoint.round + 1 for name, checkpoint in saved.items()}
    finished = {name for name, folder in left.items() if (folder / "status.json").exists() and status(folder) == "finished"}
    assert sum(played.values()) >= stop
    for name, folder in left.items():
        assert not folder.exists() or name in finished or status(folder) == "interrupted", (folder / "status.json").read_text()
    before = files(tmp_path / "b")
    assert [c["cell"] for c in json.loads(before["summary.json"])["cells"]] == [c.name for c in scenario.cells() if c.name in finished]
    rest = Jealous()
    done = resume(tmp_path / "b", engine="local", cells=2, listener=rest)
    assert rest.rounds == 3 * 8 - sum(played.values())
    assert set(rest.started) == set(left) - finished
    assert hashes(done.summary) == hashes(whole)
    after = files(tmp_path / "b")
    assert all(after[name] == content for name, content in before.items() if any(name.startswith(f"cells/{f}/") for f in finished))
    for name, folder in left.items():
        assert recorded(folder) == recorded(tmp_path / "whole" / "cells" / name)


def test_whoever_comes_back_after_the_interruption_writes_nothing(small: Small, tmp_path: Path, registered: Registered) -> None:
    """A rule in the middle of long work cannot be stopped; what it finds afterwards must not reach a folder that may be resumed already."""
    busy, release = threading.Event(), threading.Event()

    def long(updates: Tensor, ctx: AggContext) -> Tensor:
        if ctx.round == 2 and not release.is_set():
            busy.set()
            assert release.wait(LONG)
        return updates.mean(0)

    def patient(ctx: ProbeContext) -> dict[str, float]:
        assert ctx.round < 2 or busy.wait(LONG)  # the other cell measures round 2 when this one's rule is at it
        return {}

    class Impatient(SilentListener):
        def round_done(self, name: str, record: Any) -> None:
            if record["round"] == 2:
                raise KeyboardInterrupt

    registered("aggregator", "long", long)
    registered("probe", "patient", patient, role="user", when="round")
    scenario = small(probes=["patient"], sweep={"strategies": ["long", "median"]})
    assert run(scenario, tmp_path / "a", engine="local", cells=2, workers=1, listener=Impatient()).status == "interrupted"
    before = files(tmp_path / "a")
    assert len(recorded(tmp_path / "a" / "cells" / "none__long__dirichlet__seed3")[0]) == 2
    stuck = [t for t in threading.enumerate() if t.name.startswith("fedtrust-cell")]
    assert len(stuck) == 1
    release.set()
    stuck[0].join(LONG)
    assert not stuck[0].is_alive()
    assert files(tmp_path / "a") == before
    assert hashes(resume(tmp_path / "a", engine="local").summary) == hashes(run(scenario, tmp_path / "b", engine="local").summary)


@contextlib.contextmanager
def playing(scenario: Path, out: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Play a scenario, two cells at once, in a process of its own, which is gone in the end."""
    command = [sys.executable, "-m", "fedtrust", "run", str(scenario), "--out", str(out), "--engine", "local", "--plain", "--cells", "2"]
    listens = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a parent may have ignored it
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *more], text=True, preexec_fn=listens, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(met: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LONG
    while not met():
        assert time.monotonic() < end, "nothing happened"
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_while_two_cells_are_played(small: Small, tmp_path: Path, how: signal.Signals) -> None:
    scenario = small(**SWEEP | {"rounds": 12, "sweep": {"seeds": [1, 2, 3]}})
    (tmp_path / "s.toml").write_text(scenario.resolved_toml())
    lines = [tmp_path / "killed" / "cells" / c.name / "rounds.jsonl" for c in scenario.cells()[:2]]
    with playing(tmp_path / "s.toml", tmp_path / "killed") as process:
        wait_for(lambda: all(f.exists() and f.read_bytes().count(b"\n") > 2 for f in lines), process)
        process.send_signal(how)
        code = process.wait(timeout=LONG)
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    unfinished = [c.name for c in scenario.cells() if not (tmp_path / "killed" / "cells" / c.name / "model.safetensors").exists()]
    assert unfinished
    listener = Jealous()
    done = resume(tmp_path / "killed", engine="local", listener=listener)
    assert set(unfinished) <= set(listener.started)
    assert hashes(done.summary) == hashes(run(scenario, tmp_path / "whole", engine="local").summary)


BUSY = """\
import torch
from fedtrust import aggregator

@aggregator("busy-test")
def busy(updates, ctx):
    '''Compute for a minute.'''
    if ctx.round == 2:
        x = torch.ones(1200, 1200)
        for _ in range(100_000):
            x = (x @ x).clamp(-1, 1)
    return updates.mean(0)
"""


def test_a_rule_in_the_middle_of_its_work_does_not_hold_the_process(tmp_path: Path) -> None:
    """Python ends badly (abort, 134) while a thread computes; the exit status must say that the run was interrupted."""
    (tmp_path / "busy.py").write_text(BUSY)
    (tmp_path / "s.toml").write_text(
        'title = "busy"\nrounds = 3\ndata = { source = { name = "digits", limit = 240 } }\nmodel = "logistic"\nclients = { count = 4 }\n'
        'strategy = { aggregator = "busy:busy-test" }\nsweep = { seeds = [1, 2, 3] }\n'
    )
    lines = [tmp_path / "out" / "cells" / f"none__busy-busy-test__iid__seed{n}" / "rounds.jsonl" for n in (1, 2)]
    with playing(tmp_path / "s.toml", tmp_path / "out", "--allow-plugin", "busy") as process:
        wait_for(lambda: all(f.exists() and f.read_bytes().count(b"\n") == 2 for f in lines), process)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=LONG) == 130
        assert process.stderr is not None
        assert process.stderr.read().startswith("error: interrupted; go on with: fedtrust run --resume")
    assert [status(f.parent) for f in lines] == ["interrupted"] * 2


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("what", ["input", "exit", "odd", "disk", "summary"])
def test_what_happens_to_one_cell_is_its_own_affair(
    small: Small, out: Path, registered: Registered, monkeypatch: pytest.MonkeyPatch, what: str, width: int
) -> None:
    def rule(updates: Tensor, ctx: AggContext) -> Tensor:
        if what == "exit":
            sys.exit(0)
        if what == "odd":
            raise KeyError("odd")
        return updates.mean(0)

    def refuses(scenario: Scenario) -> Any:
        if what == "input" and scenario.strategy.aggregator.name == "rule":
            raise InputError("cannot be meant", "strategy")
        return build(scenario)

    def full(when: str, plain: Callable[..., None]) -> Callable[..., None]:
        def write(directory: RunDirectory, *rest: Any) -> None:
            if what == when and "__rule__" in directory.path.name:
                raise RunError("cannot write: No space left on device")
            plain(directory, *rest)

        return write

    registered("aggregator", "rule", rule)
    monkeypatch.setattr(runner, "build", refuses)
    monkeypatch.setattr(RunDirectory, "save", full("disk", RunDirectory.save))
    monkeypatch.setattr(records, "write_summary", full("summary", records.write_summary))
    scenario = small(sweep={"strategies": ["mean", "rule", "median"]})
    result = run(scenario, out, engine="local", cells=width)
    assert result.status == status(out) == "failed"
    assert result.why == "1 of 3 cells failed (first: none__rule__dirichlet__seed3)"
    assert [c["status"] for c in result.summary["cells"]] == ["finished", "failed", "finished"]
    assert json.loads((out / "summary.json").read_text())["cells"] == result.summary["cells"]
    said = {"input": "strategy: cannot be meant", "exit": "SystemExit", "odd": "KeyError", "disk": "No space", "summary": "No space"}
    assert said[what] in result.summary["cells"][1]["why"]
    what = "nothing"
    again = resume(out, engine="local", cells=width)
    assert again.status == "finished"
    assert hashes(again.summary) == hashes(run(scenario, out.with_name("whole"), engine="local").summary)


def test_samples_that_somebody_wrote_on_are_nobodys_result(small: Small, tmp_path: Path, registered: Registered) -> None:
    """A probe of one cell writes on the samples that its neighbour uses, too: neither records what came of it, and both can be resumed."""
    both, spoilt, wicked = threading.Barrier(2, timeout=LONG), threading.Event(), [True]

    def rule(updates: Tensor, ctx: AggContext) -> Tensor:
        if wicked and ctx.round == 2 and both.wait() == 0:  # the other one goes on, and measures this round before we do
            assert spoilt.wait(LONG)
        return updates.mean(0)

    def spoil(ctx: ProbeContext) -> dict[str, float]:
        if wicked and ctx.round == 2 and not spoilt.is_set():
            assert ctx.test is not None
            ctx.test[0].mul_(0.5)
            spoilt.set()
        return {}

    registered("aggregator", "rule", rule)
    registered("probe", "spoil", spoil, role="teacher", when="round")
    scenario = small(probes=["accuracy", "spoil"], strategy={"aggregator": "rule"}, sweep={"seeds": [1, 2]})
    first = run(scenario, tmp_path / "a", engine="local", cells=2).summary
    assert [c["status"] for c in first["cells"]] == ["failed", "failed"]
    assert sorted("probe 'spoil'" in c["why"] for c in first["cells"]) == [False, True]
    assert all("in place" in c["why"] for c in first["cells"])
    assert all(len(recorded(tmp_path / "a" / "cells" / c)[0]) == 2 for c in hashes(first))
    wicked.clear()
    clean = run(scenario, tmp_path / "b", engine="local").summary
    done = resume(tmp_path / "a", engine="local").summary
    assert hashes(done) == hashes(clean)
    assert [c["metrics"] for c in done["cells"]] == [c["metrics"] for c in clean["cells"]]


def test_the_summary_is_not_written_after_each_of_many_cells(small: Small, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counter[str]()
    plain = records.write_summary
    run_git = subprocess.run

    def write(directory: RunDirectory, summary: Mapping[str, Any]) -> None:
        counts["matrix" if directory.path == out else "cell"] += 1
        plain(directory, summary)

    def git(command: list[str], **settings: Any) -> Any:
        counts[command[0]] += 1
        return run_git(command, **settings)

    monkeypatch.setattr(records, "write_summary", write)
    monkeypatch.setattr(subprocess, "run", git)
    monkeypatch.setattr(matrix, "_EVERY", 1e9)
    records._machine.cache_clear()
    result = run(small(rounds=1, sweep={"seeds": list(range(8))}), out, engine="local", cells=2)
    assert result.status == "finished"
    assert counts["cell"] == 8
    assert counts["matrix"] <= 2
    assert counts["git"] == 1
    assert len(json.loads((out / "summary.json").read_text())["cells"]) == 8


def test_cells_at_once_are_checked(small: Small, out: Path) -> None:
    with pytest.raises(InputError, match=r"--cells: is for a scenario with \[sweep\]"):
        run(small(), out, engine="local", cells=2)
    with pytest.raises(InputError, match=r"--cells: needs at least one \(got 0\)"):
        run(small(sweep={"seeds": [1, 2]}), out, engine="local", cells=0)
    assert not out.exists()


def test_a_cell_whose_result_was_lost_is_played_again(small: Small, tmp_path: Path) -> None:
    scenario = small(sweep={"seeds": [1, 2, 3]})
    whole = run(scenario, tmp_path / "a", engine="local").summary
    RunDirectory(tmp_path / "a").status("running")  # as if it had been killed just before its end
    os.truncate(tmp_path / "a" / "cells" / "none__mean__dirichlet__seed2" / "summary.json", 20)
    listener = Jealous()
    assert hashes(resume(tmp_path / "a", engine="local", listener=listener).summary) == hashes(whole)
    assert set(listener.started) == {"none__mean__dirichlet__seed2"}
    assert listener.rounds == 0  # every round was in its checkpoint
