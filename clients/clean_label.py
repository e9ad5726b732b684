"""Clean-label poisoning: pictures that look right, are labelled right, and make the model misjudge one chosen test sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad, grad_and_value

from fedtrust.client import Behaviour, View, behaviour
from fedtrust.data.base import Task
from fedtrust.errors import InputError

Share = Annotated[float, Field(gt=0, le=1)]
Class = Annotated[int, Field(ge=0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanLabel(Behaviour):
    """What clean-label attacks share: whom they aim at, which of the own samples they work on, and that no label is touched."""

    source: Class = 0
    target: Class = 1
    targets: Annotated[int, Field(ge=1)] = 1
    fraction: Share = 0.5

    def __post_init__(self) -> None:
        if self.source == self.target:
            raise InputError("source and target are the same class", "source")

    def check(self, task: Task) -> str | None:
        """Refuse regressions and classes that do not exist."""
        if task.kind != "classification":
            return f"wants a sample in another class, but the task is {task.called}"
        if max(self.source, self.target) >= task.classes:
            return f"the task has classes 0 to {task.classes - 1} only"
        return None

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the data with `fraction` of the own samples of class `target` turned into poison, made anew on the model just sent."""
        own = (y == self.target).nonzero().flatten()
        if view.targets is None or not len(own):
            return x, y
        count = max(1, round(self.fraction * len(own)))
        chosen = own[torch.randperm(len(own), generator=view.rng)[:count]]
        return x.index_copy(0, chosen, self.made(x[chosen], view.targets[0], view)), y

    def made(self, bases: Tensor, wanted: Tensor, view: View) -> Tensor:
        """Return poisons [m, *shape] made of `bases` [m, *shape] (all of class `target`) for the samples `wanted` [t, *shape]."""
        raise NotImplementedError

    def goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor] | None:
        """Count as success: the first `targets` test samples of class `source`, as they are, taken for `target`."""
        aimed = (y == self.source).nonzero().flatten()[: self.targets]
        return x[aimed], torch.full_like(y[aimed], self.target)


def in_range(x: Tensor, task: Task) -> Tensor:
    """Return samples with every value in the task's range; a table has none."""
    return x if task.low is None and task.high is None else x.clamp(task.low, task.high)


def span(task: Task) -> float:
    """Return the width of the range of a feature value; 1 for a table."""
    return 1.0 if task.low is None or task.high is None else task.high - task.low


@behaviour("poison-frogs", targets=True, paper="Shafahi et al., NeurIPS 2018, algorithm 1; watermarking: section 4.1")
class PoisonFrogs(CleanLabel):
    """Make own samples of class `target` collide with a test sample of class `source` in the features of the model; labels stay right.

    The attacker knows the very test samples he wants misjudged (`targets` of them; poison number i is made for number i modulo `targets`).
    A poison starts as a base that shows the target at `opacity` (0.3 in the paper's end-to-end attack), and follows forward-backward
    splitting: a step against ‖f(x) − f(t)‖², then back towards the base with the paper's weight `beta` · p² / d² for p features and
    d values a sample. The paper leaves the step size open: here the first one moves no value by more than `step` of the range, then each
    poison's grows by a fifth while its objective falls and halves where it would not, so that the objective never rises.

    The paper poisons a fixed training set; here the poisons are made anew on every model that is sent.
    """

    opacity: Annotated[float, Field(ge=0, lt=1)] = 0.3
    beta: Annotated[float, Field(ge=0)] = 0.25
    iterations: Annotated[int, Field(ge=1)] = 40
    step: Share = 0.1

    def made(self, bases: Tensor, wanted: Tensor, view: View) -> Tensor:
        """Return the poisons [m, *shape]."""
        aimed = wanted[torch.arange(len(bases)) % len(wanted)]
        bases = in_range(self.opacity * aimed + (1 - self.opacity) * bases, view.task)
        features = view.model.features(view.params, aimed)
        beta = self.beta * (features.shape[1] / bases[0].numel()) ** 2

        def distance(x: Tensor) -> Tensor:
            return (view.model.features(view.params, x) - features).square().sum(dim=1)

        first = self.step * span(view.task)
        return collide(distance, bases, beta, first, self.iterations, lambda x: in_range(x, view.task))


def collide(
    distance: Callable[[Tensor], Tensor], bases: Tensor, beta: float, first: float, iterations: int, allowed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the end of forward-backward splitting from `bases`; Shafahi et al., algorithm 1.

    Args:
        distance: what each sample's forward step lowers, [m, *shape] → [m].
        bases: where the samples start and what the backward step pulls towards [m, *shape].
        beta: how strongly it does.
        first: the largest change of a value by the first forward step.
        iterations: how many steps.
        allowed: puts samples back into the range of valid ones.
    """
    wide = (-1, *[1] * (bases.dim() - 1))

    def objective(x: Tensor) -> Tensor:  # the one that the paper's backward step, (x + λβb) / (1 + λβ), belongs to
        return distance(x) + beta / 2 * (x - bases).flatten(1).square().sum(dim=1)

    x, value = bases, objective(bases)
    rate = torch.zeros(len(bases))
    for i in range(iterations):
        slope = grad(lambda z: distance(z).sum())(x)
        if i == 0:
            rate = first / slope.flatten(1).abs().amax(dim=1).clamp(min=1e-12)
        pull = (rate * beta).view(wide)
        moved = allowed((x - rate.view(wide) * slope + pull * bases) / (1 + pull))
        new = objective(moved)
        better = new < value
        x, value = torch.where(better.view(wide), moved, x), torch.where(better, new, value)
        rate = torch.where(better, 1.2 * rate, 0.5 * rate)
    return x.detach()


@behaviour("witches-brew", targets=True, paper="Geiping et al., ICLR 2021, section 3, algorithm 1 (gradient matching)")
class WitchesBrew(CleanLabel):
    """Add noise within `epsilon` to own samples of class `target` so that training on them also learns the wrong label; labels stay right.

    The gradient of the loss on the poisons is turned towards that on the test samples of class `source` labelled `target` (the attacker
    knows these very samples): signed Adam on 1 − cosine, with the paper's learning-rate drops to a tenth after 3/8, 5/8 and 7/8 of the
    iterations, from `restarts` random starts, of which the best is kept. `epsilon` and the first learning rate `step` · `epsilon` count
    in widths of the value range. 250 iterations and 8 restarts in the paper, for a fixed training set; here the poisons are made anew on
    every model that is sent, and fewer do.
    """

    epsilon: Share = 16 / 255
    iterations: Annotated[int, Field(ge=1)] = 24
    restarts: Annotated[int, Field(ge=1)] = 1
    step: Annotated[float, Field(gt=0)] = 0.4

    def made(self, bases: Tensor, wanted: Tensor, view: View) -> Tensor:
        """Return the poisons [m, *shape]."""
        mismatch = self.mismatch(bases, wanted, view)
        best, least = bases, float("inf")
        for _ in range(self.restarts):
            noise = self.brewed(mismatch, bases, view)
            value = float(mismatch(noise))
            if value < least:
                best, least = bases + noise, value
        return in_range(best, view.task)  # an addition may leave the range by its rounding

    def mismatch(self, bases: Tensor, wanted: Tensor, view: View) -> Callable[[Tensor], Tensor]:
        """Return 1 − cosine of the two gradients as a function of the noise [m, *shape]; the paper's equation 3."""
        same = torch.full((len(bases),), self.target)
        other = torch.full((len(wanted),), self.target)

        def slope(x: Tensor, y: Tensor) -> Tensor:
            found: Tensor = grad(lambda params: view.criterion(view.model(params, x), y))(view.params)
            return found

        aim = slope(wanted, other).detach()

        def mismatch(noise: Tensor) -> Tensor:
            return 1 - torch.cosine_similarity(slope(bases + noise, same), aim, dim=0, eps=1e-12)

        return mismatch

    def brewed(self, mismatch: Callable[[Tensor], Tensor], bases: Tensor, view: View) -> Tensor:
        """Return the best noise [m, *shape] that signed Adam passes through from one random start."""
        bound = self.epsilon * span(view.task)

        def held(noise: Tensor) -> Tensor:
            return in_range(bases + noise.clamp(-bound, bound), view.task) - bases

        noise = held(bound * (2 * torch.rand(bases.shape, generator=view.rng) - 1))
        mean, squares = torch.zeros_like(noise), torch.zeros_like(noise)
        best, least = noise, float("inf")
        slope_and_value = grad_and_value(mismatch)
        for t in range(1, self.iterations + 1):
            slope, value = slope_and_value(noise)
            if float(value) < least:
                best, least = noise, float(value)
            sign = slope.sign()
            mean, squares = 0.9 * mean + 0.1 * sign, 0.999 * squares + 0.001 * sign.square()
            drops = sum(8 * (t - 1) >= part * self.iterations for part in (3, 5, 7))
            rate = self.step * bound * 0.1**drops
            noise = held(noise - rate * (mean / (1 - 0.9**t)) / ((squares / (1 - 0.999**t)).sqrt() + 1e-8))
        return noise.detach() if float(mismatch(noise)) < least else best.detach()
