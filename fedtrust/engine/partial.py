"""Adding updates up where they are made: what a server that needs only a weighted sum gets to see of a chunk.

A rule that is a weighted mean, after filters that treat every row by itself, never needs the matrix [n, d]: each worker checks its rows,
filters them, weighs them and sends one row. The driver adds these up in a fixed order (`fedtrust.engine.sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedtrust.engine import seeds
from fedtrust.server import AggContext, Stage, run_filter

if TYPE_CHECKING:
    from fedtrust.engine.world import World

#: A larger number in an update is a fault like NaN: a few of them would make sums and norms overflow float32.
LARGEST = 1e15


class Sums(NamedTuple):
    """How updates are added up.

    Attributes:
        filters: what each row passes through first.
        by_examples: whether a row counts as many times as its client has samples, or once.
    """

    filters: tuple[Stage, ...] = ()
    by_examples: bool = False

    def weights(self, registered: Sequence[int]) -> Tensor:
        """Return how much each row counts [k], float32, from its client's registered number of samples."""
        return torch.tensor([float(n) if self.by_examples else 1.0 for n in registered])


class Partial(NamedTuple):
    """What is known of a chunk's sum beside the sum.

    Attributes:
        trust: how far each row is trusted [k], or `None`.
        bound: the largest L2 norm a row can have, if the last filter guarantees one.
    """

    trust: Tensor | None
    bound: float | None


def look(updates: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Return the L2 norms of rows [k, d], float64 [k], and row → what is wrong with it, for those that no rule may see."""
    norms = torch.linalg.vector_norm(updates, dim=1).double()
    # A norm below LARGEST bounds every number of its row: one look at k numbers in place of k*d.
    if bool((norms <= LARGEST).all()):
        return norms, {}
    suspect = torch.nonzero(~(norms <= LARGEST)).flatten().tolist()
    for i in suspect:
        norms[i] = torch.linalg.vector_norm(updates[i], dtype=torch.float64)
    return norms, {i: why for i in suspect if (why := wrong(updates[i])) is not None}


def wrong(values: Tensor) -> str | None:
    """Return what is wrong with an update: NaN, infinite, too large; `None` if nothing is."""
    if bool((values.abs() <= LARGEST).all()):  # false for NaN as well
        return None
    if bool(torch.isnan(values).any()):
        return "NaN in the update"
    return "infinite value in the update" if bool(torch.isinf(values).any()) else f"value above {LARGEST:g} in the update"


def partial(world: World, sums: Sums, round_number: int, params: Tensor, clients: Sequence[int], updates: Tensor) -> tuple[Tensor, Partial]:
    """Filter, weigh and add up the rows of a chunk.

    Args:
        world: the run.
        sums: how.
        round_number: the round, from 1.
        params: the model that they were sent [d].
        clients: whose the rows are.
        updates: the rows [k, d]; left as they are.

    Returns:
        The weighted sum [d] on the CPU, and what else the server learns.
    """
    weights = sums.weights([world.examples(c) for c in clients])
    rows, trust, bound = updates, None, None
    if sums.filters:
        ctx = AggContext(
            params=params.clone(),
            weights=weights,
            clients=(),
            round=round_number,
            assumed_malicious=0,
            layout=world.layout,
            task=world.data.task,
            model=world.model,
            criterion=world.criterion,
            root=None,
            rng=seeds.torch_stream(world.seed, "rowwise", round_number, clients[0]),
        )
        rows, trust, bound = through(sums.filters, updates.cpu(), ctx)
    return (weights.to(rows.device) @ rows).cpu(), Partial(trust, bound)


def through(filters: Sequence[Stage], rows: Tensor, ctx: AggContext) -> tuple[Tensor, Tensor | None, float | None]:
    """Return rows [k, d] after filters that treat each by itself, how far each is trusted [k], and the bound on their norms."""
    trust, bound = None, ctx.bound
    for stage in filters:
        verdict = run_filter(stage, rows, ctx)
        rows, bound = verdict.value, verdict.bound
        if verdict.trust is not None:
            trust = verdict.trust if trust is None else trust * verdict.trust
    return rows, trust, bound
