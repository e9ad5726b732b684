"""My evasion: one step in the direction of the gradient's signs (FGSM). It runs, and asks for one gradient a sample."""

from __future__ import annotations

import torch


def perturb(x: torch.Tensor, y: torch.Tensor, query) -> torch.Tensor:
    """Return the samples [n, *shape], changed so that the model gets them wrong; no feature may move by more than `query.eps`.

    `y` [n] is what the model says of the samples, and it is right. `query.gradient(x, y)` is the gradient [n, *shape] of the cross-entropy
    at `y`; with weights [n, C] in place of `y`, that of (weights · output).sum(), for any other loss. `query(x)` are the model's answers
    [n, C]. Every sample of either counts. `query.task.low` and `query.task.high` are the range of a feature, `query.rng` is randomness.
    """
    half_way = query.eps / 2  # braver is allowed
    moved = x + half_way * query.gradient(x, y).sign()
    return moved.clamp(query.task.low, query.task.high)
