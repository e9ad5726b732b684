"""Membership inference that compares the model with models of the user's own: LiRA and RMIA.

Both ask the model for its outputs alone. To train models like it the user knows its architecture and the clients' recipe, and has samples
of its own like theirs: simulated knowledge.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.fits import within_budget
from fedtrust.probes.base import ProbeContext, Result, need, probe
from fedtrust.probes.guesses import Membership
from fedtrust.probes.membership import scaled_confidence, told

Models = Annotated[int, Field(ge=2, le=1024)]
Many = Annotated[int, Field(ge=1)]
Epochs = Annotated[int, Field(ge=1)]

#: With fewer shadow models than this a deviation for each candidate is too uncertain (Carlini et al., S&P 2022, section V-B and figure 6).
OWN_DEVIATION = 64


class Shadows(NamedTuple):
    """Models of the observer's own, and what each was trained on.

    Attributes:
        params: their parameters [k, d].
        inside: whether a model was trained on a candidate [k, q], bool.
        own: whether it was trained on a sample of the population [k, p], bool.
    """

    params: Tensor
    inside: Tensor
    own: Tensor


def train_shadows(ctx: ProbeContext, models: int, epochs: int, samples: int | None, online: bool) -> Shadows:
    """Train shadow models.

    Offline each is trained on its own draw from the population. Online each also gets a random half of the candidates (pairs of models
    share them out, so that every candidate is inside of half of the models), and only the rest comes from the population.

    Args:
        ctx: the observer's context.
        models: how many.
        epochs: passes over the data.
        samples: how many each is trained on; by default, and at most from the population, as many as half of that.
        online: whether candidates are trained on.
    """
    x, y = need(ctx.candidates, "the candidates")
    own_x, own_y = need(ctx.population, "samples of its own")
    half = max(len(own_x) // 2, 1)
    inside = _halves(len(x), models, ctx.rng) if online else torch.zeros(models, len(x), dtype=torch.bool)
    own = torch.zeros(models, len(own_x), dtype=torch.bool)
    for chosen, taken in zip(own, inside.sum(1).tolist(), strict=True):
        chosen[torch.randperm(len(own_x), generator=ctx.rng)[: min(max((samples or half) - taken, 0), half)]] = True
    sets = [(torch.cat([x[i], own_x[o]]), torch.cat([y[i], own_y[o]])) for i, o in zip(inside, own, strict=True)]
    return Shadows(need(ctx.shadow, "a trainer")(sets, epochs=epochs), inside, own)


def _halves(count: int, models: int, rng: torch.Generator) -> Tensor:
    """Return which candidates each model is trained on [models, count]: half of them, and its neighbour the other half."""
    chosen = torch.zeros(models, count, dtype=torch.bool)
    for i in range(0, models, 2):
        chosen[i, torch.randperm(count, generator=rng)[: count // 2]] = True
        chosen[i + 1 : i + 2] = ~chosen[i]
    return chosen


def answers(ctx: ProbeContext, params: Tensor, x: Tensor) -> Tensor:
    """Return what each model [k, d] says to the samples, [k, n, C]."""
    model = need(ctx.model, "the architecture")
    with torch.no_grad():
        return torch.stack([torch.cat([model(one, part) for part in torch.split(x, 512)]) for one in params])


@probe(
    "lira",
    role="user",
    when="end",
    task="classification",
    asks="membership",
    population=True,
    architecture=True,
    fits=within_budget(lambda facts: facts.candidates + (facts.own if facts.params["align"] else 0)),
    paper="Carlini, Chien, Nasr, Song, Terzis and Tramèr, S&P 2022, algorithm 1 (online) and section V-C (offline)",
)
def lira(
    ctx: ProbeContext,
    *,
    mode: Literal["offline", "online"] = "offline",
    models: Models = 32,
    epochs: Epochs = 10,
    samples: Many | None = None,
    deviation: Literal["auto", "common", "own"] = "auto",
    align: bool = True,
) -> Result:
    """Ask of each candidate how its confidence compares with that in models that surely were not (and were) trained on it.

    The logit-scaled confidence of a candidate is taken for Gaussian over models. Offline: how many deviations it lies above the mean of the
    shadow models, none of which has seen a candidate (the paper's one-sided test, in its logarithm-free form: the order is the same).
    Online: the log-likelihood ratio between the shadow models that were trained on the candidate and those that were not.

    Args:
        ctx: the observer's context.
        mode: `online` trains the shadow models after the candidates are known, on halves of them.
        models: how many shadow models.
        epochs: passes over their data.
        samples: on how many each is trained; by default, and at most from the population, on as many as half of that.
        deviation: each candidate's own, a common one of all, or (`auto`) its own from 64 models on.
        align: bring the shadow models' confidence to the scale of the model's, see below.

    Returns:
        `lira-offline` or `lira-online`, so that both can stand in one scenario.

    The paper trains shadow models as the target was trained. Here the target is an average of many, less sure of itself than a model that
    is
    trained centrally, as shadow models are: the paper's scores would mostly measure that difference. With `align` their scaled confidence s
    is replaced by c·s + e, with c and e fitted by least squares on the samples of the population, which neither the target nor the shadow
    models that are asked were trained on; this step is ours, and without it the scores are the paper's.
    """
    x, y = need(ctx.candidates, "the candidates")
    shadow = train_shadows(ctx, models, epochs, samples, mode == "online")
    seen = scaled_confidence(told(ctx, x), y)  # [q]
    theirs = scaled_confidence(answers(ctx, shadow.params, x), y.expand(models, -1))  # [k, q]
    common = deviation == "common" or (deviation == "auto" and models < OWN_DEVIATION)
    if align:
        factor, offset = _alignment(ctx, shadow)
        theirs = factor * theirs + offset
    mean, std = _gaussian(theirs, ~shadow.inside, common)
    scores = (seen - mean) / std
    if mode == "online":
        mean_in, std_in = _gaussian(theirs, shadow.inside, common)
        scores = scores.square() / 2 + std.log() - ((seen - mean_in) / std_in).square() / 2 - std_in.log()
    return {f"lira-{mode}": Membership(scores)}


def _alignment(ctx: ProbeContext, shadow: Shadows) -> tuple[float, float]:
    """Return the factor and offset from the shadow models' scaled confidence to the model's, from samples that none was trained on."""
    x, y = need(ctx.population, "samples of its own")
    seen = scaled_confidence(told(ctx, x), y)
    theirs, _ = _gaussian(scaled_confidence(answers(ctx, shadow.params, x), y.expand(len(shadow.own), -1)), ~shadow.own, True)
    known = ~shadow.own.all(0)
    theirs, seen = theirs[known], seen[known]
    spread = theirs - theirs.mean()
    factor = float((spread * seen).sum() / spread.square().sum().clamp(min=1e-12))
    if factor <= 0:
        return 1.0, 0.0  # the model has learnt nothing of what they have learnt
    return factor, float(seen.mean() - factor * theirs.mean())


def _gaussian(values: Tensor, counts: Tensor, common: bool) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the models that count, of each candidate [q]; a common deviation pools the candidates'."""
    n = counts.sum(0)
    mean = (values * counts).sum(0) / n.clamp(min=1)
    squares = ((values - mean).square() * counts).sum(0)
    variance = (squares.sum() / (n - 1).clamp(min=0).sum().clamp(min=1)).expand_as(mean) if common else squares / (n - 1).clamp(min=1)
    return mean, variance.sqrt().clamp(min=1e-3)


@probe(
    "rmia",
    role="user",
    when="end",
    task="classification",
    asks="membership",
    population=True,
    architecture=True,
    fits=within_budget(lambda facts: facts.candidates + facts.own),
    paper="Zarifzadeh, Liu and Shokri (RMIA), ICML 2024, equations 3 to 5 and 9 (offline)",
)
def rmia(
    ctx: ProbeContext,
    *,
    models: Models = 4,
    gamma: Annotated[float, Field(ge=1)] = 2.0,
    a: Annotated[float, Field(ge=0, le=1)] = 0.3,
    epochs: Epochs = 10,
    samples: Many | None = None,
) -> Result:
    """Ask of each candidate against how many samples of the population its rise in confidence stands out.

    The score of x is the share of samples z with (p(x|θ)/p(x)) ÷ (p(z|θ)/p(z)) ≥ `gamma`. p(z) is the mean confidence of the reference
    models, which saw z or did not; none of them saw x, so p(x) = ((1 + `a`) p_out(x) + 1 − `a`)/2 as in the paper's offline form.
    Confidences are those of the softmax (the paper also tries a Taylor form of it).

    Args:
        ctx: the observer's context.
        models: how many reference models; few are enough, which is the paper's point.
        gamma: by how much x must stand out.
        a: how far the confidence in what was trained on follows that in what was not; 1: entirely.
        epochs: passes over the reference models' data.
        samples: on how many each is trained; by default, and at most from the population, on as many as half of that.
    """
    x, y = need(ctx.candidates, "the candidates")
    own_x, own_y = need(ctx.population, "samples of its own")
    shadow = train_shadows(ctx, models, epochs, samples, online=False)
    out = _confidence(answers(ctx, shadow.params, x), y).mean(0)  # [q]
    base = _confidence(answers(ctx, shadow.params, own_x), own_y).mean(0)  # [p]
    rise = _confidence(told(ctx, x), y) / (((1 + a) * out + 1 - a) / 2)
    others = _confidence(told(ctx, own_x), own_y) / base.clamp(min=1e-30)
    bar = (others * gamma).sort().values  # x stands out from all z with gamma · (rise of z) ≤ its own
    return {"rmia": Membership(torch.searchsorted(bar, rise, right=True).double() / len(bar))}


def _confidence(output: Tensor, y: Tensor) -> Tensor:
    """Return the softmax probability of the label, float64 [..., n], from logits [..., n, C] and labels [n]."""
    chance = output.double().softmax(-1)
    return chance.gather(-1, y.expand(chance.shape[:-1]).unsqueeze(-1)).squeeze(-1)
