"""Convolutions and max pools of a fused cohort as machine code; see `fedtrust.engine.native_layers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedtrust.engine import kernels
from fedtrust.engine.fused_layers import At
from fedtrust.engine.kernels import Window
from fedtrust.engine.native_layers import Call, Framed, Margin, Native, buffer, each, framed


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
        each(at.models, (kernels.repack(outputs, inputs, self._window, way), at.w, packed))
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
        each(at.models, (kernels.convolution(x.frame, out.frame, self._window, at.c is not None), x.whole, weight, at.c, out.whole, images))
        return out, x

    def backward(self, g: Framed, kept: Framed, at: At) -> Framed:
        """Return the gradient of the input."""
        descent, gx = self._descent(kept, g, at)
        each(at.models, *descent)
        return self._hand_over(at, gx or g)

    def _descent(self, x: Framed, above: Framed, at: At) -> tuple[list[Call], Framed | None]:
        """Return what goes back through the layer, and where the input's gradient will be, if it is wanted.

        Args:
            x: the layer's input.
            above: the gradient of its output, or the place for one model's.
            at: where it stands.
        """
        assert at.w is not None
        inside, images = x.frame, x.whole.shape[1]
        weights = kernels.weight_gradient(inside, above.frame, self._window, at.gc is not None)
        calls: list[Call] = [(weights, x.whole, above.whole, self._gradients(at), at.gc, images)]
        if not at.wanted:
            return calls, None
        gx = framed(at, "gx", (at.models, images, inside.height, inside.width, inside.channels), self.back)
        back = kernels.convolution(above.frame, gx.frame, self._turned, False)
        return [*calls, (back, above.whole, self._packed(at, kernels.TURN), None, gx.whole, images)], gx

    def _gradients(self, at: At) -> Tensor:
        """Return the place for the weights' gradients in the kernels' order."""
        assert at.w is not None
        return buffer(at, "gw", tuple(at.w.shape))

    def _hand_over(self, at: At, gx: Framed) -> Framed:
        """Bring the weights' gradients into PyTorch's order; return the input's."""
        assert at.gw is not None
        outputs, inputs = at.gw.shape[1:3]
        each(at.models, (kernels.repack(outputs, inputs, self._window, kernels.UNPACK), at.gw, self._gradients(at)))
        return gx


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
        here: Call = (kernel, x.whole, weight, at.c, out.whole, images)
        each(at.models, here, (pool, out.whole, pooled.whole, places, images))
        return pooled, (x, places)

    def backward(self, g: Framed, kept: Any, at: At) -> Framed:
        """Return the gradient of the input."""
        x, places = kept
        images, height, width, channels = self._size(x, at)
        rest = bool(height % self._side or width % self._side)
        above = framed(at, "above", (1, images, height, width, channels), self.spread if at.wanted else (0, 0), zero=rest)
        unpool = kernels.pool_gradient(above.frame, g.frame, self._side)
        descent, gx = self._descent(x, above, at)
        each(at.models, (unpool, g.whole, places, above.whole, images), *descent)
        return self._hand_over(at, gx or g)


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
        each(k, (kernels.pool(inside, out.frame, self._side, self._relu), x.whole, out.whole, places, b))
        return out, (inside, places)

    def backward(self, g: Framed, kept: Any, at: At) -> Framed:
        """Return the gradient of the input."""
        inside, places = kept
        k, b = g.whole.shape[:2]
        rest = bool(inside.height % self._side or inside.width % self._side)
        gx = framed(at, "gx", (k, b, inside.height, inside.width, inside.channels), self.back, zero=rest)
        each(k, (kernels.pool_gradient(gx.frame, g.frame, self._side), g.whole, places, gx.whole, b))
        return gx


def square(value: int | tuple[int, ...]) -> int:
    """Return the side of a square window, as a layer's parameters give it; -1 if it is none."""
    if not isinstance(value, tuple):
        return int(value)
    return int(value[0]) if len(set(value)) == 1 else -1
