"""My membership inference. This one takes samples that the model is sure about for members; it runs, and is hardly better than guessing."""

from __future__ import annotations

import torch


def score(ctx) -> torch.Tensor:
    """Return a score for every candidate [q]: the higher, the more likely it was trained on.

    `ctx.candidates` are the samples in question (x [q, *shape], y [q]); `ctx.query(x)` is what the model answers [q, C];
    `ctx.population` are further samples (x, y) of the same kind, which nobody trained on.
    """
    x = ctx.candidates[0]
    return ctx.query(x).softmax(dim=1).max(dim=1).values
