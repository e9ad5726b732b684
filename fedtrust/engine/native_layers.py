"""The layers of a fused cohort that have machine code of their own (`fedtrust.engine.kernels`), for float32 on a CPU.

Their hidden values come in a third form beside split and merged: framed, images channels-last with a margin of zeros, a model after
the other. Buffers stay from step to step; nothing ever writes into a margin, so that it stays zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtrust.engine import kernels, kernels_dense
from fedtrust.engine.fused_layers import At, Layer, Recorded
from fedtrust.engine.kernels import Frame, Window

_aten = torch.ops.aten

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
    """Return a layer's buffer of this name; what was left in it, or the first time zeros if asked for."""
    found = at.scratch.get(name)
    if found is None or found.shape != shape:
        found = at.scratch[name] = (torch.zeros if zero else torch.empty)(shape, dtype=dtype)
    return found


def framed(at: At, name: str, size: tuple[int, ...], margin: Margin, zero: bool = False) -> Framed:
    """Return a layer's buffer for images [k, b, H, W, C] with these margins; `zero`: not all of every image will be written."""
    k, b, height, width, channels = size
    whole = buffer(at, name, (k, b, height + 2 * margin[0], width + 2 * margin[1], channels), zero=zero or any(margin))
    return Framed(whole, margin)


class Native:
    """A layer on framed values.

    Attributes:
        room: the margin that the next layer wants around the output.
        back: the margin that the layer before wants around the gradient of its output.
    """

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
        kernels.planes(out.frame, True)(_start(out.whole), _start(x), k * b)
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
        kernels.planes(frame, False)(_start(x.whole), _start(out), k * b)
        return out, None

    def backward(self, g: Tensor, kept: Any, at: At) -> Framed:
        """Return the gradient of the input."""
        k, b, channels, height, width = g.shape
        out = framed(at, "gx", (k, b, height, width, channels), self.back)
        g = g.contiguous()
        kernels.planes(out.frame, True)(_start(out.whole), _start(g), k * b)
        return out


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
        self.weights(_start(self.x.whole, model), g, _start(self.gw, model), _start(self.gc, model), images)
        if self.gx is not None and self.back is not None:
            self.back(g, _start(self.turned, model), 0, _start(self.gx.whole, model), images)


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
        packed = buffer(at, way, tuple(at.w.shape))
        kernels.repack(*at.w.shape[1:3], self._window, way)(_start(at.w), _start(packed), at.models, at.w.stride(0))
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
            kernel(_start(x.whole, model), _start(weight, model), _start(at.c, model), _start(out.whole, model), images)
        return out, x

    def backward(self, g: Framed, kept: Framed, at: At) -> Framed:
        """Return the gradient of the input."""
        descent = self._descent(kept, g.frame, at)
        for model in range(at.models):
            descent.step(model, _start(g.whole, model))
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
        unpack = kernels.repack(*at.gw.shape[1:3], self._window, kernels.UNPACK)
        unpack(_start(at.gw), _start(descent.gw), at.models, at.gw.stride(0))
        return g if descent.gx is None else descent.gx


class NativeConvPool(NativeConv):
    """A convolution and the max pool behind it, with the ReLU behind that if there is one.

    Each model's output is pooled while it is in the cache, and is not kept; the same way back.
    """

    def __init__(self, layer: nn.Conv2d, pool: nn.MaxPool2d, relu: bool) -> None:
        super().__init__(layer)
        self._side, self._relu = _one(pool.kernel_size), relu

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
            kernel(_start(x.whole, model), _start(weight, model), _start(at.c, model), _start(out.whole), images)
            pool(_start(out.whole), _start(pooled.whole, model), _start(places, model), images)
        return pooled, (x, places)

    def backward(self, g: Framed, kept: Any, at: At) -> Framed:
        """Return the gradient of the input."""
        x, places = kept
        images, height, width, channels = self._size(x, at)
        rest = bool(height % self._side or width % self._side)
        above = framed(at, "above", (1, images, height, width, channels), self.spread if at.wanted else (0, 0), zero=rest)
        unpool = kernels.pool_gradient(above.frame, g.frame, self._side)
        descent, here = self._descent(x, above.frame, at), _start(above.whole)
        for model in range(at.models):
            unpool(_start(g.whole, model), _start(places, model), here, images)
            descent.step(model, here)
        return self._hand_over(descent, g, at)


def _start(tensor: Tensor | None, model: int = 0) -> int:
    """Return where a model's part of a buffer starts; 0 for no buffer. Whoever asks must hold the buffer while its address is used."""
    return 0 if tensor is None else tensor.data_ptr() + tensor.element_size() * model * tensor.stride(0)


class NativePool(Native):
    """`nn.MaxPool2d` over windows that do not overlap, with the ReLU behind it if there is one."""

    def __init__(self, layer: nn.MaxPool2d, relu: bool) -> None:
        super().__init__()
        self._side, self._relu = _one(layer.kernel_size), relu

    def forward(self, x: Framed, at: At) -> tuple[Framed, Any]:
        """Return the output and what is kept."""
        k, b = x.whole.shape[:2]
        inside = x.frame
        size = (k, b, inside.height // self._side, inside.width // self._side, inside.channels)
        out, places = framed(at, "out", size, self.room), buffer(at, "places", size, torch.uint8)
        kernel = kernels.pool(inside, out.frame, self._side, self._relu)
        kernel(_start(x.whole), _start(out.whole), _start(places), k * b)
        return out, (inside, places)

    def backward(self, g: Framed, kept: Any, at: At) -> Framed:
        """Return the gradient of the input."""
        inside, places = kept
        k, b = g.whole.shape[:2]
        rest = bool(inside.height % self._side or inside.width % self._side)
        gx = framed(at, "gx", (k, b, inside.height, inside.width, inside.channels), self.back, zero=rest)
        kernels.pool_gradient(gx.frame, g.frame, self._side)(_start(g.whole), _start(places), _start(gx.whole), k * b)
        return gx


class NativeLinear:
    """`nn.Linear` of split values [k, b, ..., in]."""

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        assert at.w is not None
        models, outputs, inputs = at.w.shape
        rows = x.flatten(1, -2).contiguous()
        out = buffer(at, "out", (models, rows.shape[1], outputs))
        kernel = kernels_dense.dense(rows.shape[1], inputs, outputs, at.c is not None)
        kernel(rows.data_ptr(), at.w.data_ptr(), *_bias(at.c)[:1], out.data_ptr(), models, at.w.stride(0), *_bias(at.c)[1:])
        return out.view(*x.shape[:-1], outputs), (rows, x.shape)

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        rows, shape = kept
        assert at.w is not None
        assert at.gw is not None
        (models, outputs, inputs), samples = at.w.shape, rows.shape[1]
        g = g.flatten(1, -2).contiguous()
        place, apart = _bias(at.gc)
        kernel = kernels_dense.dense_weight_gradient(samples, inputs, outputs, at.gc is not None)
        kernel(rows.data_ptr(), g.data_ptr(), at.gw.data_ptr(), place, models, at.gw.stride(0), apart)
        if not at.wanted:
            return g
        gx = buffer(at, "gx", (models, samples, inputs))
        kernels_dense.dense_input_gradient(samples, inputs, outputs)(g.data_ptr(), at.w.data_ptr(), gx.data_ptr(), models, at.w.stride(0))
        return gx.view(shape)


def _bias(bias: Tensor | None) -> tuple[int, int]:
    """Return where a stacked bias [k, out] stands, and how far two models' are apart."""
    return (0, 0) if bias is None else (bias.data_ptr(), bias.stride(0))


class NativeRectify(Native):
    """`nn.ReLU`, in place: every framed value is a buffer of the layer before, which does not look at it again."""

    def forward(self, x: Framed, at: At) -> tuple[Framed, Any]:
        """Return the output and what is kept."""
        x.whole.relu_()
        return x, x

    def backward(self, g: Framed, kept: Framed, at: At) -> Framed:
        """Return the gradient of the input."""
        _aten.threshold_backward.grad_input(g.inner, kept.inner, 0, grad_input=g.inner)
        return g


class NativeElementwise(Native):
    """Any other activation: autograd's backward pass, on the numbers within the margins."""

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


#: Above so many weights a library's matrix product, which minds the caches, is as fast.
DENSE_MOST = 1 << 17


def native(layer: nn.Module) -> bool:
    """Whether the layer has machine code of its own."""
    if isinstance(layer, nn.Linear):
        return layer.weight.numel() <= DENSE_MOST
    if isinstance(layer, nn.Conv2d):
        plain = layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.groups == 1 and not isinstance(layer.padding, str)
        return plain and all(int(p) < size for p, size in zip(layer.padding, layer.kernel_size, strict=True))
    if isinstance(layer, nn.MaxPool2d):
        same = {_one(layer.kernel_size), _one(layer.stride)}
        # The places of a window are noted in a byte.
        return len(same) == 1 and 0 < min(same) < 16 and not layer.ceil_mode and (_one(layer.padding), _one(layer.dilation)) == (0, 1)
    return False


def make(layers: Sequence[nn.Module]) -> tuple[Layer, int]:
    """Return the native form of the first of some layers on images, and how many of them it stands for."""
    first, *rest = layers
    if isinstance(first, nn.Conv2d) and rest and isinstance(rest[0], nn.MaxPool2d) and native(rest[0]):
        relu = len(rest) > 1 and isinstance(rest[1], nn.ReLU)
        return NativeConvPool(first, rest[0], relu), 2 + relu
    if isinstance(first, nn.Conv2d):
        return NativeConv(first), 1
    if isinstance(first, nn.MaxPool2d):
        relu = bool(rest) and isinstance(rest[0], nn.ReLU)
        return NativePool(first, relu), 1 + relu
    return NativeRectify() if isinstance(first, nn.ReLU) else NativeElementwise(first), 1


def give_room(layers: list[Any], first: int) -> None:
    """Tell every native layer of a plan which margins its neighbours want; `first`: the first layer with a parameter."""
    room: Margin = (0, 0)
    for layer in reversed(layers):
        if isinstance(layer, Native):
            layer.room = room
            if isinstance(layer, NativeConv):
                room = layer.padding
            elif not isinstance(layer, NativeRectify | NativeElementwise):
                room = (0, 0)
    back: Margin = (0, 0)
    for number, layer in enumerate(layers):
        if isinstance(layer, Native):
            layer.back = back
            if isinstance(layer, NativeConv):
                back = layer.spread if number > first and not isinstance(layer, NativeConvPool) else (0, 0)
            elif not isinstance(layer, NativeRectify | NativeElementwise):
                back = (0, 0)


def _one(value: Any) -> int:
    """Return the side of a square window; -1 if it is none."""
    if not isinstance(value, tuple):
        return int(value)
    return int(value[0]) if len(set(value)) == 1 else -1
