"""Models: shapes, sizes, and initial weights that depend on the seed alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from fedtrust.data.base import Task
from fedtrust.errors import InputError
from fedtrust.models.build import build, initialise

MNIST = Task("classification", (1, 28, 28), 10, 0.0, 1.0)
DIGITS = Task("classification", (1, 8, 8), 10, 0.0, 1.0)
CIFAR = Task("classification", (3, 32, 32), 10, 0.0, 1.0)
TABLE = Task("classification", (30,), 2)
REGRESSION = Task("regression", (13,), 1)
#: A bound may be exceeded by its own rounding to float32.
ROUNDING = 1 + 1e-6
NAMES = ("logistic", "mlp", "cnn", "cnn-large", "resnet18")


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"), [("logistic", 7850), ("mlp", 109_386), ("cnn", 53_626), ("cnn-large", 1_199_882), ("resnet18", 11_172_810)]
)
def test_number_of_parameters_on_mnist(name: str, parameters: int) -> None:
    assert size(build(name, {}, MNIST, 0)) == parameters


@pytest.mark.parametrize("task", [MNIST, DIGITS, CIFAR], ids=["mnist", "digits", "cifar"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_each_sample_depend_on_that_sample_alone(name: str, task: Task) -> None:
    module = build(name, {}, task, 3)
    x = torch.rand(3, *task.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = module(x)
        alone = torch.cat([module(one.unsqueeze(0)) for one in x])
    assert together.shape == (3, 10)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not torch.equal(together[0], together[1])
    assert not list(module.buffers())
    assert not any(isinstance(m, nn.ReLU) and m.inplace for m in module.modules())


@pytest.mark.parametrize("name", ["logistic", "mlp"])
@pytest.mark.parametrize(("task", "outputs"), [(TABLE, 2), (REGRESSION, 1)])
def test_tables(name: str, task: Task, outputs: int) -> None:
    assert build(name, {}, task, 0)(torch.rand(4, *task.shape)).shape == (4, outputs)


@pytest.mark.parametrize("name", ["cnn", "cnn-large", "resnet18"])
def test_image_models_refuse_tables_and_tiny_images(name: str) -> None:
    with pytest.raises(InputError, match=r"needs images .* shape \[30\]"):
        build(name, {}, TABLE, 0)
    with pytest.raises(InputError, match="these have 3x3"):
        build(name, {}, Task("classification", (1, 3, 3), 2), 0)


def test_smallest_images_that_are_allowed_work() -> None:
    for name, side in (("cnn", 4), ("cnn-large", 6), ("resnet18", 8)):
        task = Task("classification", (2, side, side), 3)
        assert build(name, {}, task, 0)(torch.rand(2, 2, side, side)).shape == (2, 3)


def test_resnet_stem_depends_on_the_image_size() -> None:
    small = build("resnet18", {}, CIFAR, 0)
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, nn.Identity)
    large = build("resnet18", {"groups": 4}, Task("classification", (1, 64, 64), 5), 0)
    assert (large.conv1.kernel_size, large.conv1.stride, large.conv1.in_channels) == ((7, 7), (2, 2), 1)
    assert isinstance(large.maxpool, nn.MaxPool2d)
    assert large.bn1.num_groups == 4
    asked = build("resnet18", {"stem": "large"}, CIFAR, 0)
    assert (asked.conv1.kernel_size, asked.conv1.stride, asked.conv1.in_channels) == ((7, 7), (2, 2), 3)
    assert isinstance(asked.maxpool, nn.MaxPool2d)
    assert asked(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    other = build("resnet18", {"stem": "small"}, Task("classification", (1, 64, 64), 5), 0)
    assert other.conv1.kernel_size == (3, 3)
    assert isinstance(other.maxpool, nn.Identity)


def test_parameters_change_the_model() -> None:
    assert [m.out_features for m in build("mlp", {"hidden": [5, 4]}, TABLE, 0) if isinstance(m, nn.Linear)] == [5, 4, 2]
    assert any(isinstance(m, nn.Tanh) for m in build("mlp", {"activation": "tanh"}, TABLE, 0))
    assert sum(isinstance(m, nn.Sigmoid) for m in build("cnn", {"activation": "sigmoid"}, DIGITS, 0)) == 3
    assert size(build("cnn", {"hidden": 8}, DIGITS, 0)) == 416 + 2320 + 64 * 8 + 8 + 8 * 10 + 10
    assert size(build("mlp", {"hidden": []}, TABLE, 0)) == size(build("logistic", {}, TABLE, 0))
    with pytest.raises(InputError, match="did you mean 'hidden'"):
        build("cnn", {"hiden": 8}, DIGITS, 0)
    with pytest.raises(InputError, match="greater than or equal to 1"):
        build("mlp", {"hidden": [0]}, TABLE, 0)


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_are_a_function_of_the_seed(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (build(name, {}, CIFAR, seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)  # what the global generator holds does not matter either
    third = build(name, {}, CIFAR, 7)
    torch.set_rng_state(before)
    for (key, a), b, c, d in zip(first.named_parameters(), again.parameters(), other.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, d)
        norm = key.split(".")[-2].startswith("bn") or "downsample.1" in key
        assert norm == torch.equal(a, c)
        assert a.dtype == torch.float32
        assert a.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_fill_pytorchs_bounds(name: str) -> None:
    for layer in build(name, {}, CIFAR, 1).modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fan_in = layer.weight[0].numel()
            bound = 1 / math.sqrt(fan_in)
            assert 0.9 * bound < layer.weight.abs().max().item() <= bound * ROUNDING
            assert layer.weight.mean().abs().item() < 6 * bound / math.sqrt(3 * layer.weight.numel())
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
            assert layer.bias is None or layer.bias.abs().max().item() <= bound * ROUNDING
        elif isinstance(layer, nn.GroupNorm):
            assert torch.equal(layer.weight, torch.ones_like(layer.weight))
            assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


@pytest.mark.parametrize(
    ("make", "bound"),
    [
        (lambda: nn.Conv1d(4, 32, 5), 1 / math.sqrt(20)),
        (lambda: nn.ConvTranspose2d(8, 32, 3), 1 / math.sqrt(32 * 9)),
        (lambda: nn.Conv2d(16, 32, 3, groups=4), 1 / math.sqrt(36)),
        (lambda: nn.GRU(10, 25, num_layers=2), 0.2),
    ],
)
def test_every_known_layer_keeps_the_bounds_of_its_own_reset(make, bound: float) -> None:
    own = make()  # PyTorch's own draw: the oracle of the bound
    with torch.device("meta"):
        module = make()
    module = module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.fill_(math.nan)
    initialise(module, torch.Generator().manual_seed(0))
    for key, parameter in module.named_parameters():
        oracle = own.get_parameter(key).abs().max().item()
        assert 0.8 * bound < parameter.abs().max().item() <= bound * ROUNDING, key
        assert oracle <= bound * ROUNDING
        assert parameter.abs().max().item() == pytest.approx(oracle, rel=0.25)


def test_embeddings_and_norms() -> None:
    module = nn.Sequential(nn.Embedding(500, 20, padding_idx=3), nn.LayerNorm(20))
    for parameter in module.parameters():
        parameter.data.fill_(math.nan)
    initialise(module, torch.Generator().manual_seed(0))
    assert torch.equal(module[0].weight[3], torch.zeros(20))
    assert module[0].weight.std().item() == pytest.approx(1, abs=0.03)
    assert module[1].weight.tolist() == [1.0] * 20
    assert module[1].bias.tolist() == [0.0] * 20


def test_a_layer_without_known_initial_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"layer '1' \(PReLU\) has parameters but no known initial weights"):
        initialise(nn.Sequential(nn.Linear(2, 2), nn.PReLU()), torch.Generator())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_under_vmap_are_those_of_each_model(name: str) -> None:
    module = build(name, {}, DIGITS, 0)
    g = torch.Generator().manual_seed(0)
    values = {n: p.detach() + 0.01 * torch.randn(2, *p.shape, generator=g) for n, p in module.named_parameters()}
    x, y = torch.rand(2, 3, 1, 8, 8, generator=g), torch.randint(0, 10, (2, 3), generator=g)

    def slope(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return grad(lambda p: F.cross_entropy(functional_call(module, p, (x,)), y))(parameters)

    together = vmap(slope)(values, x, y)
    for i in range(2):
        own = {n: v[i].clone().requires_grad_() for n, v in values.items()}
        F.cross_entropy(functional_call(module, own, (x[i],)), y[i]).backward()
        for key, value in own.items():
            torch.testing.assert_close(together[key][i], value.grad, atol=1e-5, rtol=1e-4)
