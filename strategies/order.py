"""Rules that look at each coordinate's order: median and trimmed mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from fedtrust.errors import TooFewError
from fedtrust.server import AggContext, PipelineFacts, Verdict, aggregator

_COLUMNS = 1 << 16


def sorted_columns(updates: Tensor) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Yield the coordinates a block at a time, each sorted over the clients: (which coordinates, float32 [c, n]).

    NumPy sorts short contiguous rows many times faster than torch sorts along the first axis, and a block keeps the copy small.
    """
    for start in range(0, updates.shape[1], _COLUMNS):
        where = slice(start, min(start + _COLUMNS, updates.shape[1]))
        block = np.ascontiguousarray(updates[:, where].numpy().T)
        block.sort(axis=1)
        yield where, block


@aggregator("median", paper="Yin et al., ICML 2018, definition 1")
def median(updates: Tensor, ctx: AggContext) -> Verdict:
    """Take the median of each coordinate; of an even number the mean of the middle two."""
    result = torch.empty(updates.shape[1])
    low, high = (len(updates) - 1) // 2, len(updates) // 2
    for where, block in sorted_columns(updates):
        # Halves first: the sum of two large values could overflow.
        result[where] = torch.from_numpy(0.5 * block[:, low] + 0.5 * block[:, high])
    return Verdict(result)


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
    result = torch.empty(updates.shape[1])
    for where, block in sorted_columns(updates):
        result[where] = torch.from_numpy(block[:, b : n - b].mean(axis=1, dtype=np.float64).astype(np.float32))
    return Verdict(result)
