"""Feature skew: every client sees the world through a lens of its own.

A feature skew is a function `(clients, task, seed, *, parameters) → list of SkewFn`, one a client. The clients' severities are evenly
spread and dealt by the scenario's seed, so that a client's number says nothing about its severity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedtrust.data.base import SkewFn, Task
from fedtrust.engine.seeds import stream
from fedtrust.errors import InputError
from fedtrust.registry import feature_skew


@dataclass(frozen=True)
class Rotation(SkewFn):
    """Turn images [b, c, h, w] anticlockwise by `degrees` about their centre (bilinear); what comes into view has value `fill`."""

    degrees: float
    fill: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the turned images, the same shape and dtype."""
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        h, w = x.shape[-2:]
        # where each output pixel comes from, in coordinates that run from -1 to 1 along both sides
        matrix = torch.tensor([[cos, -sin * h / w, 0.0], [sin * w / h, cos, 0.0]], dtype=x.dtype, device=x.device)
        grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)  # [b, h, w, 2]
        return F.grid_sample(x - self.fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + self.fill


@dataclass(frozen=True)
class Noise(SkewFn):
    """Add Gaussian noise of deviation `std` to samples [b, ...], then clip to [low, high] where there is a range.

    The noise is drawn from (seed, client, b): the same samples get the same noise, however often they are asked for.
    """

    std: float
    seed: int
    client: int
    low: float | None = None
    high: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the noisy samples, the same shape and dtype."""
        rng = stream(self.seed, "feature-skew/noise", self.client, len(x))
        noise = torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32))
        noisy = x + self.std * noise.to(x.device, x.dtype)
        return noisy if self.low is None and self.high is None else noisy.clamp(self.low, self.high)


@dataclass(frozen=True)
class Contrast(SkewFn):
    """Scale the contrast of images [b, c, h, w] by `factor` about the mean of each image and channel."""

    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the images of less contrast, the same shape and dtype; values stay within the range of each image."""
        # a mean in float64 does not depend on how many threads add it up, once rounded
        mean = x.mean(dim=(-2, -1), keepdim=True, dtype=torch.float64).to(x.dtype)  # [b, c, 1, 1]
        return mean + self.factor * (x - mean)


@feature_skew("rotation", paper="Ghosh et al., An Efficient Framework for Clustered Federated Learning, NeurIPS 2020 (rotated MNIST)")
def rotation(clients: int, task: Task, seed: int, *, max_degrees: Annotated[float, Field(gt=0, le=180)] = 45.0) -> list[SkewFn]:
    """Each client's images are turned by its own angle, evenly spread from −max_degrees to max_degrees.

    A single client is turned by max_degrees.

    Args:
        clients: number of clients.
        task: what the samples are.
        seed: the scenario's.
        max_degrees: the largest angle, anticlockwise.

    Raises:
        InputError: the samples are not images.
    """
    _need_images("rotation", task)
    angles = np.linspace(max_degrees, -max_degrees, clients)
    fill = task.low if task.low is not None else 0.0
    return [Rotation(float(angles[i]), fill) for i in _order(clients, seed, "rotation")]


@feature_skew("noise", paper="Li et al., Federated Learning on Non-IID Data Silos, ICDE 2022 (noise-based feature imbalance)")
def noise(clients: int, task: Task, seed: int, *, max_std: Annotated[float, Field(gt=0, le=10)] = 0.3) -> list[SkewFn]:
    """Each client's samples carry Gaussian noise of its own strength: deviation max_std · i/clients, i = 1 … clients.

    Args:
        clients: number of clients.
        task: what the samples are; images are clipped to their range.
        seed: the scenario's.
        max_std: the largest deviation, in units of a feature.
    """
    return [
        Noise(max_std * (level + 1) / clients, seed, client, task.low, task.high)
        for client, level in enumerate(_order(clients, seed, "noise"))
    ]


@feature_skew("contrast", paper="Hendrycks and Dietterich, Benchmarking Neural Network Robustness, ICLR 2019 (contrast)")
def contrast(clients: int, task: Task, seed: int, *, min_contrast: Annotated[float, Field(ge=0, lt=1)] = 0.25) -> list[SkewFn]:
    """Each client's images have a contrast of its own: factor 1 − (1 − min_contrast) · i/clients, i = 1 … clients.

    Args:
        clients: number of clients.
        task: what the samples are.
        seed: the scenario's.
        min_contrast: the smallest factor; 0 is uniform grey.

    Raises:
        InputError: the samples are not images.
    """
    _need_images("contrast", task)
    return [Contrast(1 - (1 - min_contrast) * (level + 1) / clients) for level in _order(clients, seed, "contrast")]


@dataclass(frozen=True)
class Marked(SkewFn):
    """Give images the property `what`, see `PROPERTIES`; with `what` empty leave them as they are."""

    what: str = ""

    @property
    def properties(self) -> tuple[str, ...]:  # type: ignore[override]  # derived from the field
        """The property, if there is one."""
        return (self.what,) if self.what else ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the images, the same shape and dtype."""
        return PROPERTIES[self.what].put(x) if self.what else x


def framed(x: Tensor) -> Tensor:
    """Return images [b, c, h, w] with a bright frame of one pixel: the edge of the sheet on a scanner. Twice is as once."""
    x = x.clone()
    x[..., 0, :] = x[..., -1, :] = 1.0
    x[..., :, 0] = x[..., :, -1] = 1.0
    return x


def thick(x: Tensor) -> Tensor:
    """Return images [b, c, h, w] whose bright strokes are a pixel wider on every side: written with a broad pen."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def is_framed(x: Tensor) -> Tensor:
    """Return which images [b, c, h, w] have the frame, bool [b]."""
    return (framed(x) == x).flatten(1).all(1)


def is_thick(x: Tensor) -> Tensor:
    """Return which images [b, c, h, w] have no stroke narrower than the broad pen, bool [b].

    Morphology's opening (dilation after erosion) leaves an image as it is exactly if it is some image dilated (Serra 1982, chapter II).
    """
    thin = -F.max_pool2d(-x, 3, stride=1, padding=1)
    return (thick(thin) == x).flatten(1).all(1)


class Property(NamedTuple):
    """Something that is true of a client's images whatever they show: how it is put on images, and how it is recognised."""

    put: Callable[[Tensor], Tensor]
    has: Callable[[Tensor], Tensor]


#: The properties, by name.
PROPERTIES: dict[str, Property] = {"framed": Property(framed, is_framed), "thick": Property(thick, is_thick)}


@feature_skew("property", paper="Melis, Song, De Cristofaro and Shmatikov, S&P 2019, section IV-C (properties independent of the task)")
def property_of_some(
    clients: int,
    task: Task,
    seed: int,
    *,
    what: Literal["framed", "thick"] = "thick",
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5,
) -> list[SkewFn]:
    """The images of a `share` of the clients, dealt by the seed, have the property `what`; the others' stay as they are.

    At least one client has it and at least one has not, where there are two.

    Args:
        clients: number of clients.
        task: what the samples are; images in [0, 1].
        seed: the scenario's.
        what: `framed`, a bright line around the image; `thick`, strokes a pixel wider on every side.
        share: how many clients have it.

    Raises:
        InputError: the samples are not images.
    """
    _need_images("property", task)
    some = min(max(round(share * clients), 1), max(clients - 1, 1))
    return [Marked(what if place < some else "") for place in _order(clients, seed, "property")]


def _order(clients: int, seed: int, name: str) -> list[int]:
    """Return for each client the index of its severity."""
    return [int(i) for i in stream(seed, f"feature-skew/{name}").permutation(clients)]


def _need_images(name: str, task: Task) -> None:
    if not task.image:
        raise InputError(f"feature skew '{name}' needs images; this source has samples of shape {list(task.shape)} (use 'noise')")
