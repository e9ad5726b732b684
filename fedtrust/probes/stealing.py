"""Users who make themselves a copy of a model that they can only ask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.data.base import Task
from fedtrust.fits import RunFacts
from fedtrust.probes.base import ProbeContext, Result, need, probe
from fedtrust.probes.guesses import Copies, Copy
from fedtrust.release import log_probabilities

Count = Annotated[int, Field(ge=1)]
_BY_DIMENSION: list[int] = []
_BUDGETS = [25, 50, 100]


def _points(task: Task, count: int, rng: torch.Generator) -> Tensor:
    """Return random inputs [count, *shape]: uniform over the range of a feature, standard normal where there is none."""
    if task.low is None or task.high is None:
        return torch.randn(count, *task.shape, generator=rng)
    return task.low + (task.high - task.low) * torch.rand(count, *task.shape, generator=rng)


def _network(ctx: ProbeContext, params: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a model of the thief's own as a function."""
    model = need(ctx.model, "the architecture")

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(params, part) for part in torch.split(x, 512)])

    return predict


def _too_many(facts: RunFacts, asks: int, own: int) -> str | None:
    """Return why a thief cannot ask so many queries, so many of them samples of its own."""
    if facts.queries is not None and asks > facts.queries:
        return f"asks {asks} queries, and a user may ask {facts.queries} (release.queries)"
    if own > facts.own:
        return f"takes {own} samples of its own and has {facts.own}; let it take fewer, or the source have more test samples"
    return None


def _unsolved(facts: RunFacts) -> str | None:
    return _too_many(facts, max(facts.params["queries"], default=math.prod(facts.task.shape) + 1), 0)


def _not_augmented(facts: RunFacts) -> str | None:
    seeds, queries = facts.params["seeds"], facts.params["queries"]
    if seeds > queries:
        return f"begins with {seeds} samples of its own (seeds), and is to ask about {queries} at most (queries)"
    return _too_many(facts, queries, seeds)


def _not_copied(facts: RunFacts) -> str | None:
    asks, noise = max(facts.params["queries"]), facts.params["inputs"] == "noise"
    if noise and facts.params["strategy"] == "adaptive":
        return "the adaptive strategy goes by the labels of the thief's samples; noise has none"
    return _too_many(facts, asks, 0 if noise else asks)


@probe(
    "equation-solving",
    role="user",
    when="end",
    task="classification",
    fits=_unsolved,
    paper="Tramèr et al., USENIX Security 2016, sections 4.1.1 and 4.1.2",
)
def equation_solving(ctx: ProbeContext, *, queries: list[Count] = _BY_DIMENSION) -> Result:
    """Solve for the parameters of a logistic regression: with p features, p + 1 answers are equations enough for all classes.

    The thief knows, or believes, that the model is a multinomial logistic regression. Its log-probabilities, less their mean over the
    classes, are linear in the input: he asks about the lowest input and about it with one feature after another at its highest (0 and 1
    where features have no range), and solves. With more queries he adds random inputs and solves by least squares, with less he leaves
    features out; given logits he reads the parameters off as they are.

    Args:
        ctx: what the user sees.
        queries: how many samples he asks about, each number a copy of its own; by default p + 1 alone.
    """
    features = math.prod(ctx.task.shape)
    budgets = sorted(queries) or [features + 1]
    low, high = (0.0, 1.0) if ctx.task.low is None or ctx.task.high is None else (ctx.task.low, ctx.task.high)
    axes = torch.eye(features)[torch.randperm(features, generator=ctx.rng)]
    plan = torch.cat([torch.zeros(1, features), axes]) * (high - low) + low
    more = _points(ctx.task, max(0, budgets[-1] - len(plan)), ctx.rng).flatten(1)
    inputs = torch.cat([plan, more])[: budgets[-1]]
    told = ctx.query(inputs.reshape(-1, *ctx.task.shape)).double()
    if ctx.answers != "logits":
        told = log_probabilities(told, ctx.answers)
        told = told - told.mean(dim=1, keepdim=True)
    rows = torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    return {"equation-solving": Copies(tuple(_linear(ctx, rows[:n], told[:n]) for n in budgets))}


def _linear(ctx: ProbeContext, rows: Tensor, told: Tensor) -> Copy:
    """Return the linear model whose answers to the rows [n, p + 1] are closest to `told` [n, C], the smallest where there are many."""
    found = torch.linalg.lstsq(rows, told, driver="gelsd").solution.float()  # [p + 1, C]
    weight, bias = found[:-1].T.contiguous(), found[-1]
    layout = need(ctx.layout, "the layout")
    params = None
    if layout.shapes == (tuple(weight.shape), tuple(bias.shape)):
        params = torch.cat([weight.flatten(), bias])

    def predict(x: Tensor) -> Tensor:
        made: Tensor = x.flatten(1) @ weight.T + bias
        return made

    return Copy(predict, len(rows), params)


@probe(
    "jacobian-augmentation",
    role="user",
    when="end",
    task="classification",
    fits=_not_augmented,
    population=True,
    architecture=True,
    paper="Papernot et al., AsiaCCS 2017 (Practical Black-Box Attacks against Machine Learning), section 4.2, algorithm 1",
)
def jacobian_augmentation(
    ctx: ProbeContext,
    *,
    seeds: Count = 20,
    queries: Count = 160,
    step: Annotated[float, Field(gt=0)] = 0.1,
    epochs: Count = 20,
) -> Result:
    """Grow a training set from a few samples of one's own: from each, go a step in the direction to which the copy's answer is sensitive.

    Each turn the thief has the new samples labelled (he uses the label alone), trains a copy from scratch on all he has, and doubles them:
    x + step * sign of the gradient of the copy's output for the label of x. He stops when the next turn would ask for more than `queries`.

    Args:
        ctx: what the user sees.
        seeds: how many samples of his own he begins with.
        queries: how many samples he asks about at most.
        step: how far a new sample lies from its origin in each feature, in the features' units.
        epochs: passes over his samples in which a copy is trained.
    """
    model = need(ctx.model, "the architecture")
    own, _ = need(ctx.population, "samples of its own")
    x = own[_some(len(own), seeds, ctx.rng)]
    y = ctx.query(x).argmax(dim=-1)
    copies = []
    while True:
        (params,) = need(ctx.shadow, "how to train")([(x, y)], epochs=epochs)
        copies.append(Copy(_network(ctx, params), len(x)))
        if 2 * len(x) > queries:
            return {"jacobian-augmentation": Copies(tuple(copies))}
        given = x.clone().requires_grad_()
        with torch.enable_grad():
            chosen = model(params, given).gather(1, y[:, None]).sum()
            (slope,) = torch.autograd.grad(chosen, given)
        new = x + step * slope.sign()
        if ctx.task.low is not None and ctx.task.high is not None:
            new = new.clamp(ctx.task.low, ctx.task.high)
        x, y = torch.cat([x, new]), torch.cat([y, ctx.query(new).argmax(dim=-1)])


def _some(have: int, wanted: int, rng: torch.Generator) -> Tensor:
    """Return which of the thief's samples he takes, in random order.

    Raises:
        ValueError: he has fewer.
    """
    if wanted > have:
        raise ValueError(f"it has {have} samples of its own, not {wanted}: ask for less, or let the source have more test samples")
    return torch.randperm(have, generator=rng)[:wanted]


@probe(
    "knockoff",
    role="user",
    when="end",
    task="classification",
    fits=_not_copied,
    population=True,
    architecture=True,
    paper="Orekondy, Schiele and Fritz, CVPR 2019 (Knockoff Nets), sections 4.1 and 4.2",
)
def knockoff(
    ctx: ProbeContext,
    *,
    queries: Annotated[list[Count], Field(min_length=1)] = _BUDGETS,
    inputs: Literal["population", "noise"] = "population",
    strategy: Literal["random", "adaptive"] = "random",
    epochs: Count = 10,
    copies: Annotated[int, Field(ge=1, le=100)] = 10,
) -> Result:
    """Have many inputs answered and train a copy on the answers, probabilities and all.

    The inputs are samples of the thief's own, like the clients' (`population`), or random ones that look like nothing (`noise`: uniform
    over the features' range, or standard normal). Taken at random, or by the paper's adaptive strategy: a gradient bandit over the labels
    that the thief gave his samples, rewarded where the answer is certain (the margin of the two likeliest classes) and where it is of a
    class seldom seen so far; the paper's third reward, the loss of a copy trained meanwhile, is left out. The copy learns the whole
    answer: each sample stands `copies` times in its training set, with labels in the proportion of the answer's probabilities.

    Args:
        ctx: what the user sees.
        queries: how many samples he asks about, each number a copy of its own.
        inputs: what he asks about.
        strategy: in which order.
        epochs: passes over the training set.
        copies: into how many labels an answer is spread; 1 draws a single label from it.
    """
    budgets = sorted(queries)
    if strategy == "adaptive":
        if inputs == "noise":
            raise ValueError("the adaptive strategy goes by the labels of the thief's samples; noise has none")
        x, told = _adaptive(ctx, budgets[-1])
    else:
        own = need(ctx.population, "samples of its own")[0]
        x = _points(ctx.task, budgets[-1], ctx.rng) if inputs == "noise" else own[_some(len(own), budgets[-1], ctx.rng)]
        told = ctx.query(x)
    chances = log_probabilities(told, ctx.answers).softmax(dim=-1) if ctx.answers != "label" else told
    labels = _spread(chances, copies, ctx.rng)  # [n, copies]
    sets = [(x[:n].repeat_interleave(copies, dim=0), labels[:n].flatten()) for n in budgets]
    models = need(ctx.shadow, "how to train")(sets, epochs=epochs)
    return {"knockoff": Copies(tuple(Copy(_network(ctx, params), n) for params, n in zip(models, budgets, strict=True)))}


def _spread(chances: Tensor, copies: int, rng: torch.Generator) -> Tensor:
    """Return labels [n, copies] in the proportion of probabilities [n, C], by systematic sampling (at most one off for each class)."""
    ends = (chances / chances.sum(dim=1, keepdim=True).clamp(min=1e-12)).cumsum(dim=1)
    places = (torch.arange(copies) + torch.rand(len(chances), 1, generator=rng)) / copies  # [n, copies]
    return torch.searchsorted(ends.contiguous(), places.to(ends.dtype)).clamp(max=chances.shape[1] - 1)


def _adaptive(ctx: ProbeContext, budget: int) -> tuple[Tensor, Tensor]:
    """Return the samples that the bandit asked about, and the answers, in their order."""
    own, labels = need(ctx.population, "samples of its own")
    order = _some(len(own), len(own), ctx.rng).tolist()
    _some(len(own), budget, ctx.rng)
    left = {z: [i for i in order if int(labels[i]) == z] for z in sorted(set(labels.tolist()))}
    liking, drawn = dict.fromkeys(left, 0.0), dict.fromkeys(left, 0)
    mean_answer = torch.zeros(ctx.task.classes)
    rewards: list[float] = []
    taken, told = [], []
    for turn in range(budget):
        open_ = [z for z in left if left[z]]
        policy = torch.tensor([liking[z] for z in open_]).softmax(dim=0)
        chosen = int(torch.multinomial(policy, 1, generator=ctx.rng))
        z = open_[chosen]
        taken.append(left[z].pop())
        told.append(ctx.query(own[taken[-1]][None])[0])
        answer = log_probabilities(told[-1][None], ctx.answers)[0].exp()
        first, second = answer.topk(2).values.tolist()
        rare = float((answer - mean_answer).clamp(min=0).sum())
        mean_answer += (answer - mean_answer) / (turn + 1)
        rewards.append((first - second + rare) / 2)
        drawn[z] += 1
        _learn(liking, open_, policy.tolist(), chosen, rewards[-1] - sum(rewards[-25:]) / len(rewards[-25:]), 1 / drawn[z])
    return own[taken], torch.stack(told)


def _learn(liking: dict[int, float], arms: Sequence[int], policy: Sequence[float], chosen: int, gain: float, rate: float) -> None:
    """Take a step of the gradient bandit, in place."""
    for place, arm in enumerate(arms):
        liking[arm] += rate * gain * ((1.0 if place == chosen else 0.0) - policy[place])
