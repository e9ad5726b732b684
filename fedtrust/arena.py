"""Every attack against every defence, in numbers: damage, ranks with intervals, what a defence costs, and whom it shuts out.

The damage of an attack that wants the model to be wrong is D = (clean − attacked) / (clean − floor), clipped to [0, 1]: the accuracy that
it takes away, against the same defence's own accuracy when nobody attacks, as a share of all that there is to take. The floor is what a
model scores that always says the commonest class. An attack with a goal of its own (a backdoor, flipped labels) also does damage by its
success, less the success that the same goal has with a model that nobody attacked, clipped likewise: what a clean model gets wrong by
itself is nobody's merit. The larger of the two is its damage: who breaks the model in place of teaching it has not done less.

All of it follows from the cells alone, so a tournament scores by the same numbers. A cell that is missing, failed or was refused counts
for nothing: means are taken over what was played, and every mean says over how much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import numpy as np

from fedtrust.intervals import Floats, Interval, drawn_means, finite_mean, percentiles, ranks, resamples

#: A model that nobody attacked has to score this much above the floor: what was never learnt cannot be damaged.
LEAST = 0.05
#: What a defence's score is made of (see `score`): what it saves on average, in the worst case, and what it leaves of FedAvg's accuracy.
SHARES = (0.5, 0.25, 0.25)
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Entry:
    """One cell of a matrix, as far as the arena looks at it.

    Attributes:
        attack: its label; `None` where nobody attacked.
        defence, partition, seed: the labels.
        share: the share of attackers, where the matrix has several; "" elsewhere. A cell without attack serves all shares.
        status: `finished`, `refused` (the rule cannot be meant there), or whatever became of it.
        why: the reason of a cell that has no result.
        accuracy, success: after the last round; success is `None` for an attack that has no goal of its own.
        base: for a cell without attack: the success of each attack's goal, by the attack's label, with the model that nobody attacked.
        floor: the share of the commonest class among the test samples.
        seconds: what the defence's own components took, a round.
        once: what its repairs took after the last round.
        means: metrics averaged over the rounds.
    """

    attack: str | None
    defence: str
    partition: str
    seed: str
    share: str = ""
    status: str = "finished"
    why: str = ""
    accuracy: float | None = None
    success: float | None = None
    base: Mapping[str, float] = field(default_factory=dict)
    floor: float | None = None
    seconds: float | None = None
    once: float | None = None
    means: Mapping[str, float] = field(default_factory=dict)


class Fight(NamedTuple):
    """One attacked cell, judged: `broken` is the damage to the accuracy, `gained` that by the attack's success (`None` without a goal)."""

    entry: Entry
    clean: float | None
    base: float | None
    damage: float | None
    broken: float | None
    gained: float | None = None


@dataclass(frozen=True)
class Pair:
    """One attack against one defence, over all partitions, shares and seeds.

    Attributes:
        attack, defence: the labels.
        damage: the mean; `None` where nothing can be judged.
        broken: the mean damage to the accuracy.
        gained: the mean damage by the attack's success; `None` where it has no goal.
        interval: over the seeds; `None` with a single one.
        known, of: how many of its cells could be judged, and how many there are.
        status: "" where there is a damage, else `refused`, `failed`, `unjudged` (it was played, but not against anything) or `missing`.
        why: the first reason given by a cell without result.
    """

    attack: str
    defence: str
    damage: float | None = None
    broken: float | None = None
    gained: float | None = None
    interval: Interval | None = None
    known: int = 0
    of: int = 0
    status: str = ""
    why: str = ""


@dataclass(frozen=True)
class Standing:
    """One side's place in the ranking.

    Attributes:
        name: the label.
        mean: the mean damage over all opponents; `None` where nothing can be judged.
        interval: over the seeds; `None` with a single one.
        rank: 1 is best: one more than the number of those whose whole interval lies on the better side. Overlapping intervals tie.
        met, of: how many opponents the mean is over, and how many there are.
        extreme: the opponent with the largest damage, and that damage.
    """

    name: str
    mean: float | None = None
    interval: Interval | None = None
    rank: int | None = None
    met: int = 0
    of: int = 0
    extreme: tuple[str, float] | None = None


@dataclass(frozen=True)
class Cost:
    """What a defence costs.

    Attributes:
        defence: the label.
        clean: its accuracy without an attack, the mean over partitions and seeds.
        lost: how much of the plain mean's accuracy without an attack it gives up, over the partitions and seeds that both played.
        seconds: what its own components take a round.
        once: what its repairs take after the last round.
        score: see `score`.
    """

    defence: str
    clean: float | None = None
    lost: float | None = None
    seconds: float | None = None
    once: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class Excluded:
    """Whom a defence wrongly distrusts: shares of the honest clients, over rounds and cells; rare ones hold unusual labels."""

    defence: str
    honest: float | None = None
    out: float | None = None  # left out altogether, not only clipped
    rare: float | None = None
    common: float | None = None
    rare_trust: float | None = None
    common_trust: float | None = None

    @property
    def gap(self) -> float | None:
        """How much more often rare honest clients are distrusted than the others."""
        return None if self.rare is None or self.common is None else self.rare - self.common


@dataclass(frozen=True)
class Arena:
    """A whole matrix judged; attackers by falling, defenders by rising damage.

    Attributes:
        fights: every attacked cell.
        pairs: (attack, defence) → what came out.
        attackers, defenders: both rankings, best first; those without a number last.
        costs, excluded: by defence.
        resamples: how many the intervals rest on; 0 with a single seed.
    """

    fights: list[Fight]
    pairs: dict[tuple[str, str], Pair]
    attackers: list[Standing]
    defenders: list[Standing]
    costs: dict[str, Cost]
    excluded: dict[str, Excluded]
    resamples: int


# ------------------------------------------------------------------------------------------------------------------------- one cell


def accuracy_damage(clean: float | None, attacked: float | None, floor: float | None) -> float | None:
    """Return (clean − attacked) / (clean − floor), clipped to [0, 1]; `None` where a number is missing or hardly anything was learnt."""
    if clean is None or attacked is None or floor is None or clean - floor < LEAST - _ROUNDING:
        return None
    return min(max((clean - attacked) / (clean - floor), 0.0), 1.0)


def success_damage(success: float, base: float | None) -> float:
    """Return success − base, clipped to [0, 1]; a base that was not measured counts as 0."""
    return min(max(success - (base or 0.0), 0.0), 1.0)


def score(damages: Sequence[float], clean: float | None, reference: float | None) -> float | None:
    """Return a defence's score in [0, 1]: 0.5 · mean(1 − D) + 0.25 · (1 − largest D) + 0.25 · clean accuracy relative to FedAvg, at most 1.

    Args:
        damages: of every attack.
        clean: the defence's accuracy without an attack.
        reference: the plain mean's.
    """
    if not damages or clean is None or not reference:
        return None
    parts = (1 - fmean(damages), 1 - max(damages), min(max(clean / reference, 0.0), 1.0))
    return sum(share * part for share, part in zip(SHARES, parts, strict=True))


def fights(entries: Sequence[Entry]) -> list[Fight]:
    """Judge every attacked cell against the cell of the same defence, partition and seed in which nobody attacked."""
    calm = {(e.defence, e.partition, e.seed): e for e in entries if e.attack is None and e.status == "finished"}
    found = []
    for entry in entries:
        if entry.attack is None:
            continue
        before = calm.get((entry.defence, entry.partition, entry.seed))
        clean = before.accuracy if before else None
        base = before.base.get(entry.attack) if before else None
        if entry.status != "finished":
            found.append(Fight(entry, clean, base, None, None))
            continue
        floor = entry.floor if entry.floor is not None else before.floor if before else None
        broken = accuracy_damage(clean, entry.accuracy, floor)
        idle = clean is not None and floor is not None and clean - floor < LEAST - _ROUNDING  # a useless model resists every backdoor
        wanted = None if entry.success is None or idle else success_damage(entry.success, base)
        damage = max((part for part in (broken, wanted) if part is not None), default=None)
        found.append(Fight(entry, clean, base, damage, broken, wanted))
    return found


# ------------------------------------------------------------------------------------------------------------------- over the seeds


class _Table(NamedTuple):
    """Damages [attacks, seeds, defences, settings] with NaN where there is none."""

    values: Floats
    attacks: list[str]
    defences: list[str]


def _table(judged: Sequence[Fight], attacks: list[str], defences: list[str]) -> _Table:
    settings = sorted({(f.entry.partition, f.entry.share) for f in judged})
    seeds = sorted({f.entry.seed for f in judged})
    places = [{name: n for n, name in enumerate(axis)} for axis in (attacks, seeds, defences, settings)]
    values = np.full([len(axis) for axis in places], np.nan)
    for fight in judged:
        if fight.damage is not None:
            entry = fight.entry
            at = (entry.attack, entry.seed, entry.defence, (entry.partition, entry.share))
            values[tuple(place[name] for place, name in zip(places, at, strict=True))] = fight.damage  # type: ignore[index]
    return _Table(values, attacks, defences)


class _Drawn(NamedTuple):
    """Means over the settings: of every pair [attacks, defences], with an interval; and per resample of every side [b, …]."""

    pairs: Floats
    intervals: dict[tuple[int, int], Interval]
    by_attack: Floats
    by_defence: Floats


def _draw(table: _Table) -> _Drawn:
    """Bootstrap over the seeds, all cells of a seed together: what a seed does to one cell it does to its neighbours."""
    count, seeds, defences, _ = table.values.shape
    plain = np.ones((1, seeds))
    pairs = np.stack([finite_mean(drawn_means(rows, plain), 2)[0] for rows in table.values]) if count else np.zeros((0, defences))
    weights = resamples(seeds) if seeds > 1 else np.zeros((0, seeds))
    intervals: dict[tuple[int, int], Interval] = {}
    by_attack, total, met = np.full((len(weights), count), np.nan), np.zeros((len(weights), defences)), np.zeros((len(weights), defences))
    for n, rows in enumerate(table.values):  # an attack at a time: resamples × attacks × defences is more than a small machine has
        drawn = finite_mean(drawn_means(rows, weights), 2)
        for m in range(defences):
            if (ends := percentiles(drawn[:, m])) is not None:
                intervals[n, m] = ends
        by_attack[:, n] = finite_mean(drawn, 1)
        known = np.isfinite(drawn)
        total, met = total + np.where(known, drawn, 0.0), met + known
    by_defence = np.divide(total, met, out=np.full_like(total, np.nan), where=met > 0)
    return _Drawn(pairs, intervals, by_attack, by_defence)


def _standings(names: list[str], others: list[str], pairs: Floats, drawn: Floats, *, low_is_best: bool) -> list[Standing]:
    """Rank one side; `pairs` [names, others] are the mean damages, `drawn` [b, names] their means in every resample."""
    means = finite_mean(pairs, 1)
    places = [None if not np.isfinite(m) else (float(m), percentiles(drawn[:, n])) for n, m in enumerate(means)]
    found = []
    for n, (name, place, rank) in enumerate(zip(names, places, ranks(places, low_is_best=low_is_best), strict=True)):
        met = int(np.isfinite(pairs[n]).sum())
        if place is None:
            found.append(Standing(name, of=len(others)))
            continue
        most = int(np.nanargmax(pairs[n]))
        found.append(Standing(name, place[0], place[1], rank, met, len(others), (others[most], float(pairs[n, most]))))
    sign = 1 if low_is_best else -1
    return sorted(found, key=lambda s: (s.rank is None, s.rank or 0, sign * (s.mean or 0.0)))


# ----------------------------------------------------------------------------------------------------------------------- the whole


def judge(entries: Sequence[Entry], reference: str | None = None) -> Arena:
    """Judge a matrix.

    Args:
        entries: its cells, those without attack included; in the order of the file, which decides between equals.
        reference: the label of the plain mean (FedAvg), against which lost accuracy is counted.
    """
    attacks = list(dict.fromkeys(e.attack for e in entries if e.attack is not None))
    defences = list(dict.fromkeys(e.defence for e in entries))
    judged = fights(entries)
    table = _table(judged, attacks, defences)
    drawn = _draw(table)
    groups: dict[tuple[str, str], list[Fight]] = {}
    for fight in judged:
        groups.setdefault((str(fight.entry.attack), fight.entry.defence), []).append(fight)
    pairs = {
        (a, d): _pair(a, d, groups.get((a, d), []), float(drawn.pairs[n, m]), drawn.intervals.get((n, m)))
        for n, a in enumerate(attacks)
        for m, d in enumerate(defences)
    }
    attackers = _standings(attacks, defences, drawn.pairs, drawn.by_attack, low_is_best=False)
    defenders = _standings(defences, attacks, drawn.pairs.T, drawn.by_defence, low_is_best=True)
    costs = {d: _cost(d, entries, reference, [p.damage for (_, name), p in pairs.items() if name == d]) for d in defences}
    seeds = table.values.shape[1]
    return Arena(
        judged, pairs, attackers, defenders, costs, {d: _excluded(d, entries) for d in defences}, len(resamples(seeds)) if seeds > 1 else 0
    )


def _pair(attack: str, defence: str, group: Sequence[Fight], damage: float, interval: Interval | None) -> Pair:
    known = sum(f.damage is not None for f in group)
    why = next((f.entry.why for f in group if f.entry.status != "finished" and f.entry.why), "")
    if known:
        parts = _average(f.broken for f in group), _average(f.gained for f in group)
        return Pair(attack, defence, damage, *parts, interval, known, len(group), why=why)
    states = {f.entry.status for f in group}
    status = "missing" if not states else "unjudged" if "finished" in states else "refused" if states == {"refused"} else "failed"
    return Pair(attack, defence, of=len(group), status=status, why=why)


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _cost(defence: str, entries: Sequence[Entry], reference: str | None, damages: Sequence[float | None]) -> Cost:
    mine = [e for e in entries if e.defence == defence and e.status == "finished"]
    calm = {(e.partition, e.seed): e.accuracy for e in mine if e.attack is None and e.accuracy is not None}
    plain = {
        (e.partition, e.seed): e.accuracy
        for e in entries
        if e.defence == reference and e.attack is None and e.status == "finished" and e.accuracy is not None
    }
    both = [place for place in calm if place in plain]
    own, other = _average(calm[p] for p in both), _average(plain[p] for p in both)
    lost = None if own is None or other is None else other - own
    judged = [d for d in damages if d is not None]
    seconds, once = _average(e.seconds for e in mine), _average(e.once for e in mine)
    return Cost(defence, _average(calm.values()), lost, seconds, once, score(judged, own, other))


def _excluded(defence: str, entries: Sequence[Entry]) -> Excluded:
    mine = [e.means for e in entries if e.defence == defence and e.status == "finished"]
    names = ("detection/fpr", "detection/excluded-honest", "rare/fpr", "common/fpr", "rare/trust", "common/trust")
    return Excluded(defence, *(_average(means.get(name) for means in mine) for name in names))
