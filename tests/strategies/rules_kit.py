"""What the tests of server rules share: a context made by hand, and the registered rules themselves."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fedtrust.data.base import Task
from fedtrust.engine import seeds
from fedtrust.layout import Layout
from fedtrust.registry import REGISTRY, Kind
from fedtrust.server import AggContext, PipelineFacts, Verdict


class Toy:
    """A linear classifier [b, 2] -> [b, 2] of any number of parameters: its four weights are taken from them in turn."""

    def __call__(self, params: Tensor, x: Tensor) -> Tensor:
        return x @ params[torch.arange(4) % len(params)].view(2, 2).T

    def features(self, params: Tensor, x: Tensor) -> Tensor:
        return self(params, x).tanh()


def own_samples(seed: int = 7) -> tuple[Tensor, Tensor]:
    """What the server owns: twelve points, labelled by the sign of their first number."""
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


def context(n: int, d: int, *, f: int = 0, weights: Tensor | None = None, seed: int = 0, **given: Any) -> AggContext:
    """The context of a round with n updates of d parameters; the server owns a few samples, and trains by one gradient step."""
    params = given.pop("params", torch.zeros(d))

    def train(x: Tensor, y: Tensor, start: Tensor | None = None, epochs: int | None = None) -> Tensor:
        with torch.enable_grad():
            at = (params if start is None else start).clone().requires_grad_()
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(Toy()(at, x), y), at)
        return -0.5 * gradient

    known: dict[str, Any] = {
        "params": params,
        "weights": torch.ones(n) if weights is None else weights,
        "clients": tuple(range(n)),
        "round": 1,
        "assumed_malicious": f,
        "layout": Layout(("w",), ((d,),)),
        "task": Task("classification", (2,), 2),
        "model": Toy(),
        "criterion": torch.nn.functional.cross_entropy,
        "root": own_samples(),
        "rng": torch.Generator().manual_seed(seed),
        "train": train,
        "private": functools.partial(seeds.stream, seed),
    }
    return AggContext(**(known | given))


def verdict(kind: Kind, name: str, value: Tensor, ctx: AggContext | None = None, *, f: int = 0, **params: Any) -> Verdict:
    """What a registered component makes of the updates [n, d] or the change [d]."""
    if ctx is None:
        ctx = context(len(value) if value.dim() == 2 else 1, value.shape[-1], f=f)
    result = REGISTRY.make(kind, name, params)(value, ctx)
    return result if isinstance(result, Verdict) else Verdict(result)


def facts(
    name: str, *, n: int, f: int, kind: Kind = "aggregator", filters: tuple[str, ...] = (), root: int = 12, **params: Any
) -> PipelineFacts:
    """What the `needs` check of a component is told."""
    aggregator = name if kind == "aggregator" else "mean"
    return PipelineFacts(n, f, REGISTRY.get(kind, name).check(params), filters, aggregator, (), bool(filters), root)


def refusal(
    name: str, *, n: int, f: int, kind: Kind = "aggregator", filters: tuple[str, ...] = (), root: int = 12, **params: Any
) -> str | None:
    """Why the component refuses n updates of which f are assumed malicious."""
    needs = REGISTRY.get(kind, name).meta["needs"]
    return None if needs is None else needs(facts(name, n=n, f=f, kind=kind, filters=filters, root=root, **params))


def normal(n: int, d: int, seed: int, scale: float = 1.0) -> Tensor:
    """Independent Gaussian updates [n, d]; no two values are equal."""
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
