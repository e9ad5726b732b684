"""The layers of a fused cohort that have machine code of their own (`fedtrust.engine.kernels`), for float32 on a CPU.

Their hidden values come in a third form beside split and merged: framed, images channels-last with a margin of zeros, a model after
the other. Buffers stay from step to step; nothing ever writes into a margin, so that it stays zero.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtrust.engine import kernels, kernels_dense
from fedtrust.engine.fused_layers import At, Linear, Recorded
from fedtrust.engine.jit import Kernel, chain
from fedtrust.engine.kernels import Frame

Margin = tuple[int, int]  # rows above and below, pixels on the left and the right


class Framed(NamedTuple):
    """Images of k models.

    Attributes:
        whole: the numbers with the margins, [k, b, H + 2 top, W + 2 left, C], contiguous.
        margin: top and left.
    """

    whole: Tensor
    margin: Margin

    @property
    def inner(self) -> Tensor:
        """The images without their margins [k, b, H, W, C], a view."""
        (top, left), (high, wide) = self.margin, self.whole.shape[2:4]
        return self.whole[:, :, top : high - top, left : wide - left]

    @property
    def frame(self) -> Frame:
        """How they lie in memory."""
        (top, left), (high, wide, channels) = self.margin, self.whole.shape[2:]
        return Frame(high - 2 * top, wide - 2 * left, channels, top, left)


def buffer(at: At, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
    """Return a layer's buffer of this name; what was left in it, or the first time zeros if asked for.

    Fewer models than before get the first ones' part.
    """
    found = at.scratch.get(name)
    if found is None or found.shape[1:] != shape[1:] or len(found) < shape[0]:
        found = at.scratch[name] = (torch.zeros if zero else torch.empty)(shape, dtype=dtype)
    return found[: shape[0]]


def framed(at: At, name: str, size: tuple[int, ...], margin: Margin, zero: bool = False) -> Framed:
    """Return a layer's buffer for images [k, b, H, W, C] with these margins; `zero`: not all of every image will be written."""
    k, b, height, width, channels = size
    whole = buffer(at, name, (k, b, height + 2 * margin[0], width + 2 * margin[1], channels), zero=zero or any(margin))
    return Framed(whole, margin)


#: A kernel and its arguments: buffers [k, ...], of which it gets a model's part ([1, ...]: one for all), whole numbers, `None`.
Call = tuple[Kernel, *tuple[Tensor | int | None, ...]]

#: Under `calls`, while a thread notes its calls, what it has noted.
_NOTED = threading.local()


class NotStraightError(Exception):
    """What is being noted does more than to make calls."""


@contextlib.contextmanager
def noting() -> Iterator[list[Call]]:
    """Note this thread's calls in place of making them."""
    calls: list[Call] = []
    _NOTED.calls = calls
    try:
        yield calls
    finally:
        _NOTED.calls = None


def each(models: int, *calls: Call) -> None:
    """Make the calls for one model after the other; where the thread notes them (see `native_program`), do only that.

    One call from Python does it: with two threads, taking Python's lock again after every kernel cost as much as a third of the kernels.
    """
    noted: list[Call] | None = getattr(_NOTED, "calls", None)
    if noted is not None:
        noted += calls
        return
    numbers, _ = table(calls)
    held = (ctypes.c_int64 * len(numbers))(*numbers)
    chain(tuple(kernel.arity for kernel, *_ in calls))(ctypes.addressof(held), models)


def table(calls: Sequence[Call]) -> tuple[list[int], list[tuple[int, Tensor]]]:
    """Return what `jit.chain` wants to know of some calls, and the buffers in them with the places of their addresses in it."""
    numbers: list[int] = []
    buffers = []
    for kernel, *arguments in calls:
        numbers.append(kernel.address)
        for given in arguments:
            if isinstance(given, Tensor):
                buffers.append((len(numbers), given))
                numbers += (given.data_ptr(), 0 if len(given) == 1 else given.element_size() * given.stride(0))
            else:
                numbers += (given or 0, 0)
    return numbers, buffers


class Native:
    """A layer on framed values.

    Attributes:
        room: the margin that the next layer wants around the output.
        back: the margin that the layer before wants around the gradient of its output.
        straight: whether it does nothing but to make calls (see `each`), in the same places for values in the same places.
    """

    straight = True

    def __init__(self) -> None:
        self.room: Margin = (0, 0)
        self.back: Margin = (0, 0)

    def forward(self, x: Any, at: At) -> tuple[Any, Any]:
        """Return the output and what is kept."""
        raise NotImplementedError

    def backward(self, g: Any, kept: Any, at: At) -> Any:
        """Return the gradient of the input."""
        raise NotImplementedError


class Enter(Native):
    """From split [k, b, C, H, W] to framed."""

    def forward(self, x: Tensor, at: At) -> tuple[Framed, Any]:
        """Return the output and what is kept."""
        k, b, channels, height, width = x.shape
        out = framed(at, "out", (k, b, height, width, channels), self.room)
        x = x.contiguous()
        each(k, (kernels.planes(out.frame, True), out.whole, x, b))
        return out, None

    def backward(self, g: Framed, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        return g.inner.permute(0, 1, 4, 2, 3)


class Leave(Native):
    """From framed to split [k, b, C, H, W]."""

    def forward(self, x: Framed, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        k, b = x.whole.shape[:2]
        frame = x.frame
        out = buffer(at, "out", (k, b, frame.channels, frame.height, frame.width))
        each(k, (kernels.planes(frame, False), x.whole, out, b))
        return out, None

    def backward(self, g: Tensor, kept: Any, at: At) -> Framed:
        """Return the gradient of the input."""
        k, b, channels, height, width = g.shape
        out = framed(at, "gx", (k, b, height, width, channels), self.back)
        g = g.contiguous()
        each(k, (kernels.planes(out.frame, True), out.whole, g, b))
        return out


class NativeLinear(Linear):
    """`nn.Linear` of split values [k, b, ..., in], with few samples a model; with many, a library's matrix product is faster."""

    straight = True

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        assert at.w is not None
        models, outputs, inputs = at.w.shape
        rows = x.flatten(1, -2).contiguous()
        if not _few(rows, at.w):
            if getattr(_NOTED, "calls", None) is not None:
                raise NotStraightError
            return super().forward(x, at)
        out = buffer(at, "out", (models, rows.shape[1], outputs))
        each(models, (kernels_dense.dense(rows.shape[1], inputs, outputs, at.c is not None), rows, at.w, at.c, out))
        return out.view(*x.shape[:-1], outputs), (rows, x.shape)

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        rows, shape = kept
        assert at.w is not None
        assert at.gw is not None
        (models, outputs, inputs), samples = at.w.shape, rows.shape[1]
        if not _few(rows, at.w):
            return super().backward(g, kept, at)
        g = g.flatten(1, -2).contiguous()
        each(models, (kernels_dense.dense_weight_gradient(samples, inputs, outputs, at.gc is not None), rows, g, at.gw, at.gc))
        if not at.wanted:
            return g
        gx = buffer(at, "gx", (models, samples, inputs))
        each(models, (kernels_dense.dense_input_gradient(samples, inputs, outputs), g, at.w, gx))
        return gx.view(shape)


#: Up to so many samples a model, and weights, a linear layer's own machine code is the faster one.
FEW_SAMPLES, FEW_WEIGHTS = 48, 1 << 21


def _few(rows: Tensor, w: Tensor) -> bool:
    return rows.shape[1] <= FEW_SAMPLES and w[0].numel() <= FEW_WEIGHTS


class NativeRectify(Native):
    """`nn.ReLU`, in place, of framed values or of split ones: each is a buffer of the layer before, which does not look at it again."""

    def forward(self, x: Framed | Tensor, at: At) -> tuple[Framed | Tensor, Any]:
        """Return the output and what is kept."""
        whole, _ = _images(x)
        each(len(whole), (kernels.rectify(), whole, whole[0].numel()))
        return x, x

    def backward(self, g: Framed | Tensor, kept: Framed | Tensor, at: At) -> Framed | Tensor:
        """Return the gradient of the input."""
        g = g.contiguous() if isinstance(g, Tensor) else g
        (above, frame), (below, inside) = _images(g), _images(kept)
        each(len(above), (kernels.rectify_gradient(frame, inside), above, below, above.shape[1]))
        return g


def _images(values: Framed | Tensor) -> tuple[Tensor, Frame]:
    """Return values as images: split ones [k, b, ...] are images of one pixel."""
    if isinstance(values, Framed):
        return values.whole, values.frame
    return values, Frame(1, 1, values[0, 0].numel())


class NativeElementwise(Native):
    """Any other activation: autograd's backward pass, on the numbers within the margins."""

    straight = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._recorded = Recorded(layer)

    def forward(self, x: Framed, at: At) -> tuple[Framed, Any]:
        """Return the output and what is kept."""
        value, kept = self._recorded.forward(x.inner.clone(), at)
        out = framed(at, "out", tuple(value.shape), self.room)
        out.inner.copy_(value)
        return out, kept

    def backward(self, g: Framed, kept: Any, at: At) -> Framed:
        """Return the gradient of the input."""
        value = self._recorded.backward(g.inner, kept, at)
        gx = framed(at, "gx", tuple(value.shape), self.back)
        gx.inner.copy_(value)
        return gx
