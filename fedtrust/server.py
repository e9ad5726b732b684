"""What the server does with a round's updates: filters, one aggregator, steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from fedtrust.data.base import Task
from fedtrust.engine import threads
from fedtrust.errors import RunError
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.registry import register

State = Mapping[str, Tensor]


class Train(Protocol):
    """The protocol's local training, on samples that the server owns."""

    def __call__(self, x: Tensor, y: Tensor, params: Tensor | None = None, epochs: int | None = None) -> Tensor:
        """Return the update [d] that training on `x` [b, *shape], `y` [b] gives."""


class Private(Protocol):
    """Randomness that a guarantee of privacy rests on, or that the clients and not the server draw."""

    def __call__(self, purpose: str, *counters: int) -> np.random.Generator:
        """Return the generator of this round that goes by that name: the same at every call, with a key of 128 bits."""


class Verdict(NamedTuple):
    """What a filter, an aggregator or a step returns (a bare tensor means `Verdict(tensor)`).

    Attributes:
        value: filters: the rows [m, d]; aggregators and steps: the change of the model [d].
        trust: how far each row that came in is trusted, [n]: from 0, left out, to 1, fully used. `None` where a rule has no such notion.
        state: what the component wants back next round (tensors; saved in the checkpoint). `None` keeps the old one.
        members: filters that merge rows: for each row that came in the index of the row it went into, int64 [n].
        bound: filters that guarantee it: the largest L2 norm any row can have, fixed before the data was seen.
        numbers: what the component says of this round, by name; recorded among the metrics as `<component>/<name>`.
    """

    value: Tensor
    trust: Tensor | None = None
    state: State | None = None
    members: Tensor | None = None
    bound: float | None = None
    numbers: Mapping[str, float] = {}


def _no_training(x: Tensor, y: Tensor, params: Tensor | None = None, epochs: int | None = None) -> Tensor:
    raise RunError("there is nothing to train with here: a rule that treats every row by itself runs where the updates are made")


def _no_randomness(purpose: str, *counters: int) -> np.random.Generator:
    raise RunError("there is no private randomness here: a rule that treats every row by itself runs where the updates are made")


@dataclass(frozen=True)
class AggContext:
    """What a server rule may know. Never the ground truth.

    Attributes:
        params: the current global model [d].
        weights: each row's number of training samples as registered with the server [n], float32.
        clients: each row's client id, sorted; empty once a filter has merged or hidden the rows.
        round: the round, from 1.
        rounds: how many there will be; 0 where nobody says.
        assumed_malicious: how many of the n rows the defender ASSUMES malicious; the scenario's belief, not the truth.
        layout: where each layer lies in [d].
        task: what is learnt.
        model: the architecture, `model(params [d], x) -> output`; shows its hidden layers too.
        criterion: the loss the protocol prescribes.
        root: the server's own labelled samples (x, y), if the scenario grants any.
        state: what this component returned last round; empty at first.
        bound: the L2 bound on the rows that a filter guarantees, if one does.
        rng: this component's source of randomness for this round.
        train: trains as clients do (optimiser, learning rate, batch size, epochs) on samples of the server's own:
            `train(x, y, params=None, epochs=None) -> update [d]`, from the global model unless `params` says another.
        asked: how many clients were asked this round, whether they replied or not; 0 where nobody says.
        private: `private(purpose, *counters)`, NumPy generators with keys of 128 bits (`rng` has 32): for noise that hides somebody, and
            for what clients draw. An attacker who is granted the server's rule is given other ones.
    """

    params: Tensor
    weights: Tensor
    clients: tuple[int, ...]
    round: int
    assumed_malicious: int
    layout: Layout
    task: Task
    model: Architecture
    criterion: Callable[[Tensor, Tensor], Tensor]
    root: tuple[Tensor, Tensor] | None
    rng: Generator
    state: State = field(default_factory=dict)
    bound: float | None = None
    train: Train = _no_training
    rounds: int = 0
    asked: int = 0
    private: Private = _no_randomness


Rule = Callable[[Tensor, AggContext], Verdict | Tensor]


@dataclass(frozen=True)
class PipelineFacts:
    """What a component's `needs` check is told before anything runs.

    Attributes:
        n: the number of rows a round that reach the component (a filter that merges them says how many it leaves).
        f: the number of them that the defender assumes malicious.
        params: the component's own parameters.
        filters, aggregator, steps: the names in the pipeline.
        bounded: whether a filter guarantees a bound on the rows that reach the aggregator.
        root_samples: the size of the server's own labelled set.
        rowwise: for each filter whether it treats every row by itself (see `server_filter`).
    """

    n: int
    f: int
    params: Mapping[str, Any]
    filters: tuple[str, ...]
    aggregator: str
    steps: tuple[str, ...]
    bounded: bool
    root_samples: int
    rowwise: tuple[bool, ...] = ()


Needs = Callable[[PipelineFacts], str | None]


def server_filter(name: str, *, needs: Needs | None = None, paper: str = "", **meta: Any) -> Callable[[Any], Any]:
    """Register a filter `(updates [n, d], ctx, *, parameters) -> [m, d]`; see `aggregator`.

    `bounds` is a function that says of the filter's parameters whether it will give a `Verdict.bound`; a filter without it takes away the
    bound that one before it gave. `rowwise` is a function that says of the parameters whether every row is treated by itself: from the row
    and the parameters alone, without state, randomness, or what the context says about the other rows. Such a filter runs where the
    updates are made, and before a `linear` aggregator the server then never holds the rows. `rows` is a function that says of the
    `PipelineFacts` how many rows a filter that merges them leaves. `hides=True`: what the filter does is done by the clients, and the
    server sees nothing but what it returns: a curious server is shown that in place of the rows, and neither client ids nor trust.
    `guarantee` is a function of (parameters, state, d) that says what privacy the filter's noise has given so far, for the summary, and
    `promise` one of (`RunFacts`, assumed attackers among the clients of a round) that says beforehand what it will give, for `check`.
    """
    return register("filter", name, needs=needs, paper=paper, **meta)


def aggregator(name: str, *, needs: Needs | None = None, paper: str = "", **meta: Any) -> Callable[[Any], Any]:
    """Register an aggregator `(updates [n, d], ctx, *, parameters) -> Verdict`.

    Args:
        name: its name in a scenario.
        needs: a function that says why the rule cannot work in a pipeline (n too small for f, rows hidden, …), or returns `None`.
        paper: authors, venue, section or algorithm.
        meta: further declarations: `exempt` names the invariances (`translation`, `scale`, `permutation`, …) that do not hold; `linear`
            says that the rule is a weighted mean and nothing else, with every row counting the same ("equal") or as many times as its
            client has samples ("examples"): such a rule is added up where the updates are made.
    """
    return register("aggregator", name, needs=needs, paper=paper, **meta)


def step(name: str, *, needs: Needs | None = None, paper: str = "", **meta: Any) -> Callable[[Any], Any]:
    """Register a step `(delta [d], ctx, *, parameters) -> delta [d]`; see `aggregator`."""
    return register("step", name, needs=needs, paper=paper, **meta)


class Stage(NamedTuple):
    """One component of a pipeline: its place (`filters[0]`, `aggregator`, `steps[1]`), name and bound function.

    `linear`, `rowwise`, `hides` and `guarantee` are what its author declared (see `aggregator` and `server_filter`); the last is asked
    with the component's state and d.
    """

    place: str
    name: str
    rule: Rule
    linear: str | None = None
    rowwise: bool = False
    hides: bool = False
    guarantee: Callable[[State, int], Mapping[str, Any] | None] | None = None


class Outcome(NamedTuple):
    """What a pipeline made of a round.

    Attributes:
        delta: the change of the global model [d].
        trust: per client row that came in [n], or `None`.
        states: the components' states by place.
        seconds: how long each component took, by place.
        shown: the rows [m, d] that a filter which hides the clients' own let the server see; `None` without such a filter.
        numbers: what components said of the round, by `<component>/<name>`.
    """

    delta: Tensor
    trust: Tensor | None
    states: dict[str, State]
    seconds: dict[str, float]
    shown: Tensor | None = None
    numbers: Mapping[str, float] = {}


@dataclass(frozen=True)
class Pipeline:
    """Filters, one aggregator, steps, in this order."""

    filters: Sequence[Stage]
    aggregator: Stage
    steps: Sequence[Stage]
    deadline: float = math.inf  # seconds that each component gets

    def __call__(self, updates: Tensor, ctx: AggContext, states: Mapping[str, State], rng: Callable[[str], Generator]) -> Outcome:
        """Turn the updates [n, d] into the change of the model.

        Args:
            updates: one row a client, sorted by client id; must be finite.
            ctx: the context of the round; `state` and `rng` are set here for each component.
            states: the components' states by place.
            rng: gives a component's generator by its place.

        Raises:
            RunError: a component raised, or returned something of the wrong shape or not finite; it is named.
        """
        return self._through((*self.filters, self.aggregator, *self.steps), updates, None, ctx, states, rng)

    @property
    def linear(self) -> str | None:
        """How rows count ("equal" or "examples") if all that is needed of them is a weighted sum of the filtered rows; else `None`."""
        return self.aggregator.linear if all(stage.rowwise for stage in self.filters) else None

    @property
    def hides(self) -> bool:
        """Whether a filter hides the clients' rows from the server."""
        return any(stage.hides for stage in self.filters)

    def finish(
        self, mean: Tensor, trust: Tensor | None, ctx: AggContext, states: Mapping[str, State], rng: Callable[[str], Generator]
    ) -> Outcome:
        """Turn what a `linear` pipeline's filters and aggregator gave into the change of the model: the steps are left to do.

        Args:
            mean: the weighted mean of the filtered rows [d].
            trust: per client, what the filters made of it [n], or `None`.
            ctx: the context of the round, with the bound that the last filter gave.
            states: the components' states by place.
            rng: gives a component's generator by its place.
        """
        return self._through(self.steps, mean, None if trust is None else trust.detach().float().clamp(max=1.0), ctx, states, rng)

    def _through(
        self,
        stages: Sequence[Stage],
        value: Tensor,
        trust: Tensor | None,
        ctx: AggContext,
        states: Mapping[str, State],
        rng: Callable[[str], Generator],
    ) -> Outcome:
        new: dict[str, State] = dict(states)
        seconds: dict[str, float] = {}
        row_of = torch.arange(len(ctx.weights))  # which current row each client's update went into
        shown: Tensor | None = None
        numbers: dict[str, float] = {}
        for stage in stages:
            began = time.perf_counter()
            # Copies: a component that computes in place must not reach the model or its own past.
            here = replace(ctx, params=ctx.params.clone(), state=_copy(states.get(stage.place, {})), rng=rng(stage.place))
            verdict = _run(stage, value, here, self.deadline)
            _check(stage, verdict, value, ctx.layout.size, rows=stage.place.startswith("filters"))
            seconds[stage.place] = time.perf_counter() - began
            if verdict.state is not None:
                new[stage.place] = _copy(verdict.state)
            if verdict.trust is not None:
                spread = verdict.trust.detach().float().clamp(max=1.0)[row_of]
                trust = spread if trust is None else trust * spread
            if stage in self.filters:  # what an earlier filter bounded, a later one may have scaled up again
                ctx = replace(ctx, bound=verdict.bound)
            if verdict.members is not None:
                row_of, ctx = verdict.members[row_of], _merged(ctx, verdict.members, len(verdict.value))
            value = verdict.value
            if stage.hides:
                shown = value.clone()
            numbers |= {f"{stage.name}/{key}": float(number) for key, number in verdict.numbers.items() if math.isfinite(number)}
        return Outcome(value, trust, new, seconds, shown, numbers)


def run_filter(stage: Stage, rows: Tensor, ctx: AggContext) -> Verdict:
    """Return what a filter that treats every row by itself makes of rows [k, d], checked.

    Raises:
        RunError: it failed, or returned what it must not; it is named.
    """
    verdict = _run(stage, rows, ctx)
    _check(stage, verdict, rows, ctx.layout.size, rows=True)
    if verdict.members is not None or verdict.state is not None:
        raise RunError(f"{stage.place} '{stage.name}' is declared rowwise, but merged rows or kept state")
    return verdict


def _copy(state: State) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _run(stage: Stage, value: Tensor, ctx: AggContext, deadline: float = math.inf) -> Verdict:
    def call() -> Verdict | Tensor:
        with torch.no_grad():
            return stage.rule(value, ctx)

    try:
        result = call() if deadline == math.inf else threads.within(deadline, call)
    except RunError:
        raise
    except (Exception, SystemExit) as error:
        raise RunError(f"{stage.place} '{stage.name}' failed in round {ctx.round}: {type(error).__name__}: {error}") from error
    return result if isinstance(result, Verdict) else Verdict(result)


def _check(stage: Stage, verdict: Verdict, given: Tensor, size: int, *, rows: bool) -> None:
    who = f"{stage.place} '{stage.name}'"
    value = verdict.value
    if not isinstance(value, Tensor):
        raise RunError(f"{who} returned {type(value).__name__}, not a tensor")
    good = value.dim() == 2 and value.shape[1] == size and len(value) > 0 if rows else value.shape == (size,)
    if not good:
        raise RunError(f"{who} returned shape {list(value.shape)}, expected {f'[m, {size}]' if rows else f'[{size}]'}")
    if value.dtype != torch.float32:
        raise RunError(f"{who} returned {value.dtype}, expected torch.float32")
    if not bool(torch.isfinite(value).all()):
        raise RunError(f"{who} returned a value that is not finite")
    if rows and verdict.members is None and len(value) != len(given):
        raise RunError(f"{who} turned {len(given)} rows into {len(value)} without saying which went where (Verdict.members)")
    _check_rows(who, verdict, given, rows=rows)
    if verdict.state is not None and not isinstance(verdict.state, Mapping):
        raise RunError(f"{who} returned state of type {type(verdict.state).__name__}, expected tensors by name")
    for name, kept in (verdict.state or {}).items():
        if not isinstance(kept, Tensor):
            raise RunError(f"{who} returned state '{name}' as {type(kept).__name__}, not a tensor")


def _check_rows(who: str, verdict: Verdict, given: Tensor, *, rows: bool) -> None:
    """Refuse trust and members that do not say one thing about each row that came in."""
    trust, members = verdict.trust, verdict.members
    if trust is not None:
        if not isinstance(trust, Tensor):
            raise RunError(f"{who} returned trust as {type(trust).__name__}, not a tensor")
        if given.dim() != 2 or trust.shape != (len(given),):
            raise RunError(f"{who} returned trust of shape {list(trust.shape)}, expected one value a row")
        if not bool(((trust >= 0) & (trust <= 1 + 1e-6)).all()):
            raise RunError(f"{who} returned trust that is not between 0 and 1")
    if members is not None:
        if not rows:
            raise RunError(f"{who} returned members, which only a filter may")
        if not isinstance(members, Tensor) or members.dtype != torch.int64 or members.shape != (len(given),):
            raise RunError(f"{who} returned members that are not {len(given)} integers (int64), one a row")
        if not bool(((members >= 0) & (members < len(verdict.value))).all()):
            raise RunError(f"{who} returned members that are no row of the {len(verdict.value)} it made")


def _merged(ctx: AggContext, members: Tensor, m: int) -> AggContext:
    """Return the context after rows were merged: weights added up, client ids hidden, the assumed attackers one row each."""
    weights = torch.zeros(m).index_add_(0, members, ctx.weights)
    return replace(ctx, weights=weights, clients=(), assumed_malicious=min(ctx.assumed_malicious, m))


def assumed_count(assumed: float | int, n: int) -> int:
    """Return how many of n updates the defender assumes malicious: a count as it is, a share rounded up."""
    if isinstance(assumed, int):
        return min(assumed, n)
    return min(n, max(0, math.ceil(assumed * n - 1e-9)))  # the 1e-9: 0.2 * 20 is a little more than 4
