"""Writing a scenario as TOML with every default in it; no dependency, since the standard library only reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedtrust.scenario import AttackerSpec, ClaimSpec, ClientsSpec, DataSpec, Ref, ReleaseSpec, Scenario, StrategySpec, SweepSpec, TrainSpec
from fedtrust.scenario_privacy import PrivacySpec

_BARE = re.compile(r"^[A-Za-z0-9_-]+$")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def value(given: Any) -> str:
    """Return a value as TOML, tables inline; `None` inside a table is left out."""
    if isinstance(given, bool):
        return "true" if given else "false"
    if isinstance(given, int):
        return str(given)
    if isinstance(given, float):
        text = repr(given)
        return text if any(c in text for c in ".en") else f"{text}.0"
    if isinstance(given, str):
        return '"' + "".join(_character(c) for c in given) + '"'
    if isinstance(given, Mapping):
        inside = ", ".join(f"{key(str(k))} = {value(v)}" for k, v in given.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(given, list | tuple):
        return "[" + ", ".join(value(v) for v in given) + "]"
    raise TypeError(f"{type(given).__name__} has no form in TOML")


def _character(c: str) -> str:
    if c in _ESCAPES:
        return _ESCAPES[c]
    return f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c


def key(name: str) -> str:
    """Return a key, quoted where it has to be."""
    return name if _BARE.match(name) else value(name)


def ref(given: Ref, word: str = "name") -> Any:
    """Return a component as in a file: flat, or with a `params` table where a parameter is called like the component's own keys."""
    if {"name", "kind", "params"} & set(given.params):
        return {word: given.name, "params": given.params}
    return {word: given.name, **given.params}


def _data(data: DataSpec) -> dict[str, Any]:
    # root and download stand in keys of their own; what they became in the source's parameters depends on the machine
    source = {k: v for k, v in data.source.params.items() if k not in ("root", "download")}
    return {
        "source": ref(Ref(name=data.source.name, params=source)),
        "partition": ref(data.partition, "kind"),
        "feature_skew": None if data.feature_skew is None else ref(data.feature_skew, "kind"),
        "root": data.root,
        "download": data.download,
    }


def _train(train: TrainSpec) -> dict[str, Any]:
    plain = {k: getattr(train, k) for k in ("optimiser", "lr", "batch_size", "epochs")}
    loss = None if train.loss is None else ref(train.loss)
    return {**plain, "loss": loss, **train.optimiser_params}


def _clients(clients: ClientsSpec) -> dict[str, Any]:
    return {
        "count": clients.count,
        "per_round": clients.per_round,
        "quorum": clients.quorum,
        "behaviour": ref(clients.behaviour),
        "train": _train(clients.train),
    }


def _attacker(group: AttackerSpec) -> dict[str, Any]:
    plain = {k: getattr(group, k) for k in ("behaviour", "share", "count", "ids", "knowledge", "rounds")}
    return {**plain, "params": group.params}


def _strategy(strategy: StrategySpec) -> dict[str, Any]:
    return {
        "assumed_malicious": strategy.assumed_malicious,
        "root_samples": strategy.root_samples,
        "filters": [ref(r) for r in strategy.filters],
        "aggregator": ref(strategy.aggregator),
        "steps": [ref(r) for r in strategy.steps],
        "repairs": [ref(r) for r in strategy.repairs],
        "privacy": None if strategy.privacy is None else _given(strategy.privacy),
        "behaviour": None if strategy.behaviour is None else ref(strategy.behaviour),
        "loss": None if strategy.loss is None else ref(strategy.loss),
    }


def _given(privacy: PrivacySpec) -> dict[str, Any]:
    """Return a privacy section; of the clip only the parameters of its kind."""
    own = ("kind", "norm") if privacy.clip.kind == "fixed" else ("kind", "quantile", "initial", "lr", "noise")
    return {**privacy.model_dump(exclude={"clip"}), "clip": {k: getattr(privacy.clip, k) for k in own}}


def _release(release: ReleaseSpec) -> dict[str, Any]:
    return {"answers": release.answers, "queries": release.queries, "defences": [ref(r) for r in release.defences]}


def _table(header: str, content: Mapping[str, Any]) -> str:
    rows = [f"{key(k)} = {value(v)}" for k, v in content.items() if v is not None]
    return "\n".join([header, *rows])


def _sweep(sweep: SweepSpec) -> list[str]:
    plain = {k: getattr(sweep, k) for k in ("seeds", "shares", "assumed", "infeasible")}
    blocks = [_table("[sweep]", plain)]
    if sweep.attackers:
        blocks.append(_table("[sweep.attackers]", {k: [_attacker(g) for g in v] for k, v in sweep.attackers.items()}))
    if sweep.strategies:
        blocks.append(_table("[sweep.strategies]", {k: _strategy(v) for k, v in sweep.strategies.items()}))
    if sweep.partitions:
        blocks.append(_table("[sweep.partitions]", {k: ref(v, "kind") for k, v in sweep.partitions.items()}))
    return blocks


def _claim(claim: ClaimSpec) -> dict[str, Any]:
    plain = {k: v for k, v in claim.model_dump().items() if k != "expect"}
    return {**plain, "expect": claim.expect.outcome or claim.expect.model_dump()}


def to_toml(scenario: Scenario) -> str:
    """Return the scenario as TOML; see `Scenario.resolved_toml`."""
    top = {k: getattr(scenario, k) for k in ("title", "week", "description", "rounds", "seed")}
    if not scenario.attackers:
        top["attackers"] = []
    blocks = [
        _table("# fedtrust scenario, every default written out", top),
        _table("[data]", _data(scenario.data)),
        _table("[model]", ref(scenario.model)),
        _table("[clients]", _clients(scenario.clients)),
        *([_table("[clients.system]", scenario.clients.system.model_dump())] if scenario.clients.system is not None else []),
        *[_table("[[attackers]]", _attacker(group)) for group in scenario.attackers],
        _table("[strategy]", _strategy(scenario.strategy)),
        *([_table("[malicious_server]", scenario.malicious_server.model_dump())] if scenario.malicious_server is not None else []),
        _table("[release]", _release(scenario.release)),
        *[_table("[[probes]]", ref(probe)) for probe in scenario.probes],
        _table("[engine]", scenario.engine.model_dump()),
        *(_sweep(scenario.sweep) if scenario.sweep is not None else []),
        *[_table("[[claims]]", _claim(claim)) for claim in scenario.claims],
    ]
    return "\n\n".join(blocks) + "\n"
