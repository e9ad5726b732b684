"""My reconstruction. This one knows how many digits there are, and draws them all grey."""

from __future__ import annotations

import torch


def reconstruct(ctx) -> torch.Tensor:
    """Return samples [m, *shape], no more than the clients have together; or a pair (samples, labels [m]).

    `ctx.clients` are those who replied (behind secure aggregation nobody can tell), `ctx.updates` their updates [n, d],
    `ctx.sent[client]` the model [d] that each was sent and `ctx.examples[client]` how many samples it has. `ctx.model(params, x)` is the
    architecture, `ctx.criterion(output, y)` the loss, `ctx.recipe` how they train (lr, batch_size, epochs);
    `ctx.layout.unflatten(update)` gives the layers of a vector by name.
    """
    count = sum(ctx.examples[client] for client in ctx.clients or ctx.sent)
    low, high = ctx.task.low or 0.0, ctx.task.high or 1.0
    return torch.full((count, *ctx.task.shape), (low + high) / 2)
