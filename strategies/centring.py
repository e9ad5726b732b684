"""Rules that move from the last aggregate by bounded steps: centred clipping."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.server import AggContext, Verdict, aggregator
from fedtrust.strategies import blocks


def _distances(updates: Tensor, point: Tensor) -> Tensor:
    """Return the rows' Euclidean distances from a point [d], float64 [n]."""
    total = torch.zeros(len(updates), dtype=torch.float64)

    def work(where: slice) -> Tensor:
        return (updates[:, where].double() - point[where]).square().sum(dim=1)

    blocks.each(blocks.cut(len(updates), updates.shape[1], blocks.SORTED), work, total.add_)
    return total.sqrt()


@aggregator(
    "centered-clipping",
    paper="Karimireddy, He and Jaggi, ICML 2021, algorithm 2",
    exempt=("translation", "scale", "identity", "robust"),  # it starts from the last aggregate and moves no farther than tau an iteration
)
def centered_clipping(
    updates: Tensor, ctx: AggContext, *, tau: Annotated[float, Field(gt=0)] = 10.0, iterations: Annotated[int, Field(ge=1)] = 1
) -> Verdict:
    """Start from the last aggregate v (zero in round 1) and move it by the mean of the updates' differences from v, each clipped to `tau`.

    v ← v + 1/n Σ (xᵢ − v) min(1, tau ÷ |xᵢ − v|), `iterations` times. No update moves the model by more than tau ÷ n an iteration, whatever
    it holds; but if all updates are farther than tau from v, so is what comes out. The paper clips the workers' momenta; here it is
    what the clients send.

    The trust in an update is its last clipping factor.
    """
    point = ctx.state["centre"].double() if "centre" in ctx.state else torch.zeros(updates.shape[1], dtype=torch.float64)
    factors = torch.ones(len(updates), dtype=torch.float64)
    for _ in range(iterations):
        factors = (tau / _distances(updates, point)).clamp(max=1.0)
        shares = factors / len(updates)
        point = (1 - shares.sum()) * point + blocks.combine(shares, updates).double()
    value = point.float()
    return Verdict(value, trust=factors.float(), state={"centre": value.clone()})
