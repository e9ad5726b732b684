"""A Flower `Grid` whose clients are simulated in batches.

Any Flower strategy can send its messages here. Those of a round are grouped by the model they carry and the loss their clients minimise,
cut into chunks, trained by the executor, crafted by the coalitions and come back as replies, sorted by client.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedtrust import views
from fedtrust.client import Behaviour, ClientMemory, Knowledge, Poisoned, Reply, View, overrides
from fedtrust.engine import flower, prepare, threads
from fedtrust.engine.chunks import chunks_of
from fedtrust.engine.cohort import Chunk, ClientTask, Trained
from fedtrust.engine.devices import Plan
from fedtrust.engine.orders import Adder, Order, Progress, Sent, alike
from fedtrust.engine.partial import Sums
from fedtrust.engine.roster import Group, Roster
from fedtrust.engine.workers import Job
from fedtrust.engine.world import World
from fedtrust.errors import RunError
from fedtrust.registry import REGISTRY

Defence = Callable[..., Tensor]
Targets = tuple[Tensor, Tensor] | None

#: The hooks that run where the client is.
_AT_HOME = ("poison", "loss", "project", "reply")


class CohortGrid(Grid):
    """The simulated clients of one run, behind Flower's `Grid` interface.

    Attributes:
        losses: client → mean training loss of its last round, as trained (a teacher's view; the replies carry the same number).
        memories: what clients and coalitions remember, by whose it is: `honest/3` is what client 3 keeps while it is honest, `0/3` what
            it keeps for the first adversary, `0` what that adversary's coalition keeps together.
    """

    def __init__(self, world: World, roster: Roster, job: Job, *, stock: bool, deadline: float = 600.0) -> None:
        """Bring up the grid.

        Args:
            world: the run's data, architecture and recipe.
            roster: who does what.
            job: this world's place on the workers.
            stock: whether a stock Flower strategy reads the replies (it needs named arrays; ours reads the vectors).
            deadline: seconds that a coalition gets to craft, or a client to put its message together.
        """
        flower.enter()
        self._world, self._roster, self._job, self._stock = world, roster, job, stock
        self._deadline = deadline
        self._round = 0
        self._cohort: list[int] = []
        self._sent = 0
        self._replies: dict[str, Message] = {}
        self._defence: Defence | None = None
        self._plan = Plan([])
        self._sums: Sums | None = None
        self._watched = False
        self.memories: dict[str, ClientMemory] = {}
        self.losses: dict[int, float] = {}

    def begin(
        self,
        round_number: int,
        cohort: Sequence[int],
        defence: Defence | None = None,
        plan: Plan | None = None,
        sums: Sums | None = None,
        watched: bool = False,
    ) -> None:
        """Start a round.

        Args:
            round_number: the round, from 1.
            cohort: who can be reached.
            defence: the server's rule `(updates, clients) -> delta`, for those who are granted it.
            plan: who will not reply in time and is not trained, and who does only part of the work.
            sums: how updates may be added up where they are made; `None`: the server's rule wants to see each.
            watched: whether somebody looks at each update even so.
        """
        self._round, self._cohort, self._defence, self._sums, self._watched = round_number, list(cohort), defence, sums, watched
        self._plan = Plan(self._cohort) if plan is None else plan
        self._replies.clear()
        self.losses.clear()

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients that can be reached this round; a node's id is its client's."""
        return list(self._cohort)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Train the clients that the messages address and return their replies, sorted by client."""
        sent: dict[int, Sent] = {}  # all messages of a round usually share one content: read it once
        reachable = set(self._cohort)
        orders = sorted((self._order(m, sent, reachable) for m in messages), key=lambda o: o.task.client)
        if not orders:
            return []
        absent = self._plan.absent
        ready, failed = self._agree([o for o in orders if o.task.client not in absent])
        progress = self._train(ready)
        progress.faults |= absent | failed
        self._craft(orders, progress.rows, progress.faults, progress.norms)
        replies = [self._reply(order, progress) for order in orders]
        return [r for r in replies if r is not None]

    def _order(self, message: Message, sent: dict[int, Sent], reachable: set[int]) -> Order:
        self._sent += 1
        client = flower.addressee(message)
        if client not in reachable:
            raise RunError(f"the strategy asked client {client}, which cannot be reached in round {self._round}")
        flower.stamped(message, self._sent)
        content = message.content
        said = sent.get(id(content))
        if said is None:
            said = sent[id(content)] = self._read(content, sent)
        task = self.task(client, said.config)
        changes = overrides(task.behaviour, "craft") or overrides(task.behaviour, "reply")
        return Order(message, said.params, said.server, task, changes)

    def task(self, client: int, config: Mapping[str, Any] | None = None) -> ClientTask:
        """Return what a client does in this round, given what the strategy told it."""
        behaviour, rank, recruits, targets = self._behaviour(client, config or {})
        # A memory that only `craft` reads is the coalition's affair, or looked up there: it need not cross to a worker and back.
        wanted = overrides(behaviour, "remember") and any(overrides(behaviour, hook) for hook in _AT_HOME)
        memory = self._memory(f"{self._owner(client)}/{client}", behaviour) if wanted else {}
        return ClientTask(client, behaviour, memory, rank, recruits, self._plan.limits.get(client), targets)

    def _read(self, content: RecordDict, sent: dict[int, Sent]) -> Sent:
        records = content.array_records
        record = records[flower.ARRAYS]
        # Messages with contents of their own may still carry one model: it must stay one tensor, so that it crosses to a worker once.
        if id(record) not in sent:
            sent[id(record)] = Sent(flower.to_flat(record, self._world.layout), {}, {})
        extras = {n: r.flat for n, r in records.items() if n != flower.ARRAYS and isinstance(r, flower.FlatRecord)}
        return Sent(sent[id(record)].params, extras, flower.config(content))

    def _agree(self, orders: Sequence[Order]) -> tuple[list[Order], dict[int, str]]:
        """Let each coalition settle what its members share this round; return who can be trained, and why the others cannot."""
        ready = list(orders)
        failed: dict[int, str] = {}
        for place, group in enumerate(self._roster.groups):
            members = [o for o in ready if self._roster.group(o.task.client, self._round) is group]
            if not members or not overrides(group.behaviour, "agree"):
                continue
            known = self._memory(str(place), group.behaviour)
            view = self._coalition_view(group.knowledge, members, known, (), torch.zeros(0, self._world.layout.size), "agree")
            try:
                threads.within(self._deadline, functools.partial(group.behaviour.agree, view))
                views.check_memory(view.memory, known)
            except (Exception, SystemExit) as error:  # a student's hook may raise anything
                failed |= {o.task.client: prepare.said("agree", error) for o in members}
                ready = [o for o in ready if o.task.client not in failed]
                continue
            shared = self.memories[str(place)] = {name: value.detach().cpu() for name, value in view.memory.items()}
            clients = {o.task.client for o in members}
            ready = [o._replace(task=o.task._replace(shared=shared)) if o.task.client in clients else o for o in ready]
        return ready, failed

    def _coalition_view(
        self, knowledge: Knowledge, party: Sequence[Order], known: ClientMemory, honest: Sequence[int], others: Tensor, purpose: str
    ) -> View:
        """Return what a coalition knows; it may write on a copy of what it remembers. `others` are the updates of the clients `honest`."""
        return views.crafting_view(
            self._world,
            self._round,
            party[0].params,
            party[0].server,
            [o.task for o in party],
            knowledge,
            {name: value.clone() for name, value in known.items()},
            others,
            self._defence,
            len(self._cohort),
            purpose,
            honest,
        )

    def _owner(self, client: int) -> str:
        group = self._roster.group(client, self._round)
        return "honest" if group is None else str(self._roster.groups.index(group))

    def _memory(self, owner: str, behaviour: Behaviour) -> ClientMemory:
        known = self.memories.get(owner)
        if known is not None:
            return known
        if not overrides(behaviour, "remember"):
            return {}
        try:
            first = dict(behaviour.remember(self._world.layout.size))
            views.check_memory(first, first)
        except (Exception, SystemExit) as error:  # a student's hook may raise anything
            raise RunError(f"`remember` of {type(behaviour).__name__} fails: {type(error).__name__}: {error}") from error
        return first

    def _behaviour(self, client: int, config: Mapping[str, Any]) -> tuple[Behaviour, int, int, Targets]:
        group = self._roster.group(client, self._round)
        if group is not None:
            plays = self._roster.plays[self._roster.groups.index(group)]
            return plays, group.members.index(client), len(group.members), group.targets
        if config.get("proximal-mu"):  # stock FedProx tells its clients so
            return REGISTRY.make("behaviour", "fedprox", {"mu": float(config["proximal-mu"])}), 0, 1, None
        return self._roster.honest, 0, 1, None

    def _train(self, orders: Sequence[Order]) -> Progress:
        """Train everybody: first those whose updates are added up where they are made."""
        adding = alike([o for o in orders if self._sums is not None and not o.changes])
        # Different models were sent: sums of their updates would be sums of different things.
        sums = self._sums if len(adding) == 1 else None
        rows = sums is None or self._watched or any(self._sees_all(o) for o in orders)
        chunks = [chunk for group in adding for chunk in self._chunks(group, sums, rows)]
        chunks += [chunk for group in alike([o for o in orders if self._sums is None or o.changes]) for chunk in self._chunks(group)]
        progress, adder = Progress(), Adder()
        ran = self._job.run(chunks)
        for chunk, result in zip(chunks, ran.results, strict=True):
            self._take(chunk, result, progress)
            adder.take(result)
        progress.added = adder.result(ran.total)
        return progress

    def _sees_all(self, order: Order) -> bool:
        group = self._roster.group(order.task.client, self._round)
        return group is not None and overrides(order.task.behaviour, "craft") and views.at_least(group.knowledge, "omniscient")

    def _chunks(self, group: Sequence[Order], sums: Sums | None = None, rows: bool = True) -> Iterable[Chunk]:
        sizes = [self._world.examples(o.task.client) for o in group]
        for positions in chunks_of(sizes, len(group), self._job.cut()):
            yield Chunk(
                self._round, group[0].params, group[0].server, tuple(group[i].task for i in positions), sums, rows, len(self._cohort)
            )

    def _take(self, chunk: Chunk, result: Trained, progress: Progress) -> None:
        progress.faults.update(result.faults)
        self.losses.update(zip(result.clients, result.losses.tolist(), strict=True))
        if result.norms is not None:
            progress.norms.update(zip(result.clients, result.norms.tolist(), strict=True))
        if chunk.rows:
            progress.rows.update(zip(result.clients, result.updates, strict=True))
        for i, client in enumerate(result.clients):
            if result.memories[i]:
                self.memories[f"{self._owner(client)}/{client}"] = result.memories[i]

    def _craft(self, orders: Sequence[Order], rows: dict[int, Tensor], faults: dict[int, str], norms: dict[int, float]) -> None:
        """Let those whose behaviour changes the update do so: honest clients first and alone, then adversaries with what they may know."""
        trained = [o for o in orders if o.task.client in rows]
        crafting = [o for o in trained if overrides(o.task.behaviour, "craft")]
        for order in crafting:
            norms.pop(order.task.client, None)  # what is crafted must be looked at again
        acting = {o.task.client: self._roster.group(o.task.client, self._round) for o in trained}
        # Who only poisons data leaves the update to the honest software.
        guided = {o.task.client: None if isinstance(o.task.behaviour, Poisoned) else acting[o.task.client] for o in crafting}
        nothing = torch.zeros(0, self._world.layout.size)
        for order in crafting:
            if guided[order.task.client] is None:
                self._craft_party(None, [order], rows, (), nothing, faults)
        parties: list[tuple[Group, list[Order]]] = []
        for order in crafting:
            group = guided[order.task.client]
            if group is None:
                continue
            party = None if group.knowledge == "own" else next((p for g, p in parties if g is group), None)
            if party is None:
                parties.append((group, [order]))
            else:
                party.append(order)
        honest = [c for c, group in acting.items() if group is None and c in rows]
        sees = any(views.at_least(group.knowledge, "omniscient") for group, _ in parties)
        others = torch.stack([rows[c] for c in honest]) if sees and honest else nothing
        for group, party in parties:
            self._craft_party(group, party, rows, honest, others, faults)

    def _craft_party(
        self,
        group: Group | None,
        party: list[Order],
        rows: dict[int, Tensor],
        honest: Sequence[int],
        others: Tensor,
        faults: dict[int, str],
    ) -> None:
        knowledge: Knowledge = "own" if group is None else group.knowledge
        client, behaviour = party[0].task.client, party[0].task.behaviour
        keeper = f"{self._owner(client)}/{client}" if knowledge == "own" else self._owner(client)
        known = self._memory(keeper, behaviour)
        view = self._coalition_view(knowledge, party, known, honest, others, "craft")
        given = torch.stack([rows[o.task.client] for o in party])
        try:
            crafted = threads.within(self._deadline, lambda: behaviour.craft(given.clone(), view))
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

    def _reply(self, order: Order, progress: Progress) -> Message | None:
        client, behaviour = order.task.client, order.task.behaviour
        delta, added = progress.rows.get(client), progress.added
        if added is not None and client not in added.clients:
            added = None
        if delta is None and added is None:
            return flower.failure(order.message, progress.faults.get(client, "not trained"))
        layout, examples, loss = self._world.layout, self._world.examples(client), self.losses[client]
        if not (order.changes and overrides(behaviour, "reply")):
            norm = progress.norms.get(client)
            return flower.CohortReply(order.message, order.params, layout, delta, examples, loss, norm, added, self._stock)
        record = flower.FlatRecord(order.params, layout, delta)
        try:
            view = views.local_view(
                self._world, Chunk(self._round, order.params, order.server, (), cohort=len(self._cohort)), order.task, "reply"
            )
            plain = Reply(dict(layout.unflatten(record.flat)), examples)
            sent = threads.within(self._deadline, lambda: behaviour.reply(plain, view))
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


def _record(arrays: Mapping[str, Any]) -> ArrayRecord:
    """Put whatever a client made of its model into a Flower record."""
    record = ArrayRecord()
    for name, value in arrays.items():
        record[name] = Array(value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value))
    return record
