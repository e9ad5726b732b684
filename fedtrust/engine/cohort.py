"""Local training of a chunk of clients: pure functions, no Flower, no Ray.

Three paths give the same updates (atol 1e-5; tested for every behaviour and model):

* `loop`: a client at a time with `torch.optim` and autograd. The reference, and the only path for models that vmap does not help.
* `vmap`: `torch.func.vmap` over the clients of the chunk. The general fast path.
* `fused`: the clients' models as one network with grouped convolutions; see `fedtrust.engine.fused`. For plain layer stacks and
  behaviours that keep the protocol's loss.

Steps made of single samples' gradients are made on the first two; see `fedtrust.engine.per_sample`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from fedtrust import views
from fedtrust.client import Behaviour, ClientMemory, Predict, View, capabilities, overrides
from fedtrust.engine import per_sample, seeds
from fedtrust.engine.fused import Fused
from fedtrust.engine.loss_gradient import with_gradient
from fedtrust.engine.partial import Partial, Sums, look, partial
from fedtrust.engine.prepare import Ready, client_data, merged, prepare, said, schedule
from fedtrust.engine.world import Path, World
from fedtrust.interrupt import Stopped

#: Above this many parameters a model without a fused form trains faster one at a time than under vmap on a CPU.
LOOP_ABOVE = 1_000_000
#: Above this many parameters the clients of a fused chunk are trained one after the other on a CPU: side by side each step would read
#: all their models from memory.
ALONE_ABOVE = 4_000_000


class ClientTask(NamedTuple):
    """One client's part in a round: its id, what it does, what it remembers, its place among the recruits of its group, the largest
    number of local steps that it has time for (`None`: all), its adversary's targets and what its coalition shares (see `View.targets`,
    `View.shared`).
    """

    client: int
    behaviour: Behaviour
    memory: ClientMemory
    rank: int = 0
    recruits: int = 1
    steps: int | None = None
    targets: tuple[Tensor, Tensor] | None = None
    shared: ClientMemory | None = None


class Chunk(NamedTuple):
    """Clients that are trained together: same model, same loss hook. Its make-up never depends on the number of workers.

    Attributes:
        round: the round, from 1.
        params: the model they are sent [d].
        server: what else they are sent.
        tasks: who they are and what they do.
        sums: how their updates are added up where they are made; `None`: they are not.
        rows: whether the updates themselves come back.
        cohort: how many clients were asked this round, in all chunks together.
    """

    round: int
    params: Tensor
    server: Mapping[str, Tensor]
    tasks: tuple[ClientTask, ...]
    sums: Sums | None = None
    rows: bool = True
    cohort: int = 1


class Trained(NamedTuple):
    """What a chunk gave.

    Attributes:
        clients: the clients that were trained and whose updates are sound, in the order of the rows.
        updates: local minus global model [k, d], float32 on the CPU; [0, d] where the chunk asked for no rows.
        losses: mean training loss over the local steps [k].
        memories: the clients' memories afterwards.
        faults: client → why it could not be trained, or what is wrong with its update.
        norms: the L2 norm of each update [k], float64.
        partial: what came of `Chunk.sums`, without the sum itself.
        total: the weighted sum of the updates [d], where the chunk asked for it.
    """

    clients: tuple[int, ...]
    updates: Tensor
    losses: Tensor
    memories: tuple[ClientMemory, ...]
    faults: dict[int, str]
    norms: Tensor | None = None
    partial: Partial | None = None
    total: Tensor | None = None


def train(world: World, chunk: Chunk) -> Trained:
    """Train a chunk; a client whose code fails is reported and costs nobody else anything."""
    # functional_call puts the parameters into the module while it runs: threads must not share one. A fused chunk never calls it.
    if any(capabilities(type(task.behaviour)) for task in chunk.tasks) or choose_path(world, chunk.tasks[0].behaviour) != "fused":
        world = dataclasses.replace(world, module=copy.deepcopy(world.module))
    ready, faults = prepare(world, chunk)
    updates, losses, done = _attempt(world, chunk, ready, faults)
    norms, found = look(updates)
    if found:
        faults |= {done[i].task.client: why for i, why in found.items()}
        kept = [i for i in range(len(done)) if i not in found]
        updates, losses, norms, done = updates[kept], losses[kept], norms[kept], [done[i] for i in kept]
    return _result(world, chunk, updates, losses, norms, done, faults)


def _result(
    world: World, chunk: Chunk, updates: Tensor, losses: Tensor, norms: Tensor, done: list[Ready], faults: dict[int, str]
) -> Trained:
    """Add up what is to be added up, and bring what is sent back to the CPU."""
    clients = tuple(r.task.client for r in done)
    total, added = None, None
    if chunk.sums is not None and done:
        total, added = partial(world, chunk.sums, chunk.round, chunk.params, clients, updates)
    return Trained(
        clients,
        updates.cpu() if chunk.rows else updates.new_zeros(0, world.layout.size, device="cpu"),
        losses.cpu(),
        tuple({name: value.cpu() for name, value in r.view.memory.items()} for r in done),
        faults,
        norms.cpu(),
        added,
        total,
    )


def choose_path(world: World, behaviour: Behaviour) -> Path:
    """Return the path on which clients with this behaviour are trained."""
    own = overrides(behaviour, "loss") or overrides(behaviour, "per_sample")
    fused = world.fused is not None and world.fused.fits(world.device, world.dtype) and not own
    if world.path == "fused" and not fused:
        return "vmap"  # asked for, but this model or step has no fused form
    if world.path != "auto":
        return world.path
    if fused:
        return "fused"
    stack = isinstance(world.fused, Fused)
    return "loop" if world.layout.size > LOOP_ABOVE and world.device == "cpu" and not stack else "vmap"


def _attempt(world: World, chunk: Chunk, ready: list[Ready], faults: dict[int, str]) -> tuple[Tensor, Tensor, list[Ready]]:
    """Train the prepared clients together; where that fails one by one, to find out who it was, and where memory runs out by halves."""
    if not ready:
        return torch.zeros(0, world.layout.size, device=world.device), torch.zeros(0, device=world.device), []
    parts = [[one] for one in ready]
    try:
        trainer = {"loop": _train_loop, "vmap": _train_blocks, "fused": _train_fused}[choose_path(world, ready[0].task.behaviour)]
        return *trainer(world, chunk, ready), ready
    except torch.OutOfMemoryError as error:
        why, parts = said("training", error), [ready[: len(ready) // 2], ready[len(ready) // 2 :]]
    except (Exception, SystemExit) as error:  # whatever a student's loss raises
        why = said("training", error)
    if len(ready) == 1:
        faults[ready[0].task.client] = why
        return _attempt(world, chunk, [], faults)
    if world.device.startswith("cuda"):
        torch.cuda.empty_cache()
    rows, losses, done = [], [], []
    for part in parts:
        updates, mean, trained = _attempt(world, chunk, part, faults)
        rows.append(updates.clone())  # the next part may be trained in the same place
        losses.append(mean)
        done += trained
    return torch.cat(rows), torch.cat(losses), done


#: For each training thread, under `event`, what its executor sets when it wants the thread to stop.
STOP = threading.local()


def _go_on() -> None:
    event = getattr(STOP, "event", None)
    if event is not None and event.is_set():
        raise Stopped


def _train_loop(world: World, chunk: Chunk, ready: list[Ready]) -> tuple[Tensor, Tensor]:
    """The reference: each client alone, as one would write it in plain PyTorch."""
    updates, losses = [], []
    for one in ready:
        module = copy.deepcopy(world.module)
        with torch.no_grad():
            for name, value in world.layout.unflatten(chunk.params.to(world.device)).items():
                module.get_parameter(name).copy_(value)
        parameters = dict(module.named_parameters())
        optimiser = world.optimiser.torch(list(parameters.values()), world.lr)
        predict = Predict(_caller(module, world.dtype), parameters, world.layout)
        view = views.in_loss(one.view, device=world.device)
        total = torch.zeros((), device=world.device)
        x, y = one.own or client_data(world, one.task.client)
        noise = per_sample.noise_stream(world.seed, chunk.round, one.task.client)
        for batch in torch.from_numpy(one.batches).to(world.device):
            _go_on()
            optimiser.zero_grad()
            if one.mechanism is None:
                here = view if one.marks is None else view._replace(marks=one.marks[batch])
                loss = one.task.behaviour.loss(predict, x[batch], y[batch], here)
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                loss = per_sample.reference_step(world, one, predict, x, y, view, batch, noise)
            optimiser.step()
            if overrides(one.task.behaviour, "project"):
                _put(world, module, one.task.behaviour, chunk.params.to(world.device), view)
            total += loss.detach()
        updates.append(world.layout.vector(module) - chunk.params.to(world.device))
        losses.append(total / len(one.batches))
    return torch.stack(updates), torch.stack(losses)


def _put(world: World, module: torch.nn.Module, behaviour: Behaviour, start: Tensor, view: View) -> None:
    """Replace a model's parameters by what its client keeps of them."""
    with torch.no_grad():
        kept = start + behaviour.project(world.layout.vector(module) - start, view)
        for name, value in world.layout.unflatten(kept).items():
            module.get_parameter(name).copy_(value)


def _caller(module: torch.nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return the module as a function of its parameters, computed in `dtype`; the output is float32."""

    def call(parameters: Mapping[str, Tensor], x: Tensor, **options: Any) -> Tensor:
        if dtype != torch.float32:
            parameters = {name: value.to(dtype) for name, value in parameters.items()}
            x = x.to(dtype) if x.is_floating_point() else x
        result: Tensor = functional_call(module, dict(parameters), (x,), options)
        return result.float()

    return call


#: From x [k, b, …], y [k, b] and marks [k, b] of a step, and its number from 0, to the losses [k]; writes the gradients.
Step = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


#: Makes the step of some clients, from their parameters [k, d], which change between steps, their memory [k, …], and where the gradients
#: go [k, d].
Gradient = Callable[[Tensor, ClientMemory, Tensor], Step]


def _train_fused(world: World, chunk: Chunk, ready: list[Ready]) -> tuple[Tensor, Tensor]:
    """All clients of the chunk at once, or one after the other where a step of one alone leaves the cache: the same updates."""
    if len(ready) == 1 or world.layout.size <= ALONE_ABOVE or world.device != "cpu":
        return _train_blocks(world, chunk, ready)
    block = _rows(chunk, len(ready))
    losses = [_train_blocks(world, chunk, [one], block[i : i + 1])[1] for i, one in enumerate(ready)]
    return block, torch.cat(losses)


def _rows(chunk: Chunk, k: int) -> Tensor:
    """Return a place for k models' parameters [k, d], where they are trained and become updates."""
    return chunk.params.new_empty(k, len(chunk.params)) if chunk.rows else _place("block", k, chunk.params)


def _train_blocks(world: World, chunk: Chunk, ready: list[Ready], block: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All clients of the chunk at once: parameters, gradients and optimiser state are blocks [k, d]; `block`: where the first are."""
    behaviour = ready[0].task.behaviour
    ready, taken = per_sample.padded(ready)
    gradient: Gradient
    if taken is not None:
        call = _caller(world.module, world.dtype)
        gradient = per_sample.sampled_gradient(world, behaviour, ready[0].view, chunk.round, ready, taken, call)
    else:
        gradient = _fused_gradient(world) if choose_path(world, behaviour) == "fused" else _vmap_gradient(world, behaviour, ready[0].view)
    start = chunk.params.to(world.device)
    project = _projection(behaviour, views.in_loss(ready[0].view, device=world.device))
    if block is None:
        block = _rows(chunk._replace(params=start), len(ready))
    block.copy_(start)
    grads = _place("gradients", len(ready), start)
    state = world.optimiser.init(block)
    x, y, batches, marks = merged(world, ready)
    steps = [len(one.batches) for one in ready]
    memory = {k: torch.stack([one.view.memory[k] for one in ready]).to(world.device) for k in ready[0].view.memory}
    total = torch.zeros(len(ready), device=world.device)
    active, here = 0, memory
    for t in range(steps[0]):
        _go_on()
        left = sum(s > t for s in steps)
        if left != active:
            active = left
            params, into, moments = block[:active], grads[:active], {k: v[:active] for k, v in state.items()}
            here = {k: v[:active] for k, v in memory.items()}
            step = gradient(params, here, into)
        batch = batches[t, :active]
        total[:active] += step(_taken(x, batch), y[batch], None if marks is None else marks[batch], t)
        world.optimiser.step(params, into, moments, t + 1, world.lr)
        if project is not None:
            params.copy_(start + project(params - start, here))
    return block.sub_(start), total / torch.tensor(steps, device=world.device)


#: The blocks of each training thread, by name.
_PLACES = threading.local()


def _place(name: str, k: int, like: Tensor) -> Tensor:
    """Return a block [k, d] for vectors like this one [d], with whatever was left in it.

    On a CPU it is this thread's own, and the next chunk finds it again: two threads that take and free blocks of many megabytes leave
    ever other gaps in the heap, which then grows whenever a block no longer fits.
    """
    if like.device.type != "cpu":
        return like.new_empty(k, len(like))
    found: Tensor | None = getattr(_PLACES, name, None)
    if found is None or len(found) < k or found.shape[1] != len(like):
        found = like.new_empty(k, len(like))
        setattr(_PLACES, name, found)
    return found[:k]


def _taken(x: Tensor, batch: Tensor) -> Tensor:
    """Return x[batch]; whole samples are copied faster this way than by indexing."""
    return x.index_select(0, batch.flatten()).view(*batch.shape, *x.shape[1:])


def _projection(behaviour: Behaviour, view: View) -> Callable[[Tensor, ClientMemory], Tensor] | None:
    """Return what some clients [k, d] keep of their movements, given their memories [k, …]; `None`: everything."""
    if not overrides(behaviour, "project"):
        return None
    return vmap(lambda update, memory: behaviour.project(update, view._replace(memory=memory)))


def _vmap_gradient(world: World, behaviour: Behaviour, view: View) -> Gradient:
    """Return the gradient of any loss, by vmap over the clients."""
    call = _caller(world.module, world.dtype)
    view = views.in_loss(view, device=world.device)

    def client_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor, memory: ClientMemory, marks: Tensor | None = None) -> Tensor:
        return behaviour.loss(Predict(call, parameters, world.layout), x, y, view._replace(memory=memory, marks=marks))

    mapped = vmap(grad_and_value(client_loss))

    def gradient(block: Tensor, memory: ClientMemory, into: Tensor) -> Step:
        parameters = world.layout.unflatten(block)

        def step(x: Tensor, y: Tensor, marks: Tensor | None, t: int) -> Tensor:
            grads: dict[str, Tensor]
            losses: Tensor
            grads, losses = mapped(parameters, x, y, memory, *(() if marks is None else (marks,)))
            torch.cat([grads[n].reshape(len(into), -1) for n in world.layout.names], dim=1, out=into)
            return losses

        return step

    return gradient


def _fused_gradient(world: World) -> Gradient:
    """Return the gradient of the protocol's own loss, through the fused network."""
    fused, criterion, dtype = world.fused, with_gradient(world.criterion), world.dtype
    if fused is None:
        raise TypeError("this model has no fused form")

    def gradient(block: Tensor, memory: ClientMemory, into: Tensor) -> Step:
        # In a coarser type the network works on a copy of the parameters, brought up to date before every step.
        coarse = block if dtype == block.dtype else block.to(dtype)
        network = fused.on(world.layout.unflatten(coarse), world.layout.unflatten(into))

        def step(x: Tensor, y: Tensor, marks: Tensor | None, t: int) -> Tensor:
            if coarse is not block:
                coarse.copy_(block)
                x = x.to(dtype) if x.is_floating_point() else x
            outputs, tape = network.forward(x)
            losses, grad = criterion(outputs.float(), y)
            network.backward(tape, grad.to(dtype))
            return losses

        return step

    return gradient


def own_training(world: World, start: Tensor, round_number: int) -> Callable[..., Tensor]:
    """Return the protocol's local training for a server with samples of its own; see `fedtrust.server.Train`.

    Every call of a round draws other batches, the same in every run.
    """
    calls = itertools.count()

    def train_on(x: Tensor, y: Tensor, params: Tensor | None = None, epochs: int | None = None) -> Tensor:
        rng = seeds.stream(world.seed, "server/train", round_number, next(calls))
        batches = schedule(len(x), min(world.batch_size, len(x)), epochs or world.epochs, rng)
        chunk = Chunk(round_number, start if params is None else params.detach(), {}, ())
        one = Ready(ClientTask(-1, Behaviour(), {}), views.quiet_view(world, chunk), batches, (x, y))
        with torch.enable_grad():
            updates, _ = _train_loop(world, chunk, [one])
        return updates[0]

    return train_on
