"""What a data set is to the rest of fedtrust."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """What the model is asked to do; public knowledge, granted to everyone.

    Attributes:
        kind: `classification` (y int64 [n]) or `regression` (y float32 [n]).
        shape: shape of one sample, channels first: (1, 28, 28), or (30,) for a table.
        classes: number of classes; 1 for a regression.
        low, high: the range of a valid feature value, for images; `None` for a table.
        labels: readable class names.
    """

    kind: Literal["classification", "regression"]
    shape: tuple[int, ...]
    classes: int
    low: float | None = None
    high: float | None = None
    labels: tuple[str, ...] = ()

    @property
    def image(self) -> bool:
        """Whether a sample is an image [channels, height, width]."""
        return len(self.shape) == 3


@dataclass(frozen=True, eq=False)
class RawData:
    """A data set as a source returns it, before it is split: the fixed train and test parts.

    Attributes:
        task: what it is for.
        x_train, x_test: float32 [n, *task.shape]; images in [0, 1].
        y_train, y_test: int64 [n], or float32 [n] for a regression.
    """

    task: Task
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True, eq=False)
class FederatedData:
    """A data set spread over clients.

    Attributes:
        task: what it is for.
        x, y: the training samples of all clients, [n, *shape] and [n], feature skew already applied where there is one.
        parts: for each client the rows of `x` that are its own, sorted int64; no row in two parts.
        x_test, y_test: the test samples; seen by the teacher's probes only.
        root: a small labelled set (x, y) that the server owns; `None` unless the scenario grants one. Never a client's row.
        skews: for each client a function [b, *shape] → [b, *shape] that puts that client's feature skew on clean samples, or
            an empty list where there is none.
    """

    task: Task
    x: Tensor
    y: Tensor
    parts: list[IntArray]
    x_test: Tensor
    y_test: Tensor
    root: tuple[Tensor, Tensor] | None = None
    skews: list[SkewFn] = field(default_factory=list)

    def client(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the samples (x [b, *shape], y [b]) of one client."""
        rows = torch.from_numpy(self.parts[index])
        return self.x[rows], self.y[rows]

    def label_counts(self) -> IntArray:
        """Return how many samples of each class each client has, [clients, classes] (one column for a regression)."""
        if self.task.kind == "regression":
            return np.array([[len(part)] for part in self.parts], dtype=np.int64)
        labels = self.y.numpy()
        counts = [np.bincount(labels[part], minlength=self.task.classes) for part in self.parts]
        return np.stack(counts).astype(np.int64)


class SkewFn:
    """A client's feature skew as a picklable, deterministic function of clean samples."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` [b, *shape] as this client sees it."""
        raise TypeError("a feature skew must say what it does")
