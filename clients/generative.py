"""A client with a generator: it draws a class that it does not own, from the model that it is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, ClientMemory, View, behaviour
from fedtrust.data.base import Task
from fedtrust.probes.guesses import Guess, Prototype

#: Side of what the generator draws, before it is brought to the size of the task's images; and of its first, coarsest picture.
_CANVAS, _COARSE = 32, 4
_BETAS, _TINY = (0.5, 0.999), 1e-8  # Adam, as in Radford et al., ICLR 2016, section 3


@behaviour("gan-attack", knowledge="coalition", paper="Hitaj, Ateniese and Perez-Cruz (Deep Models under the GAN), CCS 2017, section 5")
class GanAttack(Behaviour):
    """Train a generator whose discriminator is the global model, until it draws the class `target`, and make the owners teach it more.

    Each round the generator is trained for `steps` batches towards images that the model takes for `target`; then samples of it, as many as
    `share` of the client's own, go into its training labelled as `decoy`. The model that comes of it says less of the fakes to be the
    target, so the owners' training must say better what the target looks like, and the next model is a better discriminator. After the last
    round the attacker claims `drawn` images. Samples of the target class that it happens to own are left out: it knows of them no more than
    their label. With `share` 0 it only watches.

    What it finds are images of the class as the model knows it. Where one person owns the class that is what this person's data look like;
    where many do it is none of their samples in particular (as Melis et al., S&P 2019, section II, and the authors' critics say):
    representatives of a class are what a good classifier is bound to know, and noise that hides single samples (record-level DP) does not
    hide them.

    The generator is that of a DCGAN with nearest-neighbour upsampling in place of strides: `latent` numbers, a linear layer to 4×4 pixels,
    three convolutions up to 32×32, brought to the size of the task's images. It draws `channels` colours.
    """

    target: Annotated[int, Field(ge=0)] = 3
    decoy: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=1)] = 20
    batch: Annotated[int, Field(ge=1)] = 32
    lr: Annotated[float, Field(gt=0)] = 2e-3
    share: Annotated[float, Field(ge=0, le=10)] = 0.3
    latent: Annotated[int, Field(ge=1, le=1024)] = 32
    width: Annotated[int, Field(ge=1, le=256)] = 16
    channels: Literal[1, 3] = 1
    drawn: Annotated[int, Field(ge=1, le=256)] = 16

    def check(self, task: Task) -> str | None:
        """Refuse what is not a classification of images of so many channels, and classes that do not exist."""
        if task.kind != "classification" or not task.image:
            return "it draws images of a class, and this task has none"
        if task.shape[0] != self.channels:
            return f"the images have {task.shape[0]} channels; set channels (1 or 3)"
        if max(self.target, self.decoy) >= task.classes or self.target == self.decoy:
            return f"target ({self.target}) and decoy ({self.decoy}) should be two of the {task.classes} classes"
        return None

    def remember(self, size: int) -> ClientMemory:
        """Return the generator's parameters and Adam's two moments [g], and the number of steps taken [1]."""
        vectors = {name: torch.zeros(sum(map(math.prod, self._shapes()))) for name in ("generator", "mean", "square")}
        return {**vectors, "steps": torch.zeros(1, dtype=torch.int64)}

    def agree(self, view: View) -> None:
        """Train the generator against the model of this round."""
        memory = view.memory
        if int(memory["steps"]) == 0:
            memory["generator"] = self._start(view)
        wanted = torch.full((self.batch,), self.target)
        for _ in range(self.steps):
            point = memory["generator"].detach().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(view.model(view.params, self._draw(point, self.batch, view)), wanted)
                (slope,) = torch.autograd.grad(loss, point)
            self._step(memory, slope)

    def _step(self, memory: ClientMemory, slope: Tensor) -> None:
        """Take one step of Adam."""
        memory["steps"] = memory["steps"] + 1
        t = int(memory["steps"])
        memory["mean"] = _BETAS[0] * memory["mean"] + (1 - _BETAS[0]) * slope
        memory["square"] = _BETAS[1] * memory["square"] + (1 - _BETAS[1]) * slope.square()
        scale = (memory["square"] / (1 - _BETAS[1] ** t)).sqrt() + _TINY
        memory["generator"] = memory["generator"] - self.lr * memory["mean"] / (1 - _BETAS[0] ** t) / scale

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return its own samples but those of the target class, and the generator's, labelled as the decoy."""
        own = y != self.target
        fakes = round(self.share * int(own.sum()))
        if not bool(own.any()):  # nothing of its own is left to train on
            fakes = max(fakes, 1)
        if view.shared is None or not fakes:
            return (x[own], y[own]) if bool(own.any()) else (x, y)
        with torch.no_grad():
            images = self._draw(view.shared["generator"], fakes, view)
        return torch.cat([x[own], images]), torch.cat([y[own], y.new_full((fakes,), self.decoy)])

    def claim(self, view: View) -> Mapping[str, Guess]:
        """Return what the generator draws, as a picture of the target class."""
        if int(view.memory["steps"]) == 0:
            return {}
        with torch.no_grad():
            return {"prototype": Prototype(self.target, self._draw(view.memory["generator"], self.drawn, view))}

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the generator's weights and biases, in the order in which they lie in its vector."""
        w = self.width
        return (
            (4 * w * _COARSE**2, self.latent), (4 * w * _COARSE**2,), (2 * w, 4 * w, 3, 3), (2 * w,), (w, 2 * w, 3, 3), (w,),
            (self.channels, w, 3, 3), (self.channels,),
        )  # fmt: skip

    def _start(self, view: View) -> Tensor:
        """Return fresh parameters [g]: uniform with He's bound for the weights (He et al., ICCV 2015), zero biases."""
        parts = []
        for shape in self._shapes():
            fan = math.prod(shape[1:])
            bound = math.sqrt(3 / fan) if len(shape) > 1 else 0.0
            parts.append((torch.rand(math.prod(shape), generator=view.rng) * 2 - 1) * bound)
        return torch.cat(parts)

    def _draw(self, generator: Tensor, count: int, view: View) -> Tensor:
        """Return `count` images [count, *shape] of the task's range."""
        pieces = torch.split(generator, [math.prod(shape) for shape in self._shapes()])
        first, shift, *rest = [piece.view(shape) for piece, shape in zip(pieces, self._shapes(), strict=True)]
        picture = F.linear(torch.randn(count, self.latent, generator=view.rng), first, shift).view(count, -1, _COARSE, _COARSE)
        for weight, bias in zip(rest[::2], rest[1::2], strict=True):
            picture = F.conv2d(F.interpolate(picture.relu(), scale_factor=2.0), weight, bias, padding=1)
        low, high = view.task.low or 0.0, 1.0 if view.task.high is None else view.task.high
        sized = F.interpolate(picture, view.task.shape[1:], mode="bilinear", antialias=True, align_corners=False)
        return low + (high - low) * sized.sigmoid()
