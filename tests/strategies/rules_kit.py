"""What the tests of server rules share: a context made by hand, and the registered rules themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedtrust.data.base import Task
from fedtrust.layout import Layout
from fedtrust.registry import REGISTRY, Kind
from fedtrust.server import AggContext, PipelineFacts, Verdict


def context(n: int, d: int, *, f: int = 0, weights: Tensor | None = None, seed: int = 0, **given: Any) -> AggContext:
    """The context of a round with n updates of d parameters."""
    return AggContext(
        params=torch.zeros(d),
        weights=torch.ones(n) if weights is None else weights,
        clients=tuple(range(n)),
        round=1,
        assumed_malicious=f,
        layout=Layout(("w",), ((d,),)),
        task=Task("classification", (2,), 2),
        model=lambda params, x: x,
        criterion=torch.nn.functional.cross_entropy,
        root=None,
        rng=torch.Generator().manual_seed(seed),
        **given,
    )


def verdict(kind: Kind, name: str, value: Tensor, ctx: AggContext | None = None, *, f: int = 0, **params: Any) -> Verdict:
    """What a registered component makes of the updates [n, d] or the change [d]."""
    if ctx is None:
        ctx = context(len(value) if value.dim() == 2 else 1, value.shape[-1], f=f)
    result = REGISTRY.make(kind, name, params)(value, ctx)
    return result if isinstance(result, Verdict) else Verdict(result)


def facts(name: str, *, n: int, f: int, kind: Kind = "aggregator", filters: tuple[str, ...] = (), **params: Any) -> PipelineFacts:
    """What the `needs` check of a component is told."""
    aggregator = name if kind == "aggregator" else "mean"
    return PipelineFacts(n, f, REGISTRY.get(kind, name).check(params), filters, aggregator, (), bool(filters), 0)


def refusal(name: str, *, n: int, f: int, kind: Kind = "aggregator", **params: Any) -> str | None:
    """Why the component refuses n updates of which f are assumed malicious."""
    needs = REGISTRY.get(kind, name).meta["needs"]
    return None if needs is None else needs(facts(name, n=n, f=f, kind=kind, **params))


def normal(n: int, d: int, seed: int, scale: float = 1.0) -> Tensor:
    """Independent Gaussian updates [n, d]; no two values are equal."""
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
