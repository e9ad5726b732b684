"""The geometric median: the point with the smallest sum of distances to the updates."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.server import AggContext, Verdict, aggregator
from fedtrust.strategies import blocks
from fedtrust.strategies.distances import centred_gram

_TINY = 1e-150
#: With more rows than this the search goes over the updates. (Of 400, the products of all pairs took 2.2 s, going over them once 0.29 s.)
MANY_ROWS = 200
#: Coordinates that the search then starts from, in so many pieces, and how often it goes over the updates before it gives up on that.
_COLUMNS, _PIECES, _PASSES = 1 << 15, 64, 8
#: There the shares stand when all iterations to come would move them by no more than this. A fall of the sum of distances below the
#: second cannot be told from float32's rounding, and so does not end the search.
_STANDS, _ROUNDING = 1e-7, 1e-9


def weiszfeld(gram: Tensor, weights: Tensor, smoothing: float, iterations: int, tolerance: float) -> tuple[Tensor, int]:
    """Return the geometric median as shares of the rows (float64 [n], adding up to 1), and the iterations it took.

    The iterate z = Σ cⱼ xⱼ is never written out: with the inner products G of the rows' differences from a centre,
    |xᵢ − z|² = Gᵢᵢ − 2 (G c)ᵢ + cᵀ G c. The first distances are those from the centre, none counted below their median: an iterate that
    stands on a row takes long to leave it.

    Args:
        gram: G, float64 [n, n].
        weights: what each row's distance counts, float64 [n].
        smoothing: distances below this share of the first ones' median count as that; above 0.
        iterations: the most to be done.
        tolerance: stop when the weighted sum of distances fell by less than this share.
    """
    norms = gram.diagonal()
    # If all agree, or more than half do, the rows' typical distance from the centre is 0; then any tiny length serves.
    typical = max(float(norms.sqrt().quantile(0.5)), _TINY)
    shares = weights / norms.sqrt().clamp(min=typical)
    shares /= shares.sum()
    before = float("inf")
    for done in range(1, iterations):
        pull = gram @ shares
        distances = (norms - 2 * pull + shares @ pull).clamp(min=0).sqrt()
        after = float(weights @ distances)
        if after >= before * (1 - tolerance):
            return shares, done
        before = after
        shares = weights / distances.clamp(min=max(smoothing * typical, _TINY))
        shares /= shares.sum()
    return shares, iterations


def over_updates(updates: Tensor, weights: Tensor, smoothing: float, iterations: int, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Return the geometric median's shares (see `weiszfeld`) and itself, for many long rows; `None` where `weiszfeld` should find it.

    The products of all pairs of rows are what `weiszfeld` takes its time for. Here they are those of some coordinates: the shares that
    they lead to are nearly the right ones, and a few iterations over the updates themselves, with distances in all coordinates, do the
    rest. Whatever the coordinates were, these decide when it is found.
    """
    (n, d), some = updates.shape, _PIECES * (_COLUMNS // _PIECES)
    if n <= MANY_ROWS or d < 4 * some:
        return None
    starts = torch.linspace(0, d - some // _PIECES, _PIECES, dtype=torch.float64).long().tolist()
    gram = centred_gram(torch.cat([updates[:, start : start + some // _PIECES] for start in starts], dim=1))
    shares, _ = weiszfeld(gram, weights, smoothing, iterations, tolerance)
    least = smoothing * float(gram.diagonal().sqrt().quantile(0.5)) * (d / some) ** 0.5
    before = moved = float("inf")
    for done in range(1, min(iterations, _PASSES) + 1):
        point, squares = _combined(shares.float(), updates)
        # Beyond float32's range, or a row on the point itself: products of differences from a centre keep the digits.
        if not bool(torch.isfinite(squares).all()) or bool((squares <= 1e-30).any()):
            return None
        after = float(weights @ squares.sqrt())
        following = weights / squares.sqrt().clamp(min=max(least, _TINY))
        following /= following.sum()
        last, moved = moved, float((following - shares).abs().sum())
        if done == iterations or (tolerance >= _ROUNDING and after >= before * (1 - tolerance)):
            return shares, point
        before, shares = after, following
        rate = moved / max(last, _TINY)  # the moves become smaller by it each time; 0 at first
        if moved < _STANDS / 100 or (0 < rate < 0.25 and moved * rate / (1 - rate) < _STANDS):
            return shares, blocks.combine(shares.float(), updates)
    return None


def _combined(shares: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the combination of the rows [d], and their squared distances from it, float64 [n]; the updates are read once for both."""
    n, d = updates.shape
    point, total, room = torch.empty(d), torch.zeros(n, dtype=torch.float64), blocks.Room()

    def work(where: slice) -> Tensor:
        block = updates[:, where]
        torch.mv(block.T, shares, out=point[where])
        apart = torch.sub(block, point[where], out=room.take("apart", *block.shape))
        squares: Tensor = torch.linalg.vector_norm(apart, dim=1).double().square_()
        return squares

    blocks.each(blocks.cut(n, d, blocks.READ), work, total.add_)
    return point, total


@aggregator("geometric-median", paper="Pillutla, Kakade and Harchaoui, IEEE TSP 2022, algorithm 2 (RFA, smoothed Weiszfeld)")
def geometric_median(
    updates: Tensor,
    ctx: AggContext,
    *,
    smoothing: Annotated[float, Field(gt=0)] = 1e-6,
    iterations: Annotated[int, Field(ge=1)] = 1000,
    tolerance: Annotated[float, Field(ge=0)] = 1e-12,
    weighted: bool = False,
) -> Verdict:
    """Find the point with the smallest sum of distances to the updates, by Weiszfeld's iteration.

    Each update is pulled in with 1 ÷ its distance. A distance below `smoothing` × the updates' median distance from the coordinates' median
    counts as that: the paper's ν, there an absolute length; relative, the rule does not depend on the learning rate. The paper does a few
    iterations, each a round of messages; here they are cheap, and end after `iterations` or when the sum of distances falls by less
    than the share `tolerance`. With `weighted` a distance counts as often as its client has samples, as in the paper; without, f of n
    attackers are f of n.

    The trust in an update is its share in the result ÷ the largest share.
    """
    weights = ctx.weights.double() if weighted else torch.ones(len(updates), dtype=torch.float64)
    weights /= weights.sum()
    found = over_updates(updates, weights, smoothing, iterations, tolerance)
    if found is None:
        shares, _ = weiszfeld(centred_gram(updates), weights, smoothing, iterations, tolerance)
        found = shares, blocks.combine(shares, updates)
    return Verdict(found[1], trust=(found[0] / found[0].max()).float())


@aggregator(
    "rfa",
    paper="Pillutla, Kakade and Harchaoui, IEEE TSP 2022, algorithm 2 (robust federated aggregation by smoothed Weiszfeld)",
    exempt=("scale", "robust"),  # ν is a length; and a few iterations from the mean do not reach the geometric median
)
def rfa(
    updates: Tensor, ctx: AggContext, *, nu: Annotated[float, Field(gt=0)] = 1e-6, iterations: Annotated[int, Field(ge=1)] = 3
) -> Verdict:
    """Go from the weighted mean towards the geometric median by `iterations` weighted averages.

    Each time an update counts as often as its client has samples, ÷ its distance from the last average (never less than `nu`).
    `geometric-median` goes on to the end, from a start that no minority can move; this is the paper's short run, in which each iteration
    is a round of messages, so that a huge update is weakened but not gone. The algorithm is written for models and starts at zero, so far
    from all of them that its first average is nearly their mean; for updates zero is where a free rider stands, so the start is that
    mean, as in the authors' code.

    The trust in an update is its share in the result ÷ its client's share of the samples, the largest made 1.
    """
    gram, share = centred_gram(updates), ctx.weights.double() / ctx.weights.double().sum()
    norms, c = gram.diagonal(), share
    for _ in range(iterations):
        pull = gram @ c
        distances = (norms - 2 * pull + c @ pull).clamp(min=0).sqrt()
        c = share / distances.clamp(min=nu)
        c = c / c.sum()
    trust = c / share
    return Verdict(blocks.combine(c, updates), trust=(trust / trust.max()).float())
