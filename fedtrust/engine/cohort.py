"""Local training of a chunk of clients: pure functions, no Flower, no Ray.

Three paths give the same updates (atol 1e-5; tested for every behaviour and model):

* `loop`: a client at a time with `torch.optim` and autograd. The reference, and the only path for models that vmap does not help.
* `vmap`: `torch.func.vmap` over the clients of the chunk. The general fast path.
* `fused`: the clients' models as one network with grouped convolutions; see `fedtrust.engine.fused`. For plain layer stacks and
  behaviours that keep the protocol's loss.

Local batches: `epochs` passes over the client's samples in fresh random orders, cut into batches of `batch_size`. The passes are laid
end to end, so every batch is full (the last is filled up from further passes) and a client takes `ceil(epochs * n / batch_size)` steps,
or `epochs` if its samples do not fill one batch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from fedtrust import views
from fedtrust.client import Behaviour, ClientMemory, Predict, View, overrides
from fedtrust.data.base import Task
from fedtrust.engine import seeds
from fedtrust.engine.fused import fused_forward
from fedtrust.engine.world import Path, World
from fedtrust.interrupt import Stopped

#: Above this many parameters a model without a fused form trains faster one at a time than under vmap on a CPU.
LOOP_ABOVE = 1_000_000


class ClientTask(NamedTuple):
    """One client's part in a round: its id, what it does, what it remembers, and its place among the recruits of its group."""

    client: int
    behaviour: Behaviour
    memory: ClientMemory
    rank: int = 0
    recruits: int = 1


class Chunk(NamedTuple):
    """Clients that are trained together: same model, same loss hook. Its make-up never depends on the number of workers."""

    round: int
    params: Tensor
    server: Mapping[str, Tensor]
    tasks: tuple[ClientTask, ...]


class Trained(NamedTuple):
    """What a chunk gave.

    Attributes:
        clients: the clients that were trained, in the order of the rows.
        updates: local minus global model [k, d], float32 on the CPU.
        losses: mean training loss over the local steps [k].
        memories: the clients' memories afterwards.
        faults: client → why it could not be trained.
    """

    clients: tuple[int, ...]
    updates: Tensor
    losses: Tensor
    memories: tuple[ClientMemory, ...]
    faults: dict[int, str]


class _Ready(NamedTuple):
    """A client with its data of this round in hand."""

    task: ClientTask
    view: View
    x: Tensor
    y: Tensor
    batches: Tensor  # rows of x, [steps, batch]


def train(world: World, chunk: Chunk) -> Trained:
    """Train a chunk; a client whose code fails is reported and costs nobody else anything."""
    # functional_call puts the parameters into the module while it runs: threads must not share one.
    world = dataclasses.replace(world, module=copy.deepcopy(world.module))
    ready, faults = _prepare(world, chunk)
    updates, losses, done = _attempt(world, chunk, ready, faults)
    return Trained(
        tuple(r.task.client for r in done),
        torch.stack(updates).cpu() if updates else torch.zeros(0, world.layout.size),
        torch.stack(losses).cpu() if losses else torch.zeros(0),
        tuple({name: value.cpu() for name, value in r.view.memory.items()} for r in done),
        faults,
    )


def schedule(samples: int, batch_size: int, epochs: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return which samples make up each local batch, [steps, batch_size]; see the module's docstring."""
    steps = max(epochs, math.ceil(epochs * samples / batch_size))
    passes = math.ceil(steps * batch_size / samples)
    order = np.concatenate([rng.permutation(samples) for _ in range(passes)])
    return order[: steps * batch_size].reshape(steps, batch_size)


def choose_path(world: World, behaviour: Behaviour) -> Path:
    """Return the path on which clients with this behaviour are trained."""
    if world.path == "fused" and (overrides(behaviour, "loss") or fused_forward(world.module) is None):
        return "vmap"  # asked for, but this model or loss has no fused form
    if world.path != "auto":
        return world.path
    if fused_forward(world.module) is not None:
        return "vmap" if overrides(behaviour, "loss") else "fused"
    return "loop" if world.layout.size > LOOP_ABOVE and world.device == "cpu" else "vmap"


def _prepare(world: World, chunk: Chunk) -> tuple[list[_Ready], dict[int, str]]:
    """Let each client look at its data; longest schedule first, so that the clients still training are always a prefix."""
    ready, faults = [], {}
    for task in chunk.tasks:
        view = views.local_view(world, chunk, task, "poison")
        x, y = _client_data(world, task.client)
        try:
            if overrides(task.behaviour, "poison"):
                x, y = _checked(task.behaviour.poison(x, y, view), x, y, world.data.task)
                views.check_memory(view.memory, task.memory)
            rng = seeds.stream(world.seed, "batches", chunk.round, task.client)
            batches = torch.from_numpy(schedule(len(x), world.batch_size, world.epochs, rng)).to(world.device)
            ready.append(_Ready(task, view, x, y, batches))
        except (Exception, SystemExit) as error:  # a student's hook may raise anything
            faults[task.client] = _say("poison", error)
    ready.sort(key=lambda r: (-len(r.batches), r.task.client))
    return ready, faults


def _client_data(world: World, client: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(world.data.parts[client]).to(world.device)
    return world.data.x[rows], world.data.y[rows]


def _checked(result: Any, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    new_x, new_y = result
    if new_x.shape[1:] != x.shape[1:] or len(new_x) != len(new_y) or len(new_x) == 0:
        raise ValueError(
            f"returned x {list(new_x.shape)} and y {list(new_y.shape)}, expected [b, {', '.join(map(str, x.shape[1:]))}] and [b]"
        )
    if new_x.dtype != x.dtype or new_y.dtype != y.dtype:
        raise TypeError(f"returned x {new_x.dtype} and y {new_y.dtype}, expected {x.dtype} and {y.dtype}")
    if task.kind == "classification" and not 0 <= int(new_y.min()) <= int(new_y.max()) < task.classes:
        raise ValueError(f"returned labels from {int(new_y.min())} to {int(new_y.max())}, the classes are 0 to {task.classes - 1}")
    return new_x.detach().to(x.device), new_y.detach().to(y.device)


def _attempt(world: World, chunk: Chunk, ready: list[_Ready], faults: dict[int, str]) -> tuple[list[Tensor], list[Tensor], list[_Ready]]:
    """Train the prepared clients together; where that fails one by one, to find out who it was."""
    if not ready:
        return [], [], []
    behaviour = ready[0].task.behaviour
    try:
        trainer = {"loop": _train_loop, "vmap": _train_blocks, "fused": _train_blocks}[choose_path(world, behaviour)]
        updates, losses = trainer(world, chunk, ready)
        return list(updates), list(losses), ready
    except (Exception, SystemExit) as error:  # whatever a student's loss raises
        if len(ready) == 1:
            faults[ready[0].task.client] = _say("training", error)
            return [], [], []
    parts = [_attempt(world, chunk, [one], faults) for one in ready]
    return ([u for p in parts for u in p[0]], [v for p in parts for v in p[1]], [r for p in parts for r in p[2]])


#: For each training thread, under `event`, what its executor sets when it wants the thread to stop.
STOP = threading.local()


def _go_on() -> None:
    event = getattr(STOP, "event", None)
    if event is not None and event.is_set():
        raise Stopped


def _say(stage: str, error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{stage}: {type(error).__name__}: {text}"[:300]


def _train_loop(world: World, chunk: Chunk, ready: list[_Ready]) -> tuple[Tensor, Tensor]:
    """The reference: each client alone, as one would write it in plain PyTorch."""
    updates, losses = [], []
    for one in ready:
        module = copy.deepcopy(world.module)
        with torch.no_grad():
            for name, value in world.layout.unflatten(chunk.params.to(world.device)).items():
                module.get_parameter(name).copy_(value)
        parameters = dict(module.named_parameters())
        optimiser = world.optimiser.torch(list(parameters.values()), world.lr)
        predict = Predict(_caller(module), parameters, world.layout)
        view = views.in_loss(one.view)
        total = torch.zeros((), device=world.device)
        for batch in one.batches:
            _go_on()
            optimiser.zero_grad()
            loss = one.task.behaviour.loss(predict, one.x[batch], one.y[batch], view)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += loss.detach()
        updates.append(world.layout.vector(module) - chunk.params.to(world.device))
        losses.append(total / len(one.batches))
    return torch.stack(updates), torch.stack(losses)


def _caller(module: torch.nn.Module) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(module, dict(parameters), (x,))


Gradient = Callable[[dict[str, Tensor], Tensor, Tensor, ClientMemory], tuple[dict[str, Tensor], Tensor]]


def _train_blocks(world: World, chunk: Chunk, ready: list[_Ready]) -> tuple[Tensor, Tensor]:
    """All clients of the chunk at once: parameters, gradients and optimiser state are blocks [k, d]."""
    behaviour = ready[0].task.behaviour
    gradient = _fused_gradient(world) if choose_path(world, behaviour) == "fused" else _vmap_gradient(world, behaviour, ready[0].view)
    start = chunk.params.to(world.device)
    block = start.repeat(len(ready), 1)
    state = world.optimiser.init(block)
    x, y, rows = _merge(ready)
    steps = [len(one.batches) for one in ready]
    memory = {k: torch.stack([one.view.memory[k] for one in ready]) for k in ready[0].view.memory}
    total = torch.zeros(len(ready), device=world.device)
    for t in range(steps[0]):
        _go_on()
        active = sum(s > t for s in steps)
        batch = torch.stack([r[t] for r in rows[:active]])
        views_ = world.layout.unflatten(block[:active])
        grads, losses = gradient(views_, x[batch], y[batch], {k: v[:active] for k, v in memory.items()})
        flat = torch.cat([grads[n].reshape(active, -1) for n in world.layout.names], dim=1)
        world.optimiser.step(block[:active], flat, {k: v[:active] for k, v in state.items()}, t + 1, world.lr)
        total[:active] += losses
    return block - start, total / torch.tensor(steps, device=world.device)


def _merge(ready: list[_Ready]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return all clients' samples as one tensor, and each client's batches as rows of it."""
    offsets = np.cumsum([0, *(len(one.x) for one in ready)])
    rows = [one.batches + int(o) for one, o in zip(ready, offsets[:-1], strict=True)]
    return torch.cat([one.x for one in ready]), torch.cat([one.y for one in ready]), rows


def _vmap_gradient(world: World, behaviour: Behaviour, view: View) -> Gradient:
    """Return (parameters [k, …], x [k, b, …], y [k, b], memory [k, …]) → gradients and losses, by vmap over the clients."""
    call = _caller(world.module)

    def client_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor, memory: ClientMemory) -> Tensor:
        return behaviour.loss(Predict(call, parameters, world.layout), x, y, views.in_loss(view, memory))

    return vmap(grad_and_value(client_loss))


def _fused_gradient(world: World) -> Gradient:
    """The same for the protocol's own loss, through the fused network."""
    forward = fused_forward(world.module)
    if forward is None:
        raise TypeError("this model has no fused form")
    criterion = vmap(world.criterion)

    def gradient(parameters: dict[str, Tensor], x: Tensor, y: Tensor, memory: ClientMemory) -> tuple[dict[str, Tensor], Tensor]:
        leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        losses = criterion(forward(leaves, x), y)
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return dict(zip(leaves, grads, strict=True)), losses.detach()

    return gradient
