"""Rules that compare directions: FoolsGold, and the cosine similarities that others use too."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.layout import Layout
from fedtrust.server import AggContext, PipelineFacts, Verdict, aggregator
from fedtrust.strategies import blocks
from fedtrust.strategies.distances import EXACT

#: A similarity so close to 1 is 1: the rows differ by no more than rounding.
_SAME = 1e-12


def norms(updates: Tensor) -> Tensor:
    """Return the rows' L2 norms, float64 [n]."""
    total = torch.zeros(len(updates), dtype=torch.float64)
    blocks.each(
        blocks.cut(len(updates), updates.shape[1], blocks.SORTED),
        lambda where: updates[:, where].double().square().sum(dim=1),
        total.add_,
    )
    return total.sqrt()


def cosine_similarities(updates: Tensor) -> Tensor:
    """Return the cosines of the angles between the rows, float64 [n, n], symmetric; a row of zeros is at right angles to all others.

    Up to `distances.EXACT` products n² d are made in float64, more in float32 and added up in float64.
    """
    n, d = updates.shape
    lengths = norms(updates)
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)[:, None]  # before the product: squares of large rows would overflow
    wide = n * n * d <= EXACT
    total = torch.zeros(n, n, dtype=torch.float64)

    def work(where: slice) -> Tensor:
        unit = updates[:, where].double() * scale
        unit = unit if wide else unit.float()
        return (unit @ unit.T).double()

    blocks.each(blocks.cut(n, d, blocks.MULTIPLIED // 2), work, total.add_)
    return ((total + total.T) / 2).clamp_(-1, 1).fill_diagonal_(1.0)


def output_layer(layout: Layout) -> list[str]:
    """Return the names of the last layer's parameters: those that share their layer with the last of all."""
    layer = layout.names[-1].rpartition(".")[0]
    return [name for name in layout.names if name.rpartition(".")[0] == layer]


def indicative_features(params: Tensor, layout: Layout) -> Tensor:
    """Return how much each parameter of the output layer counts, [p]: its size, each class's adding up to the number of its parameters.

    Args:
        params: the global model [d].
        layout: its layout; the first dimension of the output layer's parameters is the class.
    """
    parts = [params[layout.slices[name]].view(layout.shapes[layout.names.index(name)][0], -1).abs() for name in output_layer(layout)]
    per_class = torch.cat([part.double() for part in parts], dim=1)  # [classes, p ÷ classes]
    mean = per_class.mean(dim=1, keepdim=True)
    shares = torch.where(mean > 0, per_class / mean, 1.0)
    ends = list(itertools.accumulate(part.shape[1] for part in parts))
    return torch.cat([shares[:, end - part.shape[1] : end].flatten() for part, end in zip(parts, ends, strict=True)]).float()


def foolsgold_weights(similarities: Tensor, confidence: float) -> Tensor:
    """Return the clients' weights α, float64 [n] from 0 to 1; see `foolsgold`.

    Args:
        similarities: cosines of the clients' histories, float64 [n, n].
        confidence: κ.
    """
    cs = similarities.clone().fill_diagonal_(0.0)  # the 0 also makes negative similarities count as none
    v = cs.max(dim=1).values
    pardon = torch.where(v[None, :] > v[:, None], v[:, None] / v[None, :], 1.0)
    alpha = 1 - (cs * pardon).max(dim=1).values
    alpha = torch.where(alpha < _SAME, 0.0, alpha)
    if not bool(alpha.any()):
        return torch.ones_like(alpha)
    alpha = alpha / alpha.max()
    return (confidence * (torch.logit(alpha) + 0.5)).clamp(0, 1)


def _needs(facts: PipelineFacts) -> str | None:
    return "it remembers each client's updates, and bucketing hides whose they are" if "bucketing" in facts.filters else None


@aggregator(
    "foolsgold",
    needs=_needs,
    paper="Fung, Yoon and Beschastnikh, RAID 2020 (The Limitations of Federated Learning in Sybil Settings), algorithm 1",
    exempt=("translation", "robust"),  # it compares directions, and a single huge row is like no other
)
def foolsgold(
    updates: Tensor,
    ctx: AggContext,
    *,
    confidence: Annotated[float, Field(gt=0)] = 1.0,
    features: Literal["output", "all"] = "output",
    indicative: bool = True,
) -> Verdict:
    """Weigh clients down whose updates, summed over the rounds, point the same way as somebody else's: sybils share a goal.

    With H the clients' sums of updates, cs their cosine similarities and vᵢ = maxⱼ csᵢⱼ: similarities to clients that are more similar to
    others are pardoned (csᵢⱼ ← csᵢⱼ vᵢ ÷ vⱼ where vⱼ > vᵢ), αᵢ = 1 − maxⱼ csᵢⱼ is divided by the largest, and becomes
    κ (ln(α ÷ (1 − α)) + 0.5), from 0 to 1. κ is `confidence`. The result is Σ αᵢ Δᵢ ÷ Σ αᵢ; the paper adds up gradients without dividing,
    which after local training would multiply the step by the number of clients.

    The paper compares indicative features: with `features = "output"` the output layer only, with `indicative` each of its parameters
    counting by its size in the global model, evenly over the classes; the state is then small. With `features = "all"` every parameter
    counts the same, and the state holds every client's sum, as large as all their updates together.

    Where the paper is silent or code differs: v is taken once, before pardoning; a client is not compared with itself; negative
    similarities count as 0; α = 1 goes to 1 (the authors' code puts 0.99 in its place). If all are as similar as can be, 0 ÷ 0, nobody
    stands out and all count the same. A client's first rounds are judged by what there is. Rows that are
    nobody's (an attacker's trial with more or fewer of them) are judged without a history.
    """
    where = torch.cat([torch.arange(part.start, part.stop) for part in (ctx.layout.slices[name] for name in output_layer(ctx.layout))])
    seen = updates if features == "all" else updates[:, where]
    state = None
    if len(ctx.clients) == len(updates):
        seen, state = _histories(seen, ctx)
    if features == "output" and indicative:
        seen = seen * indicative_features(ctx.params, ctx.layout)
    alpha = foolsgold_weights(cosine_similarities(seen), confidence)
    total = alpha.sum()
    return Verdict(blocks.combine(alpha / total, updates), trust=alpha.float(), state=state)


def _histories(seen: Tensor, ctx: AggContext) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clients' sums of updates up to this round [n, p], and the new state: ids, sorted, and sums of all who ever sent."""
    now = torch.tensor(ctx.clients)
    if "clients" not in ctx.state:
        return seen, {"clients": now, "sums": seen.clone()}
    known, sums = ctx.state["clients"], ctx.state["sums"]
    everybody = torch.tensor(sorted({*known.tolist(), *ctx.clients}))
    merged = torch.zeros(len(everybody), seen.shape[1])
    merged[torch.searchsorted(everybody, known)] = sums
    place = torch.searchsorted(everybody, now)
    merged.index_add_(0, place, seen)
    return merged[place], {"clients": everybody, "sums": merged}
