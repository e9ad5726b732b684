"""Which layers of a fused cohort have machine code of their own, and how they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fedtrust.engine.fused_layers import Layer
from fedtrust.engine.native_conv import NativeConv, NativeConvPool, NativePool, square
from fedtrust.engine.native_layers import Enter, Leave, Margin, Native, NativeElementwise, NativeLinear, NativeRectify

__all__ = ["Enter", "Leave", "NativeLinear", "NativeRectify", "give_room", "make", "native"]


def native(layer: nn.Module) -> bool:
    """Whether the layer has machine code of its own."""
    if isinstance(layer, nn.Linear):
        return True
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str) or (layer.stride, layer.dilation, layer.groups) != ((1, 1), (1, 1), 1):
            return False
        return all(padding < size for padding, size in zip(layer.padding, layer.kernel_size, strict=True))
    if isinstance(layer, nn.MaxPool2d):
        same = {square(layer.kernel_size), square(layer.stride)}
        # The places of a window are noted in a byte.
        return len(same) == 1 and 0 < min(same) < 16 and not layer.ceil_mode and (square(layer.padding), square(layer.dilation)) == (0, 1)
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
