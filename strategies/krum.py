"""Rules that trust updates with close neighbours: Krum and Multi-Krum."""

from __future__ import annotations

import torch
from torch import Tensor

from fedtrust.errors import TooFewError
from fedtrust.server import AggContext, PipelineFacts, Verdict, aggregator
from fedtrust.strategies import blocks
from fedtrust.strategies.distances import squared_distances


def krum_scores(updates: Tensor, f: int) -> Tensor:
    """Return each row's sum of squared distances to its n − f − 2 nearest other rows, float64 [n]; Blanchard et al., section 4.

    Scores that are equal by definition (copies of a row, pairs of nearest neighbours) are equal bit for bit: ties must go to the smallest
    client id.

    Raises:
        TooFewError: n < 2f + 3.
    """
    n = len(updates)
    if n < 2 * f + 3:
        raise TooFewError(f"Krum needs n ≥ 2f + 3, got n = {n}, f = {f}")
    others = squared_distances(updates).fill_diagonal_(float("inf"))
    return others.sort(dim=1).values[:, : n - f - 2].sum(dim=1)


def _krum_needs(facts: PipelineFacts) -> str | None:
    if facts.n < 2 * facts.f + 3:
        return f"needs n ≥ 2f + 3 updates a round; n = {facts.n} and the defender assumes f = {facts.f}"
    m = facts.params.get("m")
    return f"cannot select m = {m} of n = {facts.n} updates" if m is not None and not 1 <= m <= facts.n else None


@aggregator("krum", needs=_krum_needs, paper="Blanchard et al., NeurIPS 2017, section 4")
def krum(updates: Tensor, ctx: AggContext) -> Verdict:
    """Take the one update that is closest to its n − f − 2 nearest neighbours.

    Needs n ≥ 2f + 3, with f what the defender assumes.
    The paper's n − f − 2 (some libraries sum n − f − 1). Ties go to the smallest client id.
    """
    best = krum_scores(updates, ctx.assumed_malicious).argsort(stable=True)[:1]
    return Verdict(updates[best[0]].clone(), trust=torch.zeros(len(updates)).index_fill_(0, best, 1.0))


@aggregator("multi-krum", needs=_krum_needs, paper="Blanchard et al., NeurIPS 2017, section 5 (m-Krum)")
def multi_krum(updates: Tensor, ctx: AggContext, *, m: int | None = None) -> Verdict:
    """Average the `m` updates with the best Krum scores; `m` defaults to n − f.

    Needs n ≥ 2f + 3, with f what the defender assumes. All scores are computed once, as in the paper; ties go to the smallest client id.
    """
    f, n = ctx.assumed_malicious, len(updates)
    if m is not None and m > n:
        raise TooFewError(f"cannot select m = {m} of {n} updates")
    best = krum_scores(updates, f).argsort(stable=True)[: (n - f if m is None else m)]
    trust = torch.zeros(n).index_fill_(0, best, 1.0)
    return Verdict(blocks.combine(trust.double() / len(best), updates), trust=trust)
