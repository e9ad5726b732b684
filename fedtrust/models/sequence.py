"""Models of texts: from characters int64 [b, L] to what comes after each of them, [b, L, classes]; nothing looks ahead.

They are written in plain operations, so that `torch.func.vmap` can train many clients at once (PyTorch's own recurrent layers cannot be).
A shorter text than the task's is taken as well: what a model says to its beginning does not depend on the rest.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedtrust.data.base import Task
from fedtrust.errors import InputError
from fedtrust.registry import model

Width = Annotated[int, Field(ge=1, le=4096)]


class Gru(nn.Module):
    """One recurrent layer between an embedding and a linear layer."""

    def __init__(self, classes: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, embedding)
        self.given = nn.Linear(embedding, 3 * hidden)
        self.kept = nn.Linear(hidden, 3 * hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [b, L, classes] for characters x [b, L]."""
        given = self.given(self.embedding(x))  # [b, L, 3 hidden], for all characters at once
        state = given.new_zeros(len(x), given.shape[-1] // 3)
        states = []
        for t in range(x.shape[1]):
            reset, update, new = given[:, t].chunk(3, dim=-1)
            back_reset, back_update, back_new = self.kept(state).chunk(3, dim=-1)
            keep = torch.sigmoid(update + back_update)
            fresh = torch.tanh(new + torch.sigmoid(reset + back_reset) * back_new)
            state = fresh + keep * (state - fresh)
            states.append(state)
        logits: Tensor = self.head(torch.stack(states, dim=1))
        return logits


@model("gru", paper="Cho et al., EMNLP 2014, section 2.3; the reset gate inside, as in cuDNN and PyTorch")
def gru(task: Task, *, embedding: Width = 24, hidden: Width = 96) -> nn.Module:
    """A character model with gated recurrent units.

    Args:
        task: a character model.
        embedding: numbers that stand for a character.
        hidden: units.

    Raises:
        InputError: the samples are no text.
    """
    _text(task, "gru")
    return Gru(task.classes, embedding, hidden)


class Block(nn.Module):
    """Causal self-attention and a small network after it, each beside a way round it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.asked, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Return [b, L, width] from [b, L, width]."""
        b, length, width = h.shape
        parts = self.asked(self.norm_attention(h)).view(b, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # [b, heads, L, width / heads]
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)
        ahead = torch.ones(length, length, dtype=torch.bool, device=h.device).triu(1)
        seen = (scores.masked_fill(ahead, -math.inf).softmax(dim=-1) @ value).transpose(1, 2).reshape(b, length, width)
        h = h + self.mixed(seen)
        result: Tensor = h + self.narrow(F.gelu(self.wide(self.norm_network(h))))
        return result


class Transformer(nn.Module):
    """Embeddings of characters and places, blocks, a linear layer."""

    def __init__(self, classes: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(classes, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [b, L, classes] for characters x [b, L]."""
        places = torch.arange(x.shape[1], device=x.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(x) + self.places(places))))
        return logits


@model("char-transformer", paper="Vaswani et al., NeurIPS 2017, section 3; norms before each part: Xiong et al., ICML 2020")
def char_transformer(
    task: Task,
    *,
    width: Width = 48,
    heads: Annotated[int, Field(ge=1, le=64)] = 4,
    layers: Annotated[int, Field(ge=1, le=12)] = 2,
) -> nn.Module:
    """A small transformer that looks back only, without dropout.

    Args:
        task: a character model.
        width: numbers that stand for a character on its way; a multiple of `heads`.
        heads: attention heads of each block.
        layers: blocks.

    Raises:
        InputError: the samples are no text, or the heads do not divide the width.
    """
    _text(task, "char-transformer")
    if width % heads:
        raise InputError(f"{heads} heads do not divide a width of {width}", "heads")
    return Transformer(task.classes, task.shape[0], width, heads, layers)


def _text(task: Task, name: str) -> None:
    if task.kind != "characters":
        raise InputError(f"model '{name}' reads characters, but the task is {task.called}")
