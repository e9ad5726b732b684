"""How easily the finished model is fooled by test samples that were moved a little (evasion), by somebody who has the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedtrust.probes.base import ProbeContext, Result, need, probe, share

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=100_000)]


def right(ctx: ProbeContext, most: int) -> tuple[Tensor, Tensor]:
    """Return test samples that users are answered right about, at most so many, drawn at random: x [n, *shape], y [n]."""
    x, y = need(ctx.test, "the test samples")
    known = (need(ctx.released, "the model")(x).argmax(1) == y).nonzero().squeeze(1)
    pick = known[torch.randperm(len(known), generator=ctx.rng)[:most]]
    return x[pick], y[pick]


def evaded(ctx: ProbeContext, x: Tensor, y: Tensor) -> float:
    """Return the share of samples x [n, *shape] that users are answered wrong about; y [n] are the true labels."""
    return share(need(ctx.released, "the model")(x).argmax(1) != y)


def gradient(ctx: ProbeContext, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of each sample's cross-entropy at label y [n] in the sample itself, [n, *shape]."""
    return slope(ctx, x, missed(y))


def missed(y: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the sum of the cross-entropies at labels y [n], as a function of outputs [n, C]."""
    return lambda output: F.cross_entropy(output, y, reduction="sum")


def slope(ctx: ProbeContext, x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the gradient of a sum over samples, a function of the model's outputs [n, C], in the samples [n, *shape]."""
    model, params = need(ctx.model, "the model"), need(ctx.params, "the model's parameters")
    at = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(of(model(params, at)), at)
    return found


def inside(ctx: ProbeContext, moved: Tensor, x: Tensor, eps: float) -> Tensor:
    """Return moved samples put back into the L∞ ball round x and into the range of a feature."""
    back = x + (moved - x).clamp(-eps, eps)
    return back if ctx.task.low is None or ctx.task.high is None else back.clamp(ctx.task.low, ctx.task.high)


@probe("fgsm", when="end", task="classification", paper="Goodfellow, Shlens and Szegedy, ICLR 2015, section 4 (fast gradient sign method)")
def fgsm(ctx: ProbeContext, *, eps: Positive = 0.1, samples: Count = 200) -> Result:
    """Share of samples that the model gets right and gets wrong after one step of `eps` in the direction of the gradient's signs.

    Args:
        ctx: what a teacher sees; the attack uses the model's parameters.
        eps: how far each feature is moved, in the features' units.
        samples: how many test samples are tried at most.
    """
    x, y = right(ctx, samples)
    if not len(x):
        return {}
    return {"fgsm/evaded": evaded(ctx, inside(ctx, x + eps * gradient(ctx, x, y).sign(), x, eps), y)}


@probe("pgd", when="end", task="classification", paper="Madry et al., ICLR 2018, section 2.1 (projected gradient descent)")
def pgd(ctx: ProbeContext, *, eps: Positive = 0.1, steps: Count = 20, step: Positive | None = None, samples: Count = 200) -> Result:
    """Share of samples that the model gets right and gets wrong after `steps` signed gradient steps within an L∞ ball of radius `eps`.

    Begins at a random point of the ball and is projected back after every step, into the ball and into the range of a feature. A sample
    counts if the last point fools the model.

    Args:
        ctx: what a teacher sees; the attack uses the model's parameters.
        eps: how far a feature may be moved, in the features' units.
        steps: gradient steps.
        step: of each; by default 2.5 · `eps` / `steps`, the paper's choice.
        samples: how many test samples are tried at most.
    """
    x, y = right(ctx, samples)
    if not len(x):
        return {}
    at = inside(ctx, x + eps * (2 * torch.rand(x.shape, generator=ctx.rng) - 1), x, eps)
    for _ in range(steps):
        at = inside(ctx, at + (step or 2.5 * eps / steps) * gradient(ctx, at, y).sign(), x, eps)
    return {"pgd/evaded": evaded(ctx, at, y)}
