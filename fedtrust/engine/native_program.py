"""A fused network that is machine code from end to end: the calls of a step are noted once and made again by one call from Python.

What a step does then depends on nothing but where the parameters, their gradients and the images stand. A model goes through all layers
before the next one begins, so that its weights and hidden values stay in a core's cache; and the threads of a process, which take turns
in Python, are there twice a step in place of a hundred times.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtrust.engine.jit import Kernel, chain
from fedtrust.engine.native_layers import Call, NotStraightError, noting, table

if TYPE_CHECKING:
    from fedtrust.engine.fused import Bound, Fused

_Numbers = npt.NDArray[np.int64]

#: The steps of each thread, by fused form.
_LOCAL = threading.local()


class Program(NamedTuple):
    """Calls that can be made again with values elsewhere.

    Attributes:
        kernel: what makes them.
        table: what it wants to know, see `jit.chain`.
        moved, source: which entries of the table are addresses of something that moves, and of what.
        models: how many models there are.
        buffers: what the other addresses belong to.
    """

    kernel: Kernel
    table: _Numbers
    moved: _Numbers
    source: _Numbers
    models: int
    buffers: tuple[Tensor, ...]

    @classmethod
    def of(cls, calls: Sequence[Call], models: int, moving: Sequence[Tensor]) -> Program:
        """Return the program of some calls; `moving`: what will be somewhere else next time.

        Raises:
            NotStraightError: a call works on a part of what moves, and the program could not follow it.
        """
        numbers, buffers = table(calls)
        where, theirs = {value.data_ptr(): i for i, value in enumerate(moving)}, {_storage(value) for value in moving}
        moved = [place for place, _ in buffers if numbers[place] in where]
        held = tuple(buffer for place, buffer in buffers if numbers[place] not in where)
        if any(_storage(buffer) in theirs for buffer in held):
            raise NotStraightError
        source = [where[numbers[place]] for place in moved]
        kernel = chain(tuple(kernel.arity for kernel, *_ in calls))
        entries, places, sources = (np.array(part, dtype=np.int64) for part in (numbers, moved, source))
        return cls(kernel, entries, places, sources, models, held)

    def run(self, moving: _Numbers) -> None:
        """Make the calls; `moving`: where what moves stands now."""
        self.table[self.moved] = moving[self.source]
        self.kernel(self.table.ctypes.data, self.models)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


class Step(NamedTuple):
    """The programs of a step, and the tensors between them: the outputs [k, b, C] and their gradient."""

    there: Program
    back: Program
    outputs: Tensor
    grad: Tensor


class _Steps:
    """A form's steps by the number of models, all for values that lie alike; `None`: a layer has to compute with PyTorch."""

    def __init__(self) -> None:
        self._apart: tuple[int, ...] = ()
        self._sample: tuple[int, ...] = ()
        self._found: dict[int, Step | None] = {}

    def get(self, shape: tuple[int, ...], apart: tuple[int, ...], make: Callable[[], Step | None]) -> Step | None:
        """Return the step for images [k, b, *sample], made if there is none yet.

        More models than ever get larger buffers. The steps before are forgotten then, or each would keep its own: they are made anew with
        a part of those. `apart`: how far two models' parameters are; nothing where there is one model.
        """
        models, *sample = shape
        if tuple(sample) != self._sample or (models > 1 and apart != self._apart) or models > max(self._found, default=0):
            self._sample, self._apart = tuple(sample), apart
            self._found.clear()
        if models not in self._found:
            self._found[models] = make()
        return self._found[models]


class Replayed:
    """A fused network on some models' parameters, of layers that are all straight (see `Native`).

    Args:
        form: the fused form, which every thread keeps its programs for.
        bound: the network as it is without programs.
        parameters: the stacked parameters, name → [k, *shape].
        into: where their gradients go.
    """

    def __init__(self, form: Fused, bound: Bound, parameters: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        self._bound, self._values = bound, (*parameters.values(), *into.values())
        self._images: Tensor | None = None  # are looked at again by `backward`
        self._moving = np.array([0, *(value.data_ptr() for value in self._values)], dtype=np.int64)  # the images stand in front
        self._apart = tuple(value.stride(0) for value in self._values) if len(self._values[0]) > 1 else ()
        if not hasattr(_LOCAL, "steps"):
            _LOCAL.steps = weakref.WeakKeyDictionary()
        self._steps: _Steps = _LOCAL.steps.setdefault(form, _Steps())

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return the outputs [k, b, C] of each model for its own samples [k, b, *sample], and what `backward` wants back."""
        self._images = x = x.contiguous()
        self._moving[0] = x.data_ptr()
        step = self._steps.get(x.shape, self._apart, lambda: self._noted(x))
        if step is None:
            return self._bound.forward(x)
        step.there.run(self._moving)
        return step.outputs, step

    def backward(self, tape: Any, grad: Tensor) -> None:
        """Write the gradients of the parameters.

        Args:
            tape: what `forward` returned; used up.
            grad: the gradient of the outputs [k, b, C]; may be written over.
        """
        if not isinstance(tape, Step):
            self._bound.backward(tape, grad)
            return
        tape.grad.copy_(grad)
        tape.back.run(self._moving)

    def _noted(self, x: Tensor) -> Step | None:
        """Return the programs of a step for images like these [k, b, *sample]; `None`: a layer has to compute with PyTorch."""
        try:
            with noting() as there:
                outputs, tape = self._bound.forward(x)
            grad = torch.empty_like(outputs)
            with noting() as back:
                self._bound.backward(tape, grad)
            moving = (x, *self._values)
            return Step(Program.of(there, len(x), moving), Program.of(back, len(x), moving), outputs, grad)
        except NotStraightError:
            return None
