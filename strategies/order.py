"""Rules that look at each coordinate's order: median and trimmed mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from fedtrust.errors import TooFewError
from fedtrust.server import AggContext, PipelineFacts, Verdict, aggregator
from fedtrust.strategies import blocks

Floats = npt.NDArray[np.float32]


def sorted_columns(block: Tensor, room: blocks.Room | None = None) -> Floats:
    """Return a copy of the values [n, c], each coordinate sorted over the clients: float32 [c, n].

    NumPy sorts short contiguous rows many times faster than torch sorts along the first axis. The rows are copied side by side before
    they are turned: reading so many distant rows in the order of the columns would cost more than both copies. With `room` the copy lies
    there, until the next one of this thread.
    """
    n, columns = block.shape
    room = room or blocks.Room()
    beside = block if block.is_contiguous() else room.take("beside", n, columns).copy_(block)
    values: Floats = room.take("turned", columns, n).copy_(beside.T).numpy()
    values.sort(axis=1)
    return values


def middle(values: Floats) -> Floats:
    """Return the median of each coordinate [c] of sorted values [c, n]; of an even number the mean of the middle two."""
    n = values.shape[1]
    # Halves first: the sum of two large values could overflow.
    return np.float32(0.5) * values[:, (n - 1) // 2] + np.float32(0.5) * values[:, n // 2]


def by_coordinate(updates: Tensor, rule: Callable[[Floats], npt.NDArray[np.floating]]) -> Tensor:
    """Return `rule(sorted values [c, n]) -> [c]` of all coordinates, float32 [d]."""
    (n, d), room = updates.shape, blocks.Room()
    result = torch.empty(d)

    def work(where: slice) -> None:
        result[where] = torch.from_numpy(rule(sorted_columns(updates[:, where], room)))

    # Long pieces of rows are read faster; two buffers a thread stay a small part of the updates.
    blocks.each(blocks.cut(n, d, max(blocks.SORTED, min(4 * blocks.SORTED, n * d // 64))), work)
    return result


@aggregator("median", paper="Yin et al., ICML 2018, definition 1")
def median(updates: Tensor, ctx: AggContext) -> Verdict:
    """Take the median of each coordinate; of an even number the mean of the middle two."""
    return Verdict(by_coordinate(updates, middle))


def _trim_needs(facts: PipelineFacts) -> str | None:
    trim = facts.params["trim"]
    b = facts.f if trim is None else trim
    return f"cannot drop {b} values from each end of {facts.n} updates (needs n > 2·{b})" if facts.n <= 2 * b else None


@aggregator("trimmed-mean", needs=_trim_needs, paper="Yin et al., ICML 2018, definition 2")
def trimmed_mean(updates: Tensor, ctx: AggContext, *, trim: Annotated[int, Field(ge=0)] | None = None) -> Verdict:
    """Drop the `trim` largest and smallest values of each coordinate and average the rest.

    `trim` defaults to the number of attackers that the defender assumes (the paper's β·n).
    """
    b = ctx.assumed_malicious if trim is None else trim
    n = len(updates)
    if n <= 2 * b:
        raise TooFewError(f"cannot drop {b} values from each end of {n} updates")
    return Verdict(by_coordinate(updates, lambda values: values[:, b : n - b].mean(axis=1, dtype=np.float64)))
