"""What passes through the grid in a round: what clients are told, which of them can be trained together, what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flwr.app import Message
from torch import Tensor

from fedtrust.client import overrides
from fedtrust.engine import flower
from fedtrust.engine.cohort import ClientTask, Trained


class Sent(NamedTuple):
    """What a message says: the model [d], the extras by name, the configuration."""

    params: Tensor
    server: Mapping[str, Tensor]
    config: Mapping[str, Any]


class Order(NamedTuple):
    """What a client was told: the message, the model and the extras in it.

    `changes` says whether its update or its message is its own code's affair after training, so that nobody may add it up before.
    """

    message: Message
    params: Tensor
    server: Mapping[str, Tensor]
    task: ClientTask
    changes: bool


class Progress:
    """What has come of the orders of a round.

    Attributes:
        rows: client → update [d]; without those that were only added up.
        norms: client → L2 norm of its update, as trained.
        faults: client → why it has no update.
        added: the sum of the updates that were added up where they were made.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}
        self.norms: dict[int, float] = {}
        self.faults: dict[int, str] = {}
        self.added: flower.Added | None = None


class Adder:
    """Gathers what the chunks of a round say about their sums."""

    def __init__(self) -> None:
        self._clients: list[int] = []
        self._trust: dict[int, float] = {}
        self._bound: float | None = None

    def take(self, result: Trained) -> None:
        """Take a chunk's result."""
        if result.partial is None:
            return
        self._clients += result.clients
        self._bound = result.partial.bound
        if result.partial.trust is not None:
            self._trust |= dict(zip(result.clients, result.partial.trust.tolist(), strict=True))

    def result(self, total: Tensor | None) -> flower.Added | None:
        """Return it with the sum of all, or `None` if nothing was added up."""
        return None if total is None else flower.Added(total, frozenset(self._clients), self._trust or None, self._bound)


def alike(orders: Sequence[Order]) -> list[list[Order]]:
    """Group orders that can be trained in one block: the same model and extras sent, and the same training."""
    groups: list[list[Order]] = []
    for order in orders:
        for group in groups:
            first = group[0]
            if _same_model(first, order) and _same_loss(first.task, order.task):
                group.append(order)
                break
        else:
            groups.append([order])
    return groups


def _same_model(a: Order, b: Order) -> bool:
    if a.message.content is b.message.content:
        return True
    one, two = a.message.content.array_records, b.message.content.array_records
    return one.keys() == two.keys() and all(one[k] is two[k] for k in one)


def _same_loss(a: ClientTask, b: ClientTask) -> bool:
    if a.behaviour is b.behaviour and not a.memory and not b.memory:
        return True
    if not any(overrides(one.behaviour, hook) for one in (a, b) for hook in ("loss", "per_sample", "project")):
        return {k: v.shape for k, v in a.memory.items()} == {k: v.shape for k, v in b.memory.items()}
    return a.behaviour == b.behaviour
