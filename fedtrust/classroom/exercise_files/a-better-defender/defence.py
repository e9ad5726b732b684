"""My defence. This one clips every update to the median norm and averages; it runs, and can be beaten."""

from __future__ import annotations

import torch


def aggregate(updates: torch.Tensor, ctx) -> torch.Tensor:
    """Return the change of the model [d] from the clients' updates [n, d].

    `ctx` holds what a server may know: `ctx.params` [d], `ctx.weights` [n], `ctx.assumed_malicious`, `ctx.round`, `ctx.model(params, x)`,
    `ctx.rng`. The order of the rows is shuffled every round. To keep something from round to round, or to say whom you trust, return a
    `fedtrust.Verdict`: see `fedtrust new aggregator`.
    """
    norms = updates.norm(dim=1, keepdim=True).clamp(min=1e-12)  # [n, 1]
    return ((norms.median() / norms).clamp(max=1) * updates).mean(0)
