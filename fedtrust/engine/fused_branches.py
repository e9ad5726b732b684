"""The fused form of networks that branch: residual ones, for instance.

The same idea as for stacks (`fused`): the backward pass is written out, parameters are read and gradients written where they lie. The
layers are those of `fused_rows`, on a CPU and in float32; elsewhere such models are trained under `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtrust.engine.fused_graph import Node, uses
from fedtrust.engine.fused_layers import ELEMENTWISE, FRESH, POOLS, At, Flat, Layer, Linear, Recorded, Rectify, kept, no_native

Parameters = Mapping[str, Tensor]


class Step(NamedTuple):
    """One layer of the plan; step n makes value n + 1, and value 0 is the sample.

    Attributes:
        layer: what makes it.
        inputs: of which values.
        weight, bias: the full names of its parameters.
        trained: whether its value depends on a parameter, so that somebody wants its gradient.
    """

    layer: Layer
    inputs: tuple[int, ...]
    weight: str | None = None
    bias: str | None = None
    trained: bool = False


@dataclass(frozen=True)
class Branched:
    """The fused form of a model that branches; it uses none of the module's own values.

    Attributes:
        steps: the layers in an order in which they can be computed.
    """

    steps: tuple[Step, ...]

    def fits(self, device: str, dtype: torch.dtype) -> bool:
        """Whether it can be used there, in this type."""
        return device == "cpu" and dtype == torch.float32 and not no_native()

    def on(self, parameters: Parameters, into: Parameters) -> BoundBranches:
        """Return the network on k models' parameters; see `fused.Fused.on`."""
        models, scratch, places = len(next(iter(parameters.values()))), kept(self), []
        for number, step in enumerate(self.steps):
            w, c = (None if name is None else parameters[name] for name in (step.weight, step.bias))
            gw, gc = (None if name is None else into[name] for name in (step.weight, step.bias))
            wanted = any(value and self.steps[value - 1].trained for value in step.inputs)
            places.append(At(models, w, c, gw, gc, wanted, scratch.setdefault(number, {})))
        return BoundBranches(self.steps, tuple(places))


class BoundBranches(NamedTuple):
    """A network on some models' parameters: its layers, and where they stand."""

    steps: tuple[Step, ...]
    places: tuple[At, ...]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        """Return the outputs [k, b, C] of each model for its own samples [k, b, *sample], and what `backward` wants back."""
        values, tape = [x], []
        with torch.no_grad():
            for step, at in zip(self.steps, self.places, strict=True):
                given = [values[value] for value in step.inputs]
                made, kept = step.layer.forward(given[0] if len(given) == 1 else tuple(given), at)
                values.append(made)
                tape.append(kept)
        return values[-1], tape

    def backward(self, tape: list[Any], grad: Tensor) -> None:
        """Write the gradients of the parameters.

        Args:
            tape: what `forward` returned; used up.
            grad: the gradient of the outputs [k, b, C]; may be written over.
        """
        grads = {len(self.steps): grad}
        with torch.no_grad():
            for number in reversed(range(len(self.steps))):
                step, kept = self.steps[number], tape.pop()
                if not step.trained:
                    continue
                found = step.layer.backward(grads.pop(number + 1), kept, self.places[number])
                for value, part in zip(step.inputs, found if len(step.inputs) > 1 else (found,), strict=True):
                    if value and self.steps[value - 1].trained:
                        grads[value] = grads[value].add_(part) if value in grads else part


def branched(nodes: list[Node]) -> Branched | None:
    """Return the fused form of a network, or `None` where it has none."""
    try:
        return Branched(_Plan(nodes).steps)
    except (ImportError, _NoForm):  # bench.gpu runs on torch alone
        return None


class _NoForm(Exception):  # noqa: N818  # not an error: the model is trained in another way
    """A layer that has no fused form where it stands."""


#: Layers on images.
_ON_IMAGES = (nn.Conv2d, nn.GroupNorm, *POOLS)


class _Plan:
    """The steps of a network.

    Values are images in rows (`fused_rows`), or split, [k, b, ...]: the samples as they come, and whatever has been flattened.
    """

    def __init__(self, nodes: list[Node]) -> None:
        self._steps: list[Step] = []
        self._flat, self._form = {0: False}, {0: "split"}
        self._changed: dict[tuple[int, str], int] = {}
        places, counts = [0], uses(nodes)
        for number, node in enumerate(nodes):
            inputs = [places[value] for value in node.inputs]
            form = self._wanted(node, inputs)
            inputs = [self._in(value, form) for value in inputs]
            maker = nodes[node.inputs[0] - 1].layer
            free = node.inputs[0] > 0 and counts[node.inputs[0]] == 1 and (maker is None or isinstance(maker, FRESH))
            flat = isinstance(node.layer, nn.Flatten | nn.Linear) or all(self._flat[value] for value in inputs)
            places.append(self._add(self._layer(node, free), tuple(inputs), form, flat, node))
            if number == len(nodes) - 1:
                self._in(places[-1], "split")
        self.steps = tuple(self._steps)

    def _wanted(self, node: Node, inputs: list[int]) -> str:
        """Return the form in which a node wants its inputs."""
        if isinstance(node.layer, _ON_IMAGES):
            if any(self._flat[value] for value in inputs):
                raise _NoForm
            return "rows"
        if isinstance(node.layer, nn.Flatten | nn.Linear):
            return "split"
        return "rows" if any(self._form[value] == "rows" for value in inputs) else "split"

    def _in(self, value: int, form: str) -> int:
        """Return the value that is the same in another form; both ways it is made once."""
        if self._form[value] == form:
            return value
        if (value, form) not in self._changed:
            if self._flat[value]:
                raise _NoForm
            from fedtrust.engine import fused_rows as own

            change: Layer = own.Enter() if form == "rows" else own.Leave()
            self._changed[value, form] = self._add(change, (value,), form, False)
        return self._changed[value, form]

    def _add(self, layer: Layer, inputs: tuple[int, ...], form: str, flat: bool, node: Node | None = None) -> int:
        weight, bias = (None, None) if node is None else (node.weight, node.bias)
        trained = bool(weight or bias) or any(value and self._steps[value - 1].trained for value in inputs)
        self._steps.append(Step(layer, inputs, weight, bias, trained))
        number = len(self._steps)
        self._form[number], self._flat[number] = form, flat
        return number

    def _layer(self, node: Node, free: bool) -> Layer:
        """Return the layer of a node; `free`: nobody else wants its input, and it may write over that."""
        from fedtrust.engine import fused_rows as own

        layer = node.layer
        if layer is None:
            return own.Sum()
        if isinstance(layer, nn.Conv2d):
            if isinstance(layer.padding, str) or layer.groups != 1 or set(layer.dilation) != {1}:
                raise _NoForm
            return own.RowsConv(layer)
        if isinstance(layer, nn.GroupNorm):
            return own.RowsNorm(layer)
        if isinstance(layer, nn.MaxPool2d):
            return own.RowsPool(layer)
        if isinstance(layer, POOLS):
            return own.RowsRecorded(layer)
        if isinstance(layer, nn.Flatten):
            return Flat()
        if isinstance(layer, nn.Linear):
            return Linear()
        assert isinstance(layer, ELEMENTWISE)
        return Rectify(free) if isinstance(layer, nn.ReLU) else Recorded(layer)
