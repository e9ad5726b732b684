"""Flower's stock strategies and ours on the same updates.

Where they differ, ours follow the paper:

* Flower's FedAvg and Krum families work on weights, ours on updates; the rules are translation-equivariant, so the models agree up to
  float32's last digits.
* Flower's MultiKrum averages its selection by number of samples; ours, as Blanchard et al. have it, with equal weights. Equal numbers
  of samples make them one.
* Flower's FedTrimmedAvg cuts int(beta * n) from each end, ours the assumed number of attackers: the betas here give whole numbers.
* Flower's Krum looks for a row's nearest neighbours at places 1 … n − f − 2 of the sorted distances, taking place 0 for the row itself:
  wrong for copies, the same here.
* Flower starts v of FedAdagrad, FedAdam and FedYogi at 0 (paper: at least τ²), and divides Adam's rate by Kingma and Ba's bias
  correction, which algorithm 2 of Reddi et al. has not. `test_fedopt` has the paper's; here only FedAvgM is compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from fedtrust.engine import flower
from fedtrust.layout import Layout
from tests.strategies.rules_kit import context, normal, verdict

LAYOUT = Layout(("a.weight", "a.bias", "b.weight"), ((4, 3), (4,), (2, 4)))
D = LAYOUT.size


def replies(base: Tensor, updates: Tensor, examples: list[int]) -> list[Message]:
    """What the clients would send to a stock strategy."""
    flower.enter()
    answers = []
    for client, (update, count) in enumerate(zip(updates, examples, strict=True)):
        order = flower.instruction(RecordDict({flower.CONFIG: ConfigRecord()}), client, client + 1)
        answers.append(flower.answer(order, flower.FlatRecord(base, LAYOUT, update).fill(), count, 0.5))
    return answers


def stock(name: str, base: Tensor, updates: Tensor, examples: list[int], f: int = 0, **params: Any) -> Tensor:
    """The change of the model that the stock strategy makes of the updates."""
    strategy = flower.stock_strategy(name, params, f)
    arrays, _ = strategy.aggregate_train(1, replies(base, updates, examples))
    assert arrays is not None
    return flower.to_flat(arrays, LAYOUT) - base


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "params", "ours", "our_params", "f"),
    [
        ("FedAvg", {}, "mean", {}, 0),
        ("FedMedian", {}, "median", {}, 0),
        ("FedTrimmedAvg", {"beta": 0.2}, "trimmed-mean", {}, 2),
        ("FedTrimmedAvg", {"beta": 0.4}, "trimmed-mean", {"trim": 4}, 0),
        ("Krum", {}, "krum", {}, 2),
        ("MultiKrum", {"num_nodes_to_select": 8}, "multi-krum", {}, 2),
        ("MultiKrum", {"num_nodes_to_select": 3}, "multi-krum", {"m": 3}, 3),
    ],
)
def test_the_rules_agree(seed: int, name: str, params: dict[str, Any], ours: str, our_params: dict[str, Any], f: int) -> None:
    updates = normal(10, D, seed=seed)
    updates[:f] *= 5.0  # so that a rule that drops nobody is seen
    base = normal(1, D, seed=99)[0]
    theirs = stock(name, base, updates, [50] * 10, f, **params)
    mine = verdict("aggregator", ours, updates, f=f, **our_params).value
    assert torch.allclose(theirs, mine, atol=2e-6)


def test_fedavg_weighs_by_samples() -> None:
    updates, base, examples = normal(5, D, seed=1), normal(1, D, seed=2)[0], [10, 200, 30, 1, 77]
    mine = verdict("aggregator", "weighted-mean", updates, context(5, D, weights=torch.tensor(examples, dtype=torch.float32))).value
    assert torch.allclose(stock("FedAvg", base, updates, examples), mine, atol=2e-6)
    assert not torch.allclose(mine, verdict("aggregator", "mean", updates).value, atol=1e-2)


def test_fedavgm_over_several_rounds() -> None:
    start = normal(1, D, seed=3)[0]
    strategy = flower.stock_strategy("FedAvgM", {"server_learning_rate": 0.5, "server_momentum": 0.9}, 0)
    strategy.current_arrays = flower.FlatRecord(start, LAYOUT).fill()  # as its configure_train would
    theirs, mine, state = start.clone(), start.clone(), {}
    for r in range(4):
        updates = normal(3, D, seed=10 + r)
        arrays, _ = strategy.aggregate_train(r + 1, replies(theirs, updates, [20, 20, 20]))
        assert arrays is not None
        theirs = flower.to_flat(arrays, LAYOUT)
        result = verdict("step", "fedavgm", updates.mean(0), context(3, D, state=state), lr=0.5, momentum=0.9)
        assert result.state is not None
        state, mine = dict(result.state), mine + result.value
        assert torch.allclose(theirs, mine, atol=5e-6)
    assert not torch.allclose(theirs, start, atol=0.1)
