"""Cards of those who attack without being clients: observers of the protocol, users of the model, a malicious server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtrust.registry import Entry
from fedtrust.scenario import ReleaseSpec, Scenario
from fedtrust.setup import entry_of, plain
from fedtrust.views import simulated

_ROLES = {"curious-server": "curious server", "user": "user of the model"}
_SEES = {
    "curious-server": "the model, the updates and the registered numbers of samples",
    "behind a hiding filter": "the model, the sum of the updates and the registered numbers of samples",
    "user": "what the model answers",
    "sender": "the model, whom it asks and the registered numbers of samples",
}
_GRANTED = {
    "model": "the model's architecture",
    "candidates": "the samples whose membership is asked",
    "population": "samples of its own like the clients'",
}


def observer_cards(scenario: Scenario) -> list[dict[str, Any]]:
    """Return role, knowledge, capability and parameters of everybody who attacks without being a client, as for `threat_cards`."""
    cards = []
    spec = scenario.malicious_server
    if spec is not None:
        entry = entry_of("sender", spec.sender, scenario)
        rounds = list(spec.rounds or (1, scenario.rounds))
        cards.append(_card(entry, spec.params, "malicious server", _SEES["sender"], ["changes the model that clients are sent"], rounds))
    for ref in scenario.probes:
        entry = entry_of("probe", ref.name, scenario)
        role = str(entry.meta["role"])
        if role in _ROLES:
            does = ["reads what clients send"] if role == "curious-server" else [_queries(scenario.release)]
            sees = _SEES[role]
            if role == "curious-server" and any(entry_of("filter", f.name, scenario).meta.get("hides") for f in scenario.strategy.filters):
                does, sees = ["reads the sum of what clients send"], _SEES["behind a hiding filter"]
            end = entry.meta["when"] == "end"
            rounds = [scenario.rounds, scenario.rounds] if end else [1, scenario.rounds]
            cards.append(_card(entry, ref.params, _ROLES[role], sees, does, rounds))
    return cards


def _queries(release: ReleaseSpec) -> str:
    """Return what a user may do, and how he is answered."""
    told = {"logits": "its raw outputs", "probabilities": "probabilities", "label": "the label alone"}[release.answers]
    behind = f", through {' and '.join(ref.name for ref in release.defences)}" if release.defences else ""
    most = "" if release.queries is None else f" about {release.queries} samples at most"
    return f"queries the model{most} (told: {told}{behind})"


def _card(entry: Entry, params: Mapping[str, Any], role: str, sees: str, does: list[str], rounds: list[int]) -> dict[str, Any]:
    return {
        "behaviour": entry.name,
        "paper": str(entry.meta.get("paper", "")),
        "summary": entry.summary,
        "role": role,
        "knowledge": ", ".join([sees, *(_GRANTED[field] for field in sorted(simulated(entry.meta)))]),
        "capability": does,
        "clients": [],
        "share": None,
        "rounds": rounds,
        "goal": "",
        "params": plain(params),
    }
