"""What a model computes, as known layers and sums of what they put out.

A plain `nn.Sequential` is read as it stands. Any other module is traced by `torch.fx`: its own `forward` runs once on symbols, and
whatever it does beyond known layers, their functional forms, flattening and sums makes it unreadable.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fedtrust.engine.fused_layers import ELEMENTWISE, POOLS

KNOWN = (nn.Conv2d, nn.Flatten, nn.GroupNorm, nn.Linear, *ELEMENTWISE, *POOLS)


class Node(NamedTuple):
    """A value of the network.

    Attributes:
        layer: what makes it; `None` where it is the sum of its inputs.
        inputs: the numbers of the values that it is made of; value 0 is the sample, and the first node makes value 1.
        weight, bias: the full names of the layer's parameters.
    """

    layer: nn.Module | None
    inputs: tuple[int, ...]
    weight: str | None = None
    bias: str | None = None


def read(module: nn.Module) -> list[Node] | None:
    """Return the nodes of a model in an order in which they can be made, the last one being its output; `None` if it cannot be read."""
    if any(_hooked(part) for part in module.modules()):
        return None
    leaves = list(_leaves(module, ""))
    if not all(_understood(layer) for _, layer in leaves):
        return None
    nodes = _stack(leaves) if _plain(module) else _traced(module)
    if not nodes or 0 in uses(nodes)[1:]:
        return None
    used = [name for node in nodes for name in (node.weight, node.bias) if name]
    # Parameters shared between layers, or owned by a container: neither has a place of its own among the nodes.
    return nodes if used and sorted(used) == sorted(name for name, _ in module.named_parameters()) else None


def chain(nodes: list[Node]) -> bool:
    """Whether each node is made of the one before, and of nothing else."""
    return all(node.inputs == (number,) for number, node in enumerate(nodes))


def uses(nodes: list[Node]) -> list[int]:
    """Return how often each value is used; the output counts as used once."""
    counts = [0] * (len(nodes) + 1)
    for node in nodes:
        for value in node.inputs:
            counts[value] += 1
    counts[-1] += 1
    return counts


def _plain(module: nn.Module) -> bool:
    """Whether a module is a layer, or a stack of them, whose `forward` is PyTorch's own."""
    if type(module) is nn.Sequential:
        return all(_plain(child) for child in module.children())
    return type(module) in KNOWN


def _leaves(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (prefix of its parameter names, layer) in the order in which a plain stack passes the data on."""
    if next(module.children(), None) is None and type(module) is not nn.Sequential:
        yield prefix, module
        return
    for name, child in module._modules.items():  # a layer that stands twice in it comes twice
        if child is not None:
            yield from _leaves(child, f"{prefix}{name}.")


def _stack(leaves: list[tuple[str, nn.Module]]) -> list[Node] | None:
    layers = [layer for _, layer in leaves]
    if any(layer is other for i, layer in enumerate(layers) for other in layers[:i]):
        return None
    return [_node(layer, (number,), prefix) for number, (prefix, layer) in enumerate(leaves)]


def _node(layer: nn.Module, inputs: tuple[int, ...], prefix: str) -> Node:
    own = {name for name, _ in layer.named_parameters()}
    return Node(layer, inputs, prefix + "weight" if "weight" in own else None, prefix + "bias" if "bias" in own else None)


def _understood(layer: nn.Module) -> bool:
    """Whether the layer is exactly one of the known ones (a subclass may do something else), in a form that fuses."""
    if type(layer) not in KNOWN or getattr(layer, "inplace", False):
        return False
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros"
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return not (isinstance(layer, nn.MaxPool2d) and layer.return_indices)


def _hooked(layer: nn.Module) -> bool:
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks, "forward" in vars(layer)))


class _Unreadable(Exception):  # noqa: N818  # not an error: the model is trained in another way
    """The model does something that has no fused form."""


class _Stand(nn.Module):
    """Stands for a known layer while a model's `forward` runs on symbols."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Any) -> Any:
        """Note that the layer was here."""
        return x.tracer.create_proxy("call_module", self.name, (x,), {})


def _traced(module: nn.Module) -> list[Node] | None:
    """Run a model's `forward` on symbols.

    `torch.fx.Tracer` would change `nn.Module` itself meanwhile, under the feet of other threads that train: here a copy runs in which
    something else stands for every known layer.
    """
    stands: dict[int, Any] = {id(part): _Stand(name) for name, part in module.named_modules() if type(part) in KNOWN}
    stands |= {id(value): value for value in (*module.parameters(), *module.buffers())}
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    try:
        output = copy.deepcopy(module, stands)(tracer.create_proxy("placeholder", "x", (), {}))
        graph.output(output.node)
        return _Reading(module, graph).nodes
    except Exception:  # a `forward` that looks at numbers, or whatever else symbols cannot stand for
        return None


#: Functions of one tensor by the layer that does the same.
_FUNCTIONS: Mapping[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU,
    F.tanh: nn.Tanh, torch.tanh: nn.Tanh, "tanh": nn.Tanh,
    F.sigmoid: nn.Sigmoid, torch.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid,
    F.elu: nn.ELU, F.gelu: nn.GELU, F.leaky_relu: nn.LeakyReLU, F.silu: nn.SiLU, F.softplus: nn.Softplus,
}  # fmt: skip
#: Pools, with the names of their parameters in order.
_POOLS: Mapping[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.max_pool2d: (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    F.avg_pool2d: (nn.AvgPool2d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
}
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_FLATTEN, _VIEWS, _SIZES = (torch.flatten, "flatten"), ("view", "reshape", torch.reshape), ("size", getattr, operator.getitem, len)


def _constant(value: Any) -> bool:
    return all(map(_constant, value)) if isinstance(value, tuple | list) else value is None or isinstance(value, int)


class _Reading:
    """The nodes of a traced graph."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self._module = module
        self._values: dict[fx.Node, int] = {}
        self._seen: set[nn.Module] = set()
        self.nodes: list[Node] = []
        for node in graph.nodes:
            self._take(node)

    def _take(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self._values:
                raise _Unreadable("more than one input")
            self._values[node] = 0
        elif node.op == "output":
            if self._value(node.args[0]) != len(self.nodes):
                raise _Unreadable("something comes after the output")
        elif node.op == "call_module":
            self._layer(node)
        elif node.op in ("call_function", "call_method") and node.target not in _SIZES:
            self._add(node, self._function(node))
        elif node.op == "get_attr":
            raise _Unreadable("a parameter outside layers")

    def _add(self, node: fx.Node, made: Node) -> None:
        self.nodes.append(made)
        self._values[node] = len(self.nodes)

    def _value(self, given: Any) -> int:
        if not isinstance(given, fx.Node) or given not in self._values:
            raise _Unreadable("not a value of the network")
        return self._values[given]

    def _layer(self, node: fx.Node) -> None:
        layer = self._module.get_submodule(str(node.target))
        if len(node.args) != 1 or node.kwargs or not _understood(layer):
            raise _Unreadable("not one known layer's input")
        if layer in self._seen and next(layer.parameters(), None) is not None:
            raise _Unreadable("a layer that stands twice in it")
        self._seen.add(layer)
        self._add(node, _node(layer, (self._value(node.args[0]),), f"{node.target}."))

    def _function(self, node: fx.Node) -> Node:
        """Return the node for a function or a tensor's method."""
        name, (first, *rest) = node.target, node.args
        options = dict(node.kwargs)
        over = options.pop("inplace", False) or name in (operator.iadd, "add_", "relu_")
        if over and isinstance(first, fx.Node) and len(first.users) > 1:
            raise _Unreadable("writes over a value that is used elsewhere")
        if name in _SUMS and len(rest) == 1 and not options:
            return Node(None, (self._value(first), self._value(rest[0])))
        if name in _FUNCTIONS and not rest and not options:
            return Node(_FUNCTIONS[name](), (self._value(first),))
        if name in _POOLS:
            kind, names = _POOLS[name]
            given = dict(zip(names, rest, strict=False)) | options
            known = len(rest) <= len(names) and given.keys() <= set(names) and not given.get("return_indices", False)
            if known and all(_constant(value) for value in given.values()):
                return Node(kind(**given), (self._value(first),))
        flat = name in _FLATTEN and (rest, options) in (([1], {}), ([], {"start_dim": 1}))
        if flat or (name in _VIEWS and not options and len(rest) == 2 and rest[1] == -1 and self._batch(rest[0])):
            return Node(nn.Flatten(), (self._value(first),))
        raise _Unreadable(f"no fused form of {name}")

    def _batch(self, given: Any) -> bool:
        """Whether this is the number of samples: x.size(0), x.shape[0] or len(x)."""
        if not isinstance(given, fx.Node):
            return False
        if given.target == "size":
            return tuple(given.args[1:]) == (0,) and given.args[0] in self._values
        if given.target is operator.getitem and given.args[1] == 0 and isinstance(given.args[0], fx.Node):
            whole = given.args[0]
            return whole.target in (getattr, "size") and tuple(whole.args[1:]) in (("shape",), ()) and whole.args[0] in self._values
        return False
