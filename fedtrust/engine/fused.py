"""The fused cohort: the k models of a chunk as one network.

The idea is horizontally fused training (Wang et al., "Horizontally Fused Training Array", MLSys 2021, section 3). The channels of the k
models lie side by side, so that k convolutions are one convolution with k times the groups, k linear layers one batched matrix product,
and everything else one call over k times the channels. Images are kept channels-last, [b, H, W, k*C] in memory, which oneDNN and cuDNN
convolve without rearranging them.

Only plain stacks of known layers are understood; for anything else `fused_forward` says so by returning `None`, and the engine trains
under `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parameters = Mapping[str, Tensor]
Forward = Callable[[Parameters, Tensor], Tensor]

#: Layers that treat every number alike, so that the fused form is the layer itself.
_ELEMENTWISE = (nn.ELU, nn.GELU, nn.Identity, nn.LeakyReLU, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh)
#: Layers that treat every channel alike.
_POOLS = (nn.AvgPool2d, nn.MaxPool2d)
_KNOWN = (nn.Conv2d, nn.Flatten, nn.GroupNorm, nn.Linear, *_ELEMENTWISE, *_POOLS)


class _Step(NamedTuple):
    """One layer of the plan: its module, the full names of its parameters (`None` where it has none), and whether it may write over its
    input, which the layer before it has just made and does not need for its own gradient.
    """

    layer: nn.Module
    weight: str | None
    bias: str | None
    overwrite: bool = False


def fused_forward(module: nn.Module) -> Forward | None:
    """Return the fused form of a model, or `None` where it has none.

    The form is a function of the stacked parameters (name → [k, *shape], any strides) and the samples x [k, b, *sample], and returns the
    outputs [k, b, C] of each model for its own samples. It is differentiable by autograd with respect to the parameters and uses none of
    the module's own values.

    Args:
        module: an `nn.Sequential` (nested ones too) of Conv2d, Linear, GroupNorm, MaxPool2d, AvgPool2d, Flatten and elementwise
            activations, none of them shared, hooked or in place.
    """
    plan = _plan(module)
    if plan is None:
        return None

    def forward(parameters: Parameters, x: Tensor) -> Tensor:
        hidden, models, merged = x, x.shape[0], False
        for layer, weight, bias, overwrite in plan:
            w = parameters[weight] if weight else None
            c = parameters[bias] if bias else None
            if isinstance(layer, _ELEMENTWISE):
                hidden = hidden.relu_() if overwrite else layer(hidden)
            elif isinstance(layer, nn.Flatten | nn.Linear):
                hidden, merged = _split(hidden, models) if merged else hidden, False
                hidden = hidden.flatten(2) if w is None else _linear(hidden, w, c)
            else:
                hidden, merged = hidden if merged else _merge(hidden), True
                hidden = _on_channels(layer, hidden, models, w, c)
        return _split(hidden, models) if merged else hidden

    return forward


def _plan(module: nn.Module) -> list[_Step] | None:
    """Return the layers in the order of the data, or `None` if there is one that the fused form would get wrong."""
    steps: list[_Step] = []
    for prefix, layer in _leaves(module, ""):
        if not _understood(layer) or any(layer is step.layer for step in steps):
            return None
        own = {name for name, _ in layer.named_parameters()}
        steps.append(_Step(layer, prefix + "weight" if "weight" in own else None, prefix + "bias" if "bias" in own else None))
    used = {name for step in steps for name in (step.weight, step.bias) if name}
    if used != {name for name, _ in module.named_parameters()}:
        return None  # parameters shared between layers, or owned by a container
    steps = _pool_first(steps)
    for i in range(1, len(steps)):
        fresh = isinstance(steps[i - 1].layer, (nn.Conv2d, nn.GroupNorm, nn.Linear, *_POOLS))
        steps[i] = steps[i]._replace(overwrite=fresh and isinstance(steps[i].layer, nn.ReLU))
    return steps


def _leaves(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (prefix of its parameter names, layer) of nested `nn.Sequential`s in the order of the data."""
    if type(module) is nn.Sequential and not _hooked(module):
        for name, child in module._modules.items():  # a layer that stands twice in it comes twice
            if child is not None:
                yield from _leaves(child, f"{prefix}{name}.")
    else:
        yield prefix, module


def _understood(layer: nn.Module) -> bool:
    """Whether the layer is exactly one of the known ones (a subclass may do something else), in a form that fuses."""
    if type(layer) not in _KNOWN or _hooked(layer) or getattr(layer, "inplace", False):
        return False
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros"
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return not (isinstance(layer, nn.MaxPool2d) and layer.return_indices)


def _hooked(layer: nn.Module) -> bool:
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks, "forward" in vars(layer)))


def _pool_first(steps: list[_Step]) -> list[_Step]:
    """Return the plan with every (ReLU, MaxPool2d) turned round: the same bits and gradients, for a quarter of the ReLU's work."""
    steps = list(steps)
    for i in range(len(steps) - 1):
        if isinstance(steps[i].layer, nn.ReLU) and isinstance(steps[i + 1].layer, nn.MaxPool2d):
            steps[i], steps[i + 1] = steps[i + 1], steps[i]
    return steps


def _merge(x: Tensor) -> Tensor:
    """Return [k, b, C, H, W] as [b, k*C, H, W], channels-last in memory (and [k, b, C] as [b, k*C])."""
    k, b, c, *size = x.shape
    if len(size) != 2:
        return x.transpose(0, 1).reshape(b, k * c, *size)
    merged = x.permute(1, 3, 4, 0, 2).reshape(b, *size, k * c).permute(0, 3, 1, 2)
    return merged.contiguous(memory_format=torch.channels_last)  # with one channel the reshape above is a view, in the old order


def _split(x: Tensor, models: int) -> Tensor:
    """Return [b, k*C, ...] as [k, b, C, ...]."""
    b, channels, *size = x.shape
    return x.view(b, models, channels // models, *size).transpose(0, 1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x [k, b, ..., f] times weight [k, o, f] plus bias [k, o], [k, b, ..., o]."""
    rows = x.flatten(1, -2)
    turned = weight.transpose(1, 2)
    out = torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, turned)
    return out.view(*x.shape[:-1], out.shape[-1])


def _on_channels(layer: nn.Module, x: Tensor, models: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply a layer to x [b, k*C, ...]; its parameters are [k, ...]."""
    weight = None if weight is None else weight.flatten(0, 1)
    bias = None if bias is None else bias.flatten()
    if isinstance(layer, nn.Conv2d):
        assert weight is not None
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups=models * layer.groups)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, models * layer.num_groups, weight, bias, layer.eps)
    pooled: Tensor = layer(x)
    return pooled
