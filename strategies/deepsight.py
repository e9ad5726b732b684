"""DeepSight: look inside the updates for training data of one kind only."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.layout import Layout
from fedtrust.server import AggContext, PipelineFacts, Verdict, aggregator
from fedtrust.strategies import blocks
from fedtrust.strategies.density import cosine_distances, density_clusters
from fedtrust.strategies.flame import median_clip


def output_layer(layout: Layout) -> tuple[slice | None, slice | None]:
    """Return where weights [P, h] and bias [P] of the output layer lie; `None` for what it does not have.

    It is the last tensor, and the one before it if the last is a vector that fits it.
    """
    names, shapes = layout.names, layout.shapes
    if len(shapes[-1]) != 1:
        return layout.slices[names[-1]], None
    fits = len(names) > 1 and len(shapes[-2]) > 1 and shapes[-2][0] == shapes[-1][0]
    return (layout.slices[names[-2]] if fits else None), layout.slices[names[-1]]


def update_energies(updates: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the normalised update energies (NEUPs) of the output neurons [n, P], float64, and their bias's updates (or weights').

    The energy of a neuron is (|Δ bias| + Σ |Δ weights|)²; a client's energies are divided by their sum (section V-A of the paper).
    """
    weights, bias = output_layer(layout)
    moved = torch.zeros(())
    if weights is not None:
        neurons = layout.shapes[-1][0]
        moved = updates[:, weights].double().reshape(len(updates), neurons, -1).abs().sum(dim=2)
    if bias is not None:
        moved = moved + updates[:, bias].double().abs()
    energies = moved.square()
    total = energies.sum(dim=1, keepdim=True)
    vectors = updates[:, bias if bias is not None else weights]
    return torch.where(total > 0, energies / total, 1 / energies.shape[1]), vectors


def exceedings(shares: Tensor) -> Tensor:
    """Return how many of each client's NEUPs [n, P] are above max(1 %, 1 ÷ P) of its largest, [n]."""
    threshold = max(0.01, 1 / shares.shape[1]) * shares.amax(dim=1, keepdim=True)
    return (shares > threshold).sum(dim=1)


def division_differences(updates: Tensor, ctx: AggContext, samples: int) -> Tensor:
    """Return each client's mean ratio of predicted probabilities to the global model's, over random inputs (DDifs), float64 [n, C]."""
    low, high = (0.0 if ctx.task.low is None else ctx.task.low), (1.0 if ctx.task.high is None else ctx.task.high)
    x = low + (high - low) * torch.rand(samples, *ctx.task.shape, generator=ctx.rng)
    usual = ctx.model(ctx.params, x).double().log_softmax(dim=1)
    ratios = [(ctx.model(ctx.params + row, x).double().log_softmax(dim=1) - usual).clamp(max=80).exp().mean(dim=0) for row in updates]
    return torch.stack(ratios)


def apart(labels: list[int]) -> Tensor:
    """Return 0 for pairs in the same cluster and 1 for all others, float64 [n, n]; rows in no cluster are apart from everybody."""
    given = torch.tensor(labels)
    together = (given[:, None] == given[None]) & (given >= 0)[:, None]
    return (~together).double().fill_diagonal_(0)


def _needs(facts: PipelineFacts) -> str | None:
    return "looks at each client's output layer, and bucketing mixes them" if "bucketing" in facts.filters else None


@aggregator(
    "deepsight",
    needs=_needs,
    task=("classification", "regression"),  # it asks models about random inputs, and noise is no text
    paper="Rieger et al., NDSS 2022, algorithms 1 and 2 (DeepSight)",
    exempt=("translation", "scale", "identity", "robust"),  # it looks at angles and outputs, and clusters as it likes
)
def deepsight(
    updates: Tensor,
    ctx: AggContext,
    *,
    samples: Annotated[int, Field(ge=1)] = 256,
    draws: Annotated[int, Field(ge=1)] = 3,
    size: Annotated[int, Field(ge=2)] = 2,
    tau: Annotated[float, Field(gt=0, le=1)] = 1 / 3,
) -> Verdict:
    """Cluster the clients by what their output layers betray, drop clusters with too many suspects, clip to the median norm, average.

    A client is a suspect if at most half the clients' median number of output neurons changed noticeably (threshold exceedings): its data
    have few labels, as a backdoor's do. Three views are clustered by HDBSCAN: cosine distances of the output bias's updates, Euclidean
    distances of the normalised update energies (NEUPs), and of the division differences (DDifs), mean ratios of local to global
    predictions for `samples` random inputs, `draws` times anew. The pairs' distances (0 in one cluster, 1 apart; DDifs averaged over
    the draws) are averaged over the views and clustered once more. A cluster whose share of suspects reaches `tau` is dropped; a client in
    none is a cluster of its own.

    What differs: the paper takes 20,000 random inputs (0.7 s a model on a CPU, for means that 256 give to about 1 %), and leaves HDBSCAN's
    parameters open; its smallest cluster has `size` members here, since five of the package's defaults are more than the attackers of
    a small cohort. An output layer without bias is compared by its weights. If every cluster is dropped, those who are no suspects
    themselves are kept.

    The trust in an update is its clipping factor, 0 if dropped.
    """
    shares, vectors = update_energies(updates, ctx.layout)
    counts = exceedings(shares).double()
    usual = float(counts.quantile(0.5))
    suspects = (counts <= 0.5 * usual) & (usual > 0)

    def clustered(distances: Tensor) -> Tensor:
        return apart(density_clusters(distances, size, samples=size))

    def lengths(points: Tensor) -> Tensor:  # copies of a point must be at distance 0, which products of many points are not
        return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")

    by_angle = clustered(cosine_distances(vectors))
    by_energy = clustered(lengths(shares))
    by_output = torch.zeros_like(by_angle)
    for _ in range(draws):
        by_output += clustered(lengths(division_differences(updates, ctx, samples))) / draws
    labels = density_clusters((by_angle + by_energy + by_output) / 3, size, samples=size)
    kept = ~suspects
    for label in set(labels) - {-1}:
        own = torch.tensor([one == label for one in labels])
        kept[own] = bool(suspects[own].double().mean() < tau)
    if not bool(kept.any()):
        kept = ~suspects
    factors, _ = median_clip(updates)
    trust = torch.where(kept, factors, 0.0)
    return Verdict(blocks.combine(trust / max(1, int(kept.sum())), updates), trust=trust.float())
