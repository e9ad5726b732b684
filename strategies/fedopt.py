"""Server optimisers: the aggregate is a pseudo-gradient."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.server import AggContext, Verdict, step

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]

_ADAPTIVE = "Reddi et al., ICLR 2021, algorithm 2"


@step("fedavgm", paper="Hsu et al., 2019 (Measuring the Effects of Non-Identical Data Distribution), section 4.3")
def fedavgm(delta: Tensor, ctx: AggContext, *, lr: Positive = 1.0, momentum: Decay = 0.9) -> Verdict:
    """Add up the aggregates with momentum: v ← momentum · v + Δ, and move by lr · v."""
    velocity = momentum * ctx.state.get("velocity", torch.zeros_like(delta)) + delta
    return Verdict(lr * velocity, state={"velocity": velocity})


def _adaptive(delta: Tensor, ctx: AggContext, second: Tensor, beta1: float, lr: float, tau: float) -> Verdict:
    """Move by lr · m / (√v + τ), with m the decayed mean of the aggregates and v as the variant says."""
    first = beta1 * ctx.state.get("first", torch.zeros_like(delta)) + (1 - beta1) * delta
    return Verdict(lr * first / (second.sqrt() + tau), state={"first": first, "second": second})


def _second(delta: Tensor, ctx: AggContext, tau: float) -> Tensor:
    """Return v of the last round; v starts at τ², the least that the paper allows."""
    return ctx.state.get("second", torch.full_like(delta, tau * tau))


@step("fedadagrad", paper=_ADAPTIVE)
def fedadagrad(delta: Tensor, ctx: AggContext, *, lr: Positive = 0.03, beta1: Decay = 0.0, tau: Positive = 1e-3) -> Verdict:
    """Divide by the root of all squared aggregates so far: v ← v + Δ²."""
    return _adaptive(delta, ctx, _second(delta, ctx, tau) + delta.square(), beta1, lr, tau)


@step("fedadam", paper=_ADAPTIVE)
def fedadam(
    delta: Tensor, ctx: AggContext, *, lr: Positive = 0.01, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: Positive = 1e-3
) -> Verdict:
    """Divide by the root of the decayed squared aggregates: v ← β₂ v + (1 − β₂) Δ²."""
    return _adaptive(delta, ctx, beta2 * _second(delta, ctx, tau) + (1 - beta2) * delta.square(), beta1, lr, tau)


@step("fedyogi", paper=_ADAPTIVE)
def fedyogi(
    delta: Tensor, ctx: AggContext, *, lr: Positive = 0.01, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: Positive = 1e-3
) -> Verdict:
    """Let v follow the squared aggregates by steps that do not depend on v: v ← v − (1 − β₂) Δ² sign(v − Δ²)."""
    old, square = _second(delta, ctx, tau), delta.square()
    return _adaptive(delta, ctx, old - (1 - beta2) * square * (old - square).sign(), beta1, lr, tau)
