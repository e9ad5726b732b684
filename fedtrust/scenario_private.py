"""What cannot be meant beside `[privacy]`: whatever would make its ε a number about something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtrust.errors import InputError
from fedtrust.plugins import is_plugin
from fedtrust.registry import REGISTRY
from fedtrust.scenario_parts import ClientsSpec, Ref, StrategySpec

if TYPE_CHECKING:
    from fedtrust.scenario import Scenario


def must_work(strategy: StrategySpec, where: str, clients: ClientsSpec) -> None:
    """Refuse a strategy whose parts do not go with its privacy mechanism.

    Raises:
        InputError: placed at the part, with the reason.
    """
    if strategy.privacy is None:
        return
    name = strategy.aggregator.name
    if name.startswith("flwr:"):
        raise InputError("a stock Flower strategy draws its clients and adds its updates up by itself; use 'mean'", f"{where}.privacy")
    if clients.system is not None:
        reason = "who can be reached is not the mechanism's draw, so its ε would not hold; a private run has no [clients.system]"
        raise InputError(reason, "clients.system")
    entry = REGISTRY.get("aggregator", name)
    if entry.meta.get("linear") == "examples":
        reason = f"'{name}' lets one client count more than another, by a number that it reports; privacy needs equal weights: use 'mean'"
        raise InputError(reason, f"{where}.aggregator")
    if entry.meta.get("linear") != "equal":
        reason = f"'{name}' uses the rows as the data have it, so one client moves more than its clip; for privacy use 'mean'"
        raise InputError(reason, f"{where}.aggregator")
    _filters(strategy, where)
    for index, repair in enumerate(strategy.repairs):
        if repair.params.get("by") == "clients":
            reason = f"'{repair.name}' asks the clients about their data, outside of the mechanism; let it work on root samples"
            raise InputError(reason, f"{where}.repairs[{index}]")


def must_mean(scenario: Scenario) -> None:
    """Refuse adversaries and repairs beside which the ε of a resolved scenario, or of its matrix, would be untrue.

    Raises:
        InputError: placed at the part, with the reason.
    """
    sweep = scenario.sweep
    strategies = {"strategy": scenario.strategy}
    attackers = {"attackers": scenario.attackers}
    if sweep is not None:
        strategies = {f"sweep.strategies.{label}": each for label, each in sweep.strategies.items()} or strategies
        attackers = {f"sweep.attackers.{label}": each for label, each in sweep.attackers.items()} or attackers
    for where, strategy in strategies.items():
        _asks_nobody(strategy, where, strategy.behaviour or scenario.clients.behaviour)
        summed = strategy.privacy is not None or any(REGISTRY.get("filter", ref.name).meta.get("guarantee") for ref in strategy.filters)
        if strategy.privacy is not None and scenario.malicious_server is not None:
            raise InputError("central privacy trusts the server; with a malicious one its ε is void: use dp-sgd or local-dp", where)
        for place, groups in attackers.items() if summed else ():
            for index, group in enumerate(groups):
                if group.knowledge in ("omniscient", "omniscient+defence"):
                    reason = (
                        f"'{group.behaviour}' sees the honest updates and may send copies of them, so a client would be in the noised sum "
                        "more than once and its ε untrue; grant at most 'coalition'"
                    )
                    raise InputError(reason, f"{place}[{index}].knowledge")


def _asks_nobody(strategy: StrategySpec, where: str, behaviour: Ref) -> None:
    """Refuse repairs that ask clients who protect themselves by noise, or whose rows are hidden."""
    target = None if is_plugin(behaviour.name) else REGISTRY.get("behaviour", behaviour.name).target
    noised = target is not None and hasattr(target, "account") and hasattr(target, "calibrated")
    hidden = any(REGISTRY.get("filter", ref.name).meta.get("hides") for ref in strategy.filters)
    for index, repair in enumerate(strategy.repairs):
        if repair.params.get("by") == "clients" and (noised or hidden):
            why = f"'{behaviour.name}' puts no noise on the answers" if noised else "the answers are not hidden as the updates are"
            raise InputError(f"'{repair.name}' asks the clients about their data, and {why}", f"{where}.repairs[{index}]")


def _filters(strategy: StrategySpec, where: str) -> None:
    for index, given in enumerate(strategy.filters):
        place = f"{where}.filters[{index}]"
        meta = REGISTRY.get("filter", given.name).meta
        if meta.get("hides"):
            reason = f"'{given.name}' rounds what the mechanism has clipped and hides the rows from it; use the noise of its own"
            raise InputError(reason, place)
        rowwise = meta.get("rowwise")
        if rowwise is None or not rowwise(given.params):
            reason = f"'{given.name}' looks at other rows, so a client moves more than its own; behind it a clip bounds nothing"
            raise InputError(reason, place)
        if strategy.privacy is not None and strategy.privacy.clip.kind == "adaptive":
            reason = f"'{given.name}' would change the norms that an adaptive clip follows; leave filters empty"
            raise InputError(reason, place)
