"""The grid behind Flower's interface: stock strategies, coalitions, faults, odd strategies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedtrust.client import Behaviour, Knowledge, View
from fedtrust.engine import flower
from fedtrust.engine.grid import CohortGrid
from fedtrust.engine.roster import Group, Roster
from fedtrust.engine.workers import LocalExecutor
from fedtrust.errors import InputError, RunError
from fedtrust.layout import Layout
from fedtrust.registry import REGISTRY
from fedtrust.runner import run
from fedtrust.scenario import Scenario
from fedtrust.setup import Setup, build
from fedtrust.strategy import FedTrustStrategy

Small = Callable[..., Scenario]

STOCK: list[Any] = [
    "flwr:FedAvg", "flwr:FedAvgM", "flwr:FedAdagrad", "flwr:FedAdam", "flwr:FedYogi", "flwr:FedMedian", "flwr:FedTrimmedAvg",
    {"name": "flwr:FedProx", "proximal_mu": 0.1}, "flwr:Krum", {"name": "flwr:MultiKrum", "num_nodes_to_select": 3}, "flwr:Bulyan",
    {"name": "flwr:QFedAvg", "client_learning_rate": 0.1},
]  # fmt: skip


def final(scenario: Scenario, out: Path) -> tuple[str, dict[str, Any]]:
    result = run(scenario, out, engine="local", workers=2)
    assert result.status == "finished", result.why
    return str(result.summary["model_sha256"]), result.summary


@pytest.mark.parametrize("aggregator", STOCK, ids=lambda a: a if isinstance(a, str) else a["name"])
def test_stock_strategies_run_and_learn(small: Small, tmp_path: Path, aggregator: Any) -> None:
    scenario = small(rounds=4, clients={"train": {"epochs": 3}}, strategy={"aggregator": aggregator, "assumed_malicious": 1})
    digest, summary = final(scenario, tmp_path / "a")
    rounds = (tmp_path / "a" / "rounds.jsonl").read_text().splitlines()
    assert len(rounds) == 5
    assert summary["metrics"]["accuracy"] > 0.2  # chance is 0.1
    assert digest == final(scenario, tmp_path / "b")[0]  # Flower draws its nodes from a global generator; the grid does not care


@pytest.mark.parametrize(("stock", "ours"), [("flwr:FedAvg", "weighted-mean"), ("flwr:FedMedian", "median"), ("flwr:Krum", "krum")])
def test_stock_and_own_rule_give_the_same_model(small: Small, tmp_path: Path, stock: str, ours: str) -> None:
    models = []
    for name in (stock, ours):
        scenario = small(strategy={"aggregator": name, "assumed_malicious": 2})
        final(scenario, tmp_path / name.replace(":", "-"))
        from safetensors.torch import load_file

        models.append(load_file(tmp_path / name.replace(":", "-") / "model.safetensors"))
    for key in models[0]:
        torch.testing.assert_close(models[0][key], models[1][key], atol=1e-5, rtol=1e-4)


def test_fedprox_of_flower_reaches_the_clients(small: Small, tmp_path: Path) -> None:
    plain, _ = final(small(strategy={"aggregator": "flwr:FedAvg"}), tmp_path / "a")
    proximal, _ = final(small(strategy={"aggregator": {"name": "flwr:FedProx", "proximal_mu": 5.0}}), tmp_path / "b")
    assert plain != proximal


@pytest.mark.parametrize("name", ["FedXgbBagging", "DifferentialPrivacyServerSideFixedClipping", "Strategy", "FedAvgg"])
def test_what_cannot_run_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InputError, match=r"cannot run here|no strategy 'FedAvgg'.*did you mean"):
        flower.stock_check(name, {})


def grid_of(setup: Setup, roster: Roster) -> tuple[CohortGrid, LocalExecutor]:
    executor = LocalExecutor(1)
    grid = CohortGrid(setup.world, roster, executor.open(setup.world), stock=False)
    return grid, executor


def ask(grid: CohortGrid, setup: Setup, clients: Iterable[int], number: int = 1, defence: Any = None) -> dict[int, Message]:
    ids = list(clients)
    grid.begin(number, ids, defence)
    record = RecordDict({"arrays": flower.FlatRecord(setup.params, setup.world.layout), "config": ConfigRecord()})
    messages = [Message(content=record, message_type=MessageType.TRAIN, dst_node_id=c) for c in ids]
    return {m.metadata.src_node_id: m for m in grid.send_and_receive(messages)}


def delta(message: Message) -> Tensor:
    record = message.content.array_records["arrays"]
    assert isinstance(record, flower.FlatRecord)
    assert record.delta is not None
    return record.delta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spy(Behaviour):
    """Send what it can see, so that a test can look at it."""

    def craft(self, updates: Tensor, view: View) -> Tensor:
        seen.append((updates.clone(), view))
        if view.others is not None:
            view.others.zero_()  # trying to reach the honest clients' updates
        updates.zero_()
        return torch.full_like(updates, 2.0)


seen: list[tuple[Tensor, View]] = []


@pytest.mark.parametrize("knowledge", ["own", "coalition", "omniscient", "omniscient+defence"])
def test_a_coalition_sees_what_it_was_granted(small: Small, knowledge: Knowledge) -> None:
    setup = build(small())
    honest = REGISTRY.make("behaviour", "honest")
    plain, executor = grid_of(setup, Roster(8, honest))
    truth = {c: delta(m) for c, m in ask(plain, setup, range(8)).items()}
    executor.close()

    seen.clear()
    grid, executor = grid_of(setup, Roster(8, honest, (Group("spy", Spy(), knowledge, (1, 4, 6), (1, 9)),)))
    replies = ask(grid, setup, [0, 1, 2, 4, 5], defence=lambda u, clients=(): u.mean(0))  # client 6 was not sampled
    executor.close()
    for client, message in replies.items():
        expected = torch.full((setup.world.layout.size,), 2.0) if client in (1, 4) else truth[client]
        torch.testing.assert_close(delta(message), expected, atol=1e-6, rtol=1e-5)

    if knowledge == "own":
        assert [v.coalition for _, v in seen] == [(1,), (4,)]
        assert [v.rank for _, v in seen] == [0, 1]
    else:
        assert [v.coalition for _, v in seen] == [(1, 4)]
        torch.testing.assert_close(seen[0][0], torch.stack([truth[1], truth[4]]), atol=1e-6, rtol=1e-5)
    view = seen[0][1]
    assert (view.others is not None) == knowledge.startswith("omniscient")
    assert (view.defence is not None) == (knowledge == "omniscient+defence")
    if view.others is not None:
        assert view.others.shape == (3, setup.world.layout.size)  # 0, 2 and 5; never the spies themselves
    assert view.data is not None
    own = sum(len(setup.world.data.parts[c]) for c in view.coalition)
    assert len(view.data()[0]) == own


def test_outside_its_rounds_an_adversary_is_honest(small: Small) -> None:
    setup = build(small())
    honest = REGISTRY.make("behaviour", "honest")
    grid, executor = grid_of(setup, Roster(8, honest, (Group("sign-flip", REGISTRY.make("behaviour", "sign-flip"), "own", (1,), (2, 3)),)))
    plain, other = grid_of(setup, Roster(8, honest))
    for number, differs in ((1, False), (2, True), (3, True), (4, False)):
        got, expected = delta(ask(grid, setup, [1], number)[1]), delta(ask(plain, setup, [1], number)[1])
        torch.testing.assert_close(got, -expected if differs else expected, atol=1e-6, rtol=1e-5)
    executor.close()
    other.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadCraft(Behaviour):
    """Return something of the wrong shape, or raise."""

    how: str = "shape"

    def craft(self, updates: Tensor, view: View) -> Tensor:
        if self.how == "raise":
            raise ZeroDivisionError("by zero")
        return updates[:, :3]


@pytest.mark.parametrize(("how", "reason"), [("shape", "returned shape"), ("raise", "ZeroDivisionError: by zero")])
def test_a_failing_craft_costs_the_coalition_its_round(small: Small, how: str, reason: str) -> None:
    setup = build(small())
    roster = Roster(8, REGISTRY.make("behaviour", "honest"), (Group("bad", BadCraft(how=how), "coalition", (1, 2), (1, 9)),))
    grid, executor = grid_of(setup, roster)
    replies = ask(grid, setup, range(4))
    executor.close()
    assert [c for c, m in replies.items() if m.has_error()] == [1, 2]
    assert reason in str(replies[1].error.reason)


def test_different_clients_may_be_sent_different_models(small: Small) -> None:
    """What a malicious server or a leak-tracing one needs: each client trains what it was sent."""
    setup = build(small())
    grid, executor = grid_of(setup, Roster(8, REGISTRY.make("behaviour", "honest")))
    grid.begin(1, [0, 1])
    records = [RecordDict({"arrays": flower.FlatRecord(setup.params * s, setup.world.layout), "config": ConfigRecord()}) for s in (1, 3)]
    sent = [Message(content=r, message_type="train", dst_node_id=i) for i, r in enumerate(records)]
    replies = list(grid.send_and_receive(sent))
    executor.close()
    for scale, client in ((1, 0), (3, 1)):
        alone = dataclasses.replace(setup, params=setup.params * scale)
        one, executor = grid_of(setup, Roster(8, REGISTRY.make("behaviour", "honest")))
        expected = delta(ask(one, alone, [client])[client])
        executor.close()
        torch.testing.assert_close(delta(replies[client]), expected, atol=1e-6, rtol=1e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Obeys(Behaviour):
    """Send what the server sent beside the model, plus one for every round it remembers."""

    def remember(self, size: int) -> dict[str, Tensor]:
        return {"rounds": torch.zeros(())}

    def craft(self, updates: Tensor, view: View) -> Tensor:
        view.memory["rounds"] = view.memory["rounds"] + 1
        return (view.server["hint"] + view.memory["rounds"]).expand_as(updates)


def test_what_the_server_sends_beside_the_model_arrives_and_memories_last(small: Small) -> None:
    setup = build(small())
    layout = setup.world.layout
    hint = torch.arange(float(layout.size))
    for knowledge, expected in (("own", [1, 2, 1]), ("coalition", [1, 2, 3])):
        roster = Roster(8, REGISTRY.make("behaviour", "honest"), (Group("obeys", Obeys(), knowledge, (1, 2), (1, 9)),))
        grid, executor = grid_of(setup, roster)
        for number, client, rounds in zip((1, 2, 3), (1, 1, 2), expected, strict=True):
            grid.begin(number, [client])
            record = RecordDict({"arrays": flower.FlatRecord(setup.params, layout), "hint": flower.FlatRecord(hint, layout)})
            (reply,) = grid.send_and_receive([Message(content=record, message_type="train", dst_node_id=client)])
            assert torch.equal(delta(reply), hint + rounds)  # a coalition remembers together, whoever was sampled
        executor.close()


def test_push_and_pull(small: Small) -> None:
    setup = build(small())
    grid, executor = grid_of(setup, Roster(8, REGISTRY.make("behaviour", "honest")))
    grid.begin(1, [0, 3])
    record = RecordDict({"arrays": flower.FlatRecord(setup.params, setup.world.layout), "config": ConfigRecord()})
    ids = list(grid.push_messages([grid.create_message(record, "train", c, "1") for c in (3, 0)]))
    pulled = list(grid.pull_messages(ids))
    executor.close()
    assert [m.metadata.src_node_id for m in pulled] == [3, 0]
    assert list(grid.pull_messages(ids)) == []


def test_a_client_that_cannot_be_reached_is_the_strategys_error(small: Small) -> None:
    setup = build(small())
    grid, executor = grid_of(setup, Roster(8, REGISTRY.make("behaviour", "honest")))
    grid.begin(1, [0, 1])
    record = RecordDict({"arrays": flower.FlatRecord(setup.params, setup.world.layout)})
    with pytest.raises(RunError, match="client 5"):
        grid.send_and_receive([Message(content=record, message_type="train", dst_node_id=5)])
    executor.close()


def test_lazy_arrays_are_what_flower_expects() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    lazy = flower.LazyArray(lambda: tensor.numpy().copy(), (2, 3))
    assert (lazy.dtype, lazy.shape, lazy.stype) == ("float32", (2, 3), "numpy.ndarray")
    lazy.numpy()[0, 0] = 99  # stock QFedAvg computes in place
    assert tensor[0, 0] == 0
    from flwr.app import Array

    assert lazy.data == Array(tensor.numpy()).data
    assert np.array_equal(ArrayRecord({"w": lazy})["w"].numpy(), tensor.numpy())


def test_the_arrays_of_a_record_belong_to_whoever_reads_them() -> None:
    layout = Layout(("w", "b"), ((2, 3), (2,)))
    base, delta = torch.arange(8.0), torch.full((8,), 0.5)
    record = flower.FlatRecord(base, layout, delta).fill()
    for _ in range(3):
        read = {name: record[name].numpy() for name in ("b", "w")}
        assert np.array_equal(read["w"], (base + delta)[:6].view(2, 3).numpy())
        assert np.array_equal(read["b"], (base + delta)[6:].numpy())
        read["w"] += 7  # stock QFedAvg computes in place
        read["b"] *= 0
    assert torch.equal(base, torch.arange(8.0))
    assert torch.equal(delta, torch.full((8,), 0.5))
    sent = flower.FlatRecord(base, layout).fill()
    sent["w"].numpy()[:] = 9
    assert torch.equal(flower.to_flat(sent, layout), base)


def test_a_float64_model_comes_back_as_float32_and_a_strange_one_is_refused(small: Small) -> None:
    layout = build(small()).world.layout
    full = flower.FlatRecord(torch.ones(layout.size), layout).fill()
    wide = ArrayRecord([a.numpy().astype(np.float64) for a in full.values()])
    record = ArrayRecord({n: wide[str(i)] for i, n in enumerate(layout.names)})
    assert flower.to_flat(record, layout).dtype == torch.float32
    del record[layout.names[0]]
    with pytest.raises(RunError, match="without parameter"):
        flower.to_flat(record, layout)


def test_flower_strategies_of_the_user_run_too(small: Small) -> None:
    """Any `Strategy` object can drive the grid, not only those that a scenario can name."""
    setup = build(small())
    grid, executor = grid_of(setup, Roster(8, REGISTRY.make("behaviour", "honest")))
    grid._stock = True
    grid.begin(1, range(8))
    arrays = flower.FlatRecord(setup.params, setup.world.layout).fill()
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid, arrays, num_rounds=1)
    executor.close()
    assert float((flower.to_flat(result.arrays, setup.world.layout) - setup.params).norm()) > 0.01


def test_our_strategy_is_a_flower_strategy(small: Small, tmp_path: Path) -> None:
    """Flower's own loop drives it to the same model as the runner's."""
    scenario = small(strategy={"filters": ["norm-clip"], "aggregator": "median", "steps": ["fedavgm"]})
    setup = build(scenario)

    class EveryRound(CohortGrid):
        """Flower's loop does not say which round it is: count the sends."""

        number = 0

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            if not (sent := list(messages)):
                return []
            EveryRound.number += 1
            self.begin(EveryRound.number, range(8))
            return super().send_and_receive(sent)

    executor = LocalExecutor(1)
    grid = EveryRound(setup.world, setup.roster, executor.open(setup.world), stock=False)
    grid.begin(1, range(8))
    result = setup.strategy.start(grid, flower.FlatRecord(setup.params, setup.world.layout), num_rounds=2)
    executor.close()
    final(scenario, tmp_path / "a")
    from safetensors.torch import load_file

    expected = load_file(tmp_path / "a" / "model.safetensors")
    torch.testing.assert_close(flower.to_flat(result.arrays, setup.world.layout), setup.world.layout.flatten(expected), atol=0, rtol=0)


def test_an_attackers_view_of_the_rule_is_the_rule_with_its_past(small: Small) -> None:
    setup = build(small(strategy={"steps": [{"name": "fedavgm", "momentum": 0.5}]}))
    strategy, size = setup.strategy, setup.world.layout.size
    assert isinstance(strategy, FedTrustStrategy)
    strategy.states = {"steps[0]": {"velocity": torch.full((size,), 4.0)}}
    defence = strategy.preview(2, setup.params)
    updates = torch.stack([torch.zeros(size), torch.full((size,), 2.0)])
    for _ in range(2):  # asking does not change it
        torch.testing.assert_close(defence(updates), torch.full((size,), 0.5 * 4.0 + 1.0))
    assert bool((strategy.states["steps[0]"]["velocity"] == 4.0).all())


def test_a_memory_that_only_craft_reads_is_kept_once(small: Small) -> None:
    """A coalition of three that remembers four vectors of the model's size must not put twelve into every checkpoint."""
    attackers = [{"behaviour": "poisoned-fl", "ids": [1, 3, 4]}]
    setup = build(small(attackers=attackers))
    grid, executor = grid_of(setup, setup.roster)
    ask(grid, setup, range(8))
    ask(grid, setup, range(8), number=2)
    executor.close()
    assert grid.memories.keys() == {"0"}
    assert int(grid.memories["0"]["rounds"]) == 2
