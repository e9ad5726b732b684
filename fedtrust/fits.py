"""What a component is told of the run before it begins, so that it can say why it would not work in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedtrust.data.base import Task
from fedtrust.errors import said
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.sending import Recipe


@dataclass(frozen=True)
class RunFacts:
    """What a component's `fits` is told once data and model are there, before anything is trained.

    Attributes:
        params: the component's own parameters.
        task: what is learnt.
        layout: where each layer lies in [d].
        model: the architecture; to be looked at.
        recipe: how clients train.
        rounds: how many there will be.
        per_round: how many clients are asked in each.
        sender: the name of what a malicious server sends, "" for an honest server; `sender_params` its parameters, and `sends` the
            first and the last round in which it does.
        properties: what some client's data have in common that has nothing to do with the task (see `fedtrust.data.skew.PROPERTIES`).
        own: how many samples of its own an observer has that is granted some.
        candidates: how many samples a membership inference asks about at least.
        queries: how many samples a user may ask about; `None`: as many as it likes.
    """

    params: Mapping[str, Any]
    task: Task
    layout: Layout
    model: Architecture
    recipe: Recipe
    rounds: int = 1
    per_round: int = 1
    sender: str = ""
    sender_params: Mapping[str, Any] | None = None
    sends: tuple[int, int] = (1, 1)
    properties: frozenset[str] = frozenset()
    own: int = 0
    candidates: int = 0
    queries: int | None = None


#: Says why a component cannot work in a run, or returns `None`; declared as `fits=…` in the decorator of a component of any kind.
Fits = Callable[[RunFacts], str | None]


def first(*asked: Fits) -> Fits:
    """Return a `fits` that says the first reason that one of several finds."""
    return lambda facts: next((reason for one in asked if (reason := one(facts))), None)


def within_budget(asked: Callable[[RunFacts], int]) -> Fits:
    """Return a `fits` of a user who asks about so many samples or more."""

    def fits(facts: RunFacts) -> str | None:
        wanted = asked(facts)
        if facts.queries is None or wanted <= facts.queries:
            return None
        return f"asks about at least {wanted} samples, and a user may ask {facts.queries} (release.queries)"

    return fits


def features(facts: RunFacts) -> str | None:
    """Return why a component that works on what goes into the last layer has nothing to work on: no layer comes before it."""
    heads = facts.model.heads
    alone = all(name.rpartition(".")[0] in heads for name in facts.layout.names)
    return "the model has no layer before its last, so no features that it learns (mlp, cnn, … have)" if alone else None


def misfit(fits: Fits | None, facts: RunFacts) -> str | None:
    """Return why a component cannot work in a run, or `None`.

    Raises:
        ValueError: `fits` itself fails; a student's may raise anything.
    """
    if fits is None:
        return None
    try:
        return fits(facts)
    except (Exception, SystemExit) as error:
        raise ValueError(f"its `fits` fails: {said(error)}") from error
