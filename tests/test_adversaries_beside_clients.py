"""A malicious server, observers that guess, clients that claim: what each is sent and shown, who scores it, and what the report is told."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtrust import report
from fedtrust.client import Behaviour, ClientMemory, View, behaviour
from fedtrust.errors import InputError, RunError
from fedtrust.probes.base import Artefact, ProbeContext, probe
from fedtrust.probes.guesses import _SCORERS, Guess, scorer
from fedtrust.registry import REGISTRY
from fedtrust.runner import run
from fedtrust.scenario import Scenario, parse
from fedtrust.sending import SendContext, sender
from fedtrust.setup import build

Small = Callable[..., Scenario]


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test registers is gone after it."""
    REGISTRY.load()
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))
    monkeypatch.setattr("fedtrust.probes.guesses._SCORERS", dict(_SCORERS))


class Word(Guess):
    """Something that a test's adversary says."""

    def __init__(self, value: float) -> None:
        self.value = value


def scored() -> None:
    @scorer(Word)
    def word(guess: Word, full: ProbeContext, seen: ProbeContext) -> Mapping[str, float | Artefact]:
        assert full.truth is not None
        table = Artefact("table", "words", "", {"columns": ["word"], "rows": [[guess.value]]})
        return {"value": guess.value, "blind": float(seen.truth is None), "": table}


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line)["metrics"] for line in (out / "rounds.jsonl").read_text().splitlines()]


SEEN: list[ProbeContext] = []


def watching() -> None:
    SEEN.clear()

    @probe("watcher", role="curious-server")
    def watcher(ctx: ProbeContext) -> dict[str, float]:
        """Writes down what it sees."""
        SEEN.append(ctx)
        return {}


def test_clients_train_what_they_are_sent_and_the_server_keeps_its_own_model(small: Small, out: Path) -> None:
    """Half of the clients get the model doubled; updates are relative to it, and are added to the true one."""
    asked = []

    @sender("doubler", paper="nobody, 2026")
    def doubler(params: Tensor, ctx: SendContext) -> dict[int, Tensor]:
        """Send some clients twice the model."""
        asked.append((ctx.round, ctx.clients, ctx.candidates, ctx.population))
        return {c: 2 * params for c in ctx.clients if c % 2}

    watching()
    scenario = small(malicious_server={"sender": "doubler", "rounds": [2, 2]}, probes=["watcher"])
    begun = build(scenario).params
    assert run(scenario, out, engine="local").status == "finished"
    assert asked == [(2, tuple(range(8)), None, None)]
    first, second = SEEN[1], SEEN[2]
    assert first.sent is not None
    assert second.sent is not None
    assert all(torch.equal(model, begun) for model in first.sent.values())
    assert first.params is not None
    assert second.params is not None
    assert second.updates is not None
    for client, model in second.sent.items():
        assert torch.equal(model, 2 * first.params if client % 2 else first.params)
    assert torch.allclose(second.params, first.params + second.updates.mean(0), atol=1e-6)
    assert not torch.allclose(second.updates[0], second.updates[1], atol=1e-3)
    assert second.examples == {c: build(scenario).world.examples(c) for c in range(8)}


def test_all_clients_may_be_sent_the_same_other_model(small: Small, out: Path) -> None:
    @sender("zeroed", paper="nobody, 2026")
    def zeroed(params: Tensor, ctx: SendContext) -> Tensor:
        """Send zeros."""
        return torch.zeros_like(params)

    watching()
    scenario = small(malicious_server={"sender": "zeroed"}, probes=["watcher"])
    assert run(scenario, out, engine="local").status == "finished"
    assert all(not model.any() for model in SEEN[2].sent.values())  # type: ignore[union-attr]
    # The rule is a mean: without a watcher its sums are made on the workers, with the same model in the end.
    quiet = out.parent / "quiet"
    assert run(small(malicious_server={"sender": "zeroed"}), quiet, engine="local").status == "finished"
    models = [(folder / "model.safetensors").read_bytes() for folder in (out, quiet)]
    assert len(models[0]) == len(models[1])
    honest = out.parent / "honest"
    run(small(), honest, engine="local")
    assert (honest / "model.safetensors").read_bytes() != models[1]


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda params, ctx: params[:-1], "expected torch.float32"),
        (lambda params, ctx: {99: params}, "client 99, who was not asked"),
        (lambda params, ctx: params / 0, "not finite"),
        (lambda params, ctx: {}["x"], "sender 'broken-one' failed in round 1: KeyError"),
    ],
)
def test_a_sender_that_makes_no_model_ends_the_run_by_name(small: Small, out: Path, made: Callable[..., Tensor], why: str) -> None:
    @sender("broken-one", paper="nobody, 2026")
    def broken(params: Tensor, ctx: SendContext) -> Tensor:
        """Make nonsense."""
        return made(params, ctx)

    with pytest.raises(RunError, match=why):
        run(small(malicious_server={"sender": "broken-one"}), out, engine="local")


def test_a_malicious_server_that_cannot_be_is_refused(small: Small) -> None:
    @sender("idle", paper="nobody, 2026")
    def idle(params: Tensor, ctx: SendContext) -> Tensor:
        """Send the model."""
        return params

    with pytest.raises(InputError, match="did you mean 'idle'"):
        small(malicious_server={"sender": "idel"})
    with pytest.raises(InputError, match="no parameter 'x'"):
        small(malicious_server={"sender": "idle", "params": {"x": 1}})
    with pytest.raises(InputError, match=r"should be \[first, last\]"):
        small(malicious_server={"sender": "idle", "rounds": [1, 9]})
    with pytest.raises(InputError, match="a stock Flower strategy sends what it wants to"):
        small(malicious_server={"sender": "idle"}, strategy={"aggregator": "flwr:FedAvg"})
    with pytest.raises(InputError, match="a stock Flower strategy sends what it wants to"):
        small(malicious_server={"sender": "idle"}, sweep={"strategies": {"plain": {}, "flower": {"aggregator": "flwr:FedAvg"}}})


def test_a_malicious_server_stands_in_the_resolved_file(small: Small, out: Path) -> None:
    @sender("drifting", paper="nobody, 2026")
    def drifting(params: Tensor, ctx: SendContext, *, by: float = 0.1) -> Tensor:
        """Send the model, moved."""
        return params + by

    made = small(malicious_server={"sender": "drifting", "params": {"by": 0.2}, "rounds": [1, 2]})
    written = tomllib.loads(made.resolved_toml())
    assert written["malicious_server"] == {"sender": "drifting", "params": {"by": 0.2}, "rounds": [1, 2]}
    assert parse(written) == made
    assert {f for f in Scenario.model_fields if f not in written} == {"week", "sweep", "claims"}  # what this one does not have


def test_a_guess_is_scored_by_who_knows_and_the_adversary_does_not(small: Small, out: Path) -> None:
    scored()

    @probe("guesser", role="user", paper="nobody, 2026")
    def guesser(ctx: ProbeContext) -> dict[str, float | Guess]:
        """Says something."""
        return {"guess": Word(0.5 + ctx.round)}

    assert run(small(probes=["guesser"]), out, engine="local").status == "finished"
    assert metrics(out)[2] == {"guess/value": 2.5, "guess/blind": 1.0}
    assert (out / "artefacts").is_dir()
    cards = json.loads((out / "summary.json").read_text())["observers"]
    assert [(c["behaviour"], c["role"], c["capability"]) for c in cards] == [
        ("guesser", "user of the model", ["queries the model (told: its raw outputs)"])
    ]
    assert "Beside the clients" in report.write(out).read_text()


def test_what_a_probe_found_in_its_one_round_stands_in_the_summary(small: Small, out: Path) -> None:
    scored()

    @probe("shy", role="user", once=True)
    def shy(ctx: ProbeContext) -> dict[str, float | Guess]:
        """Speaks in the first round only."""
        return {"shy": Word(0.25)} if ctx.round == 1 else {}

    @probe("fickle", role="user")
    def fickle(ctx: ProbeContext) -> dict[str, float]:
        """Has no number in the last round: what it said before is not what it says in the end."""
        return {"fickle": 0.5} if ctx.round == 1 else {}

    assert run(small(probes=["shy", "fickle", "accuracy"]), out, engine="local").status == "finished"
    found = json.loads((out / "summary.json").read_text())["metrics"]
    assert found["shy/value"] == 0.25
    assert "fickle" not in found
    assert found["accuracy"] == metrics(out)[2]["accuracy"]


def test_a_guess_that_nobody_can_score_ends_the_run(small: Small, out: Path) -> None:
    @probe("mumbler", role="user")
    def mumbler(ctx: ProbeContext) -> dict[str, float | Guess]:
        """Says something."""
        return {"guess": Word(1.0)}

    with pytest.raises(RunError, match="nobody can score a Word"):
        run(small(probes=["mumbler"]), out, engine="local")


@pytest.mark.parametrize(("knowledge", "wanted"), [("own", 2.0), ("coalition", 4.0)])
def test_adversaries_claim_what_they_remember_after_the_last_round(small: Small, out: Path, knowledge: str, wanted: float) -> None:
    scored()

    @behaviour("counter", paper="nobody, 2026")
    class Counter(Behaviour):
        """Counts the updates that it has crafted."""

        def remember(self, size: int) -> ClientMemory:
            return {"count": torch.zeros(())}

        def craft(self, updates: Tensor, view: View) -> Tensor:
            view.memory["count"] = view.memory["count"] + len(updates)
            return updates

        def claim(self, view: View) -> Mapping[str, Guess]:
            return {"counted": Word(float(view.memory["count"]))}

    scenario = small(attackers=[{"behaviour": "counter", "ids": [3, 1], "knowledge": knowledge}])
    assert run(scenario, out, engine="local").status == "finished"
    found = metrics(out)
    assert found[2]["counted/value"] == wanted
    assert "counted/value" not in found[1]


def test_candidates_are_half_members_and_the_population_is_nobodys(small: Small, out: Path) -> None:
    @probe("asker", role="user", asks="membership", population=True)
    def asker(ctx: ProbeContext) -> dict[str, float]:
        """Looks at the candidates."""
        SEEN.append(ctx)
        return {}

    SEEN.clear()
    scenario = small(probes=["asker"], attackers=[{"behaviour": "sign-flip", "ids": [0, 1]}])
    assert run(scenario, out, engine="local").status == "finished"
    setup = build(scenario)
    assert setup.game is not None
    data, member = setup.world.data, setup.game.member
    ctx = SEEN[-1]
    assert ctx.candidates is not None
    assert ctx.population is not None
    assert ctx.member is None
    x = ctx.candidates[0]
    assert 2 * int(member.sum()) == len(member) == len(x)
    honest = torch.cat([data.client(c)[0] for c in range(2, 8)]).flatten(1)
    test = data.x_test.flatten(1)

    def among(rows: Tensor, pool: Tensor) -> list[bool]:
        return [bool((pool == row).all(1).any()) for row in rows.flatten(1)]

    assert all(among(x[member], honest))
    assert all(among(x[~member], test))
    assert all(among(ctx.population[0], test))
    assert not any(among(ctx.population[0], x[~member].flatten(1)))
    again = build(scenario).game
    assert again is not None
    assert torch.equal(again.x, setup.game.x)


def test_shadow_models_are_what_clients_would_have_trained(small: Small, out: Path) -> None:
    """Each is trained on its own set alone, in the same order whoever computes; two calls differ."""
    found: list[Tensor] = []

    @probe("shadower", role="curious-server", when="end")
    def shadower(ctx: ProbeContext) -> dict[str, float]:
        """Trains models of its own."""
        assert ctx.shadow is not None
        assert ctx.layout is not None
        g = torch.Generator().manual_seed(1)
        sets = [(torch.rand(n, *ctx.task.shape, generator=g), torch.arange(n) % 10) for n in (20, 5, 33)]
        start = torch.zeros(ctx.layout.size)
        found.extend([ctx.shadow(sets, start, 2), ctx.shadow([sets[0]], start, 2), ctx.shadow(sets)])
        with pytest.raises(ValueError, match="needs samples"):
            ctx.shadow([])
        return {}

    scenario = small(probes=["shadower"])
    for workers in (1, 2):
        run(scenario, out.parent / f"run{workers}", engine="local", workers=workers)
    first, second = found[:3], found[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape == (3, build(scenario).world.layout.size)
    assert torch.isfinite(first[0]).all()
    assert len({tuple(row[:5].tolist()) for row in first[0]}) == 3
    assert not torch.equal(first[0][0], first[1][0])  # other batches
    assert first[2].norm(dim=1).min() > 0


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("candidates", "the candidates"),
        ("population", "the observers' own samples"),
        ("updates", "the updates"),
        ("trust", "the trust"),
        ("sent", "the models that were sent"),
    ],
)
def test_who_writes_on_what_others_are_shown_is_named(small: Small, out: Path, what: str, said: str) -> None:
    """The candidates serve every probe of every round; the trust goes into the record."""

    @probe("scribbler", role="curious-server", asks="membership", population=True)
    def scribbler(ctx: ProbeContext) -> dict[str, float]:
        """Writes on one of the things that it sees."""
        if ctx.round == 0:
            return {}
        shown = getattr(ctx, what)
        tensor = next(iter(shown.values())) if what == "sent" else shown[0] if isinstance(shown, tuple) else shown
        tensor.mul_(2)
        return {}

    with pytest.raises(RunError, match=f"probe 'scribbler' failed in round 1: ValueError: it changed {said} in place"):
        run(small(probes=["scribbler"], strategy={"aggregator": "multi-krum"}), out, engine="local")
