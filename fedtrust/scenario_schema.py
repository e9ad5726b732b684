"""The JSON schema of a scenario file, for editors: the file's short forms, and the registered components with their parameters."""

from __future__ import annotations

from typing import Any

from fedtrust.client import KNOWLEDGE
from fedtrust.registry import REGISTRY, Entry, Kind
from fedtrust.scenario import Scenario

Json = dict[str, Any]

_PLUGIN = {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*:[A-Za-z0-9_-]+$", "description": "code beside the scenario: module:name"}
_STOCK = {"type": "string", "pattern": "^flwr:[A-Za-z]+$", "description": "a stock Flower strategy"}


def build() -> Json:
    """Return the schema; see `fedtrust.scenario.schema`."""
    made = Scenario.model_json_schema()
    parts: Json = made["$defs"]
    parts.pop("Ref", None)
    kinds: tuple[Kind, ...] = (
        "aggregator",
        "answer",
        "behaviour",
        "feature-skew",
        "filter",
        "loss",
        "model",
        "partition",
        "probe",
        "repair",
    )
    for kind in (*kinds, "source", "step"):
        parts[f"{kind}-ref"] = component(kind)
    _link(made, "model", "model")
    made["properties"]["probes"] = _many("probe")
    for key, kind in (("source", "source"), ("partition", "partition"), ("feature_skew", "feature-skew")):
        _link(parts["DataSpec"], key, kind)
    _link(parts["ClientsSpec"], "behaviour", "behaviour")
    for part in ("AvailabilitySpec", "RateSpec"):  # a bare number will do
        parts[part] = {"anyOf": [{"type": "number"}, parts[part]]}
    _link(parts["StrategySpec"], "aggregator", "aggregator")
    parts["StrategySpec"]["properties"] |= {"filters": _many("filter"), "steps": _many("step"), "repairs": _many("repair")}
    made["properties"]["privacy"] = parts["StrategySpec"]["properties"]["privacy"]
    _link(parts["StrategySpec"], "behaviour", "behaviour")
    _link(parts["StrategySpec"], "loss", "loss")
    parts["ClipSpec"] = {"anyOf": [{"type": "number"}, parts["ClipSpec"]]}  # a bare number will do
    parts["ReleaseSpec"]["properties"]["defences"] = _many("answer")
    _train(parts["TrainSpec"])
    _attacker(parts["AttackerSpec"])
    _sender(parts["MaliciousServerSpec"])
    _sweep(parts["SweepSpec"])
    _claim(parts)
    _profiles(made)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "fedtrust scenario"}


def _sender(part: Json) -> None:
    """Name the senders, each with its parameters."""
    entries = [e for e in REGISTRY if e.kind == "sender" and ":" not in e.name]
    part["properties"]["sender"] = {"anyOf": [{"enum": [e.name for e in entries]}, _PLUGIN]}


def component(kind: Kind) -> Json:
    """Return the schema of a component of a kind: a name, or a table with the name and that component's parameters."""
    entries = [e for e in REGISTRY if e.kind == kind and ":" not in e.name]
    if kind == "behaviour":
        entries = [e for e in entries if e.meta.get("role") == "honest"]
    names = [_PLUGIN, *([_STOCK] if kind == "aggregator" else [])]
    word = "kind" if kind in ("partition", "feature-skew") else "name"
    loose = {"type": "object", "properties": {word: {"anyOf": names}}, "required": [word]}
    return {"anyOf": [{"enum": [e.name for e in entries]}, *names, *(_table(e, word) for e in entries), loose]}


def _table(entry: Entry, word: str) -> Json:
    properties = {word: {"const": entry.name}, **_parameters(entry)}
    return {
        "type": "object",
        "description": entry.summary,
        "properties": properties,
        "required": [word],
        "additionalProperties": False,
    }


def _parameters(entry: Entry) -> Json:
    properties: Json = entry.schema.model_json_schema().get("properties", {})
    return properties


def _link(part: Json, key: str, kind: str) -> None:
    part["properties"][key] = {"$ref": f"#/$defs/{kind}-ref"}


def _many(kind: str) -> Json:
    return {"type": "array", "items": {"$ref": f"#/$defs/{kind}-ref"}}


def _train(part: Json) -> None:
    part["properties"].pop("optimiser_params", None)
    _link(part, "loss", "loss")
    entries = [e for e in REGISTRY if e.kind == "optimiser"]
    for entry in entries:
        part["properties"] |= {k: v for k, v in _parameters(entry).items() if k not in part["properties"]}
    part["properties"]["optimiser"] = {"anyOf": [{"enum": [e.name for e in entries]}, _PLUGIN]}
    part["additionalProperties"] = True


def _attacker(part: Json) -> None:
    entries = [e for e in REGISTRY if e.kind == "behaviour" and e.meta.get("role") != "honest" and ":" not in e.name]
    part["properties"]["behaviour"] = {"anyOf": [{"enum": [e.name for e in entries]}, _PLUGIN]}
    part["properties"]["knowledge"] = {"enum": list(KNOWLEDGE)}
    part["allOf"] = [
        {
            "if": {"properties": {"behaviour": {"const": e.name}}, "required": ["behaviour"]},
            "then": {"properties": {"params": {"type": "object", "properties": _parameters(e), "additionalProperties": False}}},
        }
        for e in entries
    ]


def _sweep(part: Json) -> None:
    strategy = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/StrategySpec"}]}
    for key, item in (("strategies", strategy), ("partitions", {"$ref": "#/$defs/partition-ref"})):
        part["properties"][key] = {
            "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "object", "additionalProperties": item}]
        }


def _claim(parts: Json) -> None:
    parts["Expectation"] = {
        "anyOf": [
            {"enum": ["copes", "fails"]},
            {
                "type": "object",
                "properties": {
                    "metric": {"type": "string"},
                    **{key: {"type": "number"} for key in ("at_least", "at_most", "at-least", "at-most")},
                    "between": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
                },
                "required": ["metric"],
                "additionalProperties": False,
            },
        ]
    }
    for key in ("attackers", "strategies", "partitions"):
        parts["ClaimSpec"]["properties"][key] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def _profiles(made: Json) -> None:
    """A profile holds any part of a scenario; what it makes of the whole is checked when it is chosen."""
    keys = list(made["properties"])
    made["properties"]["profile"] = {"type": "string", "description": "the profile that is laid over the document"}
    made["properties"]["profiles"] = {"type": "object", "additionalProperties": {"type": "object", "propertyNames": {"enum": keys}}}
