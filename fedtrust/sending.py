"""What a server sends its clients in place of the model, if it is malicious; and the recipe that everybody knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from fedtrust.data.base import Task
from fedtrust.errors import RunError, said
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.registry import register


@dataclass(frozen=True)
class Recipe:
    """How clients train; part of the protocol, so known to everybody.

    Attributes:
        optimiser: its name, and `params` its parameters.
        lr: learning rate.
        batch_size: samples a step.
        epochs: passes over a client's data a round.
        loss: the name of the loss.
    """

    optimiser: str
    lr: float
    batch_size: int
    epochs: int
    loss: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SendContext:
    """What a malicious server knows when it decides what to send.

    Attributes:
        round: the round, from 1.
        clients: whom it asks, sorted.
        examples: client → the number of samples it registered.
        layout: where each layer lies in [d].
        task: what is learnt.
        model: the architecture.
        criterion: the loss that the protocol prescribes.
        recipe: how clients train.
        root: the server's own labelled samples, if the scenario grants any.
        candidates: samples whose membership it wants to know (x, y); only for a sender registered with `asks="membership"`.
        population: samples of its own of the same kind as the clients' (x, y); only for one registered with `population=True`.
        rng: its randomness for this round.
    """

    round: int
    clients: tuple[int, ...]
    examples: Mapping[int, int]
    layout: Layout
    task: Task
    model: Architecture
    criterion: Callable[[Tensor, Tensor], Tensor]
    recipe: Recipe
    rng: Generator
    root: tuple[Tensor, Tensor] | None = None
    candidates: tuple[Tensor, Tensor] | None = None
    population: tuple[Tensor, Tensor] | None = None


#: From the true model [d] to what all clients are sent [d], or client → what it is sent (whoever is missing gets the true one).
Send = Callable[[Tensor, SendContext], "Tensor | Mapping[int, Tensor]"]


def sender(name: str, *, paper: str = "", **meta: Any) -> Callable[[Any], Any]:
    """Register what a malicious server sends: `(params [d], ctx: SendContext, *, parameters) -> [d] or {client: [d]}`.

    Updates stay relative to what each client was sent, and are added to the server's true model, which it keeps to itself.

    Args:
        name: its name in a scenario (`[malicious_server] sender = …`).
        paper: authors, venue, section.
        meta: further declarations: `asks="membership"` and `population=True` grant what `SendContext` says.
    """
    return register("sender", name, paper=paper, **meta)


@dataclass(frozen=True)
class MaliciousServer:
    """A sender with its parameters bound, and the rounds in which it acts."""

    name: str
    send: Send
    rounds: tuple[int, int]

    def models(self, params: Tensor, ctx: SendContext) -> dict[int, Tensor]:
        """Return what each client of the round is sent; clients that get the same model share one tensor.

        Raises:
            RunError: the sender failed, or made something that is no model.
        """
        if not self.rounds[0] <= ctx.round <= self.rounds[1]:
            return dict.fromkeys(ctx.clients, params)
        try:
            made = self.send(params.clone(), ctx)
        except Exception as error:  # a student's sender may raise anything
            raise RunError(f"sender '{self.name}' failed in round {ctx.round}: {said(error)}") from error
        if not isinstance(made, Mapping):
            self._check(made, params)
            return dict.fromkeys(ctx.clients, made.detach())
        for client, model in made.items():
            if client not in ctx.clients:
                raise RunError(f"sender '{self.name}' sends a model to client {client}, who was not asked in round {ctx.round}")
            self._check(model, params)
        return {client: made[client].detach() if client in made else params for client in ctx.clients}

    def _check(self, model: Any, params: Tensor) -> None:
        if not isinstance(model, Tensor) or model.shape != params.shape or model.dtype != torch.float32:
            got = f"{model.dtype} {list(model.shape)}" if isinstance(model, Tensor) else type(model).__name__
            raise RunError(f"sender '{self.name}' made {got}, expected torch.float32 {list(params.shape)}")
        if not bool(torch.isfinite(model).all()):
            raise RunError(f"sender '{self.name}' made a model that is not finite")
