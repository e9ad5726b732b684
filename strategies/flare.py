"""FLARE: trust those whose last hidden layer says what the others' say."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.fits import features
from fedtrust.server import AggContext, PipelineFacts, Verdict, aggregator
from fedtrust.strategies import blocks


def discrepancies(features: Tensor, width: float) -> Tensor:
    """Return the squared maximum mean discrepancies between sets of points [n, b, p], float64 [n, n].

    Unbiased estimates (Gretton et al., JMLR 2012, equation 3) with the kernel exp(−|u − v|² ÷ (2 · width²)); may be a little below 0.
    """
    n, b, p = features.shape
    everything = features.reshape(n * b, p)
    between = torch.empty(n, n, dtype=torch.float64)
    for i in range(n):
        kernel = torch.exp(torch.cdist(features[i], everything).square() / (-2 * width * width)).view(b, n, b)
        between[i] = kernel.mean(dim=(0, 2))
        within = kernel[:, i].sum() - kernel[:, i].diagonal().sum()
        between[i, i] = within / (b * (b - 1))
    own = between.diagonal()
    result = own[:, None] + own[None] - (between + between.T)
    return result.fill_diagonal_(0)


def votes(distances: Tensor, count: int) -> Tensor:
    """Return how many others have each row among their `count` nearest, [n]; rows equally far are taken by client id."""
    order = distances.clone().fill_diagonal_(math.inf).argsort(dim=1, stable=True)[:, :count]
    return order.flatten().bincount(minlength=len(distances))


def _needs(facts: PipelineFacts) -> str | None:
    if facts.root_samples < 2:
        return "compares what the clients' models say about the server's own samples; set strategy.root_samples to at least 2"
    return None


@aggregator(
    "flare",
    needs=_needs,
    fits=features,
    paper="Wang et al., ASIA CCS 2022, section 4 (FLARE)",
    exempt=("translation", "scale", "robust"),  # it looks at outputs of the models; everybody keeps some weight
)
def flare(
    updates: Tensor,
    ctx: AggContext,
    *,
    samples: Annotated[int, Field(ge=2)] = 64,
    neighbours: Annotated[float, Field(gt=0, le=1)] = 0.5,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
) -> Verdict:
    """Weigh each client by the softmax of how often it is among the others' nearest, by what enters the last layer (PLRs).

    For the first `samples` of the server's own samples each client's model gives a set of penultimate-layer representations; the sets are
    compared by maximum mean discrepancy. Each client names the ⌈`neighbours` · (n − 1)⌉ others nearest to it, and one that is named c times
    counts exp(c ÷ (`temperature` · c̄)), c̄ being the mean of c. That is what the authors' code does; softmax of the bare counts, as some
    libraries have it, silences all but a few as soon as there are twenty clients. Their samples are of one class; these are as they come.
    The kernel's width, which the paper leaves open, is the median distance between the representations that the global model gives:
    no client can move it. The trust is the weight ÷ the largest weight.

    Raises:
        ValueError: the server owns no samples, or the model has no linear layer.
    """
    if ctx.root is None:
        raise ValueError("the server owns no samples (strategy.root_samples)")
    n, x = len(updates), ctx.root[0][:samples]
    usual = torch.pdist(ctx.model.features(ctx.params, x).flatten(1).double())
    width = float(usual.quantile(0.5)) or 1.0
    said = torch.stack([ctx.model.features(ctx.params + row, x).flatten(1).double() for row in updates])
    count = max(1, math.ceil(neighbours * (n - 1) - 1e-9))  # each names so many, so it is also how often one is named on average
    if n == 1:
        return Verdict(updates[0].clone(), trust=torch.ones(1))
    named = votes(discrepancies(said, width), count).double()
    weights = torch.exp((named - named.max()) / (temperature * count))
    return Verdict(blocks.combine(weights / weights.sum(), updates), trust=weights.float())
