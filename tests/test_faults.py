"""What must not happen: a bug of one part that looks like a result of another."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrust import records
from fedtrust.client import Behaviour, Reply, View
from fedtrust.data.base import Task
from fedtrust.engine.cohort import Chunk, ClientTask
from fedtrust.engine.workers import LocalExecutor
from fedtrust.errors import InputError, RunError
from fedtrust.probes.base import ProbeContext
from fedtrust.registry import REGISTRY
from fedtrust.runner import resume, run
from fedtrust.runs import RunDirectory
from fedtrust.scenario import Scenario
from fedtrust.server import AggContext
from fedtrust.setup import build

Small = Callable[..., Scenario]
Registered = Callable[..., None]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Registered:
    """Register a component for one test."""
    REGISTRY.load()
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))

    def add(kind: Any, name: str, target: Any, **meta: Any) -> None:
        REGISTRY.add(kind, name, target, **({"role": "malicious", "knowledge": "own"} if kind == "behaviour" else {}) | meta)

    return add


def rows(folder: Path, name: str = "rounds.jsonl") -> list[dict[str, Any]]:
    return RunDirectory(folder).records(name)


def test_one_folder_is_played_by_one_process(small: Small, out: Path) -> None:
    (out).mkdir()
    (out / "scenario.toml").write_text(small().resolved_toml())
    with RunDirectory(out).lock(), pytest.raises(InputError, match="another process"):
        resume(out, engine="local")
    assert resume(out, engine="local").status == "finished"  # killed in its first moments it starts from the beginning


def test_an_error_that_nobody_foresaw_ends_with_its_reason(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = records.round_record

    def odd(number: int, *rest: Any) -> dict[str, Any]:
        if number == 2 and odd.calls == 0:  # type: ignore[attr-defined]
            odd.calls = 1  # type: ignore[attr-defined]
            raise ZeroDivisionError("surprise")
        return plain(number, *rest)

    odd.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(records, "round_record", odd)
    with pytest.raises(ZeroDivisionError):
        run(small(), tmp_path / "a", engine="local")
    assert json.loads((tmp_path / "a" / "status.json").read_text()) == {"status": "failed", "why": "ZeroDivisionError: surprise"}
    odd.calls = 0  # type: ignore[attr-defined]
    matrix = run(small(sweep={"seeds": [1, 2]}), tmp_path / "b", engine="local", cells=1)
    assert [c["status"] for c in matrix.summary["cells"]] == ["failed", "finished"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Same(Behaviour):
    """Hand on the reply as it is: the message is built the long way and must say the same."""

    def reply(self, reply: Reply, view: View) -> Reply | None:
        return reply


@pytest.mark.parametrize(("role", "meta"), [("curious-server", {}), ("teacher", {"updates": True})])
def test_observers_see_the_updates_that_were_sent(small: Small, tmp_path: Path, registered: Registered, role: str, meta: Any) -> None:
    seen: list[Tensor] = []

    def look(ctx: ProbeContext) -> dict[str, float]:
        if ctx.updates is not None:
            seen.append(ctx.updates)
        return {}

    registered("probe", "look", look, role=role, when="round", **meta)
    registered("behaviour", "same", Same)
    run(small(probes=["look"], rounds=1), tmp_path / "a", engine="local")
    run(small(probes=["look"], rounds=1, attackers=[{"behaviour": "same", "ids": [1]}]), tmp_path / "b", engine="local")
    assert [len(s) for s in seen] == [8, 8]
    torch.testing.assert_close(seen[0], seen[1], atol=1e-6, rtol=1e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sleeps(Behaviour):
    """Do not come back in time."""

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        time.sleep(3)
        return x, y


def test_a_local_client_that_hangs_is_given_up(small: Small) -> None:
    setup = build(small())
    executor, other = LocalExecutor(1, deadline=0.5), LocalExecutor(1)
    job = executor.open(setup.world)
    chunks = [Chunk(1, setup.params, {}, (ClientTask(c, b, {}),)) for c, b in ((0, Sleeps()), (1, setup.roster.honest))]
    assert job.run(chunks[:1]).results[0].faults == {0: "no answer within 0.5 s"}
    other.close()  # closing one executor is no other one's affair
    executor._deadline = 60.0
    assert job.run(chunks[1:]).results[0].clients == (1,)
    executor.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acts(Behaviour):
    """Go wrong in one of many ways, every round or only in the first."""

    how: str = "none"
    always: bool = True

    def _now(self, view: View) -> bool:
        return self.always or view.round == 1

    def craft(self, updates: Tensor, view: View) -> Tensor:
        if self._now(view):
            match self.how:
                case "exit":
                    sys.exit(0)
                case "double":
                    return updates.double()
                case "huge":
                    return torch.full_like(updates, 3e38)
                case "nan":
                    return updates * float("nan")
                case "memory":
                    view.memory["never declared"] = torch.zeros(1)
        return updates

    def reply(self, reply: Reply, view: View) -> Reply | None:
        odd = {"a\u2028key": torch.zeros(1)} if self.how == "separator" and self._now(view) else {}
        return reply._replace(arrays={**reply.arrays, **odd})


HOW = {
    "exit": "craft: SystemExit",
    "double": "expected torch.float32",
    "huge": "value above 1e+15",
    "nan": "NaN in the update",
    "memory": "`remember` declared",
    "separator": "unknown parameter",
}


@pytest.mark.parametrize("how", HOW)
def test_an_attack_that_never_gets_through_is_no_victory_of_the_defence(
    small: Small, tmp_path: Path, registered: Registered, how: str
) -> None:
    registered("behaviour", "acts", Acts)
    attackers = [{"behaviour": "acts", "count": 2, "params": {"how": how}}]
    result = run(small(attackers=attackers), tmp_path / "a", engine="local")
    assert result.status == "failed"
    assert "'acts' never sent a valid update" in result.why
    assert HOW[how] in result.why
    attackers[0]["params"]["always"] = False  # type: ignore[index]
    once = run(small(attackers=attackers), tmp_path / "b", engine="local")
    assert once.status == "finished"
    assert "2 replies were dropped" in once.summary["warnings"][0]
    faulty = [r for r in rows(tmp_path / "b", "clients.jsonl") if r["fault"]]
    assert {r["round"] for r in faulty} == {1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stamps(Behaviour):
    """Forget to copy in `goal`."""

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        return x, y

    def goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor] | None:
        return x.zero_(), y.zero_()


def test_a_goal_that_writes_in_place_does_not_change_the_measure(small: Small, tmp_path: Path, registered: Registered) -> None:
    registered("behaviour", "stamps", Stamps)
    clean = run(small(), tmp_path / "a", engine="local").summary
    stamped = run(small(attackers=[{"behaviour": "stamps", "count": 2}]), tmp_path / "b", engine="local").summary
    assert stamped["metrics"] == clean["metrics"]


def test_a_probe_that_writes_on_what_it_is_shown_is_named(small: Small, tmp_path: Path, registered: Registered) -> None:
    def wipes(ctx: ProbeContext) -> dict[str, float]:
        assert ctx.test is not None
        ctx.test[1].zero_()
        return {}

    def vandal(ctx: ProbeContext) -> dict[str, float]:
        assert ctx.params is not None
        ctx.params.zero_()
        ctx.test_output.zero_()
        return {"x": 1.0}

    registered("probe", "vandal", vandal, role="teacher", when="round")
    clean = run(small(probes=["accuracy"]), tmp_path / "a", engine="local").summary
    beside = run(small(probes=["vandal", "accuracy"]), tmp_path / "b", engine="local").summary
    assert beside["model_sha256"] == clean["model_sha256"]
    assert beside["metrics"]["accuracy"] == clean["metrics"]["accuracy"]
    registered("probe", "wipes", wipes, role="teacher", when="round")
    setup = small(data={"source": {"limit": 250}}, probes=["wipes"])  # its own copy of the data: the next test must not see it
    with pytest.raises(RunError, match=r"probe 'wipes' failed.*in place"):
        run(setup, tmp_path / "c", engine="local")
    from fedtrust.data import build as data

    data._remembered.cache_clear()


def test_two_probes_cannot_measure_the_same(small: Small, out: Path, registered: Registered) -> None:
    registered("probe", "again", lambda ctx: {"accuracy": 0.5}, role="user", when="round")
    with pytest.raises(RunError, match=r"probe 'again'.*'accuracy' is measured by another probe"):
        run(small(probes=["accuracy", "again"]), out, engine="local")


def test_a_bug_in_a_rule_is_not_blamed_on_a_faulty_client(small: Small, out: Path, registered: Registered) -> None:
    def buggy(updates: Tensor, ctx: AggContext) -> Tensor:
        return updates.nothing()  # type: ignore[attr-defined, no-any-return, operator]

    registered("aggregator", "buggy", buggy)
    with pytest.raises(RunError, match="AttributeError"):
        run(small(strategy={"aggregator": "buggy"}, attackers=[{"behaviour": "malformed", "count": 1}]), out, engine="local")


def test_a_rule_cannot_reach_the_data_through_what_it_is_given(small: Small, out: Path, registered: Registered) -> None:
    def curious(updates: Tensor, ctx: AggContext) -> Tensor:
        for held in (ctx.model, ctx.criterion):
            owner = getattr(held, "__self__", held)
            assert not any(hasattr(owner, name) for name in ("data", "seed", "examples"))
        return updates.mean(0)

    registered("aggregator", "curious", curious)
    assert run(small(strategy={"aggregator": "curious"}), out, engine="local").status == "finished"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves(Behaviour):
    """An honest client that sends half of its update and counts how often."""

    def remember(self, size: int) -> dict[str, Tensor]:
        return {"count": torch.zeros(())}

    def craft(self, updates: Tensor, view: View) -> Tensor:
        view.memory["count"] = view.memory["count"] + 1
        return updates / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watches(Behaviour):
    """Keep the largest norm among the others; a memory of another shape than the honest one."""

    def remember(self, size: int) -> dict[str, Tensor]:
        return {"norms": torch.zeros(2)}

    def craft(self, updates: Tensor, view: View) -> Tensor:
        assert view.others is not None
        view.memory["norms"] = torch.stack([view.others.norm(dim=1).max(), view.memory["norms"][0]])
        watched.append(view.others)
        return updates


watched: list[Tensor] = []


def test_an_omniscient_adversary_sees_what_honest_clients_send(small: Small, out: Path, registered: Registered) -> None:
    """And what a client remembers as an adversary is not mixed with what it remembered while it was honest."""
    registered("behaviour", "halves", Halves, role="honest")
    registered("behaviour", "watches", Watches, knowledge="omniscient")
    watched.clear()
    scenario = small(
        rounds=4,
        clients={"behaviour": "halves"},
        attackers=[{"behaviour": "watches", "ids": [1, 3], "knowledge": "omniscient", "rounds": [2, 3]}],
    )
    assert run(scenario, out, engine="local").status == "finished"
    assert len(watched) == 2
    for number, others in zip((2, 3), watched, strict=True):
        sent = [r["norm"] for r in rows(out, "clients.jsonl") if r["round"] == number and not r["malicious"]]
        assert others.norm(dim=1).tolist() == pytest.approx(sent, rel=1e-5)


def test_no_attack_means_no_attackers(small: Small) -> None:
    with pytest.raises(InputError, match="stands for the run without an attack"):
        small(sweep={"attackers": {"none": [{"behaviour": "sign-flip", "count": 2}]}})


def test_a_batch_is_never_larger_than_the_largest_client(small: Small) -> None:
    world = build(small(clients={"train": {"batch_size": 10**9}})).world
    assert world.batch_size == max(len(p) for p in world.data.parts)
