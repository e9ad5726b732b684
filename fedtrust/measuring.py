"""Everybody who looks at the model after a round: what each may see, and what is made of what each finds."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedtrust import views
from fedtrust.client import ClientMemory, View, overrides
from fedtrust.engine import flower, seeds, threads
from fedtrust.engine.cohort import ClientTask
from fedtrust.engine.shadow import shadows
from fedtrust.engine.validate import Valid
from fedtrust.engine.workers import Executor
from fedtrust.errors import RunError
from fedtrust.models.build import initialise
from fedtrust.probes.base import Artefact, ProbeContext, Truth, need
from fedtrust.probes.guesses import Guess, score
from fedtrust.release import AnswerContext
from fedtrust.runs import RunDirectory
from fedtrust.setup import Setup, goals_now


class Looked(NamedTuple):
    """A model to be looked at.

    Attributes:
        round: the round just finished.
        final: whether it was the last.
        params: the model [d].
        before: the one that the round began with [d].
        valid: the replies that the server used.
        trust: how far the strategy trusts each of them [n].
        sent: client → the model it was sent [d].
        memories: what coalitions remember, by their place in the roster.
        history: what was measured so far, by round.
        hides: whether the clients' rows are hidden from the server, and `shown`: what it sees in their place [m, d].
    """

    round: int
    final: bool
    params: Tensor
    before: Tensor
    valid: Valid
    trust: Tensor | None
    sent: Mapping[int, Tensor]
    memories: Mapping[str, ClientMemory]
    history: tuple[Mapping[str, float], ...]
    hides: bool = False
    shown: Tensor | None = None


class Measuring:
    """The probes of one run."""

    def __init__(self, setup: Setup, directory: RunDirectory, executor: Executor) -> None:
        self._setup, self._directory, self._executor = setup, directory, executor
        self.world = setup.world.for_measuring("cuda" if torch.cuda.is_available() else "cpu")
        self._deadline = setup.scenario.engine.deadline
        self._windows = tuple((group.name, *group.rounds) for group in setup.roster.groups)

    @property
    def watched(self) -> bool:
        """Whether somebody looks at each update."""
        metas = [p.entry.meta for p in self._setup.probes]
        return any(meta.get("role") == "curious-server" or meta.get("updates") for meta in metas)

    def probe(self, looked: Looked) -> dict[str, float]:
        """Let every probe look, and after the last round every adversary say what he has found; return the numbers, keep the artefacts.

        Raises:
            RunError: a probe failed, or broke the rules; it is named.
        """
        metrics: dict[str, float] = {}
        context = self._context(looked)
        for bound in self._setup.probes:
            name, meta = bound.entry.name, bound.entry.meta
            if meta.get("when") == "end" and not looked.final:
                continue
            full = dataclasses.replace(
                context,
                rng=seeds.torch_stream(self._setup.world.seed, f"probe/{name}", looked.round),
                params=looked.params.clone(),  # a probe that writes on it harms nobody
                shadow=shadows(self._executor, self._setup.world, looked.round, name),
                released=self._released(context, name),
            )
            hidden = looked.hides and meta["role"] == "curious-server"
            seen = views.probe_view(str(meta["role"]), views.behind(full, looked.shown) if hidden else full, meta)
            metrics |= self._found(f"probe '{name}'", name, functools.partial(bound.call, seen), full, seen, metrics)
        if looked.final:
            for place, group in enumerate(self._setup.roster.groups):
                if overrides(group.behaviour, "claim"):
                    claim = functools.partial(group.behaviour.claim, self._claiming(place, looked))
                    metrics |= self._found(f"`claim` of '{group.name}'", group.name, claim, context, context, metrics)
        return metrics

    def _found(
        self,
        who: str,
        name: str,
        look: Callable[[], Mapping[str, float | Artefact | Guess]],
        full: ProbeContext,
        seen: ProbeContext,
        metrics: Mapping[str, float],
    ) -> dict[str, float]:
        """Return the numbers that somebody found, guesses scored; `metrics` are those of this round so far."""
        stamps = self._stamps(full)

        def scored() -> dict[str, float | Artefact]:
            found: dict[str, float | Artefact] = {}
            for key, value in look().items():
                found |= score(key, value, full, seen) if isinstance(value, Guess) else {key: value}
            return found

        try:
            numbers = self.keep(name, threads.within(self._deadline, scored))
            twice = sorted(metrics.keys() & numbers.keys())
            if twice:
                raise ValueError(f"metric '{twice[0]}' is measured by another probe already")
            changed = [what for what, stamp in self._stamps(full).items() if stamp != stamps[what]]
            if changed:
                raise ValueError(f"it changed {changed[0]} in place")
        except (Exception, SystemExit) as error:  # a student's code may raise anything
            raise RunError(f"{who} failed in round {full.round}: {type(error).__name__}: {error}") from error
        return numbers

    def _stamps(self, full: ProbeContext) -> dict[str, tuple[int, ...]]:
        """Return the version counters of what several probes are shown, or the run goes on with, and nobody must write on."""
        data, game = self._setup.world.data, self._setup.game
        shared: dict[str, tuple[Tensor | None, ...]] = {
            "the test samples": (data.x_test, data.y_test),
            "the clients' data": (data.x, data.y),
            "the candidates": () if game is None else (game.x, game.y, game.member),
            "the observers' own samples": () if game is None else game.population,
            "the updates": (full.updates,),
            "the trust": (full.trust,),
            "the models that were sent": tuple((full.sent or {}).values()),
        }
        return {what: tuple(t._version for t in tensors if t is not None) for what, tensors in shared.items()}

    def keep(self, name: str, found: Mapping[str, float | Artefact]) -> dict[str, float]:
        """Save the artefacts and return the numbers."""
        for key, value in found.items():
            if isinstance(value, Artefact):
                self._directory.save_artefact(f"{name}.{key}".replace("/", "."), value)
        numbers = {k: float(v) for k, v in found.items() if not isinstance(v, Artefact)}
        # A model that has diverged may have no finite loss, and JSON no other number: such a metric is absent from its round.
        return {k: v for k, v in numbers.items() if math.isfinite(v)}

    def _claiming(self, place: int, looked: Looked) -> View:
        """Return what an adversary knows when he says what he has found out: of a coalition all of it, else the first member alone."""
        setup, group = self._setup, self._setup.roster.groups[place]
        alone = group.knowledge == "own"
        members = group.members[:1] if alone else group.members
        tasks = [ClientTask(c, group.behaviour, {}, i, len(group.members), None, group.targets) for i, c in enumerate(members)]
        memory = looked.memories.get(f"{place}/{members[0]}" if alone else str(place), {})
        nothing = torch.zeros(0, setup.world.layout.size)
        known = {name: value.clone() for name, value in memory.items()}
        return views.crafting_view(
            setup.world, looked.round, looked.before, {}, tasks, group.knowledge, known, nothing, None, len(members), "claim"
        )

    def _context(self, looked: Looked) -> ProbeContext:
        setup, world, params = self._setup, self._setup.world, looked.params
        on_test: list[Tensor] = []  # what the model says to the test samples, asked for by most probes

        def query(x: Tensor) -> Tensor:
            if x is not world.data.x_test:
                return self.world.predict(params, x)
            if not on_test:
                on_test.append(self.world.predict(params, x))
            return on_test[0].clone()

        game = setup.game
        return ProbeContext(
            round=looked.round,
            final=looked.final,
            task=world.data.task,
            query=query,
            rng=seeds.torch_stream(world.seed, "probe", looked.round),
            criterion=world.criterion,
            params=params,
            model=world.model,
            clients=looked.valid.clients,
            updates=self._updates(looked),
            trust=looked.trust,
            test=(world.data.x_test, world.data.y_test),
            data=world.data,
            truth=Truth(
                frozenset(setup.roster.malicious(min(looked.round, setup.scenario.rounds))),
                goals_now(setup, looked.memories),
                self._windows,
            ),
            history=looked.history,
            answers=setup.release.form,
            queries=setup.release.queries,
            layout=world.layout,
            recipe=setup.recipe,
            sent=self._sent(looked),
            examples={client: world.examples(client) for client in looked.sent},
            candidates=None if game is None else (game.x, game.y),
            population=None if game is None else game.population,
            member=None if game is None else game.member,
        )

    def _released(self, context: ProbeContext, name: str) -> Callable[[Tensor], Tensor]:
        """Return the model as an observer of that name is answered; each of its queries has randomness of its own."""
        setup, world, params = self._setup, self._setup.world, need(context.params, "the model")
        numbers = itertools.count()

        def released(x: Tensor) -> Tensor:
            number = next(numbers)

            def defence() -> AnswerContext:
                rng = seeds.torch_stream(world.seed, f"answers/{name}", context.round, number)
                return AnswerContext(world.data.task, world.model, params.clone(), self._surrogate(), rng)

            return setup.release.answers(context.query(x), x, defence)

        return released

    def _surrogate(self) -> Tensor:
        """Return the parameters of a fresh model, the same whenever it is asked."""
        module = copy.deepcopy(self._setup.world.module)
        initialise(module, seeds.torch_stream(self._setup.world.seed, "answers/surrogate"))
        return self._setup.world.layout.vector(module)

    def _sent(self, looked: Looked) -> dict[int, Tensor]:
        """Return copies of the models that clients were sent; those who were sent the same share one."""
        copies = {id(model): model.clone() for model in looked.sent.values()} if self.watched else {}
        return {client: copies[id(model)] for client, model in looked.sent.items()} if self.watched else {}

    def _updates(self, looked: Looked) -> Tensor | None:
        """Return what the protocol showed the server; only gathered when a probe looks at it."""
        if not self.watched or not looked.valid.messages:
            return None
        layout = self._setup.world.layout
        return torch.stack([flower.update(m, looked.sent.get(flower.sender(m), looked.before), layout) for m in looked.valid.messages])
