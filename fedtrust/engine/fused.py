"""The fused cohort: the k models of a chunk as one network.

The idea is horizontally fused training (Wang et al., "Horizontally Fused Training Array", MLSys 2021, section 3). The channels of the k
models lie side by side, so that k convolutions are one convolution with k times the groups, k linear layers one batched matrix product,
and everything else one call over k times the channels. Images are kept channels-last, [b, H, W, k*C] in memory, which oneDNN and cuDNN
convolve without rearranging them. On a CPU in float32, plain convolutions, max pools and linear layers have machine code of their own
instead (`native_plan`, `native_layers`, `kernels`); where LLVM is not to be had, the library's are used.

The backward pass is written out, layer by layer, in place of being recorded by autograd: gradients are written where they are wanted,
buffers are used again as soon as nobody needs them, and a step costs about a third less (`fused_layers`).

Only stacks of known layers are understood, and networks of them that branch and add up again (`fused_branches`); for anything else `fuse`
says so by returning `None`, and the engine trains under `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtrust.engine import fused_graph
from fedtrust.engine.fused_branches import Branched, branched
from fedtrust.engine.fused_graph import Node
from fedtrust.engine.fused_layers import (
    ELEMENTWISE,
    FRESH,
    At,
    Conv,
    Flat,
    Layer,
    Linear,
    Merge,
    Pool,
    Recorded,
    Rectify,
    Split,
    kept,
    no_native,
)

if TYPE_CHECKING:
    from fedtrust.engine.native_program import Replayed

Parameters = Mapping[str, Tensor]
_Found = tuple[nn.Module, str | None, str | None]  # a layer, and the full names of its weight and bias


class _Step(NamedTuple):
    """One layer of the plan and the full names of its parameters (`None` where it has none)."""

    layer: Layer
    weight: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Fused:
    """The fused form of a model; it uses none of the module's own values.

    Attributes:
        steps: the layers in the order of the data.
        native: the same with machine code where there is some; `None` where no layer has any.
    """

    steps: tuple[_Step, ...]
    native: tuple[_Step, ...] | None = None

    def on(self, parameters: Parameters, into: Parameters) -> Bound | Replayed:
        """Return the network on k models' parameters; it sees what is written into them afterwards.

        What it returns may be overwritten by the next network of this thread.

        Args:
            parameters: the stacked parameters, name → [k, *shape], any strides.
            into: where their gradients go, the same way.
        """
        example = next(iter(parameters.values()))
        plain = self.native is None or example.device.type != "cpu" or example.dtype != torch.float32 or no_native()
        steps = self.steps if plain or self.native is None else self.native
        first, scratch = _first(steps), kept(self)
        places = []
        for number, (layer, weight, bias) in enumerate(steps):
            w, c, gw, gc = _of(parameters, weight), _of(parameters, bias), _of(into, weight), _of(into, bias)
            places.append((layer, At(len(example), w, c, gw, gc, wanted=number > first, scratch=scratch.setdefault(number, {}))))
        bound = Bound(tuple(places), first)
        if plain or not all(isinstance(layer, Flat) or getattr(layer, "straight", False) for layer, _, _ in steps):
            return bound
        from fedtrust.engine.native_program import Replayed

        return Replayed(self, bound, parameters, into)

    def fits(self, device: str, dtype: torch.dtype) -> bool:
        """Whether it can be used there, in this type: everywhere."""
        return True


class Bound(NamedTuple):
    """A fused network on some models' parameters: its layers with where they stand, and the first one with a parameter."""

    places: tuple[tuple[Layer, At], ...]
    first: int

    def forward(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        """Return the outputs [k, b, C] of each model for its own samples [k, b, *sample], and what `backward` wants back."""
        tape: list[Any] = []
        hidden = x
        with torch.no_grad():
            for layer, at in self.places:
                hidden, kept = layer.forward(hidden, at)
                tape.append(kept)
        return hidden, tape

    def backward(self, tape: list[Any], grad: Tensor) -> None:
        """Write the gradients of the parameters.

        Args:
            tape: what `forward` returned; used up.
            grad: the gradient of the outputs [k, b, C]; may be written over.
        """
        with torch.no_grad():
            for layer, at in reversed(self.places[self.first :]):
                grad = layer.backward(grad, tape.pop(), at)


def describe_native() -> str:
    """Return in words what computes the layers of fused cohorts on this machine's CPU."""
    why = no_native()
    if why:
        return f"PyTorch's: {' '.join(why.split())}"
    from fedtrust.engine import jit

    return f"machine code for {jit.host().name}, {jit.host().lanes} floats a register"


def _first(steps: tuple[_Step, ...] | list[_Step]) -> int:
    """Return the first layer with a parameter: nobody asks for gradients before it."""
    return next(i for i, step in enumerate(steps) if step.weight or step.bias)


def _of(parameters: Parameters, name: str | None) -> Tensor | None:
    return None if name is None else parameters[name]


def fuse(module: nn.Module) -> Fused | Branched | None:
    """Return the fused form of a model, or `None` where it has none.

    Args:
        module: Conv2d, Linear, GroupNorm, pools, Flatten, elementwise activations and sums, none of them shared, hooked or in place: an
            `nn.Sequential` (nested ones too), or a module whose `forward` applies them (see `fused_graph.read`).
    """
    nodes = fused_graph.read(module)
    if nodes is None:
        return None
    if not fused_graph.chain(nodes):
        return branched(nodes)
    found = _pool_first([_found(node) for node in nodes])
    return Fused(tuple(_plan(found)), _native_plan(found))


def _found(node: Node) -> _Found:
    assert node.layer is not None
    return node.layer, node.weight, node.bias


def _native_plan(found: list[_Found]) -> tuple[_Step, ...] | None:
    """Return the steps with machine code where a layer has some; `None` if none has, or there is no LLVM."""
    try:
        from fedtrust.engine import native_plan as own
    except ImportError:
        return None
    if not any(own.native(layer) for layer, _, _ in found):
        return None
    steps = _plan(found, own)
    own.give_room([step.layer for step in steps], _first(steps))
    return tuple(steps)


def _plan(found: list[_Found], own: ModuleType | None = None) -> list[_Step]:
    """Return the steps with the changes of form between them.

    Layers on channels get merged values, [b, k*C, ...], or framed ones where they have machine code; others split ones, [k, b, ...]. An
    activation takes what comes. `own`: `native_plan`, where machine code is wanted.
    """
    steps: list[_Step] = []
    form, i = "split", 0
    while i < len(found):
        layer, weight, bias = found[i]
        wanted = form if isinstance(layer, ELEMENTWISE) else _form(layer, own)
        steps += [_Step(change) for change in _changes(form, wanted, own)]
        form, taken, fresh = wanted, 1, i > 0 and isinstance(found[i - 1][0], FRESH)
        made: Layer
        if own is not None and form == "framed":
            made, taken = own.make([layer for layer, _, _ in found[i:]])
        elif own is not None and isinstance(layer, nn.Linear):
            made = own.NativeLinear()
        elif own is not None and form == "split" and isinstance(layer, nn.ReLU) and fresh:
            made = own.NativeRectify()
        else:
            made = _fused(layer, fresh)
        steps.append(_Step(made, weight, bias))
        i += taken
    return [*steps, *(_Step(change) for change in _changes(form, "split", own))]


def _form(layer: nn.Module, own: ModuleType | None) -> str:
    """Return the form in which a layer wants its values."""
    if isinstance(layer, nn.Flatten | nn.Linear):
        return "split"
    return "framed" if own is not None and own.native(layer) else "merged"


def _changes(form: str, wanted: str, own: ModuleType | None) -> list[Layer]:
    """Return the steps from one form to another; all go by way of split."""
    if form == wanted:
        return []
    changes: list[Layer] = []
    if form != "split":
        changes.append(own.Leave() if own is not None and form == "framed" else Split())
    if wanted != "split":
        changes.append(own.Enter() if own is not None and wanted == "framed" else Merge())
    return changes


def _fused(layer: nn.Module, fresh: bool) -> Layer:
    """Return the fused form of one layer; `fresh`: it may write over its input."""
    if isinstance(layer, nn.Flatten):
        return Flat()
    if isinstance(layer, nn.Linear):
        return Linear()
    if isinstance(layer, nn.ReLU):
        return Rectify(fresh)
    if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str):
        return Conv(layer)
    if isinstance(layer, nn.MaxPool2d):
        return Pool(layer)
    return Recorded(layer)


def _pool_first(found: list[_Found]) -> list[_Found]:
    """Return the layers with every (ReLU, MaxPool2d) turned round: the same bits and gradients, for a quarter of the ReLU's work."""
    found = list(found)
    for i in range(len(found) - 1):
        if isinstance(found[i][0], nn.ReLU) and isinstance(found[i + 1][0], nn.MaxPool2d):
            found[i], found[i + 1] = found[i + 1], found[i]
    return found
