"""Who may see what. Each table here is written out by hand: what is not in it must not be seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrust import views
from fedtrust.client import KNOWLEDGE, Behaviour, Knowledge, View
from fedtrust.data.base import FederatedData, Task
from fedtrust.engine import cohort, seeds
from fedtrust.engine.cohort import Chunk, ClientTask
from fedtrust.engine.world import World
from fedtrust.probes.base import ProbeContext
from fedtrust.registry import REGISTRY
from fedtrust.release import Metered

#: What everybody who takes part in the protocol knows.
PUBLIC = {"params", "round", "task", "layout", "model", "criterion", "server", "cohort"}
#: What a client knows of itself, or a coalition of itself.
OWN = {"memory", "rng", "client", "coalition", "rank", "recruits"}


def world() -> World:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=generator), torch.arange(12) % 3
    parts = [np.arange(4), np.arange(4, 7), np.arange(7, 12)]
    data = FederatedData(Task("classification", (4,), 3), x, y, parts, torch.randn(6, 4, generator=generator), torch.arange(6) % 3)
    return World(data, nn.Linear(4, 3), F.cross_entropy, REGISTRY.make("optimiser", "sgd"), 0.1, 2, 1, seed=5, path="loop")


WORLD = world()
PARAMS = torch.arange(15.0)
OTHERS = torch.arange(30.0).reshape(2, 15)


def member(client: int, rank: int = 0) -> ClientTask:
    return ClientTask(client, REGISTRY.make("behaviour", "badnets"), {"kept": torch.ones(2)}, rank, 3)


def defence(updates: Tensor) -> Tensor:
    return updates.mean(0)


def crafting(knowledge: Knowledge, *clients: int, memory: dict[str, Tensor] | None = None, others: Tensor = OTHERS) -> View:
    members = [member(c, rank=i + 1) for i, c in enumerate(clients)]
    return views.crafting_view(
        WORLD, 4, PARAMS, {"hint": torch.zeros(1)}, members, knowledge, {} if memory is None else memory, others, defence, 9
    )


def granted(view: View) -> set[str]:
    """The fields that say anything."""
    return {name for name, value in view._asdict().items() if value is not None and value != ()}


@pytest.mark.parametrize(
    ("knowledge", "clients", "more"),
    [
        ("own", (2,), {"data"}),
        ("coalition", (0, 2), {"data"}),
        ("omniscient", (0, 2), {"data", "others"}),
        ("omniscient+defence", (0, 2), {"data", "others", "defence"}),
    ],
)
def test_exactly_what_the_knowledge_grants_is_in_the_view(knowledge: Knowledge, clients: tuple[int, ...], more: set[str]) -> None:
    view = crafting(knowledge, *clients)
    alone = len(clients) == 1
    assert granted(view) == (PUBLIC | OWN | {"private"} | more) - (set() if alone else {"client"})
    assert view.coalition == clients
    assert view.client == (clients[0] if alone else None)
    assert (view.round, view.rank, view.recruits, view.cohort) == (4, 1, 3, 9)
    more = {"data", "others", "defence", "targets", "shared", "marks", "private"}
    assert set(View._fields) == PUBLIC | OWN | more  # a new one? say here who sees it


@pytest.mark.parametrize("knowledge", KNOWLEDGE)
def test_the_coalitions_samples_are_its_own_and_no_others(knowledge: Knowledge) -> None:
    view = crafting(knowledge, 0, 2)
    assert view.data is not None
    x, y = view.data()
    rows = [0, 1, 2, 3, 7, 8, 9, 10, 11]
    assert torch.equal(x, WORLD.data.x[rows])
    assert torch.equal(y, WORLD.data.y[rows])
    before = WORLD.data.x.clone()
    x.zero_()
    assert torch.equal(WORLD.data.x, before)


@pytest.mark.parametrize("knowledge", KNOWLEDGE)
def test_an_attacker_cannot_reach_what_the_others_send(knowledge: Knowledge) -> None:
    others, before, params = OTHERS.clone(), OTHERS.clone(), PARAMS.clone()
    view = crafting(knowledge, 1, others=others)
    if view.others is not None:
        assert torch.equal(view.others, before)
        view.others.zero_()
    view.params.zero_()
    assert torch.equal(others, before)
    assert torch.equal(PARAMS, params)


def test_the_levels_of_knowledge_include_each_other() -> None:
    assert KNOWLEDGE == ("own", "coalition", "omniscient", "omniscient+defence")
    assert [[views.at_least(a, b) for b in KNOWLEDGE] for a in KNOWLEDGE] == [[j <= i for j in range(4)] for i in range(4)]


def test_the_defence_is_told_whose_rows_it_is_shown() -> None:
    """The honest clients' first, then the coalition's; any other number of rows is nobody's."""
    asked: list[tuple[int, tuple[int, ...]]] = []

    def rule(updates: Tensor, clients: tuple[int, ...] = ()) -> Tensor:
        asked.append((len(updates), clients))
        return updates.sum(0)

    def granted_rule(knowledge: Knowledge) -> Callable[[Tensor], Tensor] | None:
        return views.crafting_view(WORLD, 4, PARAMS, {}, [member(0), member(2)], knowledge, {}, OTHERS, rule, 9, honest=(1, 3)).defence

    shown = granted_rule("omniscient+defence")
    assert shown is not None
    assert torch.equal(shown(torch.ones(4, 15)), torch.full((15,), 4.0))
    shown(torch.ones(3, 15))
    assert asked == [(4, (1, 3, 0, 2)), (3, ())]
    assert granted_rule("omniscient") is None


def test_the_coalition_writes_to_its_memory_and_draws_from_its_own_source() -> None:
    memory: dict[str, Tensor] = {}
    view = crafting("coalition", 2, 1, memory=memory)
    view.memory["seen"] = torch.ones(1)
    assert "seen" in memory
    draws = [torch.rand(3, generator=crafting("coalition", *ids).rng) for ids in ((1, 2), (1, 2), (2, 1))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0], torch.rand(3, generator=seeds.torch_stream(5, "craft", 4, 1)))


def local(client: int = 1, purpose: str = "poison") -> tuple[View, Chunk]:
    chunk = Chunk(4, PARAMS.clone(), {"hint": torch.zeros(1)}, (member(client, rank=2)._replace(behaviour=Vandal()),))
    return views.local_view(WORLD, chunk, chunk.tasks[0], purpose), chunk


def test_a_client_knows_the_protocol_and_itself() -> None:
    view, _ = local()
    assert granted(view) == PUBLIC | OWN
    assert (view.client, view.coalition, view.rank, view.recruits, view.round) == (1, (1,), 2, 3, 4)
    assert torch.equal(view.params, PARAMS)
    assert view.rng is not None
    assert torch.equal(torch.rand(3, generator=view.rng), torch.rand(3, generator=seeds.torch_stream(5, "poison", 4, 1)))
    assert local(purpose="reply")[0].rng is not None
    assert torch.rand((), generator=local(purpose="reply")[0].rng) != torch.rand((), generator=local()[0].rng)


def test_what_a_client_remembers_is_a_copy_until_the_round_is_over() -> None:
    view, chunk = local()
    view.memory["kept"].zero_()
    view.memory["new"] = torch.ones(1)
    assert chunk.tasks[0].memory.keys() == {"kept"}
    assert torch.equal(chunk.tasks[0].memory["kept"], torch.ones(2))


def test_inside_loss_a_client_knows_only_what_it_shares_with_its_chunk() -> None:
    view, _ = local()
    inside = views.in_loss(view)
    assert granted(inside) == PUBLIC | {"memory", "rank", "recruits"}
    assert (inside.rng, inside.client, inside.coalition, inside.rank, inside.recruits) == (None, None, (), 0, 1)
    assert inside.memory == view.memory
    inside.memory["new"] = torch.ones(1)  # what a loss writes down is gone: on the batched paths it could not be kept either
    assert "new" not in view.memory


def test_a_client_that_writes_on_its_view_harms_nobody_else() -> None:
    view, chunk = local()
    view.params.zero_()
    view.server["hint"].fill_(9.0)
    assert torch.equal(chunk.params, PARAMS)
    assert chunk.server["hint"].item() == 0.0
    hint = {"hint": torch.zeros(1)}
    party = views.crafting_view(WORLD, 4, PARAMS, hint, [member(1)], "own", {}, OTHERS, None, 9)
    party.server["hint"].fill_(9.0)
    assert hint["hint"].item() == 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vandal(Behaviour):
    """Wipes the model it was sent while it prepares its data."""

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        view.params.zero_()
        return x, y


def test_a_vandal_in_the_chunk_does_not_change_where_the_honest_start() -> None:
    quiet, start = ClientTask(1, Behaviour(), {}), torch.linspace(-1, 1, 15)
    alone = cohort.train(WORLD, Chunk(1, start.clone(), {}, (quiet,)))
    beside = cohort.train(WORLD, Chunk(1, start.clone(), {}, (ClientTask(0, Vandal(), {}), quiet)))
    assert not beside.faults
    assert torch.equal(beside.updates[list(beside.clients).index(1)], alone.updates[0])


#: What every observer of the global model has, and what each role sees beside it.
EVERYBODY = {"round", "final", "task", "query", "rng", "criterion", "layout", "recipe", "shadow", "answers", "queries"}
SERVER = {"params", "model", "clients", "updates", "trust", "sent", "examples"}
SEES = {
    "teacher": SERVER | {"test", "data", "truth", "history", "candidates", "population", "member", "released"},
    "curious-server": SERVER,
    "user": set(),
}


def full() -> ProbeContext:
    """A context with every field set to something of its own."""
    return ProbeContext(**{f.name: (1, 2) if f.name == "clients" else object() for f in dataclasses.fields(ProbeContext)})  # type: ignore[arg-type]


def test_every_field_of_a_probes_context_is_assigned() -> None:
    names = {f.name for f in dataclasses.fields(ProbeContext)}
    assert names == EVERYBODY | SEES["teacher"], "a new field: say in this file, and in PROBE_GRANTS, who may see it"
    assert {role: set(fields) for role, fields in views.PROBE_GRANTS.items()} == SEES


@pytest.mark.parametrize("role", list(SEES))
@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ProbeContext)])
def test_a_probe_sees_what_its_role_may_and_nothing_else(role: str, field: str) -> None:
    context = full()
    seen: Any = getattr(views.probe_view(role, context), field)
    if (role, field) == ("user", "query"):
        assert isinstance(seen, Metered), "a user asks the released model, and every sample counts"
    elif field in EVERYBODY | SEES[role]:
        assert seen is getattr(context, field)
    else:
        assert seen == () if field == "clients" else seen is None


@pytest.mark.parametrize("role", ["curious-server", "user"])
def test_simulated_knowledge_is_seen_only_by_who_asks_for_it(role: str) -> None:
    context = full()
    given = (({"asks": "membership"}, {"candidates"}), ({"population": True}, {"population"}), ({"population": False}, set()))
    for meta, more in given:
        seen = views.probe_view(role, context, meta)
        assert (seen.model is None) == (role == "user")
        assert {f for f in ("candidates", "population", "member", "test", "truth") if getattr(seen, f) is not None} == more


def test_a_user_knows_the_architecture_only_if_that_is_declared() -> None:
    context = full()
    assert views.probe_view("user", context).model is None
    assert views.probe_view("user", context, {"architecture": True}).model is context.model


def test_what_the_teacher_has_computed_does_not_reach_the_others() -> None:
    x, y = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    context = dataclasses.replace(full(), query=lambda x: x + 1, test=(x, y))
    assert torch.equal(views.probe_view("teacher", context).test_output, x + 1)
    for role in ("curious-server", "user"):
        with pytest.raises(PermissionError, match="does not see the test samples"):
            _ = views.probe_view(role, context).test_output


def test_a_role_nobody_knows_sees_nothing() -> None:
    with pytest.raises(KeyError):
        views.probe_view("janitor", full())


def test_every_registered_probe_has_a_role() -> None:
    roles = {e.name: e.meta["role"] for e in REGISTRY if e.kind == "probe"}
    assert roles
    assert set(roles.values()) <= set(SEES)
