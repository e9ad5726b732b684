"""The layers of a fused cohort, each with its forward and its backward pass.

Hidden values come in two forms here: split, [k, b, ...], a model at a time, and merged, [b, k*C, ...], the models' channels side by side
(channels-last in memory for images). `Merge` and `Split` go from one to the other. A third form stands in `native_layers`.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_aten = torch.ops.aten

#: Layers that treat every number alike, so that the fused form is the layer itself.
ELEMENTWISE = (nn.ELU, nn.GELU, nn.Identity, nn.LeakyReLU, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh)
#: Layers that treat every channel alike.
POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d)
#: Layers whose output is a new tensor that they do not need for their own gradient: what follows may write over it.
FRESH = (nn.Conv2d, nn.GroupNorm, nn.Linear, *POOLS)


class At(NamedTuple):
    """Where a layer stands.

    Attributes:
        models: how many models there are, k.
        w, c: the stacked weight and bias [k, ...]; `None` where the layer has none.
        gw, gc: where their gradients go.
        wanted: whether anybody wants the gradient of the input.
        scratch: buffers that a layer keeps from step to step.
    """

    models: int
    w: Tensor | None = None
    c: Tensor | None = None
    gw: Tensor | None = None
    gc: Tensor | None = None
    wanted: bool = True
    scratch: dict[str, Tensor] = {}  # noqa: RUF012  # never changed: `Fused.on` gives each place its own


#: The buffers of each thread, by fused form.
_LOCAL = threading.local()


def kept(form: Any) -> dict[int, dict[str, Tensor]]:
    """Return the buffers of a fused form's layers. They are this thread's, and the next chunk that it trains finds them again."""
    if not hasattr(_LOCAL, "scratch"):
        _LOCAL.scratch = weakref.WeakKeyDictionary()
    found: dict[int, dict[str, Tensor]] = _LOCAL.scratch.setdefault(form, {})
    return found


def no_native() -> str:
    """Return why no layer runs as machine code of its own on this machine's CPU; empty if they do."""
    try:
        from fedtrust.engine import jit
    except ImportError as error:  # bench.gpu runs on torch alone
        return str(error)
    return jit.missing()


class Layer(Protocol):
    """A layer of the fused network."""

    def forward(self, x: Any, at: At) -> tuple[Any, Any]:
        """Return the output, and what the backward pass needs."""

    def backward(self, g: Any, kept: Any, at: At) -> Any:
        """Write the gradients of weight and bias and return the input's (anything where that is not wanted).

        The gradient `g` of the output may be written over.
        """


def merge(x: Tensor) -> Tensor:
    """Return [k, b, C, H, W] as [b, k*C, H, W], channels-last in memory (and [k, b, C] as [b, k*C])."""
    k, b, c, *size = x.shape
    if len(size) != 2:
        return x.transpose(0, 1).reshape(b, k * c, *size)
    merged = x.permute(1, 3, 4, 0, 2).reshape(b, *size, k * c).permute(0, 3, 1, 2)
    return merged.contiguous(memory_format=torch.channels_last)  # with one channel the reshape above is a view, in the old order


def split(x: Tensor, models: int) -> Tensor:
    """Return [b, k*C, ...] as [k, b, C, ...], a view."""
    b, channels, *size = x.shape
    return x.view(b, models, channels // models, *size).transpose(0, 1)


class Merge:
    """From split to merged."""

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        return merge(x), None

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        return split(g, at.models)


class Split:
    """From merged to split."""

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        return split(x, at.models), None

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        return merge(g)


class Flat:
    """`nn.Flatten` of split values."""

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        return x.flatten(2), x.shape

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        return g.reshape(kept)


class Linear:
    """`nn.Linear` of split values [k, b, ..., f]: one batched matrix product."""

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        assert at.w is not None
        rows = x.flatten(1, -2)
        turned = at.w.transpose(1, 2)
        out = torch.bmm(rows, turned) if at.c is None else torch.baddbmm(at.c.unsqueeze(1), rows, turned)
        return out.view(*x.shape[:-1], out.shape[-1]), (rows, x.shape)

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        rows, shape = kept
        assert at.w is not None
        assert at.gw is not None
        g = g.flatten(1, -2)
        at.gw.copy_(torch.bmm(g.transpose(1, 2), rows))
        if at.gc is not None:
            at.gc.copy_(g.sum(1))
        return torch.bmm(g, at.w).view(shape) if at.wanted else g


class Rectify:
    """`nn.ReLU`, over its input where nobody else needs that."""

    def __init__(self, fresh: bool) -> None:
        self._fresh = fresh

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        out = x.relu_() if self._fresh else x.relu()
        return out, out

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        result: Tensor = _aten.threshold_backward.grad_input(g, kept, 0, grad_input=g)
        return result


class Conv:
    """`nn.Conv2d` of merged values: one convolution with k times the groups."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self._stride, self._padding, self._dilation = list(layer.stride), list(layer.padding), list(layer.dilation)
        self._groups = layer.groups

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        assert at.w is not None
        weight = at.w.flatten(0, 1)
        bias = None if at.c is None else at.c.flatten()
        groups = at.models * self._groups
        out = _aten.convolution(x, weight, bias, self._stride, self._padding, self._dilation, False, [0, 0], groups)
        return out, (x, weight)

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        x, weight = kept
        assert at.gw is not None
        sizes = None if at.gc is None else [at.gc.numel()]
        mask = [at.wanted, True, at.gc is not None]
        gx, weights, biases = _aten.convolution_backward(
            g, x, weight, sizes, self._stride, self._padding, self._dilation, False, [0, 0], at.models * self._groups, mask
        )
        at.gw.copy_(weights.reshape(at.gw.shape))
        if at.gc is not None:
            at.gc.copy_(biases.view(at.gc.shape))
        return gx if at.wanted else g


class Pool:
    """`nn.MaxPool2d` of merged values; of equal values the first counts, as everywhere in PyTorch."""

    def __init__(self, layer: nn.MaxPool2d) -> None:
        self._window = (*map(_pair, (layer.kernel_size, layer.stride, layer.padding, layer.dilation)), layer.ceil_mode)

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        out, where = _aten.max_pool2d_with_indices(x, *self._window)
        return out, (x, where)

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        x, where = kept
        result: Tensor = _aten.max_pool2d_with_indices_backward(g, x, *self._window, where)
        return result


def _pair(value: Any) -> list[int]:
    return list(value) if isinstance(value, tuple) else [value, value]


class Recorded:
    """Any other known layer: its backward pass is autograd's, of this layer alone."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, Any]:
        """Return the output and what is kept."""
        with torch.enable_grad():
            leaves = [None if value is None else value.detach().requires_grad_() for value in (x, at.w, at.c)]
            out = self._apply(leaves[0], leaves[1], leaves[2], at.models)
        return out.detach(), (leaves, out)

    def _apply(self, x: Tensor | None, w: Tensor | None, c: Tensor | None, models: int) -> Tensor:
        assert x is not None
        layer = self._layer
        weight = None if w is None else w.flatten(0, 1)
        bias = None if c is None else c.flatten()
        if isinstance(layer, nn.Conv2d):
            assert weight is not None
            return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups=models * layer.groups)
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, models * layer.num_groups, weight, bias, layer.eps)
        # `view_as`: a layer that hands its input on (nn.Identity) must still give a node of the graph.
        result: Tensor = layer(x.view_as(x))
        return result

    def backward(self, g: Tensor, kept: Any, at: At) -> Tensor:
        """Return the gradient of the input."""
        leaves, out = kept
        places = [None, at.gw, at.gc]
        asked = [i for i, leaf in enumerate(leaves) if leaf is not None and (i > 0 or at.wanted)]
        found = torch.autograd.grad(out, [leaves[i] for i in asked], g)
        for i, value in zip(asked, found, strict=True):
            place = places[i]
            if place is not None:
                place.copy_(value.reshape(place.shape))
        return found[0] if at.wanted else g
