"""What runs inside a Ray worker, and how things travel there and back.

Tensors travel as NumPy arrays, which Ray hands over without pickling them; on the same node they are shared, not copied.
"""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtrust import __version__
from fedtrust.engine import threads
from fedtrust.engine.cohort import Chunk, train
from fedtrust.engine.sums import Tree
from fedtrust.engine.world import World

#: Stands for a tensor that travels by itself.
_NOTHING = torch.zeros(0)


class _Array(NamedTuple):
    """A tensor on its way."""

    values: np.ndarray[Any, Any]


def pack(value: Any) -> Any:
    """Return a value with the tensors in its tuples, lists and dicts turned into arrays."""
    if isinstance(value, Tensor):
        return value if value.dtype == torch.bfloat16 else _Array(value.detach().cpu().numpy())
    if isinstance(value, tuple):
        parts = [pack(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [pack(v) for v in value]
    return {k: pack(v) for k, v in value.items()} if type(value) is dict else value


def unpack(value: Any) -> Any:
    """Return what `pack` was given; the tensors are copies that may be written on."""
    if isinstance(value, _Array):
        return torch.from_numpy(value.values.copy())
    if isinstance(value, tuple):
        parts = [unpack(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [unpack(v) for v in value]
    return {k: unpack(v) for k, v in value.items()} if type(value) is dict else value


def pack_chunk(chunk: Chunk) -> Any:
    """Return a chunk without the model and what is sent along with it; these travel once a round."""
    return pack(chunk._replace(params=_NOTHING, server={}))


def pack_model(chunk: Chunk) -> Any:
    """Return what all clients of a chunk are sent."""
    return pack((chunk.params, dict(chunk.server)))


class Hello(NamedTuple):
    """Who a worker is: process and node, what it runs, and the bytes that are free on its GPU (0: it has none)."""

    pid: int
    node: str
    versions: tuple[str, str]
    free: int


def versions() -> tuple[str, str]:
    """Return what must be the same everywhere for the same bits: the versions of fedtrust and of torch."""
    return __version__, torch.__version__.split("+")[0]


def bare(world: World) -> tuple[World, list[Tensor]]:
    """Return a world without its samples, and the samples (x, y) that workers train on; test and root samples stay at home."""
    data = world.data
    empty = dataclasses.replace(data, x=data.x[:0], y=data.y[:0], x_test=data.x_test[:0], y_test=data.y_test[:0], root=None, skews=[])
    # A slice would drag the whole storage along when it is pickled.
    empty = dataclasses.replace(empty, **{name: getattr(empty, name).clone() for name in ("x", "y", "x_test", "y_test")})
    return dataclasses.replace(world, data=empty), [data.x, data.y]


class StaleError(Exception):
    """A worker has not got the model that it was told to train: a call before failed on its way in."""


class Worker:
    """The actor's class: holds the worlds of the open jobs, trains chunks, adds partial sums.

    The samples of several worlds are held once where they are the same; on a CPU they stay in the object store, which all workers of a
    node share.
    """

    def __init__(self) -> None:
        threads.keep_memory()
        threads.fix(1)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._worlds: dict[int, World] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        self._samples: dict[str, Tensor] = {}
        self._models: dict[int, tuple[int, Any]] = {}  # what each job's clients were sent last, and its number

    def hello(self) -> Hello:
        """Say who this is."""
        import ray

        free = torch.cuda.mem_get_info()[0] if self._device == "cuda" else 0
        return Hello(os.getpid(), ray.get_runtime_context().get_node_id(), versions(), free)

    def open(self, job: int, world: World, names: Sequence[str], *samples: Any) -> None:
        """Take over a run; `samples` are its x and y, and `names` say what they hold."""
        for name, values in zip(names, samples, strict=True):
            if name not in self._samples:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # shared memory is read-only; training only ever reads rows of it
                    self._samples[name] = torch.from_numpy(values).to(self._device)
        x, y = (self._samples[name] for name in names)
        self._worlds[job] = dataclasses.replace(world.on(self._device), data=dataclasses.replace(world.data, x=x, y=y))
        self._names[job] = tuple(names)

    def forget(self, job: int) -> None:
        """Drop a run, and its samples if no other run uses them."""
        self._worlds.pop(job, None)
        self._names.pop(job, None)
        self._models.pop(job, None)
        used = {name for names in self._names.values() for name in names}
        self._samples = {name: values for name, values in self._samples.items() if name in used}
        threads.give_back()

    def holds(self) -> tuple[list[int], int]:
        """Return the jobs whose worlds are here, and how many tensors of samples."""
        return sorted(self._worlds), len(self._samples)

    def train(self, job: int, number: int, model: Any, chunks: Sequence[Any]) -> tuple[tuple[list[Any], bool], list[Any], Any]:
        """Train a block of chunks.

        Args:
            job: the run.
            number: of the model.
            model: what all clients are sent; `None`: it is here already.
            chunks: the chunks.

        Returns:
            Of every chunk the small part of the result, and the seconds; of every chunk the updates; the sum over all chunks.

        Raises:
            StaleError: it is not.
        """
        threads.fix(1)  # a method with a group of its own runs on a thread that has not been told
        if model is not None:
            self._models[job] = number, unpack(model)
        held, (params, server) = self._models.get(job, (None, (None, None)))
        if held != number:
            raise StaleError
        heads, updates, sums = [], [], Tree(len(chunks), torch.Tensor.add_)
        for place, chunk in enumerate(chunks):
            began = time.perf_counter()
            result = train(self._worlds[job], unpack(chunk)._replace(params=params, server=server))
            sums.put(place, result.total)
            updates.append(result.updates.numpy() if len(result.updates) else None)
            head = pack(result._replace(updates=result.updates[:0].clone(), total=None))
            heads.append((head, time.perf_counter() - began))
        total = sums.result()
        return (heads, total is not None), updates, None if total is None else total.numpy()

    def add(self, left: Any, right: Any) -> Any:
        """Return the sum of two partial sums that lie on this node."""
        return left + right
