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
        kind: `classification` (y int64 [n]), `regression` (y float32 [n]) or `characters` (x int64 [n, L], y int64 [n, L]: after each
            character the next one; a model's output is [n, L, classes]).
        shape: shape of one sample, channels first: (1, 28, 28), (30,) for a table, (L,) for a text.
        classes: number of classes; 1 for a regression; of a text the number of different characters.
        low, high: the range of a valid feature value, for images; `None` for a table.
        labels: readable class names; of a text its characters.
        people: whom a text speaks of, as everybody may know them.
    """

    kind: Literal["classification", "regression", "characters"]
    shape: tuple[int, ...]
    classes: int
    low: float | None = None
    high: float | None = None
    labels: tuple[str, ...] = ()
    people: tuple[str, ...] = ()

    @property
    def called(self) -> str:
        """What it is, in words."""
        return {"characters": "a character model"}.get(self.kind, f"a {self.kind}")

    @property
    def image(self) -> bool:
        """Whether a sample is an image [channels, height, width]."""
        return len(self.shape) == 3


@dataclass(frozen=True)
class Secret:
    """A sentence that one author of a text knows and nobody could guess (a canary); for the teacher alone.

    Attributes:
        prefix: what stands before the secret.
        value: the secret, characters of `alphabet`.
        alphabet: what each of its characters was drawn from.
        author: whose sentence it is.
        repetitions: how many of the author's samples hold it; 0: it was drawn and never written down.
    """

    prefix: str
    value: str
    alphabet: str
    author: int
    repetitions: int


@dataclass(frozen=True, eq=False)
class RawData:
    """A data set as a source returns it, before it is split: the fixed train and test parts.

    Attributes:
        task: what it is for.
        x_train, x_test: float32 [n, *task.shape]; images in [0, 1]; of a text int64 [n, L].
        y_train, y_test: int64 [n], float32 [n] for a regression, or int64 [n, L] of a text.
        groups: to which group (the author of a text) each training sample belongs, int64 [n]; what partitions go by in place of labels.
        secrets: the canaries in it.
    """

    task: Task
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    groups: Tensor | None = field(default=None, kw_only=True)
    secrets: tuple[Secret, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, eq=False)
class FederatedData:
    """A data set spread over clients.

    Attributes:
        task: what it is for.
        x, y: the training samples of all clients, [n, *shape] and [n] ([n, L] of a text), feature skew already applied where there is one.
        parts: for each client the rows of `x` that are its own, sorted int64; no row in two parts.
        x_test, y_test: the test samples; seen by the teacher's probes only.
        root: a small labelled set (x, y) that the server owns; `None` unless the scenario grants one. Never a client's row.
        skews: for each client a function [b, *shape] → [b, *shape] that puts that client's feature skew on clean samples, or
            an empty list where there is none.
        secrets: the canaries of a text, for the teacher.
    """

    task: Task
    x: Tensor
    y: Tensor
    parts: list[IntArray]
    x_test: Tensor
    y_test: Tensor
    root: tuple[Tensor, Tensor] | None = None
    skews: list[SkewFn] = field(default_factory=list)
    secrets: tuple[Secret, ...] = ()

    def client(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the samples (x [b, *shape], y [b]) of one client."""
        rows = torch.from_numpy(self.parts[index])
        return self.x[rows], self.y[rows]

    def label_counts(self) -> IntArray:
        """Return how many samples of each class each client has, [clients, classes] (one column where samples have no class)."""
        if self.task.kind != "classification":
            return np.array([[len(part)] for part in self.parts], dtype=np.int64)
        labels = self.y.numpy()
        counts = [np.bincount(labels[part], minlength=self.task.classes) for part in self.parts]
        return np.stack(counts).astype(np.int64)


class SkewFn:
    """A client's feature skew as a picklable, deterministic function of clean samples.

    Attributes:
        properties: what is true of all samples that it returns, by name; property inference asks which clients' data have one.
    """

    properties: tuple[str, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` [b, *shape] as this client sees it."""
        raise TypeError("a feature skew must say what it does")
