"""What a curious server makes of an update before it inverts it: whose it is, the gradient in it, the update that a guess would give.

Everything here is computed from what the protocol tells a server: the recipe, the model that it sent, the update that came back, and how
many samples the client has registered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from fedtrust.engine.prepare import local_steps
from fedtrust.fits import RunFacts
from fedtrust.models.architecture import Architecture
from fedtrust.models.optimisers import Sgd
from fedtrust.probes.base import ProbeContext, need
from fedtrust.registry import REGISTRY
from fedtrust.sending import Recipe

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """What a server saw of one client in one round.

    Attributes:
        client: who it is; `None`: nobody knows, it is the mean of a whole cohort (secure aggregation).
        start: the model it was sent [d].
        update: what came back, minus that [d].
        samples: how many samples it trained on, as registered; behind secure aggregation all of them together.
        steps: how many local steps it made.
        whole: whether every step is to be taken for one over all samples.
    """

    client: int | None
    start: Tensor
    update: Tensor
    samples: int
    steps: int
    whole: bool = False


def acts(ctx: ProbeContext, number: int) -> bool:
    """Return whether an observer that acts in round `number` acts now.

    Raises:
        ValueError: the run is over and never had such a round.
    """
    if ctx.final and ctx.round < number:
        raise ValueError(f"`at_round` is {number}, but the last round was {ctx.round}")
    return ctx.round == number


def seen(ctx: ProbeContext, clients: int) -> list[Seen]:
    """Return what the server saw of the first `clients` clients, by id; nothing where no reply was used.

    Behind secure aggregation it is the mean of all updates, which gets the number of all samples.
    """
    if ctx.updates is None:
        return []
    sent, examples = need(ctx.sent, "what was sent"), need(ctx.examples, "the registered samples")
    if not ctx.clients:
        start = torch.stack(list(sent.values())).mean(0)
        steps = max(_steps(n, ctx) for n in examples.values())
        return [Seen(None, start, row, sum(examples.values()), steps, whole=True) for row in ctx.updates]
    rows = list(zip(ctx.clients, ctx.updates, strict=True))[:clients]
    return [Seen(client, sent[client], row, examples[client], _steps(examples[client], ctx)) for client, row in rows]


def _steps(samples: int, ctx: ProbeContext) -> int:
    recipe: Recipe = need(ctx.recipe, "the recipe")
    return local_steps(samples, recipe.batch_size, recipe.epochs)


def plan(what: Seen, samples: int, recipe: Recipe) -> list[Tensor]:
    """Return which of so many guessed samples make up each local batch, as far as a server knows: in an order that only the client knows.

    Any order will do for the first pass, because guessed samples have none of their own; later passes are ASSUMED to repeat it. A batch
    that holds every sample equally often is written as holding each once. Of a whole cohort every step is ASSUMED to see all samples.
    """
    if what.whole:
        return [torch.arange(samples)] * what.steps
    steps = what.steps if samples == what.samples else local_steps(samples, recipe.batch_size, recipe.epochs)
    order = torch.arange(steps * recipe.batch_size) % samples
    batches = []
    for batch in order.view(steps, recipe.batch_size):
        times = torch.bincount(batch, minlength=samples)
        batches.append(torch.arange(samples) if int(times.min()) == int(times.max()) else batch)
    return batches


def descent(recipe: Recipe) -> Sgd:
    """Return the clients' optimiser.

    Raises:
        ValueError: it is none of the SGD family; the steps of the others hide the gradient's size and are not differentiated here.
    """
    made = REGISTRY.make("optimiser", recipe.optimiser, recipe.params)
    if not isinstance(made, Sgd):
        raise ValueError(f"inverts updates of sgd, momentum and nesterov, but clients.train.optimiser is '{recipe.optimiser}'")
    return made


def undone(facts: RunFacts) -> str | None:
    """Return why no gradient can be read off the updates of these clients: their optimiser is none that `descent` knows."""
    try:
        descent(facts.recipe)
    except ValueError as error:
        return str(error)
    return None


def weight(steps: int, optimiser: Sgd) -> float:
    """Return how often a gradient that stays the same would be added up in so many local steps (momentum counts it more than once)."""
    velocity = moved = 0.0
    for t in range(steps):
        velocity, change = _step(optimiser, t, velocity, 1.0)
        moved += change
    return moved


T = TypeVar("T", float, Tensor)


def _step(optimiser: Sgd, t: int, velocity: T, gradient: T) -> tuple[T, T]:
    """Return the velocity and what is subtracted, times the learning rate, in local step t, from 0."""
    if not optimiser.momentum:
        return velocity, gradient
    velocity = optimiser.momentum * velocity + (1.0 if t == 0 else 1 - optimiser.dampening) * gradient
    return velocity, gradient + optimiser.momentum * velocity if optimiser.nesterov else velocity


def as_one(what: Seen, recipe: Recipe) -> Seen:
    """Return an update of several local steps as if it were one step over all samples: what attacks on single gradients take it for."""
    optimiser = descent(recipe)
    return replace(what, update=what.update * (weight(1, optimiser) / weight(what.steps, optimiser)), steps=1, whole=True)


def mean_gradient(what: Seen, recipe: Recipe) -> Tensor:
    """Return the mean gradient of the local steps [d]: minus the update, by learning rate and number of steps, less the weight decay.

    Exact for a single step; of several, the gradients at the later models are in it too.
    """
    return target(what, recipe) - descent(recipe).weight_decay * what.start


def loss_of(criterion: Criterion, output: Tensor, y: Tensor) -> Tensor:
    """Return the protocol's loss of outputs [b, C] for labels int64 [b], or its expectation under soft labels [b, C]; mean over b.

    For cross-entropy the expectation is that of the soft labels themselves, as in DLG.
    """
    if not y.is_floating_point():
        return criterion(output, y)
    classes = torch.arange(output.shape[1])
    each = vmap(lambda one: vmap(lambda c: criterion(one.unsqueeze(0), c.unsqueeze(0)))(classes))(output)  # [b, C]
    result: Tensor = (y * each).sum(1).mean()
    return result


def imitated(model: Architecture, criterion: Criterion, what: Seen, recipe: Recipe, x: Tensor, y: Tensor) -> Tensor:
    """Return what `mean_gradient` (with the weight decay) would be, had the client trained on these samples [d]; differentiable.

    The local steps are played one by one from the model that was sent, and differentiated through: Geiping et al., section 6.

    Args:
        model: the architecture.
        criterion: the protocol's loss.
        what: whose update is imitated.
        recipe: how clients train.
        x: the samples [samples, *shape].
        y: their labels, int64 [samples] or soft [samples, C].
    """
    optimiser = descent(recipe)
    params = what.start.detach().requires_grad_()
    velocity = moved = torch.zeros_like(what.start)
    batches = plan(what, len(x), recipe)
    for t, batch in enumerate(batches):
        loss = loss_of(criterion, model(params, x[batch]), y[batch])
        (gradient,) = torch.autograd.grad(loss, params, create_graph=True)
        gradient = gradient + optimiser.weight_decay * params if optimiser.weight_decay else gradient
        velocity, change = _step(optimiser, t, velocity, gradient)
        moved = moved + change
        if t + 1 < len(batches):
            params = what.start - recipe.lr * moved
    return moved / weight(len(batches), optimiser)


def target(what: Seen, recipe: Recipe) -> Tensor:
    """Return what `imitated` should come to [d]."""
    return -what.update / (recipe.lr * weight(what.steps, descent(recipe)))


def start_images(shape: Sequence[int], n: int, box: tuple[float, float] | None, rng: torch.Generator) -> Tensor:
    """Return random samples [n, *shape] to start from: uniform in the range of the task, or standard normal where it has none."""
    if box is None:
        return torch.randn(n, *shape, generator=rng)
    return box[0] + (box[1] - box[0]) * torch.rand(n, *shape, generator=rng)


def box_of(ctx: ProbeContext) -> tuple[float, float] | None:
    """Return the range of a valid feature, or `None` for a table."""
    return None if ctx.task.low is None or ctx.task.high is None else (ctx.task.low, ctx.task.high)
