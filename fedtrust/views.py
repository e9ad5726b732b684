"""Who may see what: the only place where an adversary's or an observer's knowledge is handed out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedtrust.client import KNOWLEDGE, ClientMemory, Knowledge, View, capabilities
from fedtrust.engine import seeds
from fedtrust.release import Metered

if TYPE_CHECKING:
    from fedtrust.engine.cohort import Chunk, ClientTask
    from fedtrust.engine.world import World
    from fedtrust.probes.base import ProbeContext


def at_least(knowledge: Knowledge, needed: Knowledge) -> bool:
    """Return whether one level of knowledge includes another."""
    return KNOWLEDGE.index(knowledge) >= KNOWLEDGE.index(needed)


def local_view(world: World, chunk: Chunk, task: ClientTask, purpose: str) -> View:
    """Return what a single client knows while it prepares its data and trains; copies, so that writing on them harms nobody else.

    Everything lies on the CPU, wherever clients train: so does its generator, and its code need not know.
    """
    params = chunk.params
    if capabilities(type(task.behaviour)):  # its own code runs; without any, copying would only cost time
        params = params.clone()
    return View(
        params=params,
        round=chunk.round,
        task=world.data.task,
        layout=world.layout,
        model=world.model,
        criterion=world.criterion,
        memory=_copies(task.memory),
        server=_copies(chunk.server),
        rng=seeds.torch_stream(world.seed, purpose, chunk.round, task.client),
        client=task.client,
        coalition=(task.client,),
        rank=task.rank,
        recruits=task.recruits,
        cohort=chunk.cohort,
        targets=_pair(task.targets),
        shared=None if task.shared is None else _copies(task.shared),
    )


def quiet_view(world: World, chunk: Chunk) -> View:
    """Return what stands for the knowledge of clients without code of their own: nobody reads it, so nothing is copied or drawn."""
    return View(
        params=chunk.params,
        round=chunk.round,
        task=world.data.task,
        layout=world.layout,
        model=world.model,
        criterion=world.criterion,
        memory={},
        server=chunk.server,
    )


def _pair(targets: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    return None if targets is None else (targets[0].clone(), targets[1].clone())


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def check_memory(memory: Mapping[str, object], before: Mapping[str, Tensor]) -> None:
    """Refuse a memory whose names or shapes are no longer those that `Behaviour.remember` gave.

    Raises:
        ValueError: says what is wrong with it.
    """
    if memory.keys() != before.keys():
        raise ValueError(f"view.memory holds {sorted(memory)}, but `remember` declared {sorted(before)}")
    for name, old in before.items():
        value = memory[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"memory '{name}' is {type(value).__name__}, expected a tensor")
        if value.shape != old.shape:
            raise ValueError(f"memory '{name}' is a tensor {list(value.shape)}, but `remember` declared {list(old.shape)}")


def in_loss(view: View, device: str = "cpu") -> View:
    """Return the view inside `loss`: no randomness and nothing that differs between the clients of a chunk but their memory.

    It lies on the device where clients train.
    """
    memory, server = ({name: value.to(device) for name, value in part.items()} for part in (view.memory, view.server))
    params = view.params.to(device)
    nobody = view._replace(rng=None, client=None, coalition=(), rank=0, recruits=1, targets=None, shared=None)
    return nobody._replace(params=params, server=server, memory=memory)


def crafting_view(
    world: World,
    round_number: int,
    params: Tensor,
    server: Mapping[str, Tensor],
    members: Sequence[ClientTask],
    knowledge: Knowledge,
    memory: ClientMemory,
    others: Tensor,
    defence: Callable[..., Tensor] | None,
    cohort: int,
    purpose: str = "craft",
    honest: Sequence[int] = (),
) -> View:
    """Return what a coalition knows when it decides what to send.

    Args:
        world: the run.
        round_number: the round, from 1.
        params: the global model they were sent [d].
        server: what else they were sent.
        members: the coalition's clients of this round; one alone without `coalition` knowledge.
        knowledge: what the scenario grants.
        memory: what the coalition remembers; it may write to it.
        others: the honest updates of this round [m, d]; passed on from `omniscient` on, as a copy.
        defence: the server's rule `(updates, clients) -> delta`; passed on with `omniscient+defence`, and with it what the server knows of
            the senders: updates of as many rows as `others` and the coalition have together are taken for theirs, in this order.
        cohort: how many clients were asked this round.
        purpose: what its randomness depends on beside round and coalition.
        honest: whose updates `others` are.
    """
    ids = tuple(m.client for m in members)

    def own_data() -> tuple[Tensor, Tensor]:
        rows = torch.cat([torch.from_numpy(world.data.parts[c]) for c in ids]).to(world.data.x.device)
        return world.data.x[rows], world.data.y[rows]

    def private(what: str, *counters: int) -> np.random.Generator:
        return seeds.stream(world.seed, f"private/{purpose}/{what}", round_number, ids[0], *counters)

    def rule(updates: Tensor) -> Tensor:
        senders = (*honest, *ids)
        return defence(updates, senders if len(updates) == len(senders) else ())  # type: ignore[misc]  # only granted where there is one

    sees_all = at_least(knowledge, "omniscient")
    return View(
        params=params.clone(),
        round=round_number,
        task=world.data.task,
        layout=world.layout,
        model=world.model,
        criterion=world.criterion,
        memory=memory,
        server=_copies(server),
        rng=seeds.torch_stream(world.seed, purpose, round_number, ids[0]),
        client=ids[0] if len(ids) == 1 else None,
        coalition=ids,
        rank=members[0].rank,
        recruits=members[0].recruits,
        cohort=cohort,
        targets=_pair(members[0].targets),
        data=own_data,
        others=others.clone() if sees_all else None,
        defence=rule if defence is not None and at_least(knowledge, "omniscient+defence") else None,
        private=private,
    )


#: What each observer of the global model sees beside the task and the answers to its queries.
PROBE_GRANTS: dict[str, frozenset[str]] = {
    "teacher": frozenset(
        {"params", "model", "clients", "updates", "trust", "test", "data", "truth", "history", "sent", "examples", "candidates"}
        | {"population", "member", "released"}
    ),
    "curious-server": frozenset({"params", "model", "clients", "updates", "trust", "sent", "examples"}),
    "user": frozenset(),
}
#: What everybody has; a field in neither list is nobody's.
_PUBLIC = frozenset({"round", "final", "task", "query", "rng", "criterion", "layout", "recipe", "shadow", "answers", "queries"})


def simulated(meta: Mapping[str, Any]) -> frozenset[str]:
    """Return the fields of simulated knowledge that a probe or a sender asks for in its registration."""
    asked = {"candidates"} if meta.get("asks") == "membership" else set()
    asked |= {"model"} if meta.get("architecture") else set()
    return frozenset(asked | ({"population"} if meta.get("population") else set()))


def behind(full: ProbeContext, shown: Tensor | None) -> ProbeContext:
    """Return what there is to see at a server from which a filter hides the clients' rows.

    Args:
        full: the context with the rows.
        shown: what the filter let through [m, d]; `None` in a round that did not count.
    """
    return dataclasses.replace(full, updates=None if shown is None else shown.clone(), clients=(), trust=None)


def probe_view(role: str, full: ProbeContext, meta: Mapping[str, Any] | None = None) -> ProbeContext:
    """Return the context with everything blanked that the role is not granted, nor asked for as simulated knowledge in its `meta`."""
    hidden = {field.name for field in dataclasses.fields(full)} - PROBE_GRANTS[role] - _PUBLIC - simulated(meta or {})
    blank: dict[str, Any] = {name: () if name == "clients" else None for name in hidden}
    if role == "user" and full.released is not None:
        blank["query"] = Metered(full.released, full.queries)
    return dataclasses.replace(full, **blank)
