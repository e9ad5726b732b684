"""Honest clients that blur what they send, so that less can be read from it: sparsified, pruned, quantised, noisy, Soteria, smooth labels.

None of them promises anything in numbers; what each costs an attack and the model is there to be measured. For a promise see `local-dp`,
`dp-sgd` and the filter `distributed-discrete-gaussian`; for hiding among others the filter `secure-aggregation`. More local steps, a
defence too, are the recipe's `epochs`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, ClientMemory, Predict, View, behaviour
from fedtrust.data.base import Task
from fedtrust.layout import Layout

Share = Annotated[float, Field(gt=0, lt=1)]


def largest(vector: Tensor, layout: Layout, keep: float) -> Tensor:
    """Return which entries of a vector [d] are the ⌈keep · p⌉ largest in magnitude of their own parameter tensor of p entries, bool [d]."""
    kept = torch.zeros(len(vector), dtype=torch.bool)
    for where in layout.slices.values():
        part = vector[where].abs()
        kept[where.start + part.topk(math.ceil(keep * len(part) - 1e-9)).indices] = True  # the 1e-9: 0.1 * 30 is a little more than 3
    return kept


@behaviour(
    "sparsified", role="honest", paper="Lin, Han, Mao, Wang and Dally, ICLR 2018 (Deep Gradient Compression), section 3 and algorithm 1"
)
class Sparsified(Behaviour):
    """Send the share `keep` of each layer's update that is largest in magnitude, and keep the rest for the next time.

    What is not sent is added to the client's next update (local accumulation, also called error feedback): nothing is lost, only late. The
    paper's momentum correction, clipping and warm-up belong to its optimiser and are not here.
    """

    keep: Share = 0.1

    def remember(self, size: int) -> ClientMemory:
        """Return what is still to be sent [d]."""
        return {"rest": torch.zeros(size)}

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the largest entries of the update and of what was left before [1, d]."""
        total = updates[0] + view.memory["rest"]
        sent = torch.where(largest(total, view.layout, self.keep), total, 0.0)
        view.memory["rest"] = total - sent
        return sent[None]


@behaviour("pruned", role="honest", paper="Zhu, Liu and Han, NeurIPS 2019 (Deep Leakage from Gradients), section 5 (gradient compression)")
class Pruned(Behaviour):
    """Set the share `rate` of each layer's update that is smallest in magnitude to zero; it is gone for good.

    The paper finds that its attack fails from a rate of 0.2 on.
    """

    rate: Share = 0.3

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the update without its small entries [1, d]."""
        return torch.where(largest(updates[0], view.layout, 1 - self.rate), updates[0], 0.0)[None]


@behaviour(
    "gradient-noise", role="honest", paper="Zhu, Liu and Han, NeurIPS 2019 (Deep Leakage from Gradients), section 5 (noisy gradients)"
)
class GradientNoise(Behaviour):
    """Add noise of the standard deviation `std` to every entry of the update; normal, or from a Laplace distribution.

    Without a bound on the update this is no differential privacy, and no ε is claimed. The paper adds its noise to a gradient; an update
    is smaller by the learning rate, and longer by the number of steps.
    """

    std: Annotated[float, Field(gt=0)] = 0.01
    noise: Literal["gaussian", "laplace"] = "gaussian"

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the noisy update [1, d]."""
        if self.noise == "gaussian":
            return updates + self.std * torch.randn(updates.shape, generator=view.rng)
        # The difference of two exponential variables of mean b has a Laplace distribution with the deviation b·√2.
        halves = torch.empty(2, *updates.shape).exponential_(generator=view.rng)
        return updates + self.std / math.sqrt(2) * (halves[0] - halves[1])


@behaviour("quantised", role="honest", paper="Alistarh, Grubic, Li, Tomioka and Vojnovic, NeurIPS 2017 (QSGD), sections 3.1 and 4")
class Quantised(Behaviour):
    """Send each entry of the update as a sign and one of 2^(`bits` − 1) levels, rounded at random so that none is moved on average.

    The update is cut into buckets of `bucket` entries; in each the levels are 0, 1/s, … 1 times its norm, with s = 2^(bits − 1) − 1. The
    norm is the Euclidean one of the paper's theory, or the largest entry (`max`) of its experiments, which is finer.
    """

    bits: Annotated[int, Field(ge=2, le=16)] = 8
    bucket: Annotated[int, Field(ge=1)] = 512
    norm: Literal["euclidean", "max"] = "euclidean"

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the rounded update [1, d]."""
        levels = 2 ** (self.bits - 1) - 1
        d = updates.shape[1]
        padded = torch.nn.functional.pad(updates[0].double(), (0, -d % self.bucket)).view(-1, self.bucket)
        size = padded.norm(dim=1, keepdim=True) if self.norm == "euclidean" else padded.abs().amax(dim=1, keepdim=True)
        scaled = padded.abs() * (levels / size.clamp(min=1e-300))
        below = scaled.floor()
        chance = torch.rand(padded.shape, generator=view.rng, dtype=torch.float64)
        level = (below + (chance < scaled - below).double()).clamp(max=levels)
        sent: Tensor = (padded.sign() * level * size / levels).flatten()[:d].float()
        return sent[None]


@behaviour("soteria", role="honest", paper="Sun, Li, Wang, Yang, Li and Chen, CVPR 2021 (Soteria), section 4 and algorithm 1")
class Soteria(Behaviour):
    """Hide from the last linear layer's update those features from which the inputs would best be read.

    A feature r_i that goes into the layer is the more telling the larger |r_i| ÷ ‖∂r_i/∂x‖; the share `rate` of them with the largest ratio
    is pruned: their columns of the layer's weights are not changed. (The authors prune by the smallest of the inverse ratio; summed over a
    batch the two orders differ, for one sample they are the same. A feature that is zero, or does not depend on x, tells nothing.)

    The paper prunes one gradient, computed with the perturbed features. Here it is the update of all local steps: the features are those
    of up to `samples` own samples under the model that was sent, and what later steps did to the columns is dropped with the first.
    Everything in front of the layer is sent as it is: an attack that leaves the layer out of its objective is not hindered (Balunović et
    al., ICLR 2022).
    """

    rate: Share = 0.8
    samples: Annotated[int, Field(ge=1)] = 16

    def check(self, task: Task) -> str | None:
        """Refuse inputs that have no derivatives."""
        return "differentiates by the inputs, which are symbols here" if task.kind not in ("classification", "regression") else None

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the update with the telling columns left as they were [1, d]."""
        if view.data is None:
            raise ValueError("Soteria looks at its client's own samples, and was given none")
        x, _ = view.data()
        chosen = torch.randperm(len(x), generator=view.rng)[: self.samples]
        told = telling(view, x[chosen.sort().values])
        hidden = torch.zeros(len(told), dtype=torch.bool)
        hidden[told.topk(math.ceil(self.rate * len(told) - 1e-9)).indices] = True
        sent, start = updates[0].clone(), 0
        for head in view.model.heads:
            weight = view.layout.unflatten(sent)[f"{head}.weight".lstrip(".")]  # a view [outputs, features]
            weight[:, hidden[start : start + weight.shape[1]]] = 0.0
            start += weight.shape[1]
        return sent[None]


def telling(view: View, x: Tensor) -> Tensor:
    """Return Σ |r_i| ÷ ‖∂r_i/∂x‖ over samples x [b, *shape], for each feature r_i under the model that was sent [p]."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        features = view.model.features(view.params, x)  # [b, p]
        total = torch.zeros(features.shape[1])
        for i, column in enumerate(features.unbind(1)):
            (slope,) = torch.autograd.grad(column.sum(), x, retain_graph=True)
            slopes = slope.flatten(1).norm(dim=1)
            total[i] = torch.where(slopes > 0, column.detach().abs() / slopes.clamp(min=1e-30), 0.0).sum()
    return total


@behaviour("label-smoothing", role="honest", paper="Szegedy, Vanhoucke, Ioffe, Shlens and Wojna, CVPR 2016, section 7")
class LabelSmoothing(Behaviour):
    """Train on labels of which the share `smoothing` is spread over all classes: the update says less clearly which they were.

    The loss is (1 − `smoothing`) times the protocol's and `smoothing` times its mean over all classes: for cross-entropy the paper's.
    """

    smoothing: Share = 0.1

    def check(self, task: Task) -> str | None:
        """Refuse tasks without classes."""
        return "smooths class labels, but the task has none" if task.kind != "classification" else None

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return the smoothed loss."""
        output = predict(x)
        each = [view.criterion(output, torch.full_like(y, label)) for label in range(view.task.classes)]
        return (1 - self.smoothing) * view.criterion(output, y) + self.smoothing * torch.stack(each).mean()
