"""What a probe is: a measurement of the global model by somebody who may look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Generator, Tensor

from fedtrust.data.base import FederatedData, Task
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.probes.guesses import Guess
from fedtrust.registry import register
from fedtrust.release import Form
from fedtrust.sending import Recipe

if TYPE_CHECKING:
    from fedtrust.engine.shadow import Shadow

Role = Literal["teacher", "curious-server", "user"]
When = Literal["round", "end"]


@dataclass(frozen=True)
class Artefact:
    """Something to look at that a probe leaves beside its numbers.

    Attributes:
        kind: `images`, `table` or `curve`.
        title, caption: what it shows.
        data: by kind, as in docs/run-directory.md: {"images": …}, {"columns": …, "rows": …} or {"x": …, "y": …, "series": …}.
    """

    kind: Literal["images", "table", "curve"]
    title: str
    caption: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """What one adversary wants the model to say.

    Attributes:
        name: the behaviour.
        x: inputs [n, *shape]; y: the labels that count as its success [n].
        clean: the test samples that `x` was made from, or `x` itself.
    """

    name: str
    x: Tensor
    y: Tensor
    clean: Tensor


@dataclass(frozen=True)
class Truth:
    """The ground truth of a round, for the teacher only.

    Attributes:
        malicious: the clients that attacked in this round.
        goals: what the adversaries of the scenario want.
        windows: per adversary its behaviour's name, and the first and the last round in which it acts.
    """

    malicious: frozenset[int]
    goals: tuple[Goal, ...]
    windows: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class ProbeContext:
    """What a probe may see; fields that its role is not granted are `None` (see `fedtrust.views.probe_view`).

    Attributes:
        round: the round just finished; 0 is the untrained model.
        final: whether it was the last.
        task: what is learnt.
        query: the model as a function x [n, *shape] → output [n, C] ([n, L, C] of a text), without gradients; all that a user has, and
            for a user on the terms of the release: other answers, and a budget of samples (`fedtrust.release`).
        params: the global model [d].
        model: the architecture, `model(params [d], x)`; differentiable.
        clients: whose replies the server used, sorted.
        updates: what the protocol showed the server of them [n, d]; for a teacher only if the probe declares `updates=True`.
        trust: the strategy's trust in each of `clients` [n]; `None` also where the rule has no such notion.
        test: the test samples (x, y).
        data: all clients' data.
        truth: who is malicious and what they want.
        criterion: the loss of the protocol, (output, y) → scalar.
        rng: the probe's own randomness.
        history: what was measured so far, by round from 0, this one not yet.
        layout: where each layer lies in [d]; public.
        recipe: how clients train; public.
        shadow: trains models of the observer's own; see `fedtrust.engine.shadow.Shadow`.
        sent: client → the model it was sent this round [d].
        examples: client → the number of samples it registered with the server.
        candidates: samples whose membership is asked (x [q, *shape], y [q]); only for a probe registered with `asks="membership"`.
        population: samples of the observer's own like the clients' (x, y); only for a probe registered with `population=True`.
        member: which candidates are members [q], bool; the teacher's.
        released: the model as its users are answered, x [n, *shape] → [n, C]; the teacher's (a user's `query` is that, metered).
        answers: what users are told (see `fedtrust.release.Form`), and `queries` how many samples each may ask about; public.
    """

    round: int
    final: bool
    task: Task
    query: Callable[[Tensor], Tensor]
    rng: Generator
    criterion: Callable[[Tensor, Tensor], Tensor]
    params: Tensor | None = None
    model: Architecture | None = None
    clients: tuple[int, ...] = ()
    updates: Tensor | None = None
    trust: Tensor | None = None
    test: tuple[Tensor, Tensor] | None = None
    data: FederatedData | None = None
    truth: Truth | None = None
    history: tuple[Mapping[str, float], ...] | None = None
    layout: Layout | None = None
    recipe: Recipe | None = None
    shadow: Shadow | None = None
    sent: Mapping[int, Tensor] | None = None
    examples: Mapping[int, int] | None = None
    candidates: tuple[Tensor, Tensor] | None = None
    population: tuple[Tensor, Tensor] | None = None
    member: Tensor | None = None
    released: Callable[[Tensor], Tensor] | None = None
    answers: Form = "logits"
    queries: int | None = None

    @property
    def test_output(self) -> Tensor:
        """The model's output for the test samples [n, C]; the runner computes it once for all probes of a round.

        Raises:
            PermissionError: this role does not see the test samples.
        """
        return self.query(need(self.test, "the test samples")[0])


Result = Mapping[str, float | Artefact | Guess]
Probe = Callable[[ProbeContext], Result]


def probe(name: str, *, role: Role = "teacher", when: When = "round", paper: str = "", **meta: Any) -> Callable[[Any], Any]:
    """Register a probe `(ctx, *, parameters) -> {metric: number, Artefact or Guess}`.

    A guess is what an adversary believes; it is scored by somebody who knows the truth (`fedtrust.probes.guesses`).

    Args:
        name: its name in a scenario.
        role: who looks; decides what `ctx` holds.
        when: after every round, or at the end.
        paper: authors, venue, section.
        meta: further declarations. `task="classification"` refuses other tasks (a tuple names all that suit); `updates=True` asks for
            `ctx.updates`, which are gathered only for a probe that looks at them (a curious server always does). `asks="membership"`
            grants `ctx.candidates`, `population=True` grants `ctx.population`, `architecture=True` grants a user `ctx.model`: simulated
            knowledge, which stands in the threat card. `once=True` says that it acts in one round and is silent in the others: what it
            found then stands in the summary; the name of its guess in place of `True`, where that is not the probe's.
    """
    return register("probe", name, role=role, when=when, paper=paper, **meta)


def need(value: Any, what: str) -> Any:
    """Return a field of the context that must have been granted.

    Raises:
        PermissionError: it was not.
    """
    if value is None:
        raise PermissionError(f"this probe does not see {what}")
    return value


def share(hits: Tensor) -> float:
    """Return the share of true values; NaN-free: an empty tensor counts as 0."""
    return float(hits.double().mean()) if hits.numel() else 0.0
