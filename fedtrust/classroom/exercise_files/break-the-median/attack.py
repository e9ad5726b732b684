"""My attack. This one sends the mean update of the coalition turned round; it runs, and does little."""

from __future__ import annotations

import torch


def craft(updates: torch.Tensor, view) -> torch.Tensor:
    """Return what the coalition sends [k, d], from the updates that honest training gave its members [k, d].

    `view` holds what the exercise grants: `view.params` [d], `view.round`, `view.task`, `view.model(params, x)`, `view.data()`, `view.rng`,
    and with more knowledge `view.others` (the honest updates) and `view.defence`. For more hooks (`poison`, a memory over the rounds)
    hand in a class: see `fedtrust new behaviour`.
    """
    return (-1.5 * updates.mean(0)).expand_as(updates).contiguous()
