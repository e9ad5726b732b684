"""The layers that a sample meets first and a gradient last: what attacks on updates read, and what careful clients look at."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture


class Dense(NamedTuple):
    """A linear layer with a bias, as it lies in the parameters.

    Attributes:
        name: its dotted name.
        weight, bias: where they lie in [d].
        shape: (rows, columns) of the weight.
    """

    name: str
    weight: slice
    bias: slice
    shape: tuple[int, int]

    def of(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight [rows, columns] and the bias [rows] in a vector [d]."""
        return flat[self.weight].view(self.shape), flat[self.bias]


def dense(name: str, layer: nn.Module, layout: Layout) -> Dense | None:
    """Return a layer as a `Dense`, or `None` if it is none or has no bias."""
    prefix = f"{name}." if name else ""
    if not isinstance(layer, nn.Linear) or f"{prefix}bias" not in layout.slices:
        return None
    return Dense(name, layout.slices[f"{prefix}weight"], layout.slices[f"{prefix}bias"], (layer.out_features, layer.in_features))


def entrance(model: Architecture, layout: Layout) -> Dense | None:
    """Return the linear layer, with a bias, that a model applies to the bare sample; `None` if it does something else first."""
    for name, layer in model.leaves.items():
        if not isinstance(layer, nn.Flatten | nn.Identity):
            return dense(name, layer, layout)
    return None


def denses(model: Architecture, layout: Layout) -> list[Dense]:
    """Return a model's linear layers with a bias, in the order of the module."""
    found = [dense(name, layer, layout) for name, layer in model.leaves.items()]
    return [one for one in found if one is not None]


def head(model: Architecture, layout: Layout) -> Dense | None:
    """Return the last linear layer, if there is one alone and it has a bias."""
    heads = model.heads
    return dense(heads[0], model.leaves[heads[0]], layout) if len(heads) == 1 else None
