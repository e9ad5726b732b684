"""Samples that an update gives away in closed form, because the model begins with a linear layer; and what a malicious server planted."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.fits import Fits, RunFacts, first
from fedtrust.models.entrance import Dense, entrance, head
from fedtrust.probes.base import ProbeContext, Result, need, probe
from fedtrust.probes.gradient_inversion import by_signed_adam
from fedtrust.probes.guesses import Reconstruction, Reconstructions
from fedtrust.probes.inversion_labels import bias_gradient, labels_of, unlabelled
from fedtrust.probes.inversion_update import acts, mean_gradient, seen, undone

Count = Annotated[int, Field(ge=1, le=100_000)]

#: Two rows of a gradient are about the same sample if their ratios differ by less than this, relative to their length.
_ALIKE = 1e-2
#: A bias gradient below this share of the largest is noise of the update's float32.
_FAINT = 1e-4


def single(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the one input of a linear layer [p] from its gradients, weight [k, p] and bias [k]: Geiping et al., proposition 3.1.

    Every row of the weight's gradient is the input times that of the bias, so each ratio is the input; the least-squares fit over all rows
    is taken, in which rows that hardly moved count for little. Exact for one sample and one step. Zero where no unit was active.
    """
    w, b = weight.double(), bias.double()
    return ((b @ w) / b.square().sum().clamp(min=1e-300)).float()


def several(weight: Tensor, bias: Tensor, n: int) -> Tensor:
    """Return at most n inputs of a linear layer [m, p] from its gradients over a batch: rows that agree.

    A rectified unit that a single sample of the batch activates gives that sample away. Two such units give the same one, while units that
    several samples activate hardly ever agree: ratios are collected by how many rows have them (Boenisch et al., IEEE EuroS&P 2023,
    section 4, passive extraction). Where fewer than n agree, the ratios of the rows with the largest bias gradients stand in.
    """
    w, b = weight.double(), bias.double()
    loud = (b.abs() > _FAINT * b.abs().max()).nonzero().flatten()
    loud = loud[b[loud].abs().argsort(descending=True, stable=True)]
    if not len(loud):
        return weight.new_zeros(0, weight.shape[1])
    ratios = w[loud] / b[loud, None]  # [r, p]
    near = torch.cdist(ratios, ratios, compute_mode="donot_use_mm_for_euclid_dist") < _ALIKE * ratios.norm(dim=1).clamp(min=1e-12)
    left = torch.ones(len(loud), dtype=torch.bool)
    found: list[Tensor] = []
    while len(found) < n and bool(left.any()):
        agreeing = (near & left).sum(1) * left  # an early row, with a large gradient, comes first among equals
        rows = (near[int(agreeing.argmax())] & left).nonzero().flatten()
        found.append((b[loud[rows], None] * w[loud[rows]]).sum(0) / b[loud[rows]].square().sum())
        left[rows] = False
    return torch.stack(found).float()


def neighbours(weight: Tensor, bias: Tensor, order: Tensor) -> Tensor:
    """Return the inputs [m, p] that lie alone in a bin, from the gradients of a planted layer: Fowl et al., section 3.2.

    Unit k is active for every sample whose measurement is above its edge, and hands the same gradient on as its neighbours, so the
    difference between two neighbouring rows is about the samples of one bin alone; divided by that of the biases it is the sample, or a
    mixture where several share the bin.

    Args:
        weight: gradient of the layer's weight [k, p].
        bias: gradient of its bias [k].
        order: the units by rising edge [k].
    """
    w, b = weight[order].double(), bias[order].double()
    w, b = torch.cat([w[:-1] - w[1:], w[-1:]]), torch.cat([b[:-1] - b[1:], b[-1:]])
    full = b.abs() > _FAINT * b.abs().max().clamp(min=1e-300)
    return (w[full] / b[full, None]).float()


_BEGINS_OTHERWISE = "reads samples off a linear layer with a bias that comes first (logistic, mlp, imprint); this model begins otherwise"
#: Rows of a planted first layer differ by less than this share of their length; silenced rows are shorter than this beside the target's.
_SAME = 0.1


def _entrance(ctx: ProbeContext) -> Dense:
    layer = entrance(need(ctx.model, "the model"), need(ctx.layout, "the layout"))
    if layer is None:
        raise ValueError(_BEGINS_OTHERWISE)
    return layer


def _no_entrance(facts: RunFacts) -> str | None:
    return _BEGINS_OTHERWISE if entrance(facts.model, facts.layout) is None else None


def _unlabelled_classes(facts: RunFacts) -> str | None:
    return unlabelled(facts) if facts.task.kind == "classification" else None


def _set_by(sender: str) -> Fits:
    """Return a `fits` of a probe that reads what a malicious server planted; a plugin's sender may plant the same."""

    def asked(facts: RunFacts) -> str | None:
        if facts.sender != sender and ":" not in facts.sender:
            return f"reads what the sender '{sender}' planted, and nobody did; set [malicious_server] sender = \"{sender}\""
        number, (begin, end) = facts.params["at_round"], facts.sends
        if not begin <= number <= end:
            return f"acts in round {number} (at_round), but the malicious server in rounds {begin} to {end} only"
        return None

    return asked


def _fished(facts: RunFacts) -> str | None:
    target, theirs = facts.params["target"], (facts.sender_params or {}).get("target")
    if target >= facts.task.classes:
        return f"`target` is {target}, but the classes are 0 to {facts.task.classes - 1}"
    return f"looks for class {target}, but the sender fishes for class {theirs}" if theirs not in (None, target) else None


def measures(weight: Tensor) -> bool:
    """Return whether all rows of a first layer's weight [k, p] measure the same, as `robbing-the-fed` makes them."""
    middle = weight.mean(0)
    return bool(((weight - middle).norm(dim=1) <= _SAME * middle.norm()).all())


def silenced(weight: Tensor, target: int) -> bool:
    """Return whether the last layer's weight [C, p] is silent for every class but the target, as `fishing` makes it."""
    lengths = weight.norm(dim=1)
    others = torch.cat([lengths[:target], lengths[target + 1 :]])
    return bool((others <= _SAME * lengths[target]).all())


def _shaped(ctx: ProbeContext, flat: Tensor) -> Tensor:
    return flat.reshape(len(flat), *ctx.task.shape)


@probe(
    "analytic-inversion",
    role="curious-server",
    once=True,
    fits=first(_no_entrance, _unlabelled_classes, undone),
    paper="Geiping et al., NeurIPS 2020, proposition 3.1; Phong et al., IEEE TIFS 2018, section 3; batches: Boenisch et al., EuroS&P 2023, "
    "section 4",
)
def analytic_inversion(
    ctx: ProbeContext, *, at_round: Count = 1, clients: Count = 4, samples: Annotated[int, Field(ge=1, le=1024)] = 64
) -> Result:
    """Samples in closed form, from a model that begins with a linear layer: the gradient of a row of weights by that of its bias.

    Exact for a single sample and a single step. Of a batch, rectified units that one sample alone activates give it away (`mlp`); a unit
    that several activate gives a mixture of them, and so does every unit of `logistic`. Local steps blur it: the units' gradients
    are then sums over different models.

    Args:
        ctx: what a curious server knows.
        at_round: when it acts.
        clients: how many clients it attacks, those with the smallest ids that replied.
        samples: it gives no more than so many guesses for a client.
    """
    if not acts(ctx, at_round):
        return {}
    layer, items = _entrance(ctx), []
    for one in seen(ctx, clients):
        weight, bias = layer.of(mean_gradient(one, need(ctx.recipe, "the recipe")))
        alone = one.samples == 1
        x = single(weight, bias)[None] if alone else several(weight, bias, min(samples, one.samples))
        y = labels_of(ctx, one, 1) if alone and ctx.task.kind == "classification" else None
        items.append(Reconstruction(one.client, _shaped(ctx, x), y))
    return {"analytic-inversion": Reconstructions(tuple(items))} if items else {}


@probe(
    "robbing-the-fed-readout",
    role="curious-server",
    once="robbing-the-fed",
    fits=first(_set_by("robbing-the-fed"), _no_entrance, undone),
    paper="Fowl et al. (Robbing the Fed), ICLR 2022, section 3.2",
)
def robbing_the_fed_readout(ctx: ProbeContext, *, at_round: Count = 1, clients: Count = 4) -> Result:
    """Reads the samples out of the bins that the sender `robbing-the-fed` planted: differences of neighbouring units.

    Every sample alone in its bin comes out exactly, whatever the size of the batch; of one step (a batch as large as the client's data).
    Of a client that was sent the true model (see the sender's `victims`) nothing is read, and nothing claimed.

    Args:
        ctx: what a curious server knows.
        at_round: when it acts; the sender must have acted then.
        clients: how many clients it attacks, those with the smallest ids that replied.
    """
    if not acts(ctx, at_round):
        return {}
    layer, items = _entrance(ctx), []
    for one in seen(ctx, clients):
        rows, biases = layer.of(one.start)
        if not measures(rows):
            continue
        edges = -biases
        weight, bias = layer.of(mean_gradient(one, need(ctx.recipe, "the recipe")))
        items.append(Reconstruction(one.client, _shaped(ctx, neighbours(weight, bias, edges.argsort(stable=True)))))
    return {"robbing-the-fed": Reconstructions(tuple(items))} if items else {}


@probe(
    "fishing-readout",
    role="curious-server",
    task="classification",
    once="fishing",
    fits=first(_set_by("fishing"), _fished, unlabelled, undone),
    paper="Wen et al. (Fishing for User Data), ICML 2022, section 3.2",
)
def fishing_readout(
    ctx: ProbeContext,
    *,
    target: Annotated[int, Field(ge=0)],
    at_round: Count = 1,
    clients: Count = 4,
    samples: Annotated[int, Field(ge=1, le=64)] = 4,
    iterations: Count = 300,
    restarts: Count = 2,
    lr: Annotated[float, Field(gt=0)] = 0.1,
    tv: Annotated[float, Field(ge=0)] = 1e-4,
) -> Result:
    """Inverts what the sender `fishing` left of a large batch: the gradient of the samples of one class.

    How many they are stands in the gradient of the class' own bias. They are read off in closed form where the model begins with a linear
    layer, and looked for by Inverting Gradients in all layers but the last otherwise. Clients that were sent the true model are
    passed over.

    Args:
        ctx: what a curious server knows.
        target: the class that the sender fished for.
        at_round: when it acts; the sender must have acted then.
        clients: how many clients it attacks, those with the smallest ids that replied.
        samples: it looks for no more than so many samples of the class.
        iterations: of Adam, from each start; as in `inverting-gradients`, like what follows.
        restarts: how many starts.
        lr: Adam's learning rate, in units of the range of a pixel.
        tv: weight of the total variation.
    """
    if not acts(ctx, at_round):
        return {}
    layout, model = need(ctx.layout, "the layout"), need(ctx.model, "the model")
    begin, last = entrance(model, layout), head(model, layout)
    items, caught = [], 0
    for one in seen(ctx, clients):
        if last is None or not silenced(last.of(one.start)[0], target):
            continue
        count = int((-one.samples * bias_gradient(ctx, one)[target]).round())
        if count < 1:
            continue
        caught += count
        fished = dataclasses.replace(one, samples=min(count, samples))
        y = torch.full((fished.samples,), target)
        gradient = mean_gradient(one, need(ctx.recipe, "the recipe"))
        if begin is not None:
            rows = slice(target, target + 1) if begin.name == last.name else slice(None)
            weight, bias = (part[rows] for part in begin.of(gradient))
            x = _shaped(ctx, single(weight, bias)[None] if count == 1 else several(weight, bias, len(y)))
        else:
            mask = torch.ones(layout.size, dtype=torch.bool)
            mask[last.weight], mask[last.bias] = False, False
            x = by_signed_adam(ctx, fished, y, iterations, restarts, lr, tv, mask).x
        items.append(Reconstruction(one.client, x, y[: len(x)]))
    result: Result = {"fishing-readout/of-the-class": float(caught)}
    return {**result, "fishing": Reconstructions(tuple(items))} if items else result
