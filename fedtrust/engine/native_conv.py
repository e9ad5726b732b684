"""Convolutions and max pools of a fused cohort as machine code; see `fedtrust.engine.native_layers`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtrust.engine import kernels
from fedtrust.engine.fused_layers import At
from fedtrust.engine.kernels import Frame, Window
from fedtrust.engine.native_layers import Framed, Margin, Native, buffer, framed, start


class _Descent(NamedTuple):
    """The way back through a convolution.

    Attributes:
        x: the layer's input.
        gw: the weights' gradients in the kernels' order.
        gc: where the biases' gradients go.
        weights: the kernel of both.
        gx: the input's gradient, where it is wanted, with the turned weights and the kernel that it takes.
    """

    x: Framed
    gw: Tensor
    gc: Tensor | None
    weights: kernels.Kernel
    gx: Framed | None = None
    turned: Tensor | None = None
    back: kernels.Kernel | None = None

    def step(self, model: int, g: int) -> None:
        """Work out a model's gradients from that of its output, which stands at the address `g`."""
        images = self.x.whole.shape[1]
        self.weights(start(self.x.whole, model), g, start(self.gw, model), start(self.gc, model), images)
        if self.gx is not None and self.back is not None:
            self.back(g, start(self.turned, model), 0, start(self.gx.whole, model), images)


class NativeConv(Native):
    """`nn.Conv2d` of stride 1; the gradient of its input is a convolution too, with the window turned round."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        (rows, columns), (up, before) = layer.kernel_size, (int(p) for p in layer.padding)
        self._window = Window(rows, columns, up, before)
        self._turned = Window(rows, columns, rows - 1 - up, columns - 1 - before)
        self.padding: Margin = (up, before)
        self.spread: Margin = (self._turned.up, self._turned.before)

    def _packed(self, at: At, way: str) -> Tensor:
        """Return the weights in the kernels' order [k, rows, columns, C, C]."""
        assert at.w is not None
        packed, (outputs, inputs) = buffer(at, way, tuple(at.w.shape)), at.w.shape[1:3]
        kernels.repack(outputs, inputs, self._window, way)(start(at.w), start(packed), at.models, at.w.stride(0))
        return packed

    def _size(self, x: Framed, at: At) -> tuple[int, ...]:
        """Return the shape of a model's output [b, H, W, C]."""
        assert at.w is not None
        inside, window = x.frame, self._window
        height, width = inside.height + 2 * window.up - window.rows + 1, inside.width + 2 * window.before - window.columns + 1
        return x.whole.shape[1], height, width, at.w.shape[1]

    def forward(self, x: Framed, at: At) -> tuple[Framed, Any]:
        """Return the output and what is kept."""
        weight, images = self._packed(at, kernels.PACK), x.whole.shape[1]
        out = framed(at, "out", (at.models, *self._size(x, at)), self.room)
        kernel = kernels.convolution(x.frame, out.frame, self._window, at.c is not None)
        for model in range(at.models):
            kernel(start(x.whole, model), start(weight, model), start(at.c, model), start(out.whole, model), images)
        return out, x

    def backward(self, g: Framed, kept: Framed, at: At) -> Framed:
        """Return the gradient of the input."""
        descent = self._descent(kept, g.frame, at)
        for model in range(at.models):
            descent.step(model, start(g.whole, model))
        return self._hand_over(descent, g, at)

    def _descent(self, x: Framed, above: Frame, at: At) -> _Descent:
        """Return what goes back through the layer; `above`: how the gradient of a model's output lies."""
        assert at.w is not None
        inside = x.frame
        gw = buffer(at, "gw", tuple(at.w.shape))
        weights = kernels.weight_gradient(inside, above, self._window, at.gc is not None)
        if not at.wanted:
            return _Descent(x, gw, at.gc, weights)
        gx = framed(at, "gx", (*x.whole.shape[:2], inside.height, inside.width, inside.channels), self.back)
        back = kernels.convolution(above, gx.frame, self._turned, False)
        return _Descent(x, gw, at.gc, weights, gx, self._packed(at, kernels.TURN), back)

    def _hand_over(self, descent: _Descent, g: Framed, at: At) -> Framed:
        """Bring the gradients into PyTorch's order; return the input's (anything where that is not wanted)."""
        assert at.gw is not None
        outputs, inputs = at.gw.shape[1:3]
        unpack = kernels.repack(outputs, inputs, self._window, kernels.UNPACK)
        unpack(start(at.gw), start(descent.gw), at.models, at.gw.stride(0))
        return g if descent.gx is None else descent.gx


class NativeConvPool(NativeConv):
    """A convolution and the max pool behind it, with the ReLU behind that if there is one.

    Each model's output is pooled while it is in the cache, and is not kept; the same way back.
    """

    def __init__(self, layer: nn.Conv2d, pool: nn.MaxPool2d, relu: bool) -> None:
        super().__init__(layer)
        self._side, self._relu = square(pool.kernel_size), relu

    def forward(self, x: Framed, at: At) -> tuple[Framed, Any]:
        """Return the output and what is kept."""
        weight = self._packed(at, kernels.PACK)
        images, height, width, channels = self._size(x, at)
        out = framed(at, "out", (1, images, height, width, channels), (0, 0))
        size = (at.models, images, height // self._side, width // self._side, channels)
        pooled, places = framed(at, "pooled", size, self.room), buffer(at, "places", size, torch.uint8)
        kernel = kernels.convolution(x.frame, out.frame, self._window, at.c is not None)
        pool = kernels.pool(out.frame, pooled.frame, self._side, self._relu)
        for model in range(at.models):
            kernel(start(x.whole, model), start(weight, model), start(at.c, model), start(out.whole), images)
            pool(start(out.whole), start(pooled.whole, model), start(places, model), images)
        return pooled, (x, places)

    def backward(self, g: Framed, kept: Any, at: At) -> Framed:
        """Return the gradient of the input."""
        x, places = kept
        images, height, width, channels = self._size(x, at)
        rest = bool(height % self._side or width % self._side)
        above = framed(at, "above", (1, images, height, width, channels), self.spread if at.wanted else (0, 0), zero=rest)
        unpool = kernels.pool_gradient(above.frame, g.frame, self._side)
        descent, here = self._descent(x, above.frame, at), start(above.whole)
        for model in range(at.models):
            unpool(start(g.whole, model), start(places, model), here, images)
            descent.step(model, here)
        return self._hand_over(descent, g, at)


class NativePool(Native):
    """`nn.MaxPool2d` over windows that do not overlap, with the ReLU behind it if there is one."""

    def __init__(self, layer: nn.MaxPool2d, relu: bool) -> None:
        super().__init__()
        self._side, self._relu = square(layer.kernel_size), relu

    def forward(self, x: Framed, at: At) -> tuple[Framed, Any]:
        """Return the output and what is kept."""
        k, b = x.whole.shape[:2]
        inside = x.frame
        size = (k, b, inside.height // self._side, inside.width // self._side, inside.channels)
        out, places = framed(at, "out", size, self.room), buffer(at, "places", size, torch.uint8)
        kernel = kernels.pool(inside, out.frame, self._side, self._relu)
        kernel(start(x.whole), start(out.whole), start(places), k * b)
        return out, (inside, places)

    def backward(self, g: Framed, kept: Any, at: At) -> Framed:
        """Return the gradient of the input."""
        inside, places = kept
        k, b = g.whole.shape[:2]
        rest = bool(inside.height % self._side or inside.width % self._side)
        gx = framed(at, "gx", (k, b, inside.height, inside.width, inside.channels), self.back, zero=rest)
        kernels.pool_gradient(gx.frame, g.frame, self._side)(start(g.whole), start(places), start(gx.whole), k * b)
        return gx


def square(value: int | tuple[int, ...]) -> int:
    """Return the side of a square window, as a layer's parameters give it; -1 if it is none."""
    if not isinstance(value, tuple):
        return int(value)
    return int(value[0]) if len(set(value)) == 1 else -1
