"""What labels a client trained on, read off the gradient of the last layer's bias."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.fits import RunFacts, first
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.probes.base import ProbeContext, Result, need, probe
from fedtrust.probes.guesses import LabelCounts
from fedtrust.probes.inversion_update import Seen, acts, box_of, mean_gradient, seen, start_images, undone

_NO_BIAS = "reads labels off the bias of one last linear layer, and the model has no such bias"


def _bias(model: Architecture, layout: Layout) -> slice | None:
    name = f"{model.heads[0]}.bias".lstrip(".") if len(model.heads) == 1 else ""
    return layout.slices.get(name)


def unlabelled(facts: RunFacts) -> str | None:
    """Return why no label can be read off an update of this model."""
    return _NO_BIAS if _bias(facts.model, facts.layout) is None else None


def bias_gradient(ctx: ProbeContext, what: Seen) -> Tensor:
    """Return the mean gradient of the last layer's bias [C]: under cross-entropy the mean of p − e_y over samples and local steps.

    Raises:
        ValueError: the model has no single linear layer with a bias at its end.
    """
    where = _bias(need(ctx.model, "the model"), need(ctx.layout, "the layout"))
    if where is None:
        raise ValueError(_NO_BIAS)
    return mean_gradient(what, need(ctx.recipe, "the recipe"))[where]


def counted(shares: Tensor, n: int) -> Tensor:
    """Return whole numbers that sum to n, int64 [C], closest to `shares` [C]; negative ones are 0, largest remainders go up."""
    ideal = shares.double().clamp(min=0)
    ideal = ideal * (n / ideal.sum()) if float(ideal.sum()) > 0 else torch.full_like(ideal, n / len(ideal))
    whole = ideal.floor()
    up = (ideal - whole).argsort(descending=True, stable=True)[: n - int(whole.sum())]
    return whole.long().index_add(0, up, torch.ones_like(up))


def by_mean_output(gradient: Tensor, output: Tensor, n: int) -> Tensor:
    """Return how many samples of each class gave the bias gradient [C], int64 [C]: Geng et al., section 3.3 (zero-shot restoration).

    The bias gradient of cross-entropy is the mean of p − e_y, so the class counts are n (p̄ − gradient). The mean output p̄ of the client's
    samples is not known; that of noise stands for it, which an untrained model answers alike.

    Args:
        gradient: the mean gradient of the last layer's bias [C].
        output: the model's output for noise [m, C].
        n: how many samples there are.
    """
    return counted(n * (output.softmax(1).mean(0) - gradient), n)


def label_counts(ctx: ProbeContext, what: Seen, n: int) -> Tensor:
    """Return how many of n samples are of each class, int64 [C]; of a single one it is iDLG's label."""
    gradient = bias_gradient(ctx, what)
    if n == 1:
        return torch.nn.functional.one_hot(gradient.argmin(), len(gradient))
    noise = start_images(ctx.task.shape, 64, box_of(ctx), ctx.rng)
    with torch.no_grad():
        return by_mean_output(gradient, need(ctx.model, "the model")(what.start, noise), n)


def labels_of(ctx: ProbeContext, what: Seen, n: int) -> Tensor:
    """Return the labels of n of a client's samples, sorted, int64 [n]."""
    counts = label_counts(ctx, what, what.samples)
    if n < what.samples:
        counts = counted(counts, n)
    return torch.arange(len(counts)).repeat_interleave(counts)


@probe(
    "label-recovery",
    role="curious-server",
    task="classification",
    once=True,
    fits=first(unlabelled, undone),
    paper="Geng et al., arXiv 2110.09074, section 3.3 (zero-shot batch label restoration); one sample: Zhao et al. (iDLG), 2020",
)
def label_recovery(
    ctx: ProbeContext,
    *,
    at_round: Annotated[int, Field(ge=1, le=100_000)] = 1,
    clients: Annotated[int, Field(ge=1, le=100_000)] = 4,
) -> Result:
    """How many samples of each class a client trained on, from the gradient of the last layer's bias. Meant for cross-entropy.

    Exact for a single sample. Of a batch it is close while the model is untrained, and loses as the model learns (its output for the
    client's samples is then no longer that for noise) and with every local step.

    Args:
        ctx: what a curious server knows.
        at_round: when it acts.
        clients: how many clients it attacks, those with the smallest ids that replied.
    """
    if not acts(ctx, at_round):
        return {}
    counts = {one.client: label_counts(ctx, one, one.samples) for one in seen(ctx, clients) if one.client is not None}
    return {"label-recovery": LabelCounts(counts)} if counts else {}
