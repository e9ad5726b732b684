"""What a run says about privacy: the server's guarantee from its ledger, the clients' own from how far they took part."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedtrust.engine.prepare import local_steps
from fedtrust.engine.roster import Roster
from fedtrust.engine.world import World
from fedtrust.errors import InputError
from fedtrust.privacy.accounts import ClientAccount, Participation, Spent, worst
from fedtrust.privacy.build import drowned, local_burden, unpaid
from fedtrust.privacy.server import PrivateStrategy
from fedtrust.strategy import FedTrustStrategy


def participations(sizes: Sequence[int], batch_size: int, epochs: int, rounds: Mapping[int, int]) -> list[Participation]:
    """Return how far clients took part.

    Args:
        sizes: every client's number of samples.
        batch_size: samples a local step, as the run uses it.
        epochs: local epochs a round.
        rounds: client → the number of rounds in which it was asked.
    """
    steps = [local_steps(sizes[client], batch_size, epochs) for client in sorted(rounds)]
    return [Participation(c, rounds[c], sizes[c], batch_size, n) for c, n in zip(sorted(rounds), steps, strict=True)]


def _in(world: World, rounds: Mapping[int, int]) -> list[Participation]:
    return participations([len(part) for part in world.data.parts], world.batch_size, world.epochs, rounds)


def calibrated(roster: Roster, world: World, rounds: int) -> Roster:
    """Return the roster with its honest clients' noise fixed, where they protect themselves; for clients asked in every round.

    Raises:
        InputError: no noise keeps their target.
    """
    honest = roster.honest
    if not isinstance(honest, ClientAccount):
        return roster
    try:
        fixed = honest.calibrated(_in(world, dict.fromkeys(range(roster.count), rounds)))
    except ValueError as error:
        raise InputError(str(error), "clients.behaviour.epsilon") from None
    return dataclasses.replace(roster, honest=fixed)


def guarantees(strategy: object, roster: Roster, world: World, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the guarantees of a run, as plain data: the server's and the clients', where there are any.

    Args:
        strategy: the run's.
        roster: who does what.
        world: the run.
        rows: the lines of `clients.jsonl`.
    """
    found = [_central(strategy, world)] if isinstance(strategy, PrivateStrategy) else []
    if isinstance(strategy, FedTrustStrategy):
        found += [{key: _plain(value) for key, value in each.items()} for each in strategy.guarantees]
    if isinstance(roster.honest, ClientAccount):
        honest = [row for row in rows if not row["malicious"]]
        asked, counts = Counter(int(row["client"]) for row in honest), list(Counter(int(row["round"]) for row in honest).values())
        most = worst(roster.honest, _in(world, asked))
        if most is not None:
            spent = {key: _plain(value) for key, value in most.spent._asdict().items()}
            found.append(
                {"by": "clients", **spent, "worst_client": most.client, "clients": most.clients, **_burden(most.spent, world, counts)}
            )
    return found


def _burden(spent: Spent, world: World, cohorts: Sequence[int]) -> dict[str, Any]:
    """Return how long the noise of a mean is, of updates that were noised as a whole; of noised local steps nothing is said."""
    if spent.unit != "client" or not cohorts:
        return {"warnings": []}
    per_round = sum(cohorts) / len(cohorts)
    warning = drowned(spent, world.layout.size, per_round)
    return {"noise_to_clip": local_burden(spent, world.layout.size, per_round), "warnings": [] if warning is None else [warning]}


def _central(strategy: PrivateStrategy, world: World) -> dict[str, Any]:
    mechanism, ledger = strategy.mechanism, strategy.mechanism.ledger(strategy.ledger)
    releases, size = len(ledger), world.layout.size
    by = {f"epsilon_{method}": _plain(mechanism.epsilon(releases, method=method)) for method in mechanism.methods}
    warning = unpaid(mechanism, size)
    return {
        "by": "server",
        **mechanism.facts(),
        "clip_norm": float(ledger[-1, 4]) if releases else mechanism.clip.first,
        "std_of_sum": float(ledger[-1, 5]) if releases else mechanism.std(mechanism.clip.first),
        "releases": releases,
        "epsilon": by[f"epsilon_{mechanism.methods[0]}"],
        **by,
        "accounting": mechanism.methods[0],
        "noise_to_clip": mechanism.burden(size),
        "warnings": [] if warning is None else [warning],
    }


def _plain(value: Any) -> Any:
    """Return a number that JSON knows: an ε without bound is `null`."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
