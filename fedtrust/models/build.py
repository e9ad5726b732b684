"""From a model's name to a module with initial weights that depend on the seed alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedtrust.data.base import Task
from fedtrust.engine import seeds
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY

_Conv = nn.modules.conv._ConvNd
_NORMS = (nn.GroupNorm, nn.LayerNorm)


def build(name: str, params: Mapping[str, Any], task: Task, seed: int) -> nn.Module:
    """Return the model `name` for a task, on the CPU, in float32, with initial weights drawn from the scenario's seed.

    The layers are made without storage and filled afterwards from the stream `(seed, "init")`, layer by layer in the module's own order,
    so that no global generator is read or changed and nothing a layer draws for itself counts.

    Args:
        name: a registered model.
        params: its parameters.
        task: what it is for.
        seed: the scenario's seed.

    Raises:
        InputError: unknown name or parameter, a model that does not fit the task, has buffers, or a layer with no known initial weights.
    """
    make = REGISTRY.make("model", name, params)
    with torch.device("meta"):
        module: nn.Module = make(task)
    if any(True for _ in module.buffers()):
        raise InputError(f"model '{name}' has buffers, which a federation cannot average: use GroupNorm instead of BatchNorm")
    _materialise(module)
    initialise(module, seeds.torch_stream(seed, "init"))
    return module


def _materialise(module: nn.Module) -> None:
    """Give every parameter storage on the CPU, in float32.

    `Module.to_empty` would do, but it imports torch's symbolic shapes and sympy: more than a second of every start.
    """
    if any(isinstance(layer, nn.RNNBase) for layer in module.modules()):  # they keep their weights in a second list, which it minds
        module.to_empty(device="cpu").to(torch.float32)
        return
    made: dict[int, nn.Parameter] = {}  # one that stands in two layers stays one
    for layer in module.modules():
        for key, value in layer._parameters.items():
            if value is not None:
                new = made.setdefault(id(value), nn.Parameter(torch.empty(value.shape), requires_grad=value.requires_grad))
                layer._parameters[key] = new


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter of `module` in place by PyTorch's default rule for its layer, from `generator`.

    Convolutions and linear layers: weight and bias uniform in ±1/sqrt(fan_in) (what `kaiming_uniform_(a=sqrt(5))` comes to; He et al.,
    ICCV 2015). Norms: 1 and 0. Embeddings: standard normal. Recurrent layers: uniform in ±1/sqrt(hidden).

    Raises:
        InputError: a layer of another kind owns parameters.
    """
    with torch.no_grad():
        for name, layer in module.named_modules():
            own = dict(layer.named_parameters(recurse=False))
            if not own:
                continue
            if isinstance(layer, nn.Linear | _Conv):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                _uniform(own, bound, generator)
            elif isinstance(layer, nn.RNNBase):
                _uniform(own, 1 / math.sqrt(layer.hidden_size), generator)
            elif isinstance(layer, nn.Embedding):
                layer.weight.normal_(generator=generator)
                if layer.padding_idx is not None:
                    layer.weight[layer.padding_idx] = 0
            elif isinstance(layer, _NORMS):
                for key, parameter in own.items():
                    parameter.fill_(1.0 if key == "weight" else 0.0)
            else:
                raise InputError(
                    f"layer '{name or type(module).__name__}' ({type(layer).__name__}) has parameters but no known initial weights"
                )


def _uniform(parameters: Mapping[str, nn.Parameter], bound: float, generator: torch.Generator) -> None:
    for parameter in parameters.values():
        parameter.uniform_(-bound, bound, generator=generator)
