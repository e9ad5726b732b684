"""What an adversary has found out, as values; a teacher who knows the truth scores them.

A probe that plays an adversary returns guesses in place of numbers, and a behaviour that extracts something returns them from `claim`.
Neither sees the truth: the scorer of the guess's type does, and its metrics and artefacts are recorded under the guess's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from fedtrust.probes.base import Artefact, ProbeContext


class Guess:
    """Base of everything that can be scored."""


@dataclass(frozen=True)
class Reconstruction:
    """Samples that somebody believes a client trained on.

    Attributes:
        client: whose they are; `None` where the adversary cannot tell (he saw a sum).
        x: the samples [b, *shape].
        y: their labels [b], if he has an idea.
    """

    client: int | None
    x: Tensor
    y: Tensor | None = None


@dataclass(frozen=True)
class Reconstructions(Guess):
    """Reconstructed samples, scored against what the clients trained on."""

    items: tuple[Reconstruction, ...]


@dataclass(frozen=True)
class LabelCounts(Guess):
    """Client → how many samples of each class it is believed to have trained on [C]."""

    counts: Mapping[int, Tensor]


@dataclass(frozen=True)
class Membership(Guess):
    """One score a candidate [q]; the higher, the more likely it was trained on."""

    scores: Tensor


@dataclass(frozen=True)
class Property(Guess):
    """Client → how likely its data have a property, by the property's name."""

    name: str
    scores: Mapping[int, float]


@dataclass(frozen=True)
class Prototype(Guess):
    """What a class, or the one client that holds it, looks like: samples x [b, *shape]."""

    label: int
    x: Tensor


@dataclass(frozen=True)
class Copy(Guess):
    """A stolen model.

    Attributes:
        predict: x [n, *shape] → output [n, C].
        queries: how many samples the owner's model was asked about for it.
        params: its parameters [d], where the thief believes them to be those of the owner's model.
    """

    predict: Callable[[Tensor], Tensor]
    queries: int
    params: Tensor | None = None


@dataclass(frozen=True)
class Copies(Guess):
    """Stolen models by the number of queries that each took, the last one being the best that the thief has."""

    items: tuple[Copy, ...]


@dataclass(frozen=True)
class Secrets(Guess):
    """Texts that somebody believes to stand in the training data.

    Attributes:
        texts: what is claimed; each sentence with the secret in it, from its beginning to the end of the secret.
        queries: how many samples the owner's model was asked about for them.
    """

    texts: tuple[str, ...]
    queries: int


Scorer = Callable[[Any, "ProbeContext", "ProbeContext"], Mapping[str, "float | Artefact"]]
ScorerType = TypeVar("ScorerType", bound=Scorer)

_SCORERS: dict[type[Guess], Scorer] = {}


def scorer(kind: type[Guess]) -> Callable[[ScorerType], ScorerType]:
    """Register how guesses of a type are scored: `(guess, full, seen) -> {name: number or Artefact}`.

    `full` is the teacher's context, `seen` the one that the adversary had.
    """

    def decorate(function: ScorerType) -> ScorerType:
        other = _SCORERS.get(kind)
        if other is not None and (other.__module__, other.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(f"{kind.__name__} is already scored by {other.__module__}.{other.__qualname__}")
        _SCORERS[kind] = function
        return function

    return decorate


def score(key: str, guess: Guess, full: ProbeContext, seen: ProbeContext) -> dict[str, float | Artefact]:
    """Return what a guess is worth, by `key/name`; an artefact named like the guess itself, `key`, if its scorer calls it "".

    Raises:
        TypeError: nobody knows how to score it.
    """
    from fedtrust.registry import REGISTRY

    REGISTRY.load()  # scorers register themselves where the built-in components do
    known = _SCORERS.get(type(guess))
    if known is None:
        raise TypeError(f"nobody can score a {type(guess).__name__} (known: {', '.join(sorted(k.__name__ for k in _SCORERS))})")
    return {f"{key}/{name}" if name else key: _titled(key, value) for name, value in known(guess, full, seen).items()}


def _titled(key: str, value: float | Artefact) -> float | Artefact:
    """Put the guess's name into an artefact's title: several adversaries of a run may leave the same kind."""
    return value if isinstance(value, int | float) else replace(value, title=f"{value.title} ({key})")
