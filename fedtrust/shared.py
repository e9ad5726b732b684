"""Samples that several runs of one process look at, in memory once.

The cells of a matrix mostly differ in attackers, strategies and seeds, and not in the samples. Whoever plays several runs side by side
borrows each run's parts from one `Library`: what is equal, bit by bit, to what another run holds is replaced by that run's tensor.

Nobody may write on samples. Torch has no tensor that forbids it, but it counts writes: a loan that finds a count changed says so, and the
run that holds it is worth nothing.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from fedtrust.errors import RunError
from fedtrust.setup import Setup

_Key = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Loan(NamedTuple):
    """The parts of a run, some of whose tensors may be other runs' too; `stamps` are the counts of writes when it was lent."""

    setup: Setup
    stamps: tuple[tuple[Tensor, int], ...]

    def check(self) -> None:
        """Make sure that the samples are still what they were.

        Raises:
            RunError: somebody wrote on them; what was measured since is of no use.
        """
        if any(tensor._version != version for tensor, version in self.stamps):
            raise RunError("the samples that the runs of this matrix share were changed in place while it ran (by a probe of any of them)")


class Library:
    """Knows which tensors are in use; keeps none of them alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: defaultdict[_Key, list[tuple[weakref.ref[Tensor], int]]] = defaultdict(list)

    def lend(self, setup: Setup) -> Loan:
        """Return the parts of a run that has just been built, with samples that another run holds in place of its own equal ones."""
        stamps: list[tuple[Tensor, int]] = []
        data = setup.world.data

        def one(tensor: Tensor) -> Tensor:
            return self._one(tensor, stamps)

        with self._lock:
            shared = dataclasses.replace(data, x=one(data.x), y=one(data.y), x_test=one(data.x_test), y_test=one(data.y_test))
            goals = tuple(dataclasses.replace(g, x=one(g.x), y=one(g.y), clean=one(g.clean)) for g in setup.goals)
        world = dataclasses.replace(setup.world, data=shared)
        return Loan(dataclasses.replace(setup, world=world, goals=goals), tuple(stamps))

    def _one(self, tensor: Tensor, stamps: list[tuple[Tensor, int]]) -> Tensor:
        """Return the tensor in use with these bits; if there is none, this one is in use from now on."""
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        # One that was written on since it came here is lent to nobody else.
        kept = [(ref, version) for ref, version in self._known[key] if (known := ref()) is not None and known._version == version]
        chosen = next((known for ref, _ in kept if (known := ref()) is not None and _same(known, tensor)), None)
        if chosen is None:
            chosen = tensor
            kept.append((weakref.ref(tensor), tensor._version))
        self._known[key] = kept
        stamps.append((chosen, chosen._version))
        return chosen


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape and type have the same bits (0.0 and -0.0 differ)."""
    bits = _INTEGERS[one.element_size()]
    return one is other or torch.equal(one.view(bits), other.view(bits))
