"""How far gradient inversion reaches: a curious server tries it on samples of its own, under conditions that it can set."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.fits import first
from fedtrust.probes.base import Artefact, ProbeContext, Result, need, probe
from fedtrust.probes.gradient_inversion import by_lbfgs, by_signed_adam
from fedtrust.probes.inversion_labels import labels_of, unlabelled
from fedtrust.probes.inversion_update import Seen, acts, as_one, box_of, descent, imitated, undone, weight
from fedtrust.probes.scores_images import EXACT, assigned, ssim
from fedtrust.sending import Recipe

Count = Annotated[int, Field(ge=1, le=100_000)]
Several = list[Annotated[int, Field(ge=1, le=64)]]

_BATCHES, _STEPS, _NOISES = [1, 2, 4, 8], [2, 4], [0.0001, 0.001, 0.01, 0.1]


class Condition(NamedTuple):
    """What is tried.

    Attributes:
        samples: in the client's data, all in every batch.
        steps: local steps.
        noise: standard deviation of the Gaussian noise on every coordinate of the update, in units of the update's length.
        unroll: whether the attack plays the local steps; else it takes the update for one gradient.
    """

    samples: int = 1
    steps: int = 1
    noise: float = 0.0
    unroll: bool = True

    @property
    def name(self) -> str:
        """The condition as part of a metric's name."""
        if self.noise:
            return f"noise-{self.noise:g}"
        if self.steps > 1:
            return f"steps-{self.steps}{'' if self.unroll else '-as-one'}"
        return f"batch-{self.samples}"


@probe(
    "inversion-frontier",
    role="curious-server",
    task="classification",
    once=True,
    population=True,
    fits=first(undone, lambda facts: None if facts.params["attack"] == "dlg" else unlabelled(facts)),
    paper="the conditions of Geiping et al., NeurIPS 2020, sections 5 and 6, and Zhu et al., NeurIPS 2019, section 5.1 (noise)",
)
def inversion_frontier(
    ctx: ProbeContext,
    *,
    attack: Literal["inverting-gradients", "idlg", "dlg"] = "inverting-gradients",
    at_round: Count = 1,
    draws: Annotated[int, Field(ge=1, le=100)] = 3,
    iterations: Count = 200,
    restarts: Count = 1,
    batches: Several = _BATCHES,
    steps: Several = _STEPS,
    noises: list[Annotated[float, Field(gt=0)]] = _NOISES,
) -> Result:
    """What an inversion gets out of batches of growing size, of more local steps, and of updates with noise on them.

    The server imitates clients on samples of its own (simulated: half of the test samples) with the model that it sent and the clients'
    optimiser and learning rate, and inverts the updates. It knows what should come out, so it can score itself. Batches: all samples of a
    client in one step. Steps: one sample, several steps, which the attack plays itself or (as-one) takes for a single gradient. Noise:
    one sample, one step, with Gaussian noise of `noise` times the update's length on every coordinate, which is what clipping at that
    length and a DP noise multiplier of `noise` for one client would do.

    Args:
        ctx: what a curious server knows.
        attack: what inverts.
        at_round: when it acts.
        draws: how often each condition is tried, with other samples.
        iterations: of the attack, from each start.
        restarts: starts of the attack.
        batches: sizes of the client's data.
        steps: numbers of local steps.
        noises: noise multipliers.
    """
    if not acts(ctx, at_round) or not ctx.sent:
        return {}
    x, y = need(ctx.population, "samples of its own")
    several = [Condition(1, s, unroll=unroll) for s in steps for unroll in ((True, False) if s > 1 else (True,))]
    conditions = dict.fromkeys([*(Condition(b) for b in batches), *several, *(Condition(noise=z) for z in noises)])
    found: dict[str, float | Artefact] = {}
    rows: list[list[str]] = []
    for condition in conditions:
        values, similar, exact = _tried(ctx, condition, (x, y), attack, draws, iterations, restarts)
        middle = float(values.quantile(0.5))
        found[f"inversion-frontier/{condition.name}"] = middle
        steps_said = f"{condition.steps}{'' if condition.unroll else ', taken for one'}"
        words = [str(condition.samples), steps_said, f"{condition.noise:g}" if condition.noise else "none"]
        rows.append([*words, f"{middle:.1f} dB", "–" if similar is None else f"{similar:.2f}", f"{exact:.0%}"])
    columns = ["samples", "local steps", "noise multiplier", "PSNR", "SSIM", "above 40 dB"]
    caption = f"{attack} on the server's own samples, medians over {draws} draws: what a client's update would give away."
    return found | {"inversion-frontier": Artefact("table", "How far the inversion reaches", caption, {"columns": columns, "rows": rows})}


def _tried(
    ctx: ProbeContext, condition: Condition, own: tuple[Tensor, Tensor], attack: str, draws: int, iterations: int, restarts: int
) -> tuple[Tensor, float | None, float]:
    """Return the PSNR of every sample under one condition, the median SSIM (`None` for tables), and the share above 40 dB."""
    recipe: Recipe = dataclasses.replace(need(ctx.recipe, "the recipe"), batch_size=condition.samples, epochs=condition.steps)
    here = dataclasses.replace(ctx, recipe=recipe)
    box = box_of(ctx)
    span = max(float(own[0].max() - own[0].min()), 1e-12) if box is None else box[1] - box[0]
    values, similar = [], []
    for _ in range(draws):
        rows = torch.randperm(len(own[0]), generator=ctx.rng)[: condition.samples]
        truth = own[0][rows]
        what = _imitation(here, condition, truth, own[1][rows])
        made = _inverted(here, what if condition.unroll else as_one(what, recipe), attack, iterations, restarts)
        made = made if box is None else made.clamp(*box)
        first, second, each = assigned(made, truth, span)
        values.append(each)
        if ctx.task.image:
            similar += [ssim(a, b, span) for a, b in zip(made[first], truth[second], strict=True)]
    each = torch.cat(values)
    return each, float(torch.tensor(similar).quantile(0.5)) if similar else None, float((each > EXACT).double().mean())


def _imitation(ctx: ProbeContext, condition: Condition, x: Tensor, y: Tensor) -> Seen:
    """Return what the server would see of a client with these samples."""
    recipe: Recipe = need(ctx.recipe, "the recipe")
    start = next(iter(need(ctx.sent, "what was sent").values()))
    what = Seen(0, start, torch.zeros_like(start), condition.samples, condition.steps)
    with torch.enable_grad():
        moved = imitated(need(ctx.model, "the model"), ctx.criterion, what, recipe, x, y).detach()
    update = -recipe.lr * weight(condition.steps, descent(recipe)) * moved
    noise = condition.noise * update.norm() * torch.randn(update.shape, generator=ctx.rng)
    return dataclasses.replace(what, update=update + noise)


def _inverted(ctx: ProbeContext, what: Seen, attack: str, iterations: int, restarts: int) -> Tensor:
    y = None if attack == "dlg" else labels_of(ctx, what, what.samples)
    if y is None or attack == "idlg":
        return by_lbfgs(ctx, what, what.samples, y, iterations, restarts).x
    return by_signed_adam(ctx, what, y, iterations, restarts, lr=0.1, tv=1e-4).x
