"""An honest client that looks at the model before it trains it, and will not train one that is made to give its samples away."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtrust.client import Behaviour, View, behaviour
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.models.entrance import head

Share = Annotated[float, Field(gt=0, le=1)]


class RefusedError(RuntimeError):
    """The client will not train the model that it was sent."""


def block_before_convolution(model: Architecture) -> str | None:
    """Return the name of a linear layer in front of the first convolution, which no network for images needs; `None`: there is none."""
    linear = None
    for name, layer in model.leaves.items():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return linear
        if isinstance(layer, nn.Linear) and linear is None:
            linear = name
    return None


def twins(weight: Tensor, alike: float) -> float:
    """Return the share of a layer's rows [k, …] that point the same way as another one of its rows; rows of zeros point nowhere."""
    rows = weight.flatten(1).double()
    norms = rows.norm(dim=1)
    alive = norms > 1e-12 * norms.max().clamp(min=1e-300)
    units = rows[alive] / norms[alive, None]
    if len(units) < 2:
        return 0.0
    cosines = units @ units.T - 2 * torch.eye(len(units), dtype=units.dtype)
    return float((cosines.amax(dim=1) >= alike).sum()) / len(rows)


def silent(weight: Tensor, small: float) -> float:
    """Return the share of a layer's rows [k, p] that are shorter than `small` times the longest."""
    norms = weight.double().norm(dim=1)
    return float((norms < small * norms.max().clamp(min=1e-300)).double().mean())


def first_weight(layout: Layout) -> str | None:
    """Return the name of the first parameter with more than one dimension."""
    return next((name for name, shape in zip(layout.names, layout.shapes, strict=True) if len(shape) > 1), None)


@behaviour(
    "inspecting",
    role="honest",
    paper="what a user could see of Fowl et al. (Robbing the Fed), ICLR 2022, and of Wen et al. (Fishing), ICML 2022; the checks are ours",
)
class Inspecting(Behaviour):
    """Train honestly, unless the model looks like a trap; then send nothing, and say why.

    Three checks, on what any client is sent: a linear layer before the first convolution (an imprint module, whatever is in it); `share` or
    more of the first layer's rows that point the same way as another (the same measurement over and over: Robbing the Fed); and in the
    last layer `share` or more of the classes' rows next to nothing beside the longest (fishing). Models that were initialised at random
    and trained do none of this. A server that knows the checks can go round them, by adding noise to the rows, at a price in what it
    recovers; they see these attacks, not every attack.

    The refusal comes before training, so that nothing of the data leaves; the round records it as this client's fault, with the reason.

    Attributes:
        share: how many rows have to be suspicious.
        alike: from this cosine on two rows of the first layer are the same measurement.
        small: a class' row counts as silent below this share of the longest row.
    """

    share: Share = 0.5
    alike: Share = 0.999
    small: Annotated[float, Field(gt=0, lt=1)] = 0.01

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the data as they are.

        Raises:
            RefusedError: the model looks like a trap.
        """
        why = self.suspicion(view.params, view.model, view.layout)
        if why is not None:
            raise RefusedError(why)
        return x, y

    def suspicion(self, params: Tensor, model: Architecture, layout: Layout) -> str | None:
        """Return what is wrong with a model [d], or `None`."""
        block = block_before_convolution(model)
        if block is not None:
            return f"linear layer '{block}' stands before the first convolution"
        first = first_weight(layout)
        if first is not None and twins(layout.unflatten(params)[first], self.alike) >= self.share:
            return f"'{first}' measures the same thing over and over"
        last = head(model, layout)
        if last is not None and silent(last.of(params)[0], self.small) >= self.share:
            return f"the last layer '{last.name}' is silent for most classes"
        return None
