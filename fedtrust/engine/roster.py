"""Who is who: which clients an adversary recruited and when they act. The ground truth; the server never sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from fedtrust.client import Behaviour, Knowledge, played
from fedtrust.engine import seeds
from fedtrust.errors import InputError


@dataclass(frozen=True)
class Group:
    """One `[[attackers]]` entry: clients that follow the same adversary.

    Attributes:
        name: the behaviour's name.
        behaviour: what they do.
        knowledge: what the scenario lets them know.
        members: the recruited clients' ids, sorted.
        rounds: first and last round in which they act; before and after they are honest.
        targets: the inputs and labels of its goal (x [t, *shape], y [t]), where the behaviour works on them.
    """

    name: str
    behaviour: Behaviour
    knowledge: Knowledge
    members: tuple[int, ...]
    rounds: tuple[int, int]
    targets: tuple[Tensor, Tensor] | None = field(default=None, compare=False)

    @cached_property
    def ids(self) -> frozenset[int]:
        """The members, for asking quickly."""
        return frozenset(self.members)

    def active(self, round_number: int) -> bool:
        """Return whether the group acts in this round."""
        return self.rounds[0] <= round_number <= self.rounds[1]


@dataclass(frozen=True)
class Roster:
    """The clients of a run.

    Attributes:
        count: how many clients there are; their ids are 0 … count-1.
        honest: what every client does that is not under an adversary's control.
        groups: the adversaries.
    """

    count: int
    honest: Behaviour
    groups: tuple[Group, ...] = ()

    def group(self, client: int, round_number: int) -> Group | None:
        """Return the adversary that controls a client in a round, or `None`."""
        for group in self.groups:
            if group.active(round_number) and client in group.ids:
                return group
        return None

    def behaviour(self, client: int, round_number: int) -> Behaviour:
        """Return what a client does in a round."""
        group = self.group(client, round_number)
        return self.honest if group is None else self.plays[self.groups.index(group)]

    @cached_property
    def plays(self) -> tuple[Behaviour, ...]:
        """What the members of each group do: `played`."""
        return tuple(played(group.behaviour, self.honest) for group in self.groups)

    def malicious(self, round_number: int | None = None) -> set[int]:
        """Return the recruited clients; with a round, those that act in it. Who only protects itself is none of them."""
        attacking = [g for g in self.groups if not g.behaviour.protects and (round_number is None or g.active(round_number))]
        return {c for g in attacking for c in g.members}


def recruits(count: int, share: float | None, number: int | None) -> int:
    """Return how many of `count` clients a share or a number means (a share is rounded to the nearest client)."""
    return number if number is not None else math.floor((share or 0.0) * count + 0.5)


def recruit(count: int, wanted: Sequence[int | Sequence[int]], seed: int) -> list[tuple[int, ...]]:
    """Choose the members of each group: explicit ids first, then random clients that are still free.

    Args:
        count: how many clients there are.
        wanted: per group a number of clients, or its explicit ids.
        seed: the scenario's seed.

    Raises:
        InputError: there are not enough clients, or two groups claim the same one.
    """
    taken = [c for entry in wanted if not isinstance(entry, int) for c in entry]
    if len(set(taken)) != len(taken):
        raise InputError("two attackers claim the same client id", "attackers")
    free = [c for c in range(count) if c not in set(taken)]
    order = [free[i] for i in seeds.stream(seed, "attackers").permutation(len(free))]
    groups: list[tuple[int, ...]] = []
    for entry in wanted:
        if isinstance(entry, int):
            if entry > len(order):
                raise InputError(f"more attackers than the {count} clients", "attackers")
            groups.append(tuple(sorted(order[:entry])))
            order = order[entry:]
        else:
            groups.append(tuple(sorted(entry)))
    return groups


def cohort(count: int, per_round: int, seed: int, round_number: int, reachable: Sequence[int] | None = None) -> list[int]:
    """Return the clients that are asked in a round, sorted: a uniform draw of `per_round` without replacement (McMahan et al., 2017).

    With `reachable` (sorted) only these can be drawn, and if they are too few all of them are.
    """
    known = range(count) if reachable is None else reachable
    if per_round >= len(known):
        return list(known)
    drawn = seeds.stream(seed, "cohort", round_number).choice(len(known), size=per_round, replace=False)
    return sorted(known[int(i)] for i in drawn)
