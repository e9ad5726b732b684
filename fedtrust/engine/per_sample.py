"""Local steps made of the gradients of single samples, where a behaviour says so (`Behaviour.per_sample`).

The hook hands over an object and not a function of the gradients [b, d]: batches can then be drawn as its accountant assumes, noise comes
from a private stream (nothing may be random under vmap), and the [b, d] of a large batch never has to exist at once. Sums of clipped
gradients are made some samples at a time, at most `MOST_BYTES` of gradients for all clients of a chunk together, or one sample a client
where that is more; at the peak about three times that, with what `torch.func` holds beside it.

On the reference path every sample goes through autograd alone; on the other one `vmap(grad)` over the samples stands inside the `vmap`
over the clients. Both draw the same noise, so they agree like any two paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from fedtrust import views
from fedtrust.client import ClientMemory, Predict, View, overrides
from fedtrust.engine import seeds

if TYPE_CHECKING:
    from fedtrust.client import Behaviour
    from fedtrust.engine.prepare import Indices, Ready
    from fedtrust.engine.world import World
    from fedtrust.privacy.record import RecordMechanism

#: Bytes of single samples' gradients that the clients of a chunk hold at a time.
MOST_BYTES = 64 << 20


def mechanism_of(world: World, behaviour: Behaviour, samples: int) -> RecordMechanism | None:
    """Return how a client with so many samples makes its steps of single samples' gradients; `None`: it does not."""
    return behaviour.per_sample(samples, world.batch_size) if overrides(behaviour, "per_sample") else None


def noise_stream(seed: int, round_number: int, client: int) -> np.random.Generator:
    """Return what the noise of a client's steps is drawn from in a round, step after step."""
    return seeds.stream(seed, "dp-sgd/noise", round_number, client)


def padded(ready: Sequence[Ready]) -> tuple[list[Ready], Tensor | None]:
    """Return the clients with batches of one width, and who is really in them, bool [steps, clients, width].

    `None` where nobody's batches vary; then the clients are returned as they are.
    """
    if all(one.mechanism is None for one in ready):
        return list(ready), None
    if any(one.mechanism is None for one in ready):
        raise TypeError("`per_sample` answers some clients of one behaviour with an object and others with None")
    width = max(one.batches.shape[1] for one in ready)
    taken = np.zeros((len(ready[0].batches), len(ready), width), dtype=bool)
    done = []
    for i, one in enumerate(ready):
        batches: Indices = np.zeros((len(one.batches), width), dtype=np.int64)
        batches[:, : one.batches.shape[1]] = one.batches
        taken[: len(batches), i, : one.batches.shape[1]] = one.batches >= 0
        done.append(one._replace(batches=batches.clip(min=0)))
    return done, torch.from_numpy(taken)


def sampled_gradient(
    world: World, behaviour: Behaviour, view: View, round_number: int, ready: Sequence[Ready], taken: Tensor, call: Callable[..., Tensor]
) -> Callable[[Tensor, ClientMemory, Tensor], Callable[[Tensor, Tensor, Tensor | None, int], Tensor]]:
    """Return the gradient of such steps for some clients at once; what it returns is called as `cohort.Gradient` says.

    Args:
        world: the run.
        behaviour: what they all do.
        view: what they all know.
        round_number: the round.
        ready: the clients, in the order of the rows.
        taken: who is in each batch, bool [steps, clients, width].
        call: the model as a function of its parameters.
    """
    view = views.in_loss(view, device=world.device)
    mechanisms = [one.mechanism for one in ready if one.mechanism is not None]
    noises = [noise_stream(world.seed, round_number, one.task.client) for one in ready]
    expected = torch.tensor([mechanism.expected for mechanism in mechanisms], device=world.device)

    def sample_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor, memory: ClientMemory, mark: Tensor | None = None) -> Tensor:
        here = view._replace(memory=memory, marks=None if mark is None else mark.unsqueeze(0))
        return behaviour.loss(Predict(call, parameters, world.layout), x.unsqueeze(0), y.unsqueeze(0), here)

    def mapped(*given: Any) -> tuple[dict[str, Tensor], Tensor]:
        over_samples = vmap(grad_and_value(sample_loss), in_dims=(None, 0, 0, None, 0)[: len(given)])
        found: tuple[dict[str, Tensor], Tensor] = vmap(over_samples)(*given)
        return found

    def gradient(block: Tensor, memory: ClientMemory, into: Tensor) -> Callable[[Tensor, Tensor, Tensor | None, int], Tensor]:
        parameters, clients, size = world.layout.unflatten(block), *block.shape
        share = max(1, MOST_BYTES // (4 * clients * size))

        def step(x: Tensor, y: Tensor, marks: Tensor | None, t: int) -> Tensor:
            here = taken[t, :clients].to(block.device)
            into.zero_()
            losses = block.new_zeros(clients)
            for start in range(0, int(here.sum(dim=1).max()), share):  # those in the batch stand first
                part = slice(start, start + share)
                further = () if marks is None else (marks[:, part],)
                grads, values = mapped(parameters, x[:, part], y[:, part], memory, *further)
                rows = torch.cat([grads[n].reshape(*values.shape, -1) for n in world.layout.names], dim=2)
                into.add_(mechanisms[0].bounded(rows, here[:, part]))
                losses += torch.where(here[:, part] & values.isfinite(), values, 0.0).sum(dim=1)
            for i in range(clients):
                into[i] = mechanisms[i].release(into[i], mechanisms[i].noise(size, noises[i]).to(block.device))
            return losses / expected[:clients]

        return step

    return gradient


def reference_step(
    world: World, one: Ready, predict: Predict, x: Tensor, y: Tensor, view: View, batch: Tensor, rng: np.random.Generator
) -> Tensor:
    """Write the gradient of a step into one client's parameters, a sample at a time, and return the loss.

    Args:
        world: the run.
        one: the client.
        predict: its model.
        x: its samples [n, *shape].
        y: their labels [n].
        view: what it knows.
        batch: who is in the batch [b], filled up with -1.
        rng: the noise's.
    """
    mechanism = one.mechanism
    if mechanism is None:
        raise TypeError("this client makes no steps of single samples' gradients")
    parameters = list(predict.parameters.values())
    total = torch.zeros(world.layout.size, device=world.device)
    lost = torch.zeros((), device=world.device)
    for row in torch.split(batch[batch >= 0], 1):
        here = view if one.marks is None else view._replace(marks=one.marks[row])
        loss = one.task.behaviour.loss(predict, x[row], y[row], here)
        grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
        flat = world.layout.flatten(dict(zip(predict.parameters, grads, strict=True)))
        total += mechanism.bounded(flat.unsqueeze(0), torch.ones(1, dtype=torch.bool, device=world.device))
        lost += loss.detach().nan_to_num(0.0, 0.0, 0.0)  # as its gradient counts for nothing
    released = mechanism.release(total, mechanism.noise(world.layout.size, rng).to(world.device))
    for name, value in world.layout.unflatten(released).items():
        predict.parameters[name].grad = value.clone()
    return lost / mechanism.expected
