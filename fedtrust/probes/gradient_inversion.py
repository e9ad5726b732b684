"""A curious server that looks for the samples whose gradient is the one it was sent: DLG, iDLG, Inverting Gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedtrust.fits import first
from fedtrust.probes.base import ProbeContext, Result, need, probe
from fedtrust.probes.guesses import Reconstruction, Reconstructions
from fedtrust.probes.inversion_labels import labels_of, unlabelled
from fedtrust.probes.inversion_update import Seen, acts, as_one, box_of, imitated, seen, start_images, target, undone

Count = Annotated[int, Field(ge=1, le=100_000)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Found(NamedTuple):
    """The best of several starts: the objective, samples [n, *shape] and labels [n]."""

    value: float
    x: Tensor
    y: Tensor


def by_lbfgs(ctx: ProbeContext, what: Seen, n: int, y: Tensor | None, iterations: int, restarts: int, enough: float = 1e-6) -> Found:
    """Return samples and labels whose gradient is closest to the one seen: Zhu et al., algorithm 1.

    Minimises ‖g(x, y) − g‖² ÷ ‖g‖² by L-BFGS, over the samples, and over the logits of soft labels where `y` is not known. L-BFGS searches
    along its line here (strong Wolfe); the authors' code takes steps of length 1.

    Args:
        ctx: what the server knows.
        what: the update.
        n: how many samples to look for.
        y: their labels int64 [n], in no particular order, if known.
        iterations: of L-BFGS, from each start.
        restarts: how many starts at most; the best counts.
        enough: no further start once the objective is below this.
    """
    model, recipe = need(ctx.model, "the model"), need(ctx.recipe, "the recipe")
    wanted = target(what, recipe)
    scale = wanted.square().sum().clamp(min=1e-30)

    def distance(known: Tensor | None, free: Sequence[Tensor]) -> Tensor:
        labels = free[1].softmax(1) if known is None else known
        return (imitated(model, ctx.criterion, what, recipe, free[0], labels) - wanted).square().sum() / scale

    best: Found | None = None
    for _ in range(restarts):
        x = start_images(ctx.task.shape, n, box_of(ctx), ctx.rng)
        labels = None if y is None else ordered(what, y, ctx.rng)
        start = [x] if labels is not None else [x, torch.randn(n, ctx.task.classes, generator=ctx.rng)]
        value, found = _lbfgs(functools.partial(distance, labels), start, iterations)
        if best is None or value < best.value:
            best = Found(value, found[0], found[1].argmax(1) if labels is None else labels)
        if value < enough:
            break
    if best is None:
        raise ValueError("no start was made")
    return best


def _lbfgs(objective: Callable[[Sequence[Tensor]], Tensor], start: Sequence[Tensor], iterations: int) -> tuple[float, list[Tensor]]:
    """Return the smallest value seen and where it was."""
    free = [one.clone().requires_grad_() for one in start]
    lowest, place = math.inf, [one.clone() for one in start]

    def closure() -> Tensor:
        nonlocal lowest, place
        with torch.enable_grad():
            value = objective(free)
            gradients = torch.autograd.grad(value, free)
        for one, gradient in zip(free, gradients, strict=True):
            one.grad = gradient
        if float(value.detach()) < lowest:
            lowest, place = float(value.detach()), [one.detach().clone() for one in free]
        return value.detach()

    search = torch.optim.LBFGS(
        free, max_iter=iterations, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-14
    )
    search.step(closure)  # type: ignore[no-untyped-call]
    return lowest, place


def by_signed_adam(
    ctx: ProbeContext,
    what: Seen,
    y: Tensor,
    iterations: int,
    restarts: int,
    lr: float,
    tv: float,
    mask: Tensor | None = None,
) -> Found:
    """Return samples whose gradient points where the one seen does: Geiping et al., section 4, equation 4.

    Minimises 1 − cos(g(x, y), g) + `tv` · TV(x) by Adam on the sign of the gradient, inside the range of the task, with a learning rate
    that falls to a tenth after 3/8, 5/8 and 7/8 of the steps, as the authors' code has it. The best start is the one of smallest
    1 − cos in the end.

    Args:
        ctx: what the server knows.
        what: the update.
        y: the labels int64 [n], in no particular order.
        iterations: of Adam, from each start.
        restarts: how many starts.
        lr: Adam's learning rate, in units of the range of a feature.
        tv: weight of the total variation; 0 for tables.
        mask: which parameters to look at, bool [d]; all by default.
    """
    model, recipe, box = need(ctx.model, "the model"), need(ctx.recipe, "the recipe"), box_of(ctx)
    wanted = target(what, recipe)
    wanted = wanted if mask is None else wanted[mask]
    size = lr * (1.0 if box is None else box[1] - box[0])
    best: Found | None = None
    for _ in range(restarts):
        x = start_images(ctx.task.shape, len(y), box, ctx.rng).requires_grad_()
        labels = ordered(what, y, ctx.rng)
        adam = torch.optim.Adam([x], lr=size)
        value = math.inf
        for step in range(iterations):
            adam.param_groups[0]["lr"] = size * 0.1 ** sum(8 * step >= k * iterations for k in (3, 5, 7))
            with torch.enable_grad():
                made = imitated(model, ctx.criterion, what, recipe, x, labels)
                off = 1 - F.cosine_similarity(made if mask is None else made[mask], wanted, dim=0)
                objective = off + tv * total_variation(x) if tv and ctx.task.image else off
                (gradient,) = torch.autograd.grad(objective, x)
            value = float(off.detach())
            x.grad = gradient.sign()
            adam.step()
            if box is not None:
                with torch.no_grad():
                    x.clamp_(*box)
        if best is None or value < best.value:
            best = Found(value, x.detach().clone(), labels)
    if best is None:
        raise ValueError("no start was made")
    return best


def ordered(what: Seen, y: Tensor, rng: torch.Generator) -> Tensor:
    """Return labels int64 [n] in an order to try: by chance where a client's steps see different samples, as they are where all see all.

    Which label was trained on first is known to the client alone; a further start tries another order.
    """
    return y if what.whole or what.steps == 1 else y[torch.randperm(len(y), generator=rng)]


def total_variation(x: Tensor) -> Tensor:
    """Return the mean absolute difference between neighbouring pixels of images [b, c, h, w], down plus across; a scalar."""
    down, across = x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]
    return down.abs().mean() + across.abs().mean()


@probe(
    "dlg",
    role="curious-server",
    task="classification",
    once=True,
    fits=undone,
    paper="Zhu, Liu and Han (Deep Leakage from Gradients), NeurIPS 2019, algorithm 1",
)
def dlg(
    ctx: ProbeContext,
    *,
    at_round: Count = 1,
    clients: Count = 4,
    samples: Annotated[int, Field(ge=1, le=64)] = 8,
    iterations: Count = 200,
    restarts: Count = 3,
    unroll: bool = True,
) -> Result:
    """Samples and labels found together, by matching the gradient with L-BFGS: deep leakage from gradients.

    Wants a smooth model (`lenet`): where the second derivative is zero or jumps (ReLU, max-pooling) L-BFGS soon stands still. An update of
    several local steps is matched by playing the steps on the guess, which is Geiping et al.'s extension (section 6), not the paper's.

    Args:
        ctx: what a curious server knows.
        at_round: when it acts.
        clients: how many clients it attacks, those with the smallest ids that replied.
        samples: it looks for no more than so many; a client with more is imitated by one with so many.
        iterations: of L-BFGS, from each start.
        restarts: starts at most; no further one once the gradient is matched.
        unroll: play the local steps on the guess; without it the update is taken for one gradient, as the paper's attack would.
    """
    if not acts(ctx, at_round):
        return {}
    found = []
    for one in _looked_at(ctx, clients, unroll):
        found.append((one, by_lbfgs(ctx, one, min(one.samples, samples), None, iterations, restarts)))
    return _guessed("dlg", found)


@probe(
    "idlg",
    role="curious-server",
    task="classification",
    once=True,
    fits=first(unlabelled, undone),
    paper="Zhao, Mopuri and Bilen (iDLG), arXiv 2001.02610, section 3",
)
def idlg(
    ctx: ProbeContext,
    *,
    at_round: Count = 1,
    clients: Count = 4,
    samples: Annotated[int, Field(ge=1, le=64)] = 8,
    iterations: Count = 200,
    restarts: Count = 3,
    unroll: bool = True,
) -> Result:
    """DLG with the labels read off first: the only negative gradient of the last layer's bias is that of the label.

    The paper is about a single sample. For more the labels are those of `label-recovery`.

    Args:
        ctx: what a curious server knows.
        at_round: when it acts.
        clients: how many clients it attacks, those with the smallest ids that replied.
        samples: it looks for no more than so many; a client with more is imitated by one with so many.
        iterations: of L-BFGS, from each start.
        restarts: starts at most; no further one once the gradient is matched.
        unroll: play the local steps on the guess; without it the update is taken for one gradient, as the paper's attack would.
    """
    if not acts(ctx, at_round):
        return {}
    found = []
    for one in _looked_at(ctx, clients, unroll):
        y = labels_of(ctx, one, min(one.samples, samples))
        found.append((one, by_lbfgs(ctx, one, len(y), y, iterations, restarts)))
    return _guessed("idlg", found)


@probe(
    "inverting-gradients",
    role="curious-server",
    task="classification",
    once=True,
    fits=first(unlabelled, undone),
    paper="Geiping et al. (Inverting Gradients), NeurIPS 2020, sections 4 to 6",
)
def inverting_gradients(
    ctx: ProbeContext,
    *,
    at_round: Count = 1,
    clients: Count = 4,
    samples: Annotated[int, Field(ge=1, le=64)] = 8,
    iterations: Count = 300,
    restarts: Count = 2,
    lr: Positive = 0.1,
    tv: NonNegative = 1e-4,
    unroll: bool = True,
) -> Result:
    """Samples whose gradient has the direction of the one seen: cosine distance, total variation, signed Adam.

    The labels are those of `label-recovery`; the paper takes them for known. Works on networks with ReLU and pooling too. An update of
    several local steps is matched by playing the steps on the guess (section 6).

    Args:
        ctx: what a curious server knows.
        at_round: when it acts.
        clients: how many clients it attacks, those with the smallest ids that replied.
        samples: it looks for no more than so many; a client with more is imitated by one with so many.
        iterations: of Adam, from each start. The paper takes 4800 to 24000; some hundreds do for digits.
        restarts: how many starts; the one whose gradient fits best counts.
        lr: Adam's learning rate, in units of the range of a pixel.
        tv: weight of the total variation. More of it (0.1) helps behind ReLU and pooling, and spoils what would be exact.
        unroll: play the local steps on the guess; without it the update is taken for one gradient.
    """
    if not acts(ctx, at_round):
        return {}
    found = []
    for one in _looked_at(ctx, clients, unroll):
        y = labels_of(ctx, one, min(one.samples, samples))
        found.append((one, by_signed_adam(ctx, one, y, iterations, restarts, lr, tv)))
    return _guessed("inverting-gradients", found)


def _looked_at(ctx: ProbeContext, clients: int, unroll: bool) -> list[Seen]:
    found = seen(ctx, clients)
    return found if unroll else [as_one(one, need(ctx.recipe, "the recipe")) for one in found]


def _guessed(name: str, found: Sequence[tuple[Seen, Found]]) -> Result:
    """Return what was found as a guess, and how well the gradients match in the mean, which the server knows itself."""
    if not found:
        return {}
    items = tuple(Reconstruction(one.client, best.x, best.y) for one, best in found)
    return {name: Reconstructions(items), f"{name}/mismatch": sum(best.value for _, best in found) / len(found)}
