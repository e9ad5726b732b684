"""My evasion. This one moves every feature at random; it runs, and fools hardly anybody."""

from __future__ import annotations

import torch


def perturb(x: torch.Tensor, y: torch.Tensor, query) -> torch.Tensor:
    """Return the samples [n, *shape], changed so that the model gets them wrong; no feature may move by more than `query.eps`.

    `y` [n] is what the model says of the samples, and it is right. `query(x)` is what it answers [n, C]; every sample that it is asked
    about counts. `query.task.low` and `query.task.high` are the range of a feature (`None` where there is none), `query.rng` is randomness.
    """
    noise = torch.empty_like(x).uniform_(-1, 1, generator=query.rng)
    moved = x + query.eps * noise
    return moved if query.task.low is None else moved.clamp(query.task.low, query.task.high)
