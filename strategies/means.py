"""Averages: what federated learning does when everybody is trusted."""

from __future__ import annotations

from torch import Tensor

from fedtrust.server import AggContext, Verdict, aggregator


@aggregator("mean", paper="McMahan et al., AISTATS 2017, algorithm 1, with equal weights", exempt=("robust",), linear="equal")
def mean(updates: Tensor, ctx: AggContext) -> Verdict:
    """Average the updates, every client counting the same."""
    return Verdict(updates.mean(0))


@aggregator("weighted-mean", paper="McMahan et al., AISTATS 2017, algorithm 1 (FedAvg)", exempt=("robust",), linear="examples")
def weighted_mean(updates: Tensor, ctx: AggContext) -> Verdict:
    """Average the updates, each weighted by the number of samples its client registered with the server."""
    share = ctx.weights / ctx.weights.sum()  # [n]
    return Verdict((share[:, None] * updates).sum(0))
