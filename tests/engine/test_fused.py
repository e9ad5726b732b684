"""The fused cohort gives each model what it would compute alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedtrust.data.base import Task
from fedtrust.engine.fused import Fused, fuse
from fedtrust.engine.fused_branches import Branched
from fedtrust.models.build import build, initialise

MNIST = Task("classification", (1, 28, 28), 10)
DIGITS = Task("classification", (1, 8, 8), 10)
CIFAR = Task("classification", (3, 32, 32), 10)
TABLE = Task("classification", (30,), 2)


def stacked(module: nn.Module, k: int, seed: int = 0) -> dict[str, Tensor]:
    """Different parameters for each of k models, as strided views of one block [k, d], the way the engine holds them."""
    g = torch.Generator().manual_seed(seed)
    sizes = [p.numel() for p in module.parameters()]
    block = torch.cat([p.detach().reshape(-1) for p in module.parameters()]) + 0.05 * torch.randn(k, sum(sizes), generator=g)
    pieces = block.split(sizes, dim=1)
    return {n: piece.view(k, *p.shape) for (n, p), piece in zip(module.named_parameters(), pieces, strict=True)}


def gradients(
    fused: Fused | Branched, values: dict[str, Tensor], x: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The fused form's outputs, and the gradients of a loss of them, written into one block the way the engine wants them."""
    sizes = [v[0].numel() for v in values.values()]
    block = torch.full((len(x), sum(sizes)), float("nan"))
    into = {n: p.view(v.shape) for (n, v), p in zip(values.items(), block.split(sizes, dim=1), strict=True)}
    network = fused.on(values, into)
    spoilt, tape = network.forward(torch.full_like(x, 7.0))  # a step before this one: buffers that it leaves must not matter
    network.backward(tape, torch.full_like(spoilt, 3.0))
    outputs, tape = network.forward(x)
    leaf = outputs.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    network.backward(tape, grad)
    return outputs, into


def check(module: nn.Module, shape: tuple[int, ...], k: int = 3, b: int = 4) -> None:
    """Outputs and gradients of the fused form, with machine code of its own and without, against k separate models."""
    fused = fuse(module)
    assert isinstance(fused, Fused)
    assert fused.native is not None
    check_form(fused, module, shape, k, b)
    check_form(replace(fused, native=None), module, shape, k, b)


def check_form(fused: Fused | Branched, module: nn.Module, shape: tuple[int, ...], k: int, b: int) -> None:
    values = stacked(module, k)
    g = torch.Generator().manual_seed(1)
    x = torch.rand(k, b, *shape, generator=g)
    kept, before = x.clone(), {n: v.clone() for n, v in values.items()}
    classes = functional_call(module, {n: v[0] for n, v in values.items()}, (x[0],)).shape[-1]
    y = torch.randint(0, classes, (k, b), generator=g)
    outputs, grads = gradients(fused, values, x, lambda out: F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum") / b)
    for i in range(k):
        own = {n: v[i].detach().requires_grad_() for n, v in values.items()}
        alone = functional_call(module, own, (x[i],))
        torch.testing.assert_close(outputs[i], alone, atol=1e-5, rtol=1e-5)
        expected = torch.autograd.grad(F.cross_entropy(alone, y[i]), list(own.values()))
        for name, value in zip(own, expected, strict=True):
            torch.testing.assert_close(grads[name][i], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert value.abs().max() > 0  # or the comparison shows nothing
    assert torch.equal(x, kept)
    assert all(torch.equal(values[n], before[n]) for n in values)


@pytest.mark.parametrize(
    ("name", "task", "params"),
    [
        ("logistic", MNIST, {}),
        ("logistic", TABLE, {}),
        ("mlp", MNIST, {}),
        ("mlp", TABLE, {"hidden": [7, 5], "activation": "tanh"}),
        ("cnn", MNIST, {}),
        ("cnn", DIGITS, {}),
        ("cnn", CIFAR, {}),
        ("cnn", DIGITS, {"activation": "tanh"}),
        ("cnn", DIGITS, {"activation": "sigmoid"}),
        ("cnn-large", DIGITS, {}),
        ("cnn-large", MNIST, {}),
    ],
)
def test_registered_models(name: str, task: Task, params: dict[str, object]) -> None:
    check(build(name, params, task, 0), task.shape)


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("b", [1, 5])
def test_any_number_of_models_and_samples(k: int, b: int) -> None:
    check(build("cnn", {}, DIGITS, 0), (1, 8, 8), k, b)


def stack_of(*layers: nn.Module) -> nn.Sequential:
    module = nn.Sequential(*layers)
    initialise(module, torch.Generator().manual_seed(2))
    return module


@pytest.mark.parametrize(
    "module",
    [
        stack_of(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, bias=False), nn.GroupNorm(3, 6, eps=1e-3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5),
        ),
        stack_of(nn.Conv2d(3, 6, 3, stride=2, dilation=2, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)),
        stack_of(nn.Conv2d(3, 6, (3, 5), padding="same"), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 5, bias=False)),
        stack_of(nn.MaxPool2d(3, stride=2, padding=1), nn.ReLU(), nn.GroupNorm(3, 3, affine=False), nn.Flatten(), nn.Linear(48, 5)),
        stack_of(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(36, 5)),
        stack_of(nn.Flatten(), nn.Linear(192, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 5)),
        stack_of(nn.Flatten(), nn.Linear(192, 6), nn.Identity(), nn.ReLU(), nn.Tanh(), nn.ReLU(), nn.GELU(), nn.Linear(6, 4), nn.ELU()),
        stack_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Sequential(nn.Flatten()), nn.Linear(144, 5))),
        stack_of(nn.Conv2d(3, 5, 8), nn.Flatten()),
        stack_of(nn.Linear(8, 4), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)),
        stack_of(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)),
    ],
    ids=["groupnorm", "dilated-grouped", "same-avgpool", "pool-first", "relu-first", "groupnorm-flat", "activations", "nested", "conv-only",
         "linear-on-images", "linear-after-conv"],
)  # fmt: skip
def test_stacks_of_known_layers(module: nn.Module) -> None:
    check(module, (3, 8, 8))


def test_a_single_layer_is_a_model() -> None:
    check(nn.Linear(30, 3), (30,))


def test_relu_and_pool_change_places_without_changing_ties() -> None:
    """A constant image makes every window a tie; the gradient must take the same place as PyTorch's."""
    module = stack_of(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3))
    fused = fuse(module)
    assert fused is not None
    values = stacked(module, 2)
    x = torch.zeros(2, 3, 1, 8, 8)
    x[:, :, :, 2:5, 3:6] = 1.0
    grads = gradients(fused, values, x, lambda out: out.square().sum())[1]
    for i in range(2):
        own = {n: v[i].detach().requires_grad_() for n, v in values.items()}
        expected = torch.autograd.grad(functional_call(module, own, (x[i],)).square().sum(), list(own.values()))
        for a, b in zip(grads.values(), expected, strict=True):
            torch.testing.assert_close(a[i], b, atol=1e-5, rtol=1e-5)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    return module


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].register_forward_hook(lambda m, i, o: 2 * o)
    return module


def owning() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4))
    module.scale = nn.Parameter(torch.ones(1))
    return module


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(4, 4), nn.Dropout()),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")),
        nn.Sequential(nn.Flatten(0), nn.Linear(4, 4)),
        nn.Sequential(nn.MaxPool2d(2, return_indices=True)),
        nn.Sequential(Doubled(4, 4)),
        nn.ModuleList([nn.Linear(4, 4)]),
        shared(),
        tied(),
        hooked(),
        owning(),
    ],
    ids=["dropout", "batchnorm", "inplace", "reflect", "flatten-all", "indices", "subclass", "list", "shared", "tied", "hooked", "owning"],
)
def test_what_is_not_understood_has_no_fused_form(module: nn.Module) -> None:
    assert fuse(module) is None
