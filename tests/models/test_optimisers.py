"""Client optimisers on blocks against torch.optim, one client at a time."""

from __future__ import annotations

import pickle

import pytest
import torch

from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY

CASES = [
    ("sgd", {}),
    ("sgd", {"weight_decay": 0.1}),
    ("sgd", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05}),
    ("sgd", {"momentum": 0.8, "nesterov": True}),
    ("momentum", {}),
    ("momentum", {"momentum": 0.5, "weight_decay": 0.1}),
    ("nesterov", {}),
    ("nesterov", {"weight_decay": 0.1}),
    ("adagrad", {}),
    ("adagrad", {"lr_decay": 0.1, "initial_accumulator": 0.5, "eps": 1e-3, "weight_decay": 0.1}),
    ("rmsprop", {}),
    ("rmsprop", {"alpha": 0.9, "momentum": 0.7, "centred": True, "eps": 1e-4, "weight_decay": 0.1}),
    ("rmsprop", {"momentum": 0.7}),
    ("adadelta", {}),
    ("adadelta", {"rho": 0.8, "eps": 1e-4, "weight_decay": 0.1}),
    ("adam", {}),
    ("adam", {"beta1": 0.8, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.1}),
]
IDS = [f"{n}-{'-'.join(p) or 'default'}" for n, p in CASES]
STEPS, D = 14, 6
#: How many steps each client makes: the rows that still train are always a prefix.
LENGTHS = (14, 11, 3)


def curvature() -> tuple[torch.Tensor, torch.Tensor]:
    """A quadratic for each client: its gradient is a * (p - c)."""
    g = torch.Generator().manual_seed(5)
    return torch.rand(len(LENGTHS), D, generator=g, dtype=torch.float64) + 0.1, torch.randn(
        len(LENGTHS), D, generator=g, dtype=torch.float64
    )


def start() -> torch.Tensor:
    return torch.randn(len(LENGTHS), D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def batched(name: str, params: dict[str, float], lr: float) -> torch.Tensor:
    a, c = curvature()
    block = start()
    optimiser = REGISTRY.make("optimiser", name, params)
    state = optimiser.init(block)
    for t in range(STEPS):
        k = sum(length > t for length in LENGTHS)
        grads = a[:k] * (block[:k] - c[:k])
        kept = grads.clone()
        optimiser.step(block[:k], grads, {n: s[:k] for n, s in state.items()}, t + 1, lr)
        assert torch.equal(grads, kept)  # gradients are read only
    return block


def one_at_a_time(name: str, params: dict[str, float], lr: float) -> torch.Tensor:
    a, c = curvature()
    rows = []
    for i, length in enumerate(LENGTHS):
        # two parameters, so that the order within a client's parameters is covered
        parts = [torch.nn.Parameter(p.clone()) for p in start()[i].split([2, 4])]
        optimiser = REGISTRY.make("optimiser", name, params).torch(parts, lr)
        for _ in range(length):
            optimiser.zero_grad()
            (0.5 * a[i] * (torch.cat(parts) - c[i]) ** 2).sum().backward()
            optimiser.step()
        rows.append(torch.cat(parts).detach())
    return torch.stack(rows)


@pytest.mark.parametrize("lr", [0.05, 0.3])
@pytest.mark.parametrize(("name", "params"), CASES, ids=IDS)
def test_blocks_are_torch_optim_row_by_row(name: str, params: dict[str, float], lr: float) -> None:
    result = batched(name, params, lr)
    torch.testing.assert_close(result, one_at_a_time(name, params, lr), rtol=1e-9, atol=1e-12)
    assert (result != start()).all()


@pytest.mark.parametrize(("name", "params"), CASES, ids=IDS)
def test_float32_is_torch_optim_too(name: str, params: dict[str, float]) -> None:
    g = torch.Generator().manual_seed(1)
    block = torch.randn(2, 50, generator=g)
    alone = torch.nn.Parameter(block[1].clone())
    optimiser = REGISTRY.make("optimiser", name, params)
    oracle = optimiser.torch([alone], 0.05)
    state = optimiser.init(block)
    for t in range(12):
        grads = torch.randn(2, 50, generator=g)
        optimiser.step(block, grads, state, t + 1, 0.05)
        alone.grad = grads[1].clone()
        oracle.step()
    torch.testing.assert_close(block[1], alone.detach(), rtol=1e-5, atol=1e-6)


def test_every_parameter_changes_the_outcome() -> None:
    other = {
        "momentum": 0.7,
        "dampening": 0.4,
        "nesterov": True,
        "weight_decay": 0.2,
        "lr_decay": 0.3,
        "initial_accumulator": 0.4,
        "eps": 1e-2,
        "alpha": 0.8,
        "centred": True,
        "rho": 0.7,
        "beta1": 0.7,
        "beta2": 0.9,
    }
    for name in REGISTRY.names("optimiser"):
        for key, default in REGISTRY.get("optimiser", name).check({}).items():
            base = {"momentum": 0.8} if name == "sgd" and key in ("dampening", "nesterov") else {}
            base |= {"nesterov": False} if name == "nesterov" and key == "dampening" else {}
            changed = other[key] if other[key] != default else not default
            assert not torch.allclose(batched(name, base, 0.1), batched(name, {**base, key: changed}, 0.1)), (name, key)


def test_state_is_only_what_is_used() -> None:
    block = start()
    assert REGISTRY.make("optimiser", "sgd", {}).init(block) == {}
    assert set(REGISTRY.make("optimiser", "sgd", {"momentum": 0.9}).init(block)) == {"velocity"}
    assert set(REGISTRY.make("optimiser", "rmsprop", {"centred": True}).init(block)) == {"squares", "mean"}


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("sgd", {"nesterov": True}, "nesterov needs momentum"),
        ("sgd", {"dampening": 0.5}, "dampening does nothing"),
        ("nesterov", {"dampening": 0.5}, "nesterov needs momentum"),
        ("adam", {"beta1": 1.0}, "less than 1"),
        ("adam", {"beta_1": 0.9}, "did you mean 'beta1'"),
        ("adadelta", {"eps": 0.0}, "greater than 0"),
        ("momentum", {"weight_decay": -1.0}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        REGISTRY.make("optimiser", name, params)


def test_optimisers_travel_to_workers() -> None:
    made = REGISTRY.make("optimiser", "adam", {"beta1": 0.8})
    assert pickle.loads(pickle.dumps(made)) == made
