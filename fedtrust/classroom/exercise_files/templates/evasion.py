"""My evasion. This one moves every feature at random; it runs, and fools hardly anybody."""

from __future__ import annotations

import torch


def perturb(x: torch.Tensor, y: torch.Tensor, query) -> torch.Tensor:
    """Return the samples [n, *shape], changed so that the model gets them wrong; no feature may move by more than `query.eps`.

    `query(x)` is what the model answers [n, C]; every sample that it is asked about counts.
    """
    noise = torch.empty_like(x).uniform_(-1, 1, generator=query.rng)
    return (x + query.eps * noise).clamp(0, 1)
