"""What comes before training: each client looks at its data, and a chunk's samples and batches are laid out for it.

Local batches: `epochs` passes over the client's samples in fresh random orders, cut into batches of `batch_size`. The passes are laid
end to end, so every batch is full (the last is filled up from further passes) and a client takes `ceil(epochs * n / batch_size)` steps,
or `epochs` if its samples do not fill one batch. A straggler that does partial work stops after the first `ClientTask.steps` of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtrust import views
from fedtrust.client import View, capabilities, overrides
from fedtrust.data.base import Task
from fedtrust.engine import seeds
from fedtrust.engine.per_sample import mechanism_of

if TYPE_CHECKING:
    from fedtrust.engine.cohort import Chunk, ClientTask
    from fedtrust.engine.world import World
    from fedtrust.privacy.record import RecordMechanism

Indices = npt.NDArray[np.int64]


class Ready(NamedTuple):
    """A client that can be trained.

    Attributes:
        task: who it is and what it does.
        view: what it knows.
        batches: which of its samples make up each local batch [steps, batch]; -1 where a drawn batch is smaller than the largest.
        own: the samples (x, y) that its behaviour made; `None`: it trains on those it was dealt.
        marks: what its behaviour wants its loss to know of each sample.
        mechanism: how it makes its steps of single samples' gradients; `None`: it does not.
    """

    task: ClientTask
    view: View
    batches: Indices
    own: tuple[Tensor, Tensor] | None
    marks: Tensor | None = None
    mechanism: RecordMechanism | None = None


def local_steps(samples: int, batch_size: int, epochs: int) -> int:
    """Return the number of local steps in a round; see the module's docstring."""
    return max(epochs, math.ceil(epochs * samples / batch_size))


def schedule(samples: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Indices:
    """Return which samples make up each local batch, [steps, batch_size]; see the module's docstring."""
    steps = local_steps(samples, batch_size, epochs)
    passes = math.ceil(steps * batch_size / samples)
    order = np.concatenate([rng.permutation(samples) for _ in range(passes)])
    return order[: steps * batch_size].reshape(steps, batch_size)


def prepare(world: World, chunk: Chunk) -> tuple[list[Ready], dict[int, str]]:
    """Let each client look at its data; longest schedule first, so that the clients still training are always a prefix.

    Returns:
        Who can be trained, and client → why it cannot.
    """
    ready, faults = [], {}
    quiet = views.quiet_view(world, chunk)
    for task in chunk.tasks:
        own, marks = None, None
        view = quiet._replace(client=task.client, coalition=(task.client,), rank=task.rank, recruits=task.recruits)
        try:
            if capabilities(type(task.behaviour)) or task.memory:
                view = views.local_view(world, chunk, task, "poison")
            if overrides(task.behaviour, "poison"):
                x, y = (part.cpu() for part in client_data(world, task.client))
                own, marks = _checked(task.behaviour.poison(x, y, view), x, y, world)
                views.check_memory(view.memory, task.memory)
            samples = world.examples(task.client) if own is None else len(own[0])
            rng = seeds.stream(world.seed, "batches", chunk.round, task.client)
            mechanism = mechanism_of(world, task.behaviour, samples)
            if mechanism is None:
                batches = schedule(samples, world.batch_size, world.epochs, rng)
            else:
                batches = mechanism.draw(local_steps(samples, world.batch_size, world.epochs), rng)
            ready.append(Ready(task, view, batches[: task.steps], own, marks, mechanism))
        except (Exception, SystemExit) as error:  # a student's hook may raise anything
            faults[task.client] = said("poison", error)
    ready.sort(key=lambda r: (-len(r.batches), r.task.client))
    return ready, faults


def client_data(world: World, client: int) -> tuple[Tensor, Tensor]:
    """Return the samples that a client was dealt, x [b, *shape] and y [b], as copies where the world lies."""
    rows = torch.from_numpy(world.data.parts[client]).to(world.device)
    return world.data.x[rows], world.data.y[rows]


def merged(world: World, ready: list[Ready]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return samples x, y of a chunk, which of them each step takes, [steps, k, batch] (of no meaning past a client's last step), and
    the samples' marks, 0 where a client made none.
    """
    plain = [one for one in ready if one.own is None]
    steps, batch = ready[0].batches.shape
    index = np.zeros((steps, len(ready), batch), dtype=np.int64)
    if len(plain) == len(ready):  # nobody made samples: read the data where it lies
        for i, one in enumerate(ready):
            index[: len(one.batches), i] = world.data.parts[one.task.client][one.batches]
        return world.data.x, world.data.y, torch.from_numpy(index).to(world.device), None
    pairs = [client_data(world, one.task.client) if one.own is None else one.own for one in ready]
    offsets = np.cumsum([0, *(len(x) for x, _ in pairs)])
    for i, one in enumerate(ready):
        index[: len(one.batches), i] = one.batches + offsets[i]
    marks = None
    if any(one.marks is not None for one in ready):
        marks = torch.cat(
            [y.new_zeros(len(y), dtype=torch.float32) if r.marks is None else r.marks for r, (_, y) in zip(ready, pairs, strict=True)]
        )
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]), torch.from_numpy(index).to(world.device), marks


def _checked(result: Any, x: Tensor, y: Tensor, world: World) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Return the samples that a behaviour made and their marks, where the world lies; `x` and `y` are those it was given."""
    new_x, new_y, marks = result if len(result) == 3 else (*result, None)
    task: Task = world.data.task
    if new_x.shape[1:] != x.shape[1:] or len(new_x) != len(new_y) or len(new_x) == 0:
        raise ValueError(
            f"returned x {list(new_x.shape)} and y {list(new_y.shape)}, expected [b, {', '.join(map(str, x.shape[1:]))}] and [b]"
        )
    if task.kind == "characters" and (new_y.shape != new_x.shape or not 0 <= int(new_x.min()) <= int(new_x.max()) < task.classes):
        raise ValueError(f"returned x and y {list(new_y.shape)}, expected [b, {task.shape[0]}] characters from 0 to {task.classes - 1}")
    if new_x.dtype != x.dtype or new_y.dtype != y.dtype:
        raise TypeError(f"returned x {new_x.dtype} and y {new_y.dtype}, expected {x.dtype} and {y.dtype}")
    if task.kind != "regression" and not 0 <= int(new_y.min()) <= int(new_y.max()) < task.classes:
        raise ValueError(f"returned labels from {int(new_y.min())} to {int(new_y.max())}, the classes are 0 to {task.classes - 1}")
    if marks is not None and (marks.shape != new_y.shape[:1] or marks.dtype != torch.float32 or not bool(torch.isfinite(marks).all())):
        raise ValueError(f"returned marks {list(marks.shape)} of {marks.dtype}, expected {list(new_y.shape[:1])} finite float32")
    return (new_x.detach().to(world.device), new_y.detach().to(world.device)), None if marks is None else marks.detach().to(world.device)


def said(stage: str, error: BaseException) -> str:
    """Return a client's error as one line."""
    text = " ".join(str(error).split())
    return f"{stage}: {type(error).__name__}: {text}"[:300]
