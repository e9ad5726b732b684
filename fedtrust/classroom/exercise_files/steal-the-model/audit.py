"""My copy. This one trains on the likeliest class of 200 answers; it runs, and throws most of what it was told away."""

from __future__ import annotations

import torch


def steal(ctx) -> torch.Tensor:
    """Return the parameters [d] of a copy of the model.

    `ctx.query(x)` is what the model answers [n, C], for `ctx.queries` samples in all; `ctx.population` are samples of your own (x, y);
    `ctx.model(params, x)` is the architecture, `ctx.layout.size` the number of its parameters.
    """
    x = ctx.population[0][: ctx.queries]
    told = ctx.query(x).argmax(dim=1)
    params = torch.zeros(ctx.layout.size, requires_grad=True)
    optimiser = torch.optim.SGD([params], lr=0.5)
    for _ in range(200):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(ctx.model(params, x), told).backward()
        optimiser.step()
    return params.detach()
