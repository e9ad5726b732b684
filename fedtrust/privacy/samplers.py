"""Who takes part in a round of a private run, and what that means for the neighbouring relation and the sensitivity.

A sampler is half of a mechanism: it draws the cohort and says how a release on such a cohort is accounted for, so that no ε can be
reported for a sampling that did not happen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedtrust.engine import seeds
from fedtrust.privacy.accountants import Release


@dataclass(frozen=True)
class Sampler:
    """Draws cohorts of `count` clients.

    Attributes:
        count: N, how many clients there are.
        per_round: n, how many take part in a round; on average, with Poisson sampling.
        seed: the run's.
    """

    count: int
    per_round: int
    seed: int

    #: Its name in a scenario.
    name: ClassVar[str] = ""
    #: How far one unit can move a sum of vectors of norm at most 1: 1 where it is added or removed, 2 where it is replaced.
    reach: ClassVar[int] = 1
    #: Which data sets are neighbours, in words.
    relation: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 1 <= self.per_round <= self.count:
            raise ValueError(f"between 1 and {self.count} clients take part in a round, not {self.per_round}")

    def draw(self, round_number: int) -> list[int]:
        """Return the clients of a round, sorted; the round is counted from 1."""
        raise NotImplementedError

    def release(self, sigma: float) -> Release:
        """Return how a noised sum over such a cohort is accounted for; σ is the noise's standard deviation ÷ (reach × clip)."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return in a few words how clients are drawn."""
        raise NotImplementedError


@dataclass(frozen=True)
class Poisson(Sampler):
    """Every client takes part with probability q = n ÷ N, whatever the others do; a cohort may be empty."""

    name: ClassVar[str] = "poisson"
    relation: ClassVar[str] = "add-or-remove-one"

    @property
    def q(self) -> float:
        """The probability to take part."""
        return self.per_round / self.count

    def draw(self, round_number: int) -> list[int]:
        """Return the clients whose own coin fell on heads; empty with probability (1 − q)^N."""
        coins = seeds.stream(self.seed, "privacy/cohort", round_number).random(self.count)
        return [int(c) for c in np.flatnonzero(coins < self.q)]

    def release(self, sigma: float) -> Release:
        """Return a Poisson-sampled release."""
        return Release(sigma, self.q)

    def describe(self) -> str:
        """Return q in words."""
        return f"Poisson, each of {self.count} clients with q = {self.q:.4g}"


@dataclass(frozen=True)
class Fixed(Sampler):
    """Exactly n of the N clients, drawn without replacement."""

    name: ClassVar[str] = "fixed"
    reach: ClassVar[int] = 2
    relation: ClassVar[str] = "replace-one"

    def draw(self, round_number: int) -> list[int]:
        """Return n different clients."""
        drawn = seeds.stream(self.seed, "privacy/cohort", round_number).choice(self.count, size=self.per_round, replace=False)
        return sorted(int(c) for c in drawn)

    def release(self, sigma: float) -> Release:
        """Return a release on a cohort of fixed size."""
        return Release(sigma, cohort=(self.per_round, self.count))

    def describe(self) -> str:
        """Return n and N in words."""
        return f"fixed cohorts, {self.per_round} of {self.count} clients without replacement"


@dataclass(frozen=True)
class RoundRobin(Sampler):
    """All clients in a shuffled order, n a round, over and over: nothing is left to chance, so nothing is gained by it either."""

    name: ClassVar[str] = "round-robin"
    relation: ClassVar[str] = "zero-out-one"

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """The clients in their order [N]."""
        return seeds.stream(self.seed, "privacy/order").permutation(self.count)

    def draw(self, round_number: int) -> list[int]:
        """Return the next n clients of the order, which begins anew when it is through."""
        first = (round_number - 1) * self.per_round
        return sorted(int(self.order[(first + i) % self.count]) for i in range(self.per_round))

    def participations(self, rounds: int) -> list[tuple[int, ...]]:
        """Return the different sets of rounds, counted from 0, that clients take part in."""
        part: dict[int, list[int]] = {}
        for place in range(rounds * self.per_round):
            part.setdefault(place % self.count, []).append(place // self.per_round)
        return sorted({tuple(found) for found in part.values()})

    def separation(self, rounds: int) -> int:
        """Return the least number of rounds from one part of a client to its next; `rounds` where none takes part twice."""
        gaps = [b - a for found in self.participations(rounds) for a, b in itertools.pairwise(found)]
        return min(gaps, default=rounds)

    def release(self, sigma: float) -> Release:
        """Return a release without any sampling."""
        return Release(sigma)

    def describe(self) -> str:
        """Return the order in words."""
        return f"a fixed order of {self.count} clients, {self.per_round} a round; no sampling is assumed"


def overlap(cohort: Sequence[int], clients: Sequence[int]) -> list[int]:
    """Return the clients that are not of the cohort."""
    drawn = set(cohort)
    return [c for c in clients if c not in drawn]
