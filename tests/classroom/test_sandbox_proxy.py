"""What stands for a submission in a run: the same answer as in this process, only what the role may see, and no failure ends the run."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrust import runs
from fedtrust.classroom.sandbox import backends, crossing
from fedtrust.classroom.sandbox.faults import SubmissionFault
from fedtrust.classroom.sandbox.limits import MIB, Limits
from fedtrust.classroom.sandbox.proxy import (
    Playing,
    SandboxedAudit,
    SandboxedEvasion,
    Submission,
    sandboxed_aggregator,
    sandboxed_behaviour,
)
from fedtrust.client import View, capabilities, overrides
from fedtrust.data.base import Task
from fedtrust.engine import seeds, workers
from fedtrust.game import Game
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.models.build import build
from fedtrust.probes.base import ProbeContext
from fedtrust.registry import REGISTRY
from fedtrust.scenario import parse
from fedtrust.server import AggContext, Pipeline, Stage
from fedtrust.setup import build as build_setup
from fedtrust.strategy import FedTrustStrategy

TASK = Task("classification", (1, 8, 8), 10, 0.0, 1.0)
MODULE = build("mlp", {}, TASK, 3)
LAYOUT = Layout.of(MODULE)
MODEL = Architecture(MODULE, LAYOUT)
CRITERION = REGISTRY.make("loss", "cross-entropy")
SETTING = crossing.setting(TASK, LAYOUT, ("mlp", {}), ("cross-entropy", {}))
PARAMS = LAYOUT.vector(MODULE)
D = LAYOUT.size
LIMITS = Limits(memory=512 * MIB, call_seconds=60, load_seconds=60)
HEAD = "import torch\nfrom fedtrust import Behaviour, behaviour, aggregator, Verdict, probe\n"

pytestmark = pytest.mark.skipif(
    not any(f.works for f in backends.available()), reason="; ".join(f"{f.name}: {f.why}" for f in backends.available())
)


class Bench:
    """One sandbox for all tests of a module: each game is a fork, and its submission is another."""

    def __init__(self) -> None:
        self.one = Submission("", "attack.py", "attack", limits=LIMITS)

    def playing(self, source: str, role: Any = "attack", *, number: int = 5, setting: Any = SETTING, **more: Any) -> Playing:
        mine = Submission(HEAD + source, f"{role}.py", role, limits=LIMITS)
        mine._sandbox = self.one.sandbox
        return Playing(mine, setting, number=number, population=20, **more)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.one.close()


def view(**more: Any) -> View:
    given: dict[str, Any] = {
        "params": PARAMS, "round": 3, "task": TASK, "layout": LAYOUT, "model": MODEL, "criterion": CRITERION, "memory": {}, "server": {},
        "rng": torch.Generator().manual_seed(1), "coalition": (2, 5, 11), "cohort": 8,
    }  # fmt: skip
    return View(**{**given, **more})


def context(updates: Tensor, **more: Any) -> AggContext:
    given: dict[str, Any] = {
        "params": PARAMS, "weights": torch.arange(1.0, len(updates) + 1), "clients": tuple(range(3, 3 + len(updates))), "round": 2,
        "assumed_malicious": 1, "layout": LAYOUT, "task": TASK, "model": MODEL, "criterion": CRITERION, "root": None,
        "rng": torch.Generator().manual_seed(4),
    }  # fmt: skip
    return AggContext(**{**given, **more})


def rows(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------------------------ attacks

IPM = """
@behaviour("mine", knowledge="omniscient")
class Mine(Behaviour):
    tau: float = 2.0
    def craft(self, updates, view):
        return (-self.tau * view.others.mean(0)).expand_as(updates)
"""


def test_an_attack_does_what_it_would_do_here(bench: Bench) -> None:
    playing = bench.playing(IPM)
    made = sandboxed_behaviour(playing)
    assert (made.needs_knowledge, capabilities(type(made)), made.role) == ("omniscient", ("update",), "malicious")
    others = rows(5)
    crafted = made.craft(rows(3, 1), view(others=others))
    assert torch.allclose(crafted, (-2 * others.mean(0)).expand(3, -1), atol=1e-5)
    report = playing.end()
    assert report.calls == 1
    assert report.bytes_in > 8 * D * 4
    assert 3 * D * 4 <= report.bytes_out < 3 * D * 4 + 2000
    assert report.cpu_seconds > 0
    assert report.faults == []


def test_parameters_are_checked_as_in_a_scenario(bench: Bench) -> None:
    playing = bench.playing(IPM)
    playing.submission.params = {"tau": 3.0}
    others = rows(4)
    assert torch.allclose(
        sandboxed_behaviour(playing).craft(rows(1), view(coalition=(2,), others=others))[0], -3 * others.mean(0), atol=1e-5
    )
    playing.end()
    wrong = bench.playing(IPM)
    wrong.submission.params = {"taus": 3.0}
    with pytest.raises(SubmissionFault, match="did you mean 'tau'") as caught:
        sandboxed_behaviour(wrong)
    assert caught.value.kind == "unusable"


def test_plain_craft_sees_each_member_s_own_row_and_gets_it_back_in_place(bench: Bench) -> None:
    playing = bench.playing(
        "def craft(updates, view):\n    print(list(view.coalition))\n    return updates + torch.tensor(view.coalition).float()[:, None]\n"
    )
    made = sandboxed_behaviour(playing)
    updates, names = rows(3), playing.names
    seen = []
    for round_number in range(1, 9):
        crafted = made.craft(updates, view(round=round_number))
        for row, client in enumerate((2, 5, 11)):
            assert torch.allclose(crafted[row] - updates[row], torch.full((D,), float(names.of(client))), atol=1e-4)
    seen = playing.end().output.split("\n")[:8]
    assert len(set(seen)) > 1  # another order in another round
    assert all(sorted(json.loads(line)) == sorted(names.of(c) for c in (2, 5, 11)) for line in seen)
    assert [names.of(c) for c in range(20)] != list(range(20))


def test_what_the_view_does_not_grant_does_not_cross(bench: Bench) -> None:
    source = (
        "def craft(updates, view):\n"
        "    print([name for name, value in zip(view._fields, view) if value is not None and name not in ('memory', 'server')])\n"
        "    return updates\n"
    )
    playing = bench.playing(source)
    sandboxed_behaviour(playing).craft(rows(3), view())
    seen = playing.end().output
    for hidden in ("others", "defence", "targets", "shared", "marks", "data", "'client'"):
        assert hidden not in seen
    assert "coalition" in seen


def test_poison_agree_and_memory_cross_and_stay_what_they_were_declared(bench: Bench) -> None:
    source = """
@behaviour("mine", knowledge="coalition")
class Mine(Behaviour):
    def remember(self, size):
        return {"count": torch.zeros(1, dtype=torch.int64), "sum": torch.zeros(size)}
    def agree(self, view):
        view.memory["count"] += 1
    def poison(self, x, y, view):
        return x, (y + view.shared["count"]) % view.task.classes
    def craft(self, updates, view):
        view.memory["sum"] = view.memory["sum"] + updates.sum(0)
        x, y = view.data()
        return updates * len(x)
"""
    playing = bench.playing(source)
    made = sandboxed_behaviour(playing)
    assert {h for h in ("remember", "agree", "poison", "craft", "goal", "loss") if overrides(made, h)} == {
        "remember",
        "agree",
        "poison",
        "craft",
    }
    memory = made.remember(D)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in memory.items()} == {"count": (torch.int64, (1,)), "sum": (torch.float32, (D,))}
    made.agree(view(memory=memory))
    made.agree(view(memory=memory))
    assert int(memory["count"]) == 2
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    new_x, new_y = made.poison(x, y, view(client=2, coalition=(2,), shared={"count": torch.tensor([2])}))
    assert torch.equal(new_x, x)
    assert torch.equal(new_y, (y + 2) % 10)
    updates = rows(3)
    crafted = made.craft(updates, view(memory=memory, data=lambda: (x, y)))
    assert torch.allclose(crafted, 6 * updates)
    assert torch.allclose(memory["sum"], updates.sum(0), atol=1e-4)
    playing.end()


def test_goal_sees_the_inputs_and_no_label(bench: Bench) -> None:
    source = (
        '@behaviour("mine")\nclass Mine(Behaviour):\n    def poison(self, x, y, view):\n        return x, y\n'
        "    def goal(self, x, y, task):\n"
        "        print(y.tolist())\n        return x.clamp(min=0.5), torch.full_like(y, 7)\n"
    )
    playing = bench.playing(source)
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    goal = sandboxed_behaviour(playing).goal(x, y, TASK)
    assert goal is not None
    assert torch.equal(goal[0], x.clamp(min=0.5))
    assert goal[1].tolist() == [7] * 4
    assert "[-1, -1, -1, -1]" in playing.end().output


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ("def loss(self, predict, x, y, view):\n        return predict(x).sum()", "train by yourself in `craft`"),
        ("def project(self, update, view):\n        return update * 2", "project in `craft`"),
        ("def reply(self, reply, view):\n        return None", "change the update in `craft`"),
    ],
)
def test_hooks_that_cannot_cross_are_refused_with_the_reason(bench: Bench, hook: str, says: str) -> None:
    playing = bench.playing(f'@behaviour("mine")\nclass Mine(Behaviour):\n    {hook}\n')
    with pytest.raises(SubmissionFault, match=says) as caught:
        sandboxed_behaviour(playing)
    assert caught.value.kind == "unsupported"
    assert [f.kind for f in playing.faults] == ["unsupported"]


def test_an_attacker_who_trains_by_himself_can(bench: Bench) -> None:
    source = """
def craft(updates, view):
    x, y = view.data()
    params = view.params.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(view.criterion(view.model(params, x), y), params)
    return (updates.mean(0) + gradient).expand_as(updates)
"""
    playing = bench.playing(source)
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
    updates = rows(3)
    crafted = sandboxed_behaviour(playing, strict=True).craft(updates, view(data=lambda: (x, y)))
    params = PARAMS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(CRITERION(MODEL(params, x), y), params)
    assert torch.allclose(crafted[0], updates.mean(0) + gradient, atol=1e-5)
    playing.end()


def test_defence_is_asked_of_the_host_and_counted(bench: Bench) -> None:
    source = "def craft(updates, view):\n    for _ in range(4):\n        d = view.defence(updates * 2)\n    return d.expand_as(updates)\n"
    asked = []

    def rule(updates: Tensor) -> Tensor:
        asked.append(updates.shape)
        return updates.mean(0)

    playing = bench.playing(source, budgets={"defence": 10})
    made = sandboxed_behaviour(playing, strict=True)
    updates = rows(3)
    for _ in range(2):
        assert torch.allclose(made.craft(updates, view(defence=rule))[0], 2 * updates.mean(0), atol=1e-5)
    with pytest.raises(SubmissionFault, match="11 calls of 'defence' asked, the budget is 10") as caught:
        made.craft(updates, view(defence=rule))
    assert caught.value.kind == "budget"
    assert len(asked) == 10
    assert playing.end().asked == {"defence": 10}


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ("raise ValueError('no idea')", "crash", "line 4: ValueError: no idea"),
        ("return updates[0]", "reply", r"what its craft returned has shape \[\d+\], expected"),
        ("return updates.double()", "reply", "torch.float64"),
        ("return updates * float('nan')", "not-finite", "NaN or infinity"),
        ("return 7", "reply", "'updates' is int, not a tensor"),
        ("view.memory['x'] = updates; return updates", "reply", "but `remember` declared"),
        ("import os; os._exit(3)", "killed", "ended without an answer"),
        ("return torch.zeros(10**10)", "memory", "more memory than it may have"),
        ("raise SystemExit(0)", "crash", "SystemExit"),
    ],
)
def test_a_failing_attack_does_not_attack_and_the_run_goes_on(bench: Bench, line: str, kind: str, says: str) -> None:
    playing = bench.playing(f"def craft(updates, view):\n    {line}\n")
    made = sandboxed_behaviour(playing)
    updates = rows(3)
    assert torch.equal(made.craft(updates, view()), updates)
    assert torch.equal(made.craft(updates, view()), updates)
    assert playing.faults[0].kind == kind
    assert re.search(says, playing.faults[0].sentence), playing.faults[0].sentence
    if kind == "killed":
        assert len(playing.faults) == 1  # its process is gone: it is not asked again
    playing.end()
    with pytest.raises(SubmissionFault):
        sandboxed_behaviour(bench.playing(f"def craft(updates, view):\n    {line}\n"), strict=True).craft(updates, view())


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def craft(updates view):", "attack.py:3: "),
        ("x = 1", "a @behaviour or a function `craft`"),
        ("import nothing_of_the_kind", "attack.py:3: ModuleNotFoundError"),
        (IPM + IPM.replace("mine", "yours").replace("Mine", "Yours"), "registers 2 components"),
        (IPM.replace("mine", "ipm"), "behaviour 'ipm' is already defined"),
    ],
)
def test_what_cannot_be_loaded_is_said_with_its_line(bench: Bench, source: str, says: str) -> None:
    playing = bench.playing(source)
    with pytest.raises(SubmissionFault) as caught:
        sandboxed_behaviour(playing)
    assert caught.value.kind == "unusable"
    assert says in caught.value.sentence
    assert playing.faults == [caught.value]


def test_a_game_knows_nothing_of_the_last(bench: Bench) -> None:
    source = """
seen = []
def craft(updates, view):
    seen.append(1)
    torch.note = getattr(torch, "note", 0) + 1
    return updates * 0 + len(seen) + 10 * torch.note
"""
    for _ in range(2):
        playing = bench.playing(source)
        made = sandboxed_behaviour(playing, strict=True)
        assert [float(made.craft(rows(1), view(coalition=(2,)))[0, 0]) for _ in range(3)] == [11.0, 22.0, 33.0]
        playing.end()


def test_the_same_call_draws_the_same_and_another_game_s_names_are_others(bench: Bench) -> None:
    source = """
def craft(updates, view):
    noise = float(view.private("noise", 1).normal())
    return updates * 0 + torch.randn(updates.shape, generator=view.rng) + noise
"""
    made = [sandboxed_behaviour(bench.playing(source), strict=True).craft(rows(2), view(coalition=(1, 2))) for _ in range(2)]
    assert torch.equal(made[0], made[1])
    other = sandboxed_behaviour(bench.playing(source), strict=True).craft(
        rows(2), view(coalition=(1, 2), rng=torch.Generator().manual_seed(2))
    )
    assert not torch.equal(made[0], other)


def test_a_behaviour_can_be_sent_to_another_process(bench: Bench) -> None:
    playing = bench.playing(IPM)
    made = sandboxed_behaviour(playing)
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is type(made)
    assert again.playing.submission._sandbox is None
    assert again.playing.names.of(7) == playing.names.of(7)
    playing.end()


# ----------------------------------------------------------------------------------------------------------------------------- defences


def test_a_defence_does_what_it_would_do_here_and_trust_comes_back_in_place(bench: Bench) -> None:
    source = """
@aggregator("mine")
def mine(updates, ctx, *, scale: float = 1.0):
    norms = updates.norm(dim=1)
    trust = (scale * norms.median() / norms).clamp(max=1)
    print(list(ctx.clients), ctx.weights.tolist())
    state = {"seen": ctx.state.get("seen", torch.zeros(1)) + 1}
    return Verdict((trust[:, None] * updates).mean(0), trust=trust, state=state, numbers={"least": float(trust.min())})
"""
    playing = bench.playing(source, "defence")
    rule = sandboxed_aggregator(playing, strict=True)
    updates = rows(7) * torch.arange(1.0, 8)[:, None]
    norms = updates.norm(dim=1)
    trust = (norms.median() / norms).clamp(max=1)
    verdict = rule(updates, context(updates))
    assert verdict.trust is not None
    assert verdict.state is not None
    assert torch.allclose(verdict.trust, trust, atol=1e-5)
    assert torch.allclose(verdict.value, (trust[:, None] * updates).mean(0), atol=1e-4)
    assert verdict.numbers["least"] == pytest.approx(float(trust.min()), abs=1e-5)
    again = rule(updates, context(updates, state=verdict.state, round=3))
    assert again.state is not None
    assert float(again.state["seen"]) == 2
    first, second = (line.split("] [") for line in playing.end().output.strip().split("\n"))
    assert first[0] != second[0]
    names = [playing.names.of(c) for c in range(3, 10)]
    weights = {names[i]: float(i + 1) for i in range(7)}
    for clients, given in (first, second):
        assert dict(zip(json.loads(clients + "]"), json.loads("[" + given), strict=True)) == weights


def test_a_registered_rule_is_the_same_inside_and_outside(bench: Bench) -> None:
    playing = bench.playing(
        "from fedtrust.strategies.medians import meamed\ndef aggregate(updates, ctx):\n    return meamed(updates, ctx)\n", "defence"
    )
    updates = rows(6)
    made = sandboxed_aggregator(playing, strict=True)(updates, context(updates))
    here = REGISTRY.make("aggregator", "meamed")(updates, context(updates))
    assert torch.allclose(made.value, here if isinstance(here, Tensor) else here.value)
    playing.end()


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("return updates", "reply"),
        ("return updates.mean(0) / 0 * 0", "not-finite"),
        ("return Verdict(updates.mean(0), trust=torch.full((len(updates),), 2.0))", "reply"),
        ("return Verdict(updates.mean(0), state={'x': torch.zeros(100_000_000)})", "reply"),
        ("return ctx.train(updates, updates)", "crash"),
        ("1 / 0", "crash"),
    ],
)
def test_a_failing_defence_is_plain_averaging(bench: Bench, line: str, kind: str) -> None:
    playing = bench.playing(f"def aggregate(updates, ctx):\n    {line}\n", "defence")
    updates = rows(4)
    ctx = context(updates)
    verdict = sandboxed_aggregator(playing)(updates, ctx)
    assert torch.allclose(verdict.value, (ctx.weights / ctx.weights.sum()) @ updates, atol=1e-6)
    assert verdict.trust is None
    assert [f.kind for f in playing.faults] in (
        [kind],
        ["memory"] if "100_000_000" in line else [kind],
        ["flood"] if "100_000_000" in line else [kind],
    )
    playing.end()


def test_training_on_the_server_s_samples_is_done_and_counted_by_the_host(bench: Bench) -> None:
    playing = bench.playing(
        "def aggregate(updates, ctx):\n    return ctx.train(*ctx.root, epochs=3) + ctx.train(*ctx.root, params=ctx.params * 2)\n", "defence"
    )
    asked = []

    def train(x: Tensor, y: Tensor, params: Tensor | None = None, epochs: int | None = None) -> Tensor:
        asked.append((len(x), epochs, params is None))
        return torch.full((D,), float(epochs or 1))

    updates, root = rows(3), (torch.rand(5, 1, 8, 8), torch.arange(5))
    verdict = sandboxed_aggregator(playing, strict=True)(updates, context(updates, root=root, train=train))
    assert asked == [(5, 3, True), (5, None, False)]
    assert torch.equal(verdict.value, torch.full((D,), 4.0))
    assert playing.end().asked == {"train": 20}


# ------------------------------------------------------------------------------------------------------------------ audits and evasions


def seen(**more: Any) -> ProbeContext:
    given: dict[str, Any] = {
        "round": 4, "final": True, "task": TASK, "query": lambda x: MODEL(PARAMS, x), "rng": torch.Generator().manual_seed(1),
        "criterion": CRITERION, "layout": LAYOUT,
    }  # fmt: skip
    return ProbeContext(**{**given, **more})


def test_an_audit_scores_candidates_by_what_it_may_ask(bench: Bench) -> None:
    source = """
def score(ctx):
    x, y = ctx.candidates
    print([f for f in ("params", "model", "test", "truth", "member", "data", "history") if getattr(ctx, f) is not None])
    return -torch.nn.functional.cross_entropy(ctx.query(x), y, reduction="none")
"""
    playing = bench.playing(source, "audit")
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    with torch.no_grad():
        wanted = -torch.nn.functional.cross_entropy(MODEL(PARAMS, x), y, reduction="none")
    secret: dict[str, Any] = {"member": torch.ones(6, dtype=torch.bool), "test": (x, y), "history": ({"accuracy": 1.0},)}
    assert torch.allclose(SandboxedAudit(playing).score(seen(candidates=(x, y), **secret)), wanted, atol=1e-5)
    report = playing.end()
    assert report.asked == {"query": 6}
    assert report.output.startswith("[]")


def test_a_user_s_queries_end_with_his_budget(bench: Bench) -> None:
    playing = bench.playing(
        "def steal(ctx):\n    for _ in range(5):\n        ctx.query(torch.rand(60, 1, 8, 8))\n    return torch.zeros(ctx.layout.size)\n",
        "audit",
    )
    with pytest.raises(SubmissionFault, match="240 samples of 'query' asked, the budget is 200") as caught:
        SandboxedAudit(playing).steal(seen(queries=200))
    assert caught.value.kind == "budget"
    assert playing.end().asked == {"query": 180}


def test_reconstructions_and_copies_come_back(bench: Bench) -> None:
    source = """
def reconstruct(ctx):
    return ctx.updates.mean() + torch.zeros(2, *ctx.task.shape), torch.tensor([1, 2])
def steal(ctx):
    return ctx.params * 2
"""
    playing = bench.playing(source, "audit")
    audit, updates = SandboxedAudit(playing), rows(3)
    x, y = audit.reconstruct(seen(updates=updates, clients=(4, 5, 6)), most=10)
    assert torch.allclose(x, updates.mean().expand(2, 1, 8, 8), atol=1e-5)
    assert y is not None
    assert y.tolist() == [1, 2]
    assert torch.allclose(audit.steal(seen(params=PARAMS)), 2 * PARAMS)
    with pytest.raises(SubmissionFault, match="the most is"):
        audit.reconstruct(seen(updates=updates, clients=(4, 5, 6)), most=0)
    playing.end()


def test_an_evasion_perturbs_with_queries_or_with_the_model(bench: Bench) -> None:
    source = """
def perturb(x, y, query):
    if query.model is None:
        return (x + query.eps * query(x).mean().sign()).clamp(0, 1)
    z = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(query.model(z), y).backward()
    return (x + query.eps * z.grad.sign()).clamp(0, 1)
"""
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    for params in (None, PARAMS):
        playing = bench.playing(source, "evasion")
        made = SandboxedEvasion(playing).perturb(
            x, y, lambda z: MODEL(PARAMS, z), TASK, eps=0.1, rng=torch.Generator().manual_seed(1), params=params
        )
        assert made.shape == x.shape
        assert 0 < float((made - x).abs().max()) <= 0.1 + 1e-6
        assert playing.end().asked == ({"query": 4} if params is None else {})


def test_the_scenario_s_seed_is_in_nothing_that_crosses() -> None:
    number = seeds.key(987654321, "sandbox") & (2**62 - 1)
    names = crossing.Names(number, 20)
    plain, tensors, _ = crossing.of_view(view(others=rows(4)), names)
    text = json.dumps(plain)
    assert "987654321" not in text
    assert str(number) not in text
    assert set(tensors) == {"params", "others"}
    assert not torch.equal(tensors["others"], rows(4))
    assert torch.equal(tensors["others"].sort(0).values, rows(4).sort(0).values)
    fields = {f.name for f in dataclasses.fields(ProbeContext)} - {"test", "data", "truth", "member", "history"}
    shown, _ = crossing.of_probe(seen(), names)
    assert set(shown) - {"random"} <= fields


# ------------------------------------------------------------------------------------------------------------------------------ in a run


RUN = """
title = "a submission in a run"
rounds = 2
seed = 5
data = { source = "digits", partition = { kind = "dirichlet", alpha = 0.5 } }
model = { name = "logistic" }
clients = { count = 6, train = { lr = 0.1, batch_size = 32 } }
attackers = [{ behaviour = "ipm", count = 2, knowledge = "omniscient", params = { epsilon = 2.0 } }]
strategy = { aggregator = { name = "median" } }
"""
INSIDE = (
    '@behaviour("inside", knowledge="omniscient")\nclass Inside(Behaviour):\n    def craft(self, updates, view):\n'
    "        return (-2.0 * view.others.mean(0)).expand_as(updates)\n"
)


def last_model(setup: Any, folder: Any) -> Tensor:
    executor = workers.make("local", None, None, 600.0, 1)
    game = Game(setup, runs.RunDirectory.create(folder), executor)
    try:
        for _ in game.rounds():
            pass
        return game.finish()[1]
    finally:
        executor.close()


def test_a_run_with_a_sandboxed_attack_or_defence_ends_with_the_model_of_one_without(bench: Bench, tmp_path: Any) -> None:
    setup = build_setup(parse(tomllib.loads(RUN)))
    wanted = last_model(setup, tmp_path / "here")
    setting = crossing.setting_of(setup.scenario, setup.world.data.task, setup.world.layout)
    attack = bench.playing(INSIDE, setting=setting)
    groups = tuple(dataclasses.replace(g, behaviour=sandboxed_behaviour(attack, strict=True)) for g in setup.roster.groups)
    swapped = dataclasses.replace(setup, roster=dataclasses.replace(setup.roster, groups=groups))
    assert torch.allclose(last_model(swapped, tmp_path / "attack"), wanted, atol=1e-6)
    assert attack.end().calls == 2
    source = "def aggregate(updates, ctx):\n    return updates.sort(0).values[2:4].mean(0)\n"
    defence = bench.playing(source, "defence", setting=setting)
    pipeline = Pipeline([], Stage("aggregator", "submission", sandboxed_aggregator(defence, strict=True)), [])
    swapped = dataclasses.replace(setup, strategy=FedTrustStrategy(pipeline, setup.world, setup.scenario.strategy.assumed_malicious, 2))
    assert torch.allclose(last_model(swapped, tmp_path / "defence"), wanted, atol=1e-6)
    assert defence.end().calls == 2
