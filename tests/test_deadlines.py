"""Whatever hangs is given up at the deadline, by name; the run goes on where it can."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fedtrust.client import Behaviour, Reply, View
from fedtrust.engine import threads
from fedtrust.errors import RunError
from fedtrust.probes.base import ProbeContext
from fedtrust.registry import REGISTRY
from fedtrust.runner import run
from fedtrust.runs import RunDirectory
from fedtrust.scenario import Scenario
from fedtrust.server import AggContext

Small = Callable[..., Scenario]
RELEASE = threading.Event()


def hang() -> None:
    RELEASE.wait(60)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HangsInCraft(Behaviour):
    """Never decide what to send."""

    def craft(self, updates: Tensor, view: View) -> Tensor:
        hang()
        return updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class HangsInReply(Behaviour):
    """Never put the message together."""

    def reply(self, reply: Reply, view: View) -> Reply | None:
        hang()
        return reply


def hanging_rule(updates: Tensor, ctx: AggContext) -> Tensor:
    hang()
    return updates.mean(0)


def hanging_probe(ctx: ProbeContext) -> Mapping[str, float]:
    hang()
    return {}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    REGISTRY.load()
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))
    for name, behaviour in (("hangs-in-craft", HangsInCraft), ("hangs-in-reply", HangsInReply)):
        REGISTRY.add("behaviour", name, behaviour, role="malicious", knowledge="own", broken=True)
    REGISTRY.add("aggregator", "hanging-rule", hanging_rule)
    REGISTRY.add("probe", "hanging-probe", hanging_probe, role="teacher")
    RELEASE.clear()
    yield
    RELEASE.set()


@pytest.mark.parametrize("where", ["craft", "reply"])
def test_a_client_that_hangs_after_training_is_dropped_by_name(small: Small, out: Path, where: str) -> None:
    scenario: Any = small(rounds=1, attackers=[{"behaviour": f"hangs-in-{where}", "ids": [2, 5]}], engine={"deadline": 0.5})
    result = run(scenario, out, engine="local")
    assert result.status == "finished", result.why
    faults = RunDirectory(out).records("rounds.jsonl")[1]["faults"]
    assert faults == dict.fromkeys(("2", "5"), f"{where}: TimeoutError: no answer within 0.5 s")


def test_a_server_rule_that_hangs_fails_the_run(small: Small, out: Path) -> None:
    with pytest.raises(RunError, match=r"aggregator 'hanging-rule' failed in round 1: TimeoutError: no answer within 0.5 s"):
        run(small(strategy={"aggregator": "hanging-rule"}, engine={"deadline": 0.5}), out, engine="local")
    assert "no answer" in (out / "status.json").read_text()


def test_a_probe_that_hangs_fails_the_run_and_is_named(small: Small, out: Path) -> None:
    with pytest.raises(RunError, match=r"probe 'hanging-probe' failed in round 0: TimeoutError: no answer within 0.5 s"):
        run(small(probes=["hanging-probe"], engine={"deadline": 0.5}), out, engine="local")


def test_within_hands_on_answers_and_errors() -> None:
    assert threads.within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        threads.within(5, lambda: 1 // 0)
    with threads.using(1):
        import torch

        assert threads.within(5, torch.get_num_threads) == 1
