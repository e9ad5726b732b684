"""What an attack, a defence or an audit of the classroom is worth: scores, intervals, ranks and marks. Pure functions, no files.

One cell is one run: an attack against a defence, on one partition and one seed. Its damage is the arena's (`fedtrust.arena`):
D = (clean − attacked) / (clean − floor), clipped to [0, 1], against the same defence's own accuracy when nobody attacks; for a house attack
with a goal of its own that, or its success less what it has with a model that nobody attacked, whichever is more. Where the exercise has
a goal (a backdoor), D is the success of that goal alone.

- An attack's effectiveness E is its mean D over the defences.
- A defence's is 0.5 · mean (1 − D) + 0.25 · (1 − largest D) + 0.25 · clean accuracy relative to plain FedAvg, at most 1; the D of an attack
  is its mean over seeds and partitions. It is zero behind the utility gate: without an attack, more than 3 points of accuracy less than
  FedAvg, or more than 10 less for the worst client.
- An audit's or an evasion's is its measure, rescaled so that chance is 0 and perfection 1; of an evasion the mean over the models.

score = 0.5 · E + 0.5 · E · (1 − C / C_max) − penalty, at least 0. C / C_max is the mean share of their budgets that the counted units
(gradient evaluations, queries, bytes) used up, weighted by their prices.

What fails counts as nothing done: a cell in which an attack fails is damage 0 for it, and is left out for the defence; one in which a
defence fails is, for both, what the same attack does to plain FedAvg. Every failure costs a penalty; who never played is worth nothing.

**How ties are cut.** Intervals are 95 % bootstrap intervals over the seeds. Entries stand in the order of their scores. The first of them
leads a group; whoever follows belongs to it as long as his interval overlaps the *leader's*, and the first one whose interval does not
leads the next group. A chain (A overlaps B, B overlaps C, A does not overlap C) is thus cut before C, whatever B is; nobody stands behind
somebody with a lower score; and the group's number is the rank that the bands of marks go by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fedtrust.arena import LEAST, accuracy_damage, success_damage
from fedtrust.intervals import Interval

Side = Literal["attack", "defence", "audit", "evasion"]
#: Two shares that differ by less are the same.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Rules:
    """The numbers of a scoring; the defaults are the course's.

    Attributes:
        mean, worst, clean: what a defence's effectiveness is made of; they add up to 1.
        effect, thrift: score = effect · E + thrift · E · (1 − C / C_max).
        prices: what the share of each counted unit's budget weighs in C / C_max.
        clean_loss, worst_client: the utility gate, as shares of accuracy.
        per_fault, most: what a failed cell costs of the score, and all of them together at most.
        bands: the marks of the first, second, … group; further ones get the last.
        zero: the mark of a score of zero.
        least: a model that nobody attacked has to be this much above the floor, or there is nothing to damage.
        stealth: an attack with a goal does no damage in a cell in which it takes more accuracy than this; `None`: it may.
    """

    mean: float = 0.5
    worst: float = 0.25
    clean: float = 0.25
    effect: float = 0.5
    thrift: float = 0.5
    prices: Mapping[str, float] = field(default_factory=lambda: {"gradients": 1.0, "queries": 1.0, "bytes": 1.0})
    clean_loss: float = 0.03
    worst_client: float = 0.10
    per_fault: float = 0.05
    most: float = 0.25
    bands: tuple[int, ...] = (100, 90, 80, 70, 60, 50)
    zero: int = 0
    least: float = LEAST
    stealth: float | None = None


#: The course's own numbers.
COURSE = Rules()


# ------------------------------------------------------------------------------------------------------------------------ formulas


def damage(clean: float | None, attacked: float | None, floor: float | None) -> float | None:
    """Return (clean − attacked) / (clean − floor), clipped to [0, 1]; `None` where nothing was learnt that could be damaged."""
    return accuracy_damage(clean, attacked, floor)


def goal_damage(success: float | None, base: float | None, lost: float | None = None, stealth: float | None = None) -> float | None:
    """Return the success of a goal, less its success with a model that nobody attacked, clipped to [0, 1].

    Args:
        success: with the attacked model.
        base: with the same defence's model that nobody attacked; `None` counts as 0.
        lost: the accuracy that the attack took.
        stealth: above this loss the attack is no longer one that nobody notices: 0.
    """
    if success is None:
        return None
    if stealth is not None and lost is not None and lost > stealth + ROUNDING:
        return 0.0
    return success_damage(success, base)


def rescaled(value: float, chance: float) -> float:
    """Return a measure on the scale from chance, 0, to perfection, 1; clipped."""
    return min(max((value - chance) / (1 - chance), 0.0), 1.0)


def defence_effect(damages: Sequence[float], clean: float | None, reference: float | None, rules: Rules = COURSE) -> float | None:
    """Return mean · mean(1 − D) + worst · (1 − largest D) + clean · min(1, clean accuracy / FedAvg's), in [0, 1].

    Args:
        damages: of every attack, each a mean over seeds and partitions.
        clean: the defence's accuracy without an attack.
        reference: plain FedAvg's.
        rules: the weights.
    """
    if not damages or clean is None or not reference:
        return None
    relative = min(max(clean / reference, 0.0), 1.0)
    return rules.mean * (1 - sum(damages) / len(damages)) + rules.worst * (1 - max(damages)) + rules.clean * relative


def gate(clean: float, reference: float, worst: float | None, reference_worst: float | None, rules: Rules = COURSE) -> str:
    """Return why a defence is worth nothing although it may resist: what it costs when nobody attacks. "" if it passes.

    Args:
        clean: its accuracy without an attack.
        reference: plain FedAvg's.
        worst: the accuracy of its worst client without an attack.
        reference_worst: plain FedAvg's.
        rules: the limits.
    """
    lost = reference - clean
    if lost > rules.clean_loss + ROUNDING:
        most = 100 * rules.clean_loss
        return f"without an attack it loses {100 * lost:.1f} points of accuracy against FedAvg (at most {most:g} are allowed)"
    if worst is not None and reference_worst is not None and reference_worst - worst > rules.worst_client + ROUNDING:
        lost = reference_worst - worst
        return f"its worst client loses {100 * lost:.1f} points against FedAvg (at most {100 * rules.worst_client:g} are allowed)"
    return ""


def cost_share(used: Mapping[str, float], budget: Mapping[str, float | None], prices: Mapping[str, float]) -> float:
    """Return C / C_max in [0, 1]: the mean share used of the budgets of the counted units, weighted by their prices; 0 without any.

    Args:
        used: what a game took, by unit.
        budget: what it may take at most; units without a budget do not count.
        prices: the units' weights.
    """
    shares = [(prices[u], min(used.get(u, 0.0) / most, 1.0)) for u, most in budget.items() if most and prices.get(u, 0.0) > 0]
    total = sum(price for price, _ in shares)
    return sum(price * part for price, part in shares) / total if total else 0.0


def score(effect: float, cost: float, penalty: float = 0.0, rules: Rules = COURSE) -> float:
    """Return effect · E + thrift · E · (1 − C / C_max) − penalty, at least 0.

    Args:
        effect: E in [0, 1].
        cost: C / C_max in [0, 1].
        penalty: for what failed.
        rules: the two weights.
    """
    return max(0.0, rules.effect * effect + rules.thrift * effect * (1 - cost) - penalty)


def penalty(faults: int, rules: Rules = COURSE) -> float:
    """Return what failed cells cost of the score."""
    return min(rules.most, rules.per_fault * faults)


def groups(places: Sequence[tuple[float, Interval | None]]) -> list[int]:
    """Return each one's group, from 1, the best; how a chain of overlapping intervals is cut stands at the top of this module.

    Args:
        places: score and interval (`None`: the score alone) of each.
    """
    spans = [interval or Interval(mean, mean) for mean, interval in places]
    order = sorted(range(len(places)), key=lambda i: -places[i][0])
    found = [0] * len(places)
    leader, group = -1, 0
    for i in order:
        if leader < 0 or spans[i].high < spans[leader].low - ROUNDING:
            leader, group = i, group + 1
        found[i] = group
    return found


def mark(group: int, value: float, rules: Rules = COURSE) -> int:
    """Return the mark of a group's member with that score."""
    return rules.zero if value <= ROUNDING else rules.bands[min(group, len(rules.bands)) - 1]


# ---------------------------------------------------------------------------------------------------------------------- from cells


class Fault(NamedTuple):
    """What went wrong with a submission in a cell: whose it was (`attack`, `defence`, …), its kind, and a sentence for its author."""

    side: str
    kind: str
    sentence: str


@dataclass(frozen=True)
class Outcome:
    """One cell as it was played.

    Attributes:
        attack: the attack's, audit's or evasion's label; `None` where nobody attacks.
        defence, partition: labels; `seed`: the place of its seed in the phase's list.
        accuracy, worst: the model's after the last round, and its worst client's.
        success: of the exercise's goal (or of the attack's own), as the exercise measures it.
        base: for a cell without attack: the same goal's success, by attack label ("" for the exercise's goal).
        floor: what a model scores that always says the commonest class.
        measure: of an audit or an evasion.
        chance: what it is without any skill.
        fault: `None` if nothing failed.
        note: why the model is worth nothing, if it is no longer finite.
        costs: side → unit → how much.
    """

    attack: str | None
    defence: str
    partition: str
    seed: int
    accuracy: float | None = None
    worst: float | None = None
    success: float | None = None
    base: Mapping[str, float] = field(default_factory=dict)
    floor: float | None = None
    measure: float | None = None
    chance: float = 0.0
    fault: Fault | None = None
    note: str = ""
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str | None, str, str, int]:
        """What it is known by."""
        return self.attack, self.defence, self.partition, self.seed


@dataclass(frozen=True)
class Line:
    """One entry of the leaderboard.

    Attributes:
        name: the entry's; `side`: what it is; `house`: whether it is a baseline.
        score, interval: in [0, 1]; the interval over the seeds, `None` with a single one.
        effect: E; `parts`: what a defence's is made of.
        cost: C / C_max; `used`: the mean use of each unit a cell.
        penalty, faults: what failures cost, and the cells in which they happened.
        gate: why the entry is worth nothing, if so: the utility gate, or it failed everywhere.
        group, mark: of a student's entry; `None` for the house, and no group for a score of zero.
        cells: how many it was judged by, of how many.
    """

    name: str
    side: Side
    house: bool
    score: float
    interval: Interval | None
    effect: float
    parts: Mapping[str, float] = field(default_factory=dict)
    cost: float = 0.0
    used: Mapping[str, float] = field(default_factory=dict)
    penalty: float = 0.0
    faults: tuple[tuple[Outcome, Fault], ...] = ()
    gate: str = ""
    group: int | None = None
    mark: int | None = None
    cells: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Board:
    """Everything that was judged: a side's lines, best first; and the mean damage of every pair (attack, defence).

    Of an evasion: the share that it fooled, by (evasion, model).
    """

    lines: Mapping[Side, Sequence[Line]]
    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict)
    seeds: int = 0


@dataclass(frozen=True)
class Field:
    """Who takes part.

    Attributes:
        attacks, defences: every label, with whether it is the house's.
        reference: the label of plain FedAvg among the defences.
        side: what stands in the attacks' place. An `audit` has no defences; an `evasion` may have models in their place.
        goal: whether damage is the success of a goal.
        budget: what a game may take at most, by unit.
    """

    attacks: Mapping[str, bool]
    defences: Mapping[str, bool]
    reference: str = ""
    side: Side = "attack"
    goal: bool = False
    budget: Mapping[str, float | None] = field(default_factory=dict)
