"""Rules that put the clients into two groups and keep the larger: clipped clustering and Auror."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from fedtrust.server import AggContext, Verdict, aggregator
from fedtrust.strategies import blocks
from fedtrust.strategies.order import sorted_columns
from fedtrust.strategies.similarity import cosine_similarities, norms

Doubles = npt.NDArray[np.float64]


def larger_half(distances: Tensor) -> Tensor:
    """Return which rows are in the larger of two clusters made by average linkage, bool [n]; of two equally large that of the first row.

    Args:
        distances: symmetric, float64 [n, n], n ≥ 1.
    """
    n = len(distances)
    if n < 3:
        return torch.arange(n) == 0 if n == 2 else torch.ones(n, dtype=torch.bool)
    from scipy.cluster.hierarchy import linkage, to_tree
    from scipy.spatial.distance import squareform

    left = to_tree(linkage(squareform(distances.numpy(), checks=False), method="average")).get_left().pre_order()
    inside = torch.zeros(n, dtype=torch.bool)
    inside[left] = True
    many = int(inside.sum())
    return inside if 2 * many > n or (2 * many == n and bool(inside[0])) else ~inside


@aggregator(
    "clipped-clustering",
    paper="Li, Ngai and Voigt, IEEE Trans. Big Data 2024 (An Experimental Study of Byzantine-Robust Aggregation Schemes)",
    exempt=("translation", "permutation", "robust", "hull"),  # it compares directions; groups of one size tie; huge rows may part the rest
)
def clipped_clustering(updates: Tensor, ctx: AggContext) -> Verdict:
    """Clip to the median of all norms seen so far, and average the larger of two clusters by direction.

    The clusters are made by average linkage on the cosine distance. A row of zeros is at distance 1 from all others. Of two clusters of
    the same size that of the smallest client id is taken; of two updates the first. The authors' library also caps the clip at 10⁵.

    The trust in an update of the larger cluster is its clipping factor ÷ the largest; in others it is 0.
    """
    lengths = norms(updates)
    history = torch.cat([ctx.state["norms"], lengths]) if "norms" in ctx.state else lengths.clone()
    limit = history.quantile(0.5) if len(history) < 10_000_000 else history.median()
    factor = torch.where(lengths > limit, limit / lengths, 1.0)
    inside = larger_half((1 - cosine_similarities(updates)).fill_diagonal_(0))
    trust = factor * inside
    value = blocks.combine(trust / inside.sum(), updates)
    return Verdict(value, trust=(trust / trust.max().clamp(min=1e-300)).float(), state={"norms": history})


def split_in_two(values: npt.NDArray[np.float32]) -> tuple[Doubles, npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the best division of each coordinate's values into two clusters (2-means, exactly).

    On a line the clusters are the values up to and beyond some point: each of the n − 1 places is tried, and the one that leaves the
    smallest sum of squares wins, that is the largest s (n − s)(m₂ − m₁)² with s values below; of several the lowest.

    Args:
        values: sorted, float32 [c, n], n ≥ 2.

    Returns:
        The distance between the two means [c], the largest value of the lower cluster [c], and how many values are in it [c]. Where all
        values are the same the distance is 0 and the lower cluster holds them all.
    """
    c, n = values.shape
    wide = values.astype(np.float64)
    wide -= wide[:, n // 2, None]  # sums of differences keep their digits
    below = np.cumsum(wide, axis=1)[:, :-1]
    size = np.arange(1, n)
    gap = (below[:, -1:] + wide[:, -1:] - below) / (n - size) - below / size
    between = size * (n - size) / n * gap**2
    # equal values belong together, and rounding must not part them
    between[wide[:, 1:] == wide[:, :-1]] = -1.0
    best = between.argmax(axis=1)
    row = np.arange(c)
    parted = values[:, 0] < values[:, -1]
    return np.where(parted, gap[row, best], 0.0), values[row, best], np.where(parted, best + 1, n)


class _Split:
    """Each coordinate's two clusters.

    Attributes:
        gap: the distance between their means [d].
        edge: the largest value of the lower one [d].
        lower: whether the lower one is the smaller; where both are the same size, or one is empty, `minority` is false [d].
        minority: whether there is a smaller one [d].
    """

    def __init__(self, updates: Tensor) -> None:
        n, d = updates.shape
        self.gap, self.edge = torch.empty(d), torch.empty(d)
        self.lower, self.minority = torch.empty(d, dtype=torch.bool), torch.empty(d, dtype=torch.bool)

        def work(where: slice) -> None:
            gap, edge, size = split_in_two(sorted_columns(updates[:, where]))
            self.gap[where], self.edge[where] = torch.from_numpy(gap).float(), torch.from_numpy(edge)
            self.lower[where], self.minority[where] = torch.from_numpy(2 * size < n), torch.from_numpy((2 * size != n) & (size < n))

        blocks.each(blocks.cut(n, d, blocks.SORTED), work)

    def votes(self, updates: Tensor, indicative: Tensor) -> Tensor:
        """Return in how many of the indicative coordinates each row is in the smaller cluster, int64 [n]."""
        total = torch.zeros(len(updates), dtype=torch.int64)
        counted = indicative & self.minority

        def work(where: slice) -> Tensor:
            small = (updates[:, where] <= self.edge[where]) == self.lower[where]
            return (small & counted[where]).sum(dim=1)

        blocks.each(blocks.cut(len(updates), updates.shape[1], blocks.SORTED), work, total.add_)
        return total


@aggregator(
    "auror",
    paper="Shen, Tople and Saxena, ACSAC 2016 (Auror), section 4",
    exempt=("robust",),  # a coordinate can hide a minority behind one huge value, and what is not indicative is averaged as it is
)
def auror(
    updates: Tensor,
    ctx: AggContext,
    *,
    alpha: Annotated[float, Field(gt=0)] | None = None,
    share: Annotated[float, Field(gt=0, le=1)] = 0.01,
    observe: Annotated[int, Field(ge=1)] = 10,
    votes: Annotated[float, Field(gt=0, lt=1)] = 0.5,
) -> Verdict:
    """Drop the clients that are in the smaller of two clusters in more than half of the telling coordinates.

    In every coordinate the clients' values are divided by 2-means. A coordinate is indicative in a round if the cluster centres are
    `alpha` or more apart, and from then on if it was so in most of the rounds up to this one; after `observe` rounds the choice is fixed. A
    client that is in the smaller cluster of more than the share `votes` of the indicative coordinates is left out of the average.

    The paper's α is a length, calibrated on benign runs of the same task. Where there is none, the `share` of the coordinates with the
    largest distances counts, which depends neither on the learning rate nor on the round. On a line 2-means is solved exactly, by trying
    all divisions of the sorted values (of equally good ones the lowest), in place of iterations from random centres; two clusters of
    the same size accuse nobody. The paper then trains anew without those it found; a federation that runs leaves them out of the round,
    and asks again in the next. If all are found, as only `votes` below a half can do, the model stays as it is.
    """
    n = len(updates)
    if n < 3:
        return Verdict(blocks.combine(torch.full((n,), 1 / n, dtype=torch.float64), updates), trust=torch.ones(n))
    split = _Split(updates)
    far = split.gap.topk(math.ceil(share * len(split.gap))).values[-1] if alpha is None else alpha
    now = (split.gap > 0) & (split.gap >= far)
    rounds = int(ctx.state["rounds"]) if "rounds" in ctx.state else 0
    seen = ctx.state["seen"] if rounds else torch.zeros(len(now), dtype=torch.int16)
    if rounds < observe:
        rounds, seen = rounds + 1, seen + now
    indicative = 2 * seen > rounds
    kept = ~(split.votes(updates, indicative) > votes * int(indicative.sum()))
    value = blocks.combine(kept.double() / max(int(kept.sum()), 1), updates)
    return Verdict(value, trust=kept.float(), state={"rounds": torch.tensor(rounds), "seen": seen})
