"""The layers of a fused network that branches, on a CPU in float32.

Such networks are mostly large: a step reads and writes more weights than values between the layers. So the weights stay where they lie,
rows of the block [k, d], and a convolution is a matrix product of them with the values under its windows (as in Chellapilla et al., "High
performance convolutional neural networks for document processing", IWFHR 2006, section 2), a model after the other; a library's
convolution would bring weights and gradients into an order of its own and back, in every step. Hidden values are images channels-last,
[k, b, H, W, C], so that the values of a pixel are a row of that product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedtrust.engine import kernels_columns, kernels_dense
from fedtrust.engine.fused_layers import At, Recorded
from fedtrust.engine.native_layers import FEW_SAMPLES, Framed, buffer, framed

_aten = torch.ops.aten


def planes(x: Tensor) -> Tensor:
    """Return [k, b, H, W, C] as the images [k*b, C, H, W] of PyTorch's layers, channels-last in memory, a view."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def rows(x: Tensor, models: int) -> Tensor:
    """Return images [k*b, C, H, W] as [k, b, H, W, C]; a view if they are channels-last in memory."""
    last = x.permute(0, 2, 3, 1).contiguous()
    return last.view(models, -1, *last.shape[1:])


class Enter:
    """From split [k, b, C, H, W] to rows."""

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        return x.permute(0, 1, 3, 4, 2).contiguous(), None

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        return g.permute(0, 1, 4, 2, 3)


class Leave:
    """From rows to split."""

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        return x.permute(0, 1, 4, 2, 3), None

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        return g.permute(0, 1, 3, 4, 2).contiguous()


class Sum:
    """The sum of two values."""

    def forward(self, x: tuple[Tensor, Tensor], at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        return x[0] + x[1], None

    def backward(self, g: Tensor, kept: Any, at: At) -> tuple[Tensor, Tensor]:
        """Return the gradients of the inputs, each in a place of its own: whoever gets one may write over it."""
        return g, g.clone()


#: From so many weights a row on, a convolution is made a matrix product: with fewer, what lies under the windows is the larger part, and
#: a library's convolution, which does not copy it, is faster (on an Intel Xeon the product took 1.14 times as long with 300
#: weights a row, 0.87 with 600, 0.41 with 59,000).
WEIGHTS_A_ROW = 512


class RowsConv:
    """`nn.Conv2d` of rows, without dilation and groups: by a matrix product, or by the library's convolution of each model."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self._few = [list(layer.stride), [int(p) for p in layer.padding], [1, 1], False, [0, 0], 1]
        self._window = (layer.kernel_size[0], layer.kernel_size[1])
        self._stride = (layer.stride[0], layer.stride[1])
        self._margin = (int(layer.padding[0]), int(layer.padding[1]))
        self._pointwise = (self._window, self._stride, self._margin) == ((1, 1), (1, 1), (0, 0))

    def _size(self, x: Tensor) -> tuple[int, int]:
        (rows, wide), (down, right), (top, left) = self._window, self._stride, self._margin
        return (x.shape[2] + 2 * top - rows) // down + 1, (x.shape[3] + 2 * left - wide) // right + 1

    def _with_margin(self, x: Tensor, at: At, name: str) -> Framed:
        """Return a place for images like these with the margin of zeros that the window reaches into."""
        return framed(at, name, tuple(x.shape), self._margin)

    def _columns(self, x: Tensor, at: At) -> Tensor:
        """Return the values under every window [k, b*pixels, C*window]."""
        k, b, _, _, channels = x.shape
        if self._pointwise:
            return x.view(k, -1, channels)
        size, images = self._size(x), x
        given = Framed(images, (0, 0))
        if any(self._margin):
            given = self._with_margin(x, at, "margin")
            given.inner.copy_(x)
        found = buffer(at, "columns", (k, b * size[0] * size[1], channels * self._window[0] * self._window[1]))
        kernels_columns.columns(given.frame, self._window, self._stride, size, False)(given.whole.data_ptr(), found.data_ptr(), k * b)
        return found

    def _product(self, x: Tensor, w: Tensor) -> bool:
        """Whether it is made a matrix product."""
        height, wide = self._size(x)
        return self._window == (1, 1) or w[0].numel() >= WEIGHTS_A_ROW * x.shape[1] * height * wide

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        assert at.w is not None
        if not self._product(x, at.w):
            made = [_aten.convolution(planes(x[m : m + 1]), at.w[m], _of(at.c, m), *self._few) for m in range(at.models)]
            return _together([rows(images, 1) for images in made]), (x, None)
        found, outputs = self._columns(x, at), at.w.shape[1]
        out = buffer(at, "out", (at.models, found.shape[1], outputs))
        for model in range(at.models):
            weights, given, to = at.w[model].flatten(1), found[model], out[model]
            if len(given) > FEW_SAMPLES:
                torch.mm(given, weights.t(), out=to)
            else:  # the other way round a library's product takes twice as long
                to.copy_(torch.mm(weights, given.t()).t())
            if at.c is not None:
                to.add_(at.c[model])
        return out.view(*x.shape[:2], *self._size(x), outputs), (x, found)

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        x, found = kept
        assert at.w is not None
        assert at.gw is not None
        if found is None:
            return self._library(g, x, at)
        above = g.reshape(at.models, found.shape[1], -1)
        for model in range(at.models):
            self._weights(found[model], above[model], at.gw[model].flatten(1))
            if at.gc is not None:
                torch.sum(above[model], 0, out=at.gc[model])
        return self._images(above, x, found, at) if at.wanted else g

    def _library(self, g: Tensor, x: Tensor, at: At) -> Tensor:
        """Write the gradients of the parameters and return the input's, by the library's convolution."""
        sizes, mask = None if at.gc is None else [at.gc.shape[1]], [at.wanted, True, at.gc is not None]
        return _back(g, x, at, lambda m, above, images: _aten.convolution_backward(above, images, _of(at.w, m), sizes, *self._few, mask))

    def _weights(self, found: Tensor, above: Tensor, into: Tensor) -> None:
        """Write the gradient of a model's weights [C_out, C*window]."""
        if len(found) > FEW_SAMPLES:
            torch.mm(above.t(), found, out=into)
        else:
            kernel = kernels_dense.dense_weight_gradient(len(found), found.shape[1], above.shape[1], False)
            kernel(found.data_ptr(), above.data_ptr(), into.data_ptr(), 0)

    def _images(self, above: Tensor, x: Tensor, found: Tensor, at: At) -> Tensor:
        """Return the gradient of the input."""
        assert at.w is not None
        gradient = buffer(at, "gcolumns", tuple(found.shape))
        for model in range(at.models):
            torch.mm(above[model], at.w[model].flatten(1), out=gradient[model])
        if self._pointwise:
            return gradient.view(x.shape)
        gx = self._with_margin(x, at, "gx")
        gx.whole.zero_()
        kernel = kernels_columns.columns(gx.frame, self._window, self._stride, self._size(x), True)
        kernel(gx.whole.data_ptr(), gradient.data_ptr(), x.shape[0] * x.shape[1])
        return gx.inner.contiguous()


class RowsNorm:
    """`nn.GroupNorm` of rows, a model after the other."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        self._groups, self._eps = layer.num_groups, layer.eps

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        b, height, width, channels = x.shape[1:]
        sizes = (b, channels, height * width, self._groups)
        made, statistics = [], []
        for model in range(at.models):
            images = planes(x[model : model + 1])
            out, mean, scale = _aten.native_group_norm(images, _of(at.w, model), _of(at.c, model), *sizes, self._eps)
            made.append(rows(out, 1))
            statistics.append((mean, scale))
        return _together(made), (x, sizes, statistics)

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        x, sizes, statistics = kept
        mask = [at.wanted, at.gw is not None, at.gc is not None]
        return _back(
            g, x, at, lambda m, above, images: _aten.native_group_norm_backward(above, images, *statistics[m], _of(at.w, m), *sizes, mask)
        )


def _back(g: Tensor, x: Tensor, at: At, call: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Write the parameters' gradients, a model after the other, and return the input's; `call`: (model, gradient, input) -> all three."""
    made = []
    for model in range(at.models):
        found, weights, biases = call(model, planes(g[model : model + 1]), planes(x[model : model + 1]))
        for place, value in ((at.gw, weights), (at.gc, biases)):
            if place is not None:
                place[model].copy_(value)
        if at.wanted:
            made.append(rows(found, 1))
    return _together(made) if at.wanted else g


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of(values: Tensor | None, model: int) -> Tensor | None:
    return None if values is None else values[model]


class RowsPool:
    """`nn.MaxPool2d` of rows."""

    def __init__(self, layer: nn.MaxPool2d) -> None:
        pairs = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        self._window = (*(list(v) if isinstance(v, tuple) else [v, v] for v in pairs), layer.ceil_mode)

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        out, where = _aten.max_pool2d_with_indices(planes(x), *self._window)
        return rows(out, at.models), (x, where)

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        x, where = kept
        return rows(_aten.max_pool2d_with_indices_backward(planes(g), planes(x), *self._window, where), at.models)


class RowsRecorded:
    """Any other layer that treats every channel alike, through autograd."""

    def __init__(self, layer: nn.Module) -> None:
        self._recorded = Recorded(layer)

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        out, kept = self._recorded.forward(planes(x), at)
        return rows(out, at.models), kept

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        return rows(self._recorded.backward(planes(g), kept, at), at.models)
