"""A server that makes its clients show whose samples they hold: gradient ascent on the candidates."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad

from fedtrust.sending import SendContext, sender


@sender(
    "gradient-ascent",
    asks="membership",
    paper="Nasr, Shokri and Houmansadr, S&P 2019, section III-E (active attacker)",
)
def gradient_ascent(
    params: Tensor,
    ctx: SendContext,
    *,
    step: Annotated[float, Field(gt=0)] = 0.05,
    steps: Annotated[int, Field(ge=1)] = 5,
) -> Tensor:
    """Send the clients a model that is worse at the candidates: the loss of all of them has been climbed.

    A client that owns a candidate takes it down again in its local training, others hardly: `active-membership` reads who was taken down.
    Each of the `steps` has the length `step` times the model's own, along the gradient of the candidates' mean loss (the paper adds γ times
    the gradient of each target; a length relative to the model needs no tuning to its size).

    The candidates are known to the server, members or not: simulated knowledge.
    """
    if ctx.candidates is None:
        raise ValueError("gradient ascent needs candidates")
    x, y = ctx.candidates
    reach = step * params.norm()

    def loss(point: Tensor) -> Tensor:
        return ctx.criterion(ctx.model(point, x), y)

    climbed = params
    for _ in range(steps):
        slope = grad(loss)(climbed)
        climbed = climbed + reach * slope / slope.norm().clamp(min=1e-12)
    return climbed.detach().to(torch.float32)
