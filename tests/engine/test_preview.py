"""What an attacker who is granted the server's rule sees of it: what the server then does, and nothing more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedtrust import runner
from fedtrust.client import Behaviour, View
from fedtrust.runner import run
from fedtrust.scenario import Scenario
from fedtrust.setup import Setup, build
from fedtrust.strategy import FedTrustStrategy

Small = Callable[..., Scenario]

VOTING = {"name": "ensemble", "of": "logistic", "members": 3}
#: Rules that know their clients again, or weigh them, with what the model must be.
RULES: dict[str, Any] = {
    "foolsgold": {"strategy": {"aggregator": "foolsgold"}},
    "flanders": {"strategy": {"aggregator": {"name": "flanders", "keep": 4}}},
    "weighted-mean": {"strategy": {"aggregator": "weighted-mean", "steps": ["fedavgm"]}},
    "dpa": {"strategy": {"aggregator": "dpa"}, "model": VOTING},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foresees(Behaviour):
    """Turn the update round, and ask the rule beforehand what will come of it."""

    def craft(self, updates: Tensor, view: View) -> Tensor:
        assert view.others is not None
        assert view.defence is not None
        rows = torch.cat([view.others, -2 * updates])
        foreseen.append((rows, view.defence(rows)))
        return -2 * updates


foreseen: list[tuple[Tensor, Tensor]] = []


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_is_foreseen_as_the_server_will_use_it(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """The same change of the model in every round; and without the names of the senders it would have been another."""
    foreseen.clear()
    done: list[Tensor] = []
    nameless: list[Tensor] = []
    aggregate = FedTrustStrategy.aggregate_train

    def recorded(self: FedTrustStrategy, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if rule != "dpa":  # which cannot do without
            assert self._params is not None
            nameless.append(self.preview(server_round, self._params)(foreseen[-1][0]))
        result = aggregate(self, server_round, replies)
        assert self.outcome is not None
        done.append(self.outcome.delta)
        return result

    def joined(*given: Any, **more: Any) -> Setup:
        setup = build(*given, **more)
        groups = tuple(dataclasses.replace(group, behaviour=Foresees()) for group in setup.roster.groups)
        return dataclasses.replace(setup, roster=dataclasses.replace(setup.roster, groups=groups))

    monkeypatch.setattr(FedTrustStrategy, "aggregate_train", recorded)
    monkeypatch.setattr(runner, "build", joined)
    attackers = [{"behaviour": "sign-flip", "ids": [1, 4, 6], "knowledge": "omniscient+defence"}]
    scenario = small(rounds=5, clients={"per_round": 6}, attackers=attackers, **RULES[rule])
    assert run(scenario, tmp_path / "run", engine="local").status == "finished"
    assert len(done) == len(foreseen) == 5
    for (_, before), after in zip(foreseen, done, strict=True):
        assert float(after.norm()) > 0
        torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-5)
    if nameless:
        assert max(float((a - b).norm() / b.norm()) for a, b in zip(nameless, done, strict=True)) > 0.01
