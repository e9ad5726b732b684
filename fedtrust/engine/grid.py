"""A Flower `Grid` whose clients are simulated in batches.

Any Flower strategy can send its messages here. Those of a round are grouped by the model they carry and the loss their clients minimise,
cut into chunks, trained by the executor, crafted by the coalitions and come back as replies, sorted by client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedtrust import views
from fedtrust.client import Behaviour, ClientMemory, Reply, overrides
from fedtrust.engine import flower
from fedtrust.engine.cohort import Chunk, ClientTask, Trained
from fedtrust.engine.roster import Group, Roster
from fedtrust.engine.workers import Executor, chunks_of
from fedtrust.engine.world import World
from fedtrust.errors import RunError
from fedtrust.registry import REGISTRY

Defence = Callable[[Tensor], Tensor]


class _Order(NamedTuple):
    """What a client was told: the message, the model and the extras in it."""

    message: Message
    params: Tensor
    server: Mapping[str, Tensor]
    task: ClientTask


class CohortGrid(Grid):
    """The simulated clients of one run, behind Flower's `Grid` interface.

    Attributes:
        losses: client → mean training loss of its last round, as trained (a teacher's view; the replies carry the same number).
        memories: what clients and coalitions remember, by whose it is: `honest/3` is what client 3 keeps while it is honest, `0/3` what
            it keeps for the first adversary, `0` what that adversary's coalition keeps together.
    """

    def __init__(self, world: World, roster: Roster, executor: Executor, *, stock: bool) -> None:
        """Bring up the grid.

        Args:
            world: the run's data, architecture and recipe.
            roster: who does what.
            executor: who computes; it must have been opened with this world.
            stock: whether a stock Flower strategy reads the replies (it needs named arrays; ours reads the vectors).
        """
        flower.enter()
        self._world, self._roster, self._executor, self._stock = world, roster, executor, stock
        self._round = 0
        self._cohort: list[int] = []
        self._sent = 0
        self._replies: dict[str, Message] = {}
        self._defence: Defence | None = None
        self.memories: dict[str, ClientMemory] = {}
        self.losses: dict[int, float] = {}

    def begin(self, round_number: int, cohort: Sequence[int], defence: Defence | None = None) -> None:
        """Start a round: only `cohort` can be reached; `defence` is the server's rule for those who are granted it."""
        self._round, self._cohort, self._defence = round_number, list(cohort), defence
        self._replies.clear()
        self.losses.clear()

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients that can be reached this round; a node's id is its client's."""
        return list(self._cohort)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Train the clients that the messages address and return their replies, sorted by client."""
        models: dict[int, Tensor] = {}  # all messages of a round usually share one record: read it once
        orders = sorted((self._order(m, models) for m in messages), key=lambda o: o.task.client)
        if not orders:
            return []
        rows, faults = self._train(orders)
        self._craft(orders, rows, faults)
        replies = [self._reply(order, rows, faults) for order in orders]
        return [r for r in replies if r is not None]

    def _order(self, message: Message, models: dict[int, Tensor]) -> _Order:
        self._sent += 1
        client = int(message.metadata.dst_node_id)
        if client not in self._cohort:
            raise RunError(f"the strategy asked client {client}, which cannot be reached in round {self._round}")
        flower.stamped(message, self._sent)
        records = message.content.array_records
        record = records[flower.ARRAYS]
        if id(record) not in models:
            models[id(record)] = flower.to_flat(record, self._world.layout)
        params = models[id(record)]
        server = {k: v for k, v in records.items() if k != flower.ARRAYS}
        extras = {name: record.flat for name, record in server.items() if isinstance(record, flower.FlatRecord)}
        behaviour, rank, recruits = self._behaviour(client, flower.config(message.content))
        memory = self._memory(f"{self._owner(client)}/{client}", behaviour)
        return _Order(message, params, extras, ClientTask(client, behaviour, memory, rank, recruits))

    def _owner(self, client: int) -> str:
        group = self._roster.group(client, self._round)
        return "honest" if group is None else str(self._roster.groups.index(group))

    def _memory(self, owner: str, behaviour: Behaviour) -> ClientMemory:
        known = self.memories.get(owner)
        if known is not None:
            return known
        try:
            first = dict(behaviour.remember(self._world.layout.size))
            views.check_memory(first, first)
        except (Exception, SystemExit) as error:  # a student's hook may raise anything
            raise RunError(f"`remember` of {type(behaviour).__name__} fails: {type(error).__name__}: {error}") from error
        return first

    def _behaviour(self, client: int, config: Mapping[str, Any]) -> tuple[Behaviour, int, int]:
        group = self._roster.group(client, self._round)
        if group is not None:
            return group.behaviour, group.members.index(client), len(group.members)
        if config.get("proximal-mu"):  # stock FedProx tells its clients so
            return REGISTRY.make("behaviour", "fedprox", {"mu": float(config["proximal-mu"])}), 0, 1
        return self._roster.honest, 0, 1

    def _train(self, orders: Sequence[_Order]) -> tuple[dict[int, Tensor], dict[int, str]]:
        """Train everybody; return the updates [d] by client, and who could not be trained."""
        chunks = [chunk for group in _alike(orders) for chunk in self._chunks(group)]
        rows: dict[int, Tensor] = {}
        faults: dict[int, str] = {}
        for result in self._executor.run(chunks):
            self._take(result, rows)
            faults.update(result.faults)
        return rows, faults

    def _chunks(self, group: Sequence[_Order]) -> Iterable[Chunk]:
        sizes = [self._world.examples(o.task.client) for o in group]
        for positions in chunks_of(sizes, len(group)):
            yield Chunk(self._round, group[0].params, group[0].server, tuple(group[i].task for i in positions))

    def _take(self, result: Trained, rows: dict[int, Tensor]) -> None:
        for i, client in enumerate(result.clients):
            rows[client] = result.updates[i]
            self.losses[client] = float(result.losses[i])
            if result.memories[i]:
                self.memories[f"{self._owner(client)}/{client}"] = result.memories[i]

    def _craft(self, orders: Sequence[_Order], rows: dict[int, Tensor], faults: dict[int, str]) -> None:
        """Let those whose behaviour changes the update do so: honest clients first and alone, then adversaries with what they may know."""
        trained = [o for o in orders if o.task.client in rows]
        crafting = [o for o in trained if overrides(o.task.behaviour, "craft")]
        acting = {o.task.client: self._roster.group(o.task.client, self._round) for o in trained}
        nothing = torch.zeros(0, self._world.layout.size)
        for order in crafting:
            if acting[order.task.client] is None:
                self._craft_party(None, [order], rows, nothing, faults)
        parties: list[tuple[Group, list[_Order]]] = []
        for order in crafting:
            group = acting[order.task.client]
            if group is None:
                continue
            party = None if group.knowledge == "own" else next((p for g, p in parties if g is group), None)
            if party is None:
                parties.append((group, [order]))
            else:
                party.append(order)
        honest = [rows[c] for c, group in acting.items() if group is None and c in rows]
        sees = any(views.at_least(group.knowledge, "omniscient") for group, _ in parties)
        others = torch.stack(honest) if sees and honest else nothing
        for group, party in parties:
            self._craft_party(group, party, rows, others, faults)

    def _craft_party(
        self, group: Group | None, party: list[_Order], rows: dict[int, Tensor], others: Tensor, faults: dict[int, str]
    ) -> None:
        knowledge = "own" if group is None else group.knowledge
        client, behaviour = party[0].task.client, party[0].task.behaviour
        keeper = f"{self._owner(client)}/{client}" if knowledge == "own" else self._owner(client)
        known = self._memory(keeper, behaviour)
        memory = {name: value.clone() for name, value in known.items()}
        view = views.crafting_view(
            self._world, self._round, party[0].params, party[0].server, [o.task for o in party], knowledge, memory, others, self._defence
        )
        given = torch.stack([rows[o.task.client] for o in party])
        try:
            crafted = behaviour.craft(given.clone(), view)
            if crafted.shape != given.shape:
                raise ValueError(f"returned shape {list(crafted.shape)}, expected {list(given.shape)}")
            views.check_memory(view.memory, known)
            if crafted.dtype != torch.float32:
                raise TypeError(f"returned {crafted.dtype}, expected torch.float32")
            crafted = crafted.detach().cpu()
        except (Exception, SystemExit) as error:  # a student's hook may raise anything
            for order in party:
                del rows[order.task.client]
                faults[order.task.client] = f"craft: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
            return
        if view.memory:
            self.memories[keeper] = {name: value.detach().cpu() for name, value in view.memory.items()}
        for i, order in enumerate(party):
            rows[order.task.client] = crafted[i]

    def _reply(self, order: _Order, rows: Mapping[int, Tensor], faults: dict[int, str]) -> Message | None:
        client, behaviour = order.task.client, order.task.behaviour
        if client not in rows:
            return flower.failure(order.message, faults.get(client, "not trained"))
        delta = rows[client]
        record = flower.FlatRecord(order.params, self._world.layout, delta)
        examples = self._world.examples(client)
        loss = self.losses[client]
        if not overrides(behaviour, "reply"):
            return flower.answer(order.message, record.fill() if self._stock else record, examples, loss)
        try:
            view = views.local_view(self._world, Chunk(self._round, order.params, order.server, ()), order.task, "reply")
            sent = behaviour.reply(Reply(dict(self._world.layout.unflatten(record.flat)), examples), view)
            if sent is None:
                return None
            return flower.answer(order.message, _record(sent.arrays), sent.examples, loss)
        except (Exception, SystemExit) as error:  # a student's hook may raise anything
            return flower.failure(order.message, f"reply: {type(error).__name__}: {' '.join(str(error).split())}"[:300])

    # The rest of Flower's interface, for strategies that push and pull by themselves.

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; the replies can be pulled at once."""
        sent = list(messages)
        for reply in self.send_and_receive(sent):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [m.metadata.message_id for m in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that have come in, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """Return a new message to a client."""
        return Message(content=content, message_type=message_type, dst_node_id=dst_node_id, group_id=group_id, ttl=ttl)

    def set_run(self, run: Any) -> None:
        """Do nothing: the grid belongs to one run."""

    @property
    def run(self) -> Any:
        """There is no Flower run behind this grid."""
        return None


def _alike(orders: Sequence[_Order]) -> list[list[_Order]]:
    """Group orders that can be trained in one block: the same model and extras sent, and the same loss."""
    groups: list[list[_Order]] = []
    for order in orders:
        for group in groups:
            first = group[0]
            if _same_model(first, order) and _same_loss(first.task, order.task):
                group.append(order)
                break
        else:
            groups.append([order])
    return groups


def _same_model(a: _Order, b: _Order) -> bool:
    if a.message.content is b.message.content:
        return True
    one, two = a.message.content.array_records, b.message.content.array_records
    return one.keys() == two.keys() and all(one[k] is two[k] for k in one)


def _same_loss(a: ClientTask, b: ClientTask) -> bool:
    if not overrides(a.behaviour, "loss") and not overrides(b.behaviour, "loss"):
        return {k: v.shape for k, v in a.memory.items()} == {k: v.shape for k, v in b.memory.items()}
    return a.behaviour == b.behaviour


def _record(arrays: Mapping[str, Any]) -> ArrayRecord:
    """Put whatever a client made of its model into a Flower record."""
    record = ArrayRecord()
    for name, value in arrays.items():
        record[name] = Array(value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value))
    return record
