"""How the model is released: what its users may ask, what they are told, and what stands between the model and its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fedtrust.data.base import Task
from fedtrust.errors import FedTrustError
from fedtrust.models.architecture import Architecture
from fedtrust.registry import register

#: What a user is told: the model's output as it is, the probabilities of the classes, or the likeliest class alone (as a one-hot row).
Form = Literal["logits", "probabilities", "label"]


@dataclass(frozen=True)
class AnswerContext:
    """What an output defence knows: its owner runs the model, so nothing of it is hidden.

    Attributes:
        task: what the model does.
        model: its architecture.
        params: its parameters [d].
        surrogate: a fresh model of the same architecture [d], the same in every call: what a thief may train.
        rng: randomness for the answers to this query; another one for each query, user and round.
    """

    task: Task
    model: Architecture
    params: Tensor
    surrogate: Tensor
    rng: Generator


#: From probabilities [n, …, C] and the samples that were asked [n, *shape] to what is answered in their place, the same shape.
Answer = Callable[[Tensor, Tensor, AnswerContext], Tensor]


def answer(name: str, *, paper: str = "", **meta: Any) -> Callable[[Any], Any]:
    """Register an output defence `(probabilities [n, …, C], x [n, *shape], ctx: AnswerContext, *, parameters) -> [n, …, C]`.

    Args:
        name: its name in a scenario.
        paper: authors, venue, section.
        meta: further declarations. `task="classification"` refuses other tasks (a tuple names all that suit); `label=False` says that it
            leaves no trace where users are told the label alone, and refuses that.
    """
    return register("answer", name, paper=paper, **meta)


class QueryBudgetError(FedTrustError):
    """A user asked more than the release allows."""


@dataclass(frozen=True)
class Release:
    """The terms on which the model is released.

    Attributes:
        form: what a user is told.
        queries: how many samples each user may ask each released model about; `None`: as many as it likes.
        defences: the output defences by name, in their order.
    """

    form: Form = "logits"
    queries: int | None = None
    defences: Mapping[str, Answer] = field(default_factory=dict)

    def answers(self, output: Tensor, x: Tensor, ctx: Callable[[], AnswerContext]) -> Tensor:
        """Return what a user is told in place of the model's output [n, …, C] for samples x [n, *shape].

        Raises:
            ValueError: a defence returned something that is no answer.
        """
        if self.form == "logits":
            return output
        told = output.softmax(dim=-1)
        for name, defence in self.defences.items():
            told = _sound(name, defence(told.clone(), x.clone(), ctx()), told)
        return F.one_hot(told.argmax(dim=-1), told.shape[-1]).to(told.dtype) if self.form == "label" else told


def _sound(name: str, made: Tensor, before: Tensor) -> Tensor:
    if made.shape != before.shape or not bool(torch.isfinite(made).all()) or bool((made < 0).any()):
        raise ValueError(f"output defence '{name}' answers {list(made.shape)}, expected {list(before.shape)}, finite and not negative")
    return made.detach().to(before.dtype)


class Metered:
    """A user's access to the model: every sample counts, and beyond the budget nothing is answered. Nobody else's to change."""

    __slots__ = ("_answer", "_asked")
    _answer: Callable[[Tensor], Tensor]
    _asked: Callable[[], int]

    def __init__(self, ask: Callable[[Tensor], Tensor], budget: int | None) -> None:
        asked = 0  # in a cell of its own, so that nobody who holds this object writes it by the way

        def answer(x: Tensor) -> Tensor:
            nonlocal asked
            if budget is not None and asked + len(x) > budget:
                raise QueryBudgetError(f"{asked + len(x)} samples asked, but a user may ask {budget} (release.queries in the scenario)")
            asked += len(x)
            return ask(x)

        object.__setattr__(self, "_answer", answer)
        object.__setattr__(self, "_asked", lambda: asked)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a user's access to the model cannot be changed ({name})")

    @property
    def asked(self) -> int:
        """How many samples were answered so far."""
        return self._asked()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the answers [n, …, C] for samples x [n, *shape].

        Raises:
            QueryBudgetError: with these it would be more than the release allows.
        """
        return self._answer(x)


def log_probabilities(told: Tensor, form: Form) -> Tensor:
    """Return what a user takes for the log-probabilities [n, …, C], given answers in a form.

    A probability of 0 was rounded or is a label's: it counts as half the smallest positive one among these answers.
    """
    if form == "logits":
        return told.log_softmax(dim=-1)
    positive = told[told > 0]
    return told.clamp(min=float(positive.min()) / 2 if len(positive) else 0.5).log()
