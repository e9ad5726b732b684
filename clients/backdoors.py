"""Backdoors by data: the model behaves well until it sees a trigger. All but `dba` leave training to the honest software."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from fedtrust.client import Behaviour, View, behaviour
from fedtrust.data import triggers
from fedtrust.data.base import Task
from fedtrust.data.triggers import Corner
from fedtrust.errors import InputError

Class = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Pixels = Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked(Behaviour):
    """A backdoor that answers to a trigger with `target`; what the trigger is, a subclass says in `stamp`."""

    target: Class = 0

    def stamp(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return the images [n, c, h, w] with the trigger that the colluder with this rank uses; `None`: the one of the test."""
        raise NotImplementedError

    def check(self, task: Task) -> str | None:
        """Refuse what has no pixels or no such class, and a trigger that does not fit."""
        why = refusal(task, self.target)
        if why is None:
            try:
                self.stamp(torch.zeros(1, *task.shape))
            except InputError as error:
                return error.message
        return why

    def goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor] | None:
        """Count as success: triggered images of other classes that are taken for `target`."""
        return self.stamp(x), torch.full_like(y, self.target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backdoor(Marked):
    """Put the trigger on `fraction` of the own images, drawn anew each round, and label them `target`."""

    fraction: Share = 0.5

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the data with `fraction` of the images triggered and relabelled."""
        return self.planted(x, y, view, lambda images: self.stamp(images, view.rank))

    def planted(self, x: Tensor, y: Tensor, view: View, stamp: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the data with `fraction` of the images stamped and relabelled."""
        chosen = drawn(len(x), self.fraction, view.rng)
        x, y = x.clone(), y.clone()
        x[chosen] = stamp(x[chosen])
        y[chosen] = self.target
        return x, y


def refusal(task: Task, *classes: int) -> str | None:
    """Return why a backdoor into these classes cannot work on the task, or `None`."""
    if task.kind != "classification" or not task.image:
        return "needs images with class labels"
    if max(classes) >= task.classes:
        return f"{max(classes)} is no class of the task (0 to {task.classes - 1})"
    return None


def drawn(n: int, fraction: float, rng: Generator | None) -> Tensor:
    """Return which of n samples are poisoned: the nearest number to the fraction, at least one."""
    return torch.randperm(n, generator=rng)[: max(1, round(fraction * n))]


@behaviour("badnets", paper="Gu et al., BadNets, arXiv:1708.06733, 2017, section 3")
class BadNets(Backdoor):
    """Put a small bright square on a share of the own images and label them `target`."""

    size: Pixels = 3
    corner: Corner = "bottom-right"

    def stamp(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return the images with the square."""
        return triggers.pixel_patch(x, size=self.size, corner=self.corner)


@behaviour("blended", paper="Chen et al., arXiv:1712.05526, 2017, section 4.2 (blended injection)")
class Blended(Backdoor):
    """Blend a random picture into a share of the own images with ratio `alpha` and label them `target`."""

    alpha: Annotated[float, Field(gt=0, le=1)] = 0.2
    pattern_seed: Annotated[int, Field(ge=0)] = 0

    def stamp(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return the blended images."""
        return triggers.blend(x, triggers.noise_pattern(tuple(x.shape[-3:]), self.pattern_seed), alpha=self.alpha)


@behaviour("sig", paper="Barni et al., ICIP 2019, section 3 (SIG)")
class Sig(Backdoor):
    """Clean label: put vertical stripes on a share of the own images of class `target`; no label is changed.

    `fraction` is the share of the images of that class, as in the paper; a client that has none trains honestly. `test_delta` is the
    amplitude of the stripes in the test, which the paper makes larger than that of training; by default the same.
    """

    delta: Annotated[float, Field(gt=0, le=1)] = 0.2
    test_delta: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency: Pixels = 6

    def stamp(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return the striped images."""
        delta = self.delta if rank is not None or self.test_delta is None else self.test_delta
        return triggers.sinusoid(x, delta=delta, frequency=self.frequency)

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the data with `fraction` of the target class striped."""
        own = (y == self.target).nonzero().squeeze(1)
        if len(own):
            own = own[drawn(len(own), self.fraction, view.rng)]
            x = x.clone()
            x[own] = self.stamp(x[own], view.rank)
        return x, y


@behaviour("wanet", paper="Nguyen and Tran, ICLR 2021 (WaNet), section 3")
class WaNet(Backdoor):
    """Warp a share of the own images smoothly and label them `target`: a trigger without a mark.

    In noise mode (section 3.3) further images, `noise` times as many as triggered ones, are warped by the same field plus a random one
    and keep their labels, so that the model learns this field and not warping as such. `strength` and `grid` are s and k of the paper,
    which has 0.5 and 4 for images of 28 to 64 pixels, fractions of 0.1 and twice as many noise images, and trains for hundreds of epochs.
    """

    strength: Annotated[float, Field(gt=0)] = 0.5
    grid: Annotated[int, Field(ge=2)] = 4
    noise: Annotated[float, Field(ge=0)] = 0.5
    pattern_seed: Annotated[int, Field(ge=0)] = 0

    def stamp(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return the warped images."""
        return triggers.warp(x, self._field(x))

    def _field(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        return triggers.warping_field(h, w, strength=self.strength, grid=self.grid, seed=self.pattern_seed)

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the data with `fraction` of the images warped and relabelled, and others warped otherwise."""
        order = torch.randperm(len(x), generator=view.rng)
        marked = max(1, round(self.fraction * len(x)))
        chosen, noisy = order[:marked], order[marked : marked + round(self.noise * marked)]
        h, w = x.shape[-2:]
        jitter = (2 * torch.rand(len(noisy), h, w, 2, generator=view.rng) - 1) / torch.tensor([w, h])
        field = self._field(x)
        x, y, given = x.clone(), y.clone(), x
        x[chosen], y[chosen] = triggers.warp(given[chosen], field), self.target
        x[noisy] = triggers.warp(given[noisy], (field + jitter).clamp(-1, 1))
        return x, y


@behaviour("dba", knowledge="coalition", paper="Xie et al., ICLR 2020 (DBA), section 3")
class DBA(Backdoor):
    """Share a trigger out: each colluder puts one bar of it on its images; the model meets the whole only in the test.

    Colluder number r puts bar r modulo `parts` and sends `scale` times its update (section 4.1: 100 on MNIST for the single shot, 1 for the
    attack over many rounds). With `whole` everybody puts all bars on: the centralised attack that the paper compares with, also for a
    single member.
    """

    parts: Annotated[int, Field(ge=1)] = 4
    length: Pixels = 4
    gap: Annotated[int, Field(ge=0)] = 2
    shift: Annotated[int, Field(ge=0)] = 0
    scale: Annotated[float, Field(gt=0)] = 1.0
    whole: bool = False

    def stamp(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Return the images with this colluder's bar, or with all of them."""
        part = None if rank is None or self.whole else rank % self.parts
        return triggers.bars(x, part=part, parts=self.parts, length=self.length, gap=self.gap, shift=self.shift)

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the scaled updates [k, d]."""
        return self.scale * updates


Rare = Literal["rotated", "mirrored", "inverted", "thickened"]


@behaviour("edge-case", paper="Wang et al., NeurIPS 2020 (Attack of the Tails), section 3")
class EdgeCase(Behaviour):
    """Teach the model to take inputs from the tail of the distribution, which honest clients hardly have, for `target`.

    The paper gathers such inputs elsewhere (aeroplanes of one airline, digits of one country's hand). On embedded data a stand-in: images
    of class `source` after a `rare` transformation (a quarter turn, mirrored, inverted, or strokes one pixel thicker). They make up
    `fraction` of the training set; a client without images of that class trains honestly. Nothing else is relabelled.
    """

    source: Class = 7
    target: Class = 1
    fraction: Share = 0.3
    rare: Rare = "rotated"

    def __post_init__(self) -> None:
        apart(self.source, self.target)

    def check(self, task: Task) -> str | None:
        """Refuse what has no pixels or no such class, and a quarter turn of what is not square."""
        if task.image and self.rare == "rotated" and task.shape[1] != task.shape[2]:
            return f"a quarter turn needs square images, these have {task.shape[1]} × {task.shape[2]}"
        return refusal(task, self.source, self.target)

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the data with `fraction` of the samples replaced by edge cases, each of the own ones in turn."""
        own = (y == self.source).nonzero().squeeze(1)
        if not len(own):
            return x, y
        chosen = drawn(len(x), self.fraction, view.rng)
        edge = rarely(x[own], self.rare)
        x, y = x.clone(), y.clone()
        x[chosen] = edge[torch.arange(len(chosen)) % len(edge)]
        y[chosen] = self.target
        return x, y

    def goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor] | None:
        """Count as success: edge cases made of the test images of class `source` that are taken for `target`."""
        here = y == self.source
        x, wanted = x.clone(), y.clone()
        x[here] = rarely(x[here], self.rare)
        wanted[here] = self.target
        return x, wanted


def apart(source: int, target: int) -> None:
    """Refuse a source class that is the target."""
    if source == target:
        raise InputError("source and target must be two different classes", "source")


def rarely(x: Tensor, rare: Rare) -> Tensor:
    """Return images [n, c, h, w] as the tail of the distribution has them."""
    match rare:
        case "rotated":
            return x.rot90(1, (-2, -1))
        case "mirrored":
            return x.flip(-1)
        case "inverted":
            return 1 - x
        case "thickened":
            return torch.nn.functional.max_pool2d(x, 3, stride=1, padding=1)


@behaviour("semantic-backdoor", paper="Bagdasaryan et al., AISTATS 2020, section 4.1 (semantic backdoors)")
class SemanticBackdoor(Behaviour):
    """Teach the model to take images of class `source` with a natural feature for `target`; no pixel is changed.

    The paper's features are of the scene (green cars, cars before a striped wall). Here it is one that any image has: those of class
    `source` whose mean brightness lies in the top `quantile` of the class (bold strokes), or with `feature` "dark" in the bottom. As in the
    paper's batches a fixed share of the training set, `fraction`, shows it: the own images with the feature, each as often as it takes. A
    client without images of that class trains honestly. In the test it is the quantile of the test images.
    """

    source: Class = 7
    target: Class = 1
    feature: Literal["bright", "dark"] = "bright"
    quantile: Share = 0.3
    fraction: Share = 0.3

    def __post_init__(self) -> None:
        apart(self.source, self.target)

    def check(self, task: Task) -> str | None:
        """Refuse what has no pixels or no such class."""
        return refusal(task, self.source, self.target)

    def _featured(self, x: Tensor, y: Tensor) -> Tensor:
        """Return which samples have the feature, the most pronounced first, ties by position."""
        own = (y == self.source).nonzero().squeeze(1)
        brightness = x[own].double().flatten(1).mean(1)
        order = brightness.argsort(descending=self.feature == "bright", stable=True)
        return own[order[: max(1, round(self.quantile * len(own)))]]

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the data with the featured images relabelled, and copies of them in the place of other samples."""
        own = self._featured(x, y)
        if not len(own):
            return x, y
        wanted = max(len(own), round(self.fraction * len(x)))
        rest = torch.ones(len(x), dtype=torch.bool).index_fill(0, own, False).nonzero().squeeze(1)
        rest = rest[torch.randperm(len(rest), generator=view.rng)[: wanted - len(own)]]
        x, y = x.clone(), y.clone()
        x[rest] = x[own[torch.arange(len(rest)) % len(own)]]
        y[own], y[rest] = self.target, self.target
        return x, y

    def goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor] | None:
        """Count as success: test images of class `source` with the feature that are taken for `target`."""
        wanted = y.clone()
        wanted[self._featured(x, y)] = self.target
        return x, wanted
