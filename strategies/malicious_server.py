"""Servers that send another model than the true one, so that an update gives single samples away: Robbing the Fed, fishing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtrust.fits import RunFacts, first
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.models.entrance import Dense, denses, entrance, head
from fedtrust.sending import SendContext, sender

Victims = Annotated[int, Field(ge=1)]


def planted(model: Architecture, layout: Layout) -> tuple[Dense, Dense]:
    """Return the layer that measures and the linear layer after it.

    Raises:
        ValueError: the model does not begin with a linear layer, a ReLU and a further linear layer.
    """
    first, all_dense = entrance(model, layout), denses(model, layout)
    names = list(model.leaves)
    if first is None or len(all_dense) < 2 or not isinstance(model.leaves[names[names.index(first.name) + 1]], nn.ReLU):
        raise ValueError("needs a model that begins with linear, ReLU, linear (mlp with relu, or imprint)")
    second = all_dense[1]
    if second.shape[1] != first.shape[0]:
        raise ValueError("needs a model whose second linear layer comes right behind the first (mlp with relu, or imprint)")
    return first, second


def _measurable(facts: RunFacts) -> str | None:
    try:
        planted(facts.model, facts.layout)
    except ValueError as error:
        return str(error)
    return None


def _fishable(facts: RunFacts) -> str | None:
    last, target = head(facts.model, facts.layout), facts.params["target"]
    if last is None or last.shape[0] != facts.task.classes:
        return "needs a model that ends with one linear layer with a bias"
    return f"`target` is {target}, but the classes are 0 to {facts.task.classes - 1}" if target >= facts.task.classes else None


def _enough(facts: RunFacts) -> str | None:
    wanted = facts.params.get("victims")
    if wanted is None or wanted <= facts.per_round:
        return None
    return f"`victims` is {wanted}, but {facts.per_round} client{'s are' if facts.per_round > 1 else ' is'} asked in a round"


def edges_of(measured: Tensor, bins: int, how: str) -> Tensor:
    """Return the lower edges of bins that a sample is as likely to fall into one as into another, rising [bins].

    The first lies so low that no sample is below it.

    Args:
        measured: the measurement of samples of the server's own [m].
        bins: how many bins.
        how: `quantiles` of these measurements, or of the `normal` distribution with their mean and deviation.
    """
    level = torch.arange(1, bins, dtype=torch.float64) / bins
    values = measured.double()
    mean, deviation = values.mean(), values.std(correction=0).clamp(min=1e-12)
    inner = values.quantile(level) if how == "quantiles" else mean + deviation * torch.special.ndtri(level)
    return torch.cat([torch.minimum(inner[:1], values.min()) - 20 * deviation, inner])


@sender("robbing-the-fed", paper="Fowl et al. (Robbing the Fed), ICLR 2022, section 3", population=True, fits=first(_measurable, _enough))
def robbing_the_fed(
    params: Tensor,
    ctx: SendContext,
    *,
    edges: Literal["quantiles", "normal"] = "quantiles",
    scale: Annotated[float, Field(gt=0)] = 0.01,
    victims: Victims | None = None,
) -> Mapping[int, Tensor]:
    """Make every unit of the first layer measure the same, the mean brightness, and compare it with an edge of its own.

    Unit k is active for the samples that are brighter than its edge; the next layer hands the same gradient to every unit. Two
    neighbouring units then differ by the samples between their edges alone: the probe `robbing-the-fed-readout` reads them. Works at any
    size of batch as long as the client takes a single step; whoever shares a bin is mixed up. Nothing else of the model is touched. Where
    the agreed model does not begin with a linear layer, the paper puts one there: the model `imprint`.

    Args:
        params: the true model [d].
        ctx: what the server knows; its own samples (simulated: half of the test samples) tell how bright samples are.
        edges: bins of equal probability by the quantiles of its own samples, or of a normal distribution (the paper's).
        scale: size of the measuring weights. Small weights leave more of float32's precision to the gradient.
        victims: send it to the first so many of the clients asked only; all by default.

    Returns:
        Victim → model [d]; the others get the true one.

    Raises:
        ValueError: the model does not begin with linear, ReLU, linear.
    """
    first, second = planted(ctx.model, ctx.layout)
    if ctx.population is None:
        raise ValueError("robbing-the-fed needs samples of the server's own")
    units, size = first.shape
    measured = ctx.population[0].flatten(1).mean(1)
    planted_model = params.clone()
    weight, bias = first.of(planted_model)
    weight.fill_(scale / size)
    bias.copy_((-scale * edges_of(measured, units, edges)).float())
    onward, after = second.of(planted_model)
    onward.copy_((0.5 + torch.rand(second.shape[0], 1, generator=ctx.rng)).expand(second.shape) / (scale * units))
    after.zero_()
    return dict.fromkeys(ctx.clients[:victims], planted_model)


@sender(
    "fishing",
    task="classification",
    fits=first(_fishable, _enough),
    paper="Wen et al. (Fishing for User Data in Large-Batch Federated Learning), ICML 2022, section 3.2 (class fishing)",
)
def fishing(
    params: Tensor,
    ctx: SendContext,
    *,
    target: Annotated[int, Field(ge=0)],
    bias: Annotated[float, Field(gt=0)] = 12.0,
    victims: Victims | None = None,
) -> Mapping[int, Tensor]:
    """Silence every class but one: only samples of the class `target` then change anything below the last layer.

    The last layer's other rows are set to zero and their biases to `bias`. A sample of another class is certain not to be of the target,
    and sends no gradient down; one of the target is as wrong as can be, and sends all of it. What is left of the batch, one or a few
    samples, the probe `fishing-readout` inverts. The paper goes on to single out one sample of several of the class (feature fishing),
    over further rounds; that is not done here.

    Args:
        params: the true model [d].
        ctx: what the server knows.
        target: the class.
        bias: how certain the others are made; what they leak falls with exp(−bias).
        victims: send it to the first so many of the clients asked only; all by default.

    Returns:
        Victim → model [d]; the others get the true one.

    Raises:
        ValueError: the model has no linear layer with a bias at its end.
    """
    last = head(ctx.model, ctx.layout)
    if last is None:
        raise ValueError("fishing needs a model that ends with one linear layer with a bias")
    bait = params.clone()
    rows, biases = last.of(bait)
    kept = rows[target].clone()
    rows.zero_()
    rows[target] = kept
    biases.fill_(bias)
    biases[target] = 0.0
    return dict.fromkeys(ctx.clients[:victims], bait)
