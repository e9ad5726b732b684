"""The game that membership inference is measured by (Yeom et al., CSF 2018): samples, some of them trained on; the adversary says which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtrust.data.base import FederatedData, IntArray
from fedtrust.engine import seeds

#: More candidates of a kind than this tell no more than the intervals do, and cost shadow models their time.
MOST = 2000


class MembershipGame(NamedTuple):
    """Candidates, half of them members, and samples of the adversary's own.

    Attributes:
        x, y: the candidates [q, *shape], [q], shuffled.
        member: whether an honest client owns it [q], bool; the teacher's.
        population: further samples (x, y) like the clients', nobody's and no candidates.
    """

    x: Tensor
    y: Tensor
    member: Tensor
    population: tuple[Tensor, Tensor]


def own_samples(data: FederatedData) -> int:
    """Return how many samples the population has: half of the test samples, rounded up."""
    return len(data.x_test) - len(data.x_test) // 2


def size_of(data: FederatedData, rows: int) -> int:
    """Return how many candidates of a kind are drawn where honest clients have so many samples."""
    return max(1, min(MOST, len(data.x_test) // 2, rows))


def draw(data: FederatedData, honest: list[int], seed: int) -> MembershipGame:
    """Draw the game from a run's data: members from the honest clients' samples, the others from half of the test samples.

    The other half is the population. Where clients have a feature skew, test samples get that of a client drawn by its number of samples:
    otherwise the skew alone would tell who is a member.
    """
    rng = seeds.stream(seed, "membership")
    test = rng.permutation(len(data.x_test))
    rows = np.concatenate([data.parts[c] for c in honest])
    size = size_of(data, len(rows))
    inside = rng.choice(rows, size=size, replace=False)
    outside, rest = test[:size], test[len(test) // 2 :]
    x = torch.cat([data.x[torch.from_numpy(inside)], _skewed(data, outside, honest, rng)])
    y = torch.cat([data.y[torch.from_numpy(inside)], data.y_test[torch.from_numpy(outside)]])
    order = torch.from_numpy(rng.permutation(2 * size))
    population = (_skewed(data, rest, honest, rng), data.y_test[torch.from_numpy(rest)])
    return MembershipGame(x[order], y[order], (torch.arange(2 * size) < size)[order], population)


def _skewed(data: FederatedData, rows: IntArray, honest: list[int], rng: np.random.Generator) -> Tensor:
    """Return these test samples as clients might see them."""
    x = data.x_test[torch.from_numpy(rows)]
    if not data.skews:
        return x
    sizes = np.array([len(data.parts[c]) for c in honest], dtype=np.float64)
    owners = rng.choice(honest, size=len(rows), p=sizes / sizes.sum())
    for client in np.unique(owners):
        index = torch.from_numpy(np.flatnonzero(owners == client))
        x[index] = data.skews[int(client)](x[index])
    return x
