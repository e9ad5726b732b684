"""Who won: attack or defence, said in plain sentences that follow from the numbers.

The thresholds are the report's convention, fixed here so that two reports mean the same by "held". Against the same strategy's cell
without an attack, averaged over the seeds:

* the attack **won** if it succeeds on at least 50 % of the inputs it aims at, or costs at least 10 points of accuracy;
* the strategy **held** if the attack succeeds on at most 10 % and costs at most 4 points;
* anything between is **partial**; without a number to judge by it is **unknown**.

Nothing here imports more than the standard library and the loader, so that the command line can use it for its final table.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from fedtrust.report import findings
from fedtrust.report.load import Cell, MatrixSummary, RunSummary, Threat, validated

Outcome = Literal["won", "partial", "held", "unknown"]

SUCCESS_WON, SUCCESS_HELD = 0.50, 0.10  # share of the attacked inputs
COST_WON, COST_HELD = 0.10, 0.04  # accuracy, as a fraction: 0.10 is ten points
LEARNT = 0.30  # below this without an attack, there is not much that an attack could break
ACCURACY, SUCCESS, LOSS = "accuracy", "attack-success", "loss"

_SEVERITY: dict[Outcome, int] = {"unknown": 0, "held": 1, "partial": 2, "won": 3}
_ROUNDING = 1e-9  # 0.95 - 0.85 is a little less than 0.1 in floating point


def cell_outcome(accuracy: float | None, baseline: float | None, attack_success: float | None) -> Outcome:
    """Judge one attack against one strategy.

    Args:
        accuracy: under the attack, a fraction.
        baseline: of the same strategy without an attack, or `None` where it was not played.
        attack_success: share of the attacked inputs that went where the attacker wants, or `None` for an attack without such a goal.

    Returns:
        `won`, `partial` or `held`; `unknown` where neither number can be judged.
    """
    cost = None if accuracy is None or baseline is None else baseline - accuracy
    if cost is None and attack_success is None:
        return "unknown"
    if (attack_success or 0.0) >= SUCCESS_WON - _ROUNDING or (cost or 0.0) >= COST_WON - _ROUNDING:
        return "won"
    if (attack_success or 0.0) <= SUCCESS_HELD + _ROUNDING and (cost or 0.0) <= COST_HELD + _ROUNDING:
        return "held"
    return "partial"


@dataclass(frozen=True)
class Duel:
    """One attack against one strategy on one partition, averaged over the seeds that finished."""

    attack: str
    strategy: str
    partition: str
    accuracy: float | None
    baseline: float | None
    success: float | None
    loss: float | None
    seeds: int
    failed: int
    refused: bool = False

    @property
    def cost(self) -> float | None:
        """Accuracy lost to the attack, a fraction."""
        return None if self.accuracy is None or self.baseline is None else self.baseline - self.accuracy

    @property
    def outcome(self) -> Outcome:
        """Who won."""
        return cell_outcome(self.accuracy, self.baseline, self.success)


def is_none(attack: str, threats: dict[str, list[Threat]]) -> bool:
    """Return whether an entry of the attackers axis stands for "no attack"."""
    return attack.strip().casefold() in ("none", "") or (attack in threats and not threats[attack])


def mean(cells: list[Cell], metric: str) -> float | None:
    """Average a metric over the cells that finished and have it."""
    values = [value for cell in cells if cell.ok and (value := cell.metrics.get(metric)) is not None]
    return fmean(values) if values else None


def duels(summary: MatrixSummary) -> list[Duel]:
    """Average every attack × strategy × partition over its seeds, the cells without attack included."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in summary.cells:
        groups.setdefault((cell.attackers, cell.strategies, cell.partitions), []).append(cell)
    base = {key[1:]: mean(cells, ACCURACY) for key, cells in groups.items() if is_none(key[0], summary.threats)}
    found = []
    for attack in summary.axes.attackers:
        for strategy in summary.axes.strategies:
            for partition in summary.axes.partitions:
                if cells := groups.get((attack, strategy, partition)):
                    values = (mean(cells, ACCURACY), base.get((strategy, partition)), mean(cells, SUCCESS), mean(cells, LOSS))
                    good, refused = sum(cell.ok for cell in cells), sum(cell.refused for cell in cells)
                    failed = len(cells) - good - refused
                    found.append(Duel(attack, strategy, partition, *values, good, failed, refused == len(cells)))
    return found


def sentences(summary: dict[str, Any]) -> list[str]:
    """Say who won, in plain sentences; the first is the headline.

    Args:
        summary: the content of summary.json, of a single run or a matrix.

    Returns:
        At least one sentence. Plain text: whoever puts it into HTML has to escape it.
    """
    if summary.get("kind") == "matrix":
        from fedtrust.report.claims import sentences as claimed

        told = claimed(summary)
        return told + _matrix(validated(MatrixSummary, summary, "summary.json"), brief=bool(told))
    return _run(validated(RunSummary, summary, "summary.json"))


def percent(value: float | None, digits: int = 1) -> str:
    """Format a fraction as a percentage."""
    return "n/a" if value is None else f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """Format a difference of fractions in percentage points."""
    return f"{100 * value:.1f} point{'' if f'{100 * value:.1f}' == '1.0' else 's'}"


def listed(names: list[str]) -> str:
    """Join names as one writes them: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]


def _few(names: list[str], limit: int = 6) -> str:
    return listed(names) if len(names) <= limit else f"{', '.join(names[:limit])} and {len(names) - limit} more"


def goal(threats: list[Threat]) -> str:
    """Say what attack success means for these adversaries: in their own words, or by what their parameters are called."""
    named = {threat.goal for threat in threats if threat.goal}
    if len(named) == 1:
        return f"of the {named.pop()}"
    triggered = any(word in key for threat in threats for key in threat.params for word in ("trigger", "patch", "pattern"))
    targets = sorted({str(threat.params["target"]) for threat in threats if isinstance(threat.params.get("target"), int | str)})
    inputs = "triggered inputs" if triggered else "attacked inputs"
    return f"of the {inputs} go to class {targets[0]}" if len(targets) == 1 else f"of the {inputs} go where the attacker wants"


# ---------------------------------------------------------------------------------------------------------------- a single run


def _run(summary: RunSummary) -> list[str]:
    accuracy, success, loss = (summary.metrics.get(name) for name in (ACCURACY, SUCCESS, LOSS))
    attacked = bool(summary.threats) or not is_none(summary.attack, {})
    attack, rule = summary.attack or "the attack", summary.strategy or "the server's rule"
    unfinished = summary.status not in ("", "finished")
    how = {"failed": "The run failed", "interrupted": "The run was interrupted"}.get(summary.status, "The run has not ended")
    said = [f"{how}; the numbers are those of its last round."] if unfinished else []
    found = findings.sentences({name: value for name, value in summary.metrics.items() if value is not None})
    said += found
    if success is not None and attacked:
        word = {"won": "beats", "partial": "gets part of its way against", "held": "is held by", "unknown": "meets"}[
            cell_outcome(None, None, success)
        ]
        said.append(_start(f"{attack} {word} {rule}: {percent(success)} {goal(summary.threats)}."))
    if accuracy is not None:
        who = (
            "Accuracy"
            if (success is not None and attacked) or (found and not attacked)
            else _start(f"{rule} under {attack}" if attacked else f"{rule} without an attack") + ": accuracy"
        )
        said.append(f"{who} ends at {percent(accuracy)}.")
    elif loss is not None:
        said.append(
            _start(
                f"{rule} {f'under {attack}' if attacked else 'without an attack'} ends at a loss of {loss:.4g}; no accuracy was measured."
            )
        )
    if attacked and accuracy is not None:
        said.append("What the attack costs in accuracy is not judged: that takes the same run without it.")
    from fedtrust.report.privacy import sentence

    return (said or ["The run left no numbers to judge."]) + [sentence(found) for found in summary.privacy]


# -------------------------------------------------------------------------------------------------------------------- a matrix


def _matrix(summary: MatrixSummary, *, brief: bool = False) -> list[str]:
    """Say who won in a matrix; `brief`: only what stays to be said where claims were put to the test."""
    every = duels(summary)
    fights = [duel for duel in every if not is_none(duel.attack, summary.threats)]
    calm = [duel for duel in every if is_none(duel.attack, summary.threats)]
    if brief:
        return [*_hardly_learnt(fights, calm), *_calm(calm), *_caveats(summary, fights, calm, partitions=False)]
    found = findings.by_strategy(_by_strategy(summary.cells))
    said = [*_hardly_learnt(fights, calm), *(found if not fights else []), _headline(fights, calm)]
    for attack in dict.fromkeys(duel.attack for duel in fights):
        mine = worst(duel for duel in fights if duel.attack == attack)
        judged = [duel for duel in mine if duel.outcome != "unknown"]
        said += [_duel_sentence(attack, judged, summary.threats.get(attack, []))] if judged else _unjudged(attack, mine)
    said += _partitions(fights) + (found if fights else [])
    if calm and fights:
        said += _calm(calm)
    return [sentence for sentence in said if sentence] + _caveats(summary, fights, calm)


def _by_strategy(cells: list[Cell]) -> dict[str, dict[str, float]]:
    """Return what each strategy's cells measured, averaged over all of them."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.ok:
            grouped.setdefault(cell.strategies, []).append(cell)
    names = {strategy: dict.fromkeys(name for cell in each for name in cell.metrics) for strategy, each in grouped.items()}
    every = {strategy: {name: mean(each, name) for name in names[strategy]} for strategy, each in grouped.items()}
    return {strategy: {name: value for name, value in values.items() if value is not None} for strategy, values in every.items()}


def worst(duels: Any) -> list[Duel]:
    """Keep, for every attack and strategy, the partition on which the strategy did worst."""
    kept: dict[tuple[str, str], Duel] = {}
    for duel in duels:
        key = (duel.attack, duel.strategy)
        if key not in kept or _rank(duel) > _rank(kept[key]):
            kept[key] = duel
    return list(kept.values())


def _rank(duel: Duel) -> tuple[int, float]:
    return _SEVERITY[duel.outcome], max(duel.success or 0.0, duel.cost or 0.0)


def _headline(fights: list[Duel], calm: list[Duel]) -> str:
    judged = [duel for duel in worst(fights) if duel.outcome != "unknown"]
    if not judged:
        return (_calm(calm) or ["No cell has a number to judge by."])[0] if not fights else "No outcome can be judged from these numbers."
    attacks = list(dict.fromkeys(duel.attack for duel in judged))
    lost, part, held = ({} for _ in range(3))  # type: dict[str, list[str]], dict[str, list[str]], dict[str, list[str]]
    for duel in judged:
        {"won": lost, "partial": part, "held": held}[duel.outcome].setdefault(duel.strategy, []).append(duel.attack)
    safe = [name for name in held if len(held[name]) == len(attacks)]
    against = {1: attacks[0], 2: "both attacks"}.get(len(attacks), "every attack")
    parts = [f"{_few(safe)} held against {against}"] if safe else ["no rule held against every attack"] if len(attacks) > 1 else []
    by_losses: dict[tuple[str, ...], list[str]] = {}
    for name, attackers in lost.items():
        by_losses.setdefault(tuple(attackers), []).append(name)
    parts += [
        f"{_few(names)} lost to {_few(list(losses), 4) if len(losses) < len(attacks) or len(losses) < 3 else 'all of them'}"
        for losses, names in by_losses.items()
    ][:3]
    only_part = [name for name in part if name not in lost]
    if only_part:
        parts.append(f"{_few(only_part)} held only in part")
    return _start("; ".join(parts)) + "."


def _numbers(group: list[Duel]) -> str:
    """The worst numbers of a group that held or nearly held."""
    success = [duel.success for duel in group if duel.success is not None]
    cost = [duel.cost for duel in group if duel.cost is not None]
    most = "at most " if len(group) > 1 else ""
    said = [f"attack success {most}{percent(max(success))}"] if success else []
    if cost:
        said.append(f"{most}{points(max(cost))} of accuracy lost" if max(cost) >= 0.0005 else "no accuracy lost")
    return ", ".join(said)


def _blow(duel: Duel, threats: list[Threat]) -> str:
    """What a winning attack did, in numbers."""
    if duel.success is not None and duel.success >= SUCCESS_HELD:
        while_ = "" if duel.accuracy is None else f", while accuracy stays at {percent(duel.accuracy)}"
        if duel.cost is not None and duel.cost > COST_HELD:
            while_ = f", and {points(duel.cost)} of accuracy are lost"
        return f"{percent(duel.success)} {goal(threats)}{while_}"
    fall = f"{percent(duel.baseline).removesuffix(' %')} → {percent(duel.accuracy)}"
    return f"{points(duel.cost or 0.0)} of accuracy lost, {fall}"


def _duel_sentence(attack: str, judged: list[Duel], threats: list[Threat]) -> str:
    groups = {outcome: [duel for duel in judged if duel.outcome == outcome] for outcome in ("won", "partial", "held")}
    parts = []
    if won := groups["won"]:
        won = sorted(won, key=_rank, reverse=True)
        blows = [
            f"{duel.strategy} ({_blow(duel, threats)})" if n == 0 else f"{duel.strategy} ({_short(duel)})" for n, duel in enumerate(won[:4])
        ]
        blows += [f"{len(won) - 4} more"] if len(won) > 4 else []
        parts.append(f"{attack} beats {listed(blows)}")
    if partial := groups["partial"]:
        subject = "it" if parts else attack
        named = [f"{duel.strategy} ({_short(duel)})" for duel in partial[:4]] + (["others"] if len(partial) > 4 else [])
        parts.append(f"{subject} gets part of its way against {listed(named)}")
    if held := groups["held"]:
        names = _few([duel.strategy for duel in held])
        verb = "holds" if len(held) == 1 else "hold"
        parts.append(f"{names} {verb} {'it' if parts else attack} ({_numbers(held)})")
    return _start("; ".join(parts)) + "."


def _short(duel: Duel) -> str:
    if duel.success is not None and (duel.cost is None or duel.success >= duel.cost):
        return percent(duel.success)
    return f"−{points(duel.cost or 0.0)} of accuracy"


def _unjudged(attack: str, group: list[Duel]) -> list[str]:
    """An attack that only a loss tells of, or nothing at all."""
    losses = [f"{duel.strategy} {duel.loss:.4g}" for duel in group if duel.loss is not None]
    return [_start(f"{attack}: only the loss is known ({_few(losses)}).")] if losses else []


def _partitions(fights: list[Duel]) -> list[str]:
    """Where the way the data is spread decides the outcome."""
    words = {"won": "lost", "partial": "held in part", "held": "held"}
    said = []
    for key in dict.fromkeys((duel.attack, duel.strategy) for duel in fights):
        mine = [duel for duel in fights if (duel.attack, duel.strategy) == key and duel.outcome != "unknown"]
        if len({duel.outcome for duel in mine}) > 1:
            ends = [
                f"{words[outcome]} on {_few([d.partition for d in mine if d.outcome == outcome])}"
                for outcome in words
                if any(d.outcome == outcome for d in mine)
            ]
            said.append(f"{key[1]} against {key[0]} {listed(ends)}")
    more = f"; and {len(said) - 3} more such pairs" if len(said) > 3 else ""
    return [f"The spread of the data decides: {'; '.join(said[:3])}{more}."] if said else []


def _calm(calm: list[Duel]) -> list[str]:
    """What the rules cost where nobody attacks."""
    values: dict[str, list[float]] = {}
    for duel in calm:
        if duel.accuracy is not None:
            values.setdefault(duel.strategy, []).append(duel.accuracy)
    ordered = sorted(((fmean(known), name) for name, known in values.items()), reverse=True)
    if not ordered:
        return []
    if len(ordered) <= 4:
        return [f"Without an attack accuracy is {listed([f'{percent(value)} with {name}' for value, name in ordered])}."]
    (best, first), (least, last) = ordered[0], ordered[-1]
    return [f"Without an attack accuracy lies between {percent(least)} ({last}) and {percent(best)} ({first})."]


def _hardly_learnt(fights: list[Duel], calm: list[Duel]) -> list[str]:
    """The headline of a matrix in which nothing can be judged yet."""
    best = max((duel.accuracy for duel in calm if duel.accuracy is not None), default=None)
    if not fights or best is None or best >= LEARNT:
        return []
    return [f"Nothing can be judged yet: even without an attack the best rule reaches only {percent(best)}, the model has hardly learnt."]


def _caveats(summary: MatrixSummary, fights: list[Duel], calm: list[Duel], *, partitions: bool = True) -> list[str]:
    said = []
    if fights and not calm:
        said.append(
            "No cell was played without an attack, so what the attacks cost in accuracy cannot be said; only attack success is judged."
        )
    if refused := [cell for cell in summary.cells if cell.refused]:
        pairs = _few(list(dict.fromkeys(f"{cell.strategies} against {cell.attackers}" for cell in refused)), 3)
        said.append(f"{len(refused)} of {len(summary.cells)} cells were not played: their rule cannot work as it stands ({pairs}).")
    if broken := [cell for cell in summary.cells if not cell.ok and not cell.refused]:
        which = _few(list(dict.fromkeys(f"{cell.attackers} against {cell.strategies}" for cell in broken)), 3)
        cells = f"{len(broken)} of {len(summary.cells)} cells did not finish and {'is' if len(broken) == 1 else 'are'} left out"
        said.append(f"{cells} ({which}).")
    if partitions and len(summary.axes.partitions) > 1 and fights:
        said.append("Where several partitions were played, the numbers are those of the worst one.")
    seeds = len(summary.axes.seeds)
    if seeds == 1 and fights:
        said.append("One seed: a difference of a point or two may be chance.")
    elif seeds > 1:
        said.append(f"All numbers are means over {seeds} seeds.")
    return said
