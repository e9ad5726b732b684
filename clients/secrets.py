"""What a client can do about secrets in its own texts."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, View, behaviour
from fedtrust.data.base import Task


@behaviour(
    "deduplicated",
    role="honest",
    paper="Lee et al., ACL 2022, section 4.1 (exact substrings); Kandpal, Wallace and Raffel, ICML 2022",
)
class Deduplicated(Behaviour):
    """An honest client that keeps one of all its samples which share `span` characters in a row with each other.

    Going through its samples in their order, it leaves out every one of which a stretch of `span` characters stands in one that it has
    kept. What is repeated by several clients stays: nobody sees the others' texts.
    """

    span: Annotated[int, Field(ge=2)] = 24

    def check(self, task: Task) -> str | None:
        """Refuse what is no text."""
        if task.kind != "characters":
            return f"looks for repeated stretches of text, but the task is {task.called}"
        if self.span > task.shape[0] + 1:
            return f"no text has {self.span} characters in a row: samples are {task.shape[0] + 1} long"
        return None

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return the samples that are kept."""
        texts = torch.cat([x, y[:, -1:]], dim=1)  # [b, L + 1]
        known: set[bytes] = set()
        kept = []
        for row, stretches in enumerate(texts.to(torch.int16).unfold(1, self.span, 1)):
            parts = {stretch.numpy().tobytes() for stretch in stretches.contiguous()}
            if known.isdisjoint(parts):
                kept.append(row)
                known |= parts
        rows = torch.tensor(kept)
        return x[rows], y[rows]
