"""From the cells that were played to the leaderboard's lines; the formulas are `fedtrust.classroom.scoring`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedtrust.classroom.scoring import (
    COURSE,
    ROUNDING,
    Board,
    Field,
    Line,
    Outcome,
    Rules,
    Side,
    cost_share,
    damage,
    defence_effect,
    gate,
    goal_damage,
    groups,
    mark,
    penalty,
    rescaled,
    score,
)
from fedtrust.intervals import Floats, drawn_means, finite_mean, percentiles, resamples


class _Values(NamedTuple):
    """D [attacks, defences, partitions, seeds] as the attacker and as the defender has it; accuracy and worst client without an attack."""

    given: Floats
    taken: Floats
    clean: Floats  # [defences, partitions, seeds]
    worst: Floats


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


class _Judge:
    """Turns cells into damages, with what a fault counts as."""

    def __init__(self, who: Field, cells: Mapping[tuple[str | None, str, str, int], Outcome], rules: Rules) -> None:
        self._who, self._cells, self._rules = who, cells, rules

    def calm(self, defence: str, partition: str, seed: int) -> Outcome | None:
        """Return the cell in which nobody attacks; FedAvg's, where the defence failed."""
        cell = self._cells.get((None, defence, partition, seed))
        if cell is not None and cell.fault is not None and defence != self._who.reference:
            return self._cells.get((None, self._who.reference, partition, seed))
        return cell

    def damage(self, attack: str, defence: str, partition: str, seed: int) -> tuple[float, float]:
        """Return D for the attacker and for the defender; NaN where there is none."""
        nothing = float("nan")
        cell = self._cells.get((attack, defence, partition, seed))
        calm = self._cells.get((None, defence, partition, seed))
        if cell is None:
            return nothing, nothing
        if cell.fault is not None and cell.fault.side == "attack":
            return 0.0, nothing
        broken = cell.fault is not None or (calm is not None and calm.fault is not None)
        if broken and defence != self._who.reference:  # plain FedAvg in its place
            same = self.damage(attack, self._who.reference, partition, seed)[0]
            return same, same
        found = _nan(self._judged(cell, calm))
        return found, found

    def _judged(self, cell: Outcome, calm: Outcome | None) -> float | None:
        clean = None if calm is None else calm.accuracy
        floor = cell.floor if cell.floor is not None else None if calm is None else calm.floor
        if clean is None or floor is None or clean - floor < self._rules.least - ROUNDING:  # a useless model resists every attack
            return None
        if cell.note:  # the model is no longer finite: it says nothing any more, nor what an attacker wants
            return 0.0 if self._who.goal else 1.0
        base = None if calm is None else calm.base.get(str(cell.attack), calm.base.get(""))
        lost = None if cell.accuracy is None else clean - cell.accuracy
        gained = goal_damage(cell.success, base, lost, self._rules.stealth if self._who.goal else None)
        if self._who.goal:
            return gained
        broken = damage(clean, cell.accuracy, floor)
        return max((part for part in (broken, gained) if part is not None), default=None)


def _values(who: Field, cells: Sequence[Outcome], rules: Rules) -> _Values:
    partitions = sorted({c.partition for c in cells})
    seeds = sorted({c.seed for c in cells})
    judge = _Judge(who, {c.key: c for c in cells}, rules)
    shape = (len(who.attacks), len(who.defences), len(partitions), len(seeds))
    given, taken = np.full(shape, np.nan), np.full(shape, np.nan)
    clean, worst = np.full(shape[1:], np.nan), np.full(shape[1:], np.nan)
    for m, defence in enumerate(who.defences):
        for p, partition in enumerate(partitions):
            for s, seed in enumerate(seeds):
                calm = judge.calm(defence, partition, seed)
                if calm is not None:
                    clean[m, p, s], worst[m, p, s] = _nan(calm.floor if calm.note else calm.accuracy), _nan(calm.worst)
                for n, attack in enumerate(who.attacks):
                    given[n, m, p, s], taken[n, m, p, s] = judge.damage(attack, defence, partition, seed)
    return _Values(given, taken, clean, worst)


def _draws(seeds: int) -> Floats:
    """Return the weights of the seeds: those that were played in the first row, then every bootstrap resample [1 + b, seeds]."""
    plain = np.ones((1, seeds))
    return np.concatenate([plain, resamples(seeds)]) if seeds > 1 else plain


def _over_seeds(values: Floats, weights: Floats) -> Floats:
    """Return the means over seeds and partitions [b, rows] of values [rows, partitions, seeds] for each row of weights [b, seeds]."""
    return finite_mean(drawn_means(np.moveaxis(values, -1, 0), weights), 2)


def judge(who: Field, outcomes: Sequence[Outcome], rules: Rules = COURSE) -> Board:
    """Judge what was played.

    Args:
        who: who takes part.
        outcomes: the cells, in any order; what is missing counts for nothing.
        rules: the numbers.
    """
    if who.side in ("audit", "evasion"):
        lines = _ranked([_audit(name, house, who, outcomes, rules) for name, house in who.attacks.items()], rules)
        return Board({who.side: lines}, _by_model(who, outcomes), len({o.seed for o in outcomes}))
    found = _values(who, outcomes, rules)
    weights = _draws(found.clean.shape[-1])
    attacks = [_attack(n, name, house, who, outcomes, found, weights, rules) for n, (name, house) in enumerate(who.attacks.items())]
    defences = [_defence(m, name, house, who, outcomes, found, weights, rules) for m, (name, house) in enumerate(who.defences.items())]
    means = [_over_seeds(rows, weights[:1])[0] for rows in found.given]
    pairs = {
        (attack, defence): float(means[n][m])
        for n, attack in enumerate(who.attacks)
        for m, defence in enumerate(who.defences)
        if np.isfinite(means[n][m])
    }
    return Board({"attack": _ranked(attacks, rules), "defence": _ranked(defences, rules)}, pairs, found.clean.shape[-1])


def _mine(side: str, name: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [o for o in outcomes if (o.defence if side == "defence" else o.attack) == name]


def _costs(side: str, mine: Sequence[Outcome], who: Field, rules: Rules) -> tuple[float, dict[str, float]]:
    """Return C / C_max and the mean use a cell, over the cells in which nothing of this entry failed."""
    known = [o.costs[side] for o in mine if side in o.costs and (o.fault is None or o.fault.side != side)]
    if not known:
        return 0.0, {}
    used = {unit: sum(c.get(unit, 0.0) for c in known) / len(known) for unit in sorted({u for c in known for u in c})}
    return cost_share(used, who.budget, rules.prices), used


def _line(
    name: str,
    side: Side,
    house: bool,
    mine: Sequence[Outcome],
    effects: Floats,
    who: Field,
    rules: Rules,
    why: str,
    parts: Mapping[str, float],
) -> Line:
    """Return an entry's line; `effects` [1 + b] is E as it was, and in every resample."""
    faults = tuple((o, o.fault) for o in sorted(mine, key=lambda o: (str(o.attack), o.defence, o.partition, o.seed)) if _by(o, side))
    cost, used = _costs(side, mine, who, rules)
    fine = 0.0 if house else penalty(len(faults), rules)
    if faults and not any(o.fault is None for o in mine):
        why = "it failed wherever it was asked"  # what never played has nothing to show, not even FedAvg's merits
    effects = np.where(np.isfinite(effects), effects, 0.0) * (0.0 if why else 1.0)
    scores = np.array([score(float(e), cost, fine, rules) for e in effects])
    interval = percentiles(scores[1:]) if len(scores) > 1 else None
    judged = len(mine) - len(faults)
    return Line(
        name, side, house, float(scores[0]), interval, float(effects[0]), parts, cost, used, fine,
        tuple((o, f) for o, f in faults if f is not None), why, cells=(judged, len(mine)),
    )  # fmt: skip


def _by(outcome: Outcome, side: str) -> bool:
    return outcome.fault is not None and outcome.fault.side == side


def _attack(n: int, name: str, house: bool, who: Field, outcomes: Sequence[Outcome], found: _Values, weights: Floats, rules: Rules) -> Line:
    effects = finite_mean(_over_seeds(found.given[n], weights), 1)
    return _line(name, "attack", house, _mine("attack", name, outcomes), effects, who, rules, "", {})


def _defence(
    m: int, name: str, house: bool, who: Field, outcomes: Sequence[Outcome], found: _Values, weights: Floats, rules: Rules
) -> Line:
    against = _over_seeds(found.taken[:, m], weights)  # [b, attacks]
    clean = _over_seeds(found.clean, weights)  # [b, defences]
    worst = _over_seeds(found.worst, weights[:1])[0]
    place = list(who.defences).index(who.reference)
    effects = np.array([_effect(row, own[m], own[place], rules) for row, own in zip(against, clean, strict=True)])
    own, reference = clean[0, m], clean[0, place]
    why = ""
    if np.isfinite(own) and np.isfinite(reference) and m != place:
        known_worst = bool(np.isfinite(worst[m]) and np.isfinite(worst[place]))
        pair = (float(worst[m]), float(worst[place])) if known_worst else (None, None)
        why = gate(float(own), float(reference), pair[0], pair[1], rules)
    known = against[0][np.isfinite(against[0])]
    parts = {"clean": float(own), "lost": float(reference - own)} if np.isfinite(own) and np.isfinite(reference) else {}
    parts |= {"mean": float(known.mean()), "worst": float(known.max())} if len(known) else {}
    parts |= {"worst client": float(worst[m])} if np.isfinite(worst[m]) else {}
    return _line(name, "defence", house, _mine("defence", name, outcomes), effects, who, rules, why, parts)


def _effect(damages: Floats, clean: float, reference: float, rules: Rules) -> float:
    known = [float(d) for d in damages if np.isfinite(d)]
    own, other = (None if not np.isfinite(v) else float(v) for v in (clean, reference))
    return _nan(defence_effect(known, own, other, rules))


def _audit(name: str, house: bool, who: Field, outcomes: Sequence[Outcome], rules: Rules) -> Line:
    mine = _mine(who.side, name, outcomes)
    games, seeds = sorted({(o.defence, o.partition) for o in outcomes}), sorted({o.seed for o in outcomes})
    values = np.full((1, len(games), len(seeds)), np.nan)
    for o in mine:
        values[0, games.index((o.defence, o.partition)), seeds.index(o.seed)] = _reached(o)
    effects = _over_seeds(values, _draws(len(seeds)))[:, 0]
    known = [o.measure for o in mine if o.measure is not None and o.fault is None]
    parts = {"measure": sum(known) / len(known), "chance": sum(o.chance for o in mine) / len(mine)} if known else {}
    note = next((o.note for o in mine if o.note), "")
    silent = bool(mine) and all(o.measure is None and o.fault is None for o in mine)
    why = "nothing was measured" + (f": {note}" if note else "") if silent else ""
    return _line(name, who.side, house, mine, effects, who, rules, why, parts)


def _reached(o: Outcome) -> float:
    """Return what an audit or an evasion reached, from chance (0) to perfection (1)."""
    return 0.0 if o.fault is not None or o.measure is None else rescaled(o.measure, o.chance)


def _by_model(who: Field, outcomes: Sequence[Outcome]) -> dict[tuple[str, str], float]:
    """Return what every evasion reached against every model, over partitions and seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    for o in outcomes:
        if o.defence in who.defences:
            found.setdefault((str(o.attack), o.defence), []).append(_reached(o))
    return {pair: sum(values) / len(values) for pair, values in found.items()}


def _ranked(lines: Sequence[Line], rules: Rules) -> list[Line]:
    """Return the lines best first, the students' with group and mark; a score of zero has a mark and no rank."""
    ranked = [line for line in lines if not line.house and line.score > ROUNDING]
    placed = dict(zip((s.name for s in ranked), groups([(s.score, s.interval) for s in ranked]), strict=True))
    made = [
        line if line.house else replace(line, group=placed.get(line.name), mark=mark(placed.get(line.name, 1), line.score, rules))
        for line in lines
    ]
    return sorted(made, key=lambda line: (-line.score, line.house, line.name))
