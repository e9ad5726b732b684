"""`fedtrust check`: a scenario without training, or every component of a plugin in a tiny run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtrust.errors import FedTrustError, InputError, RunError
from fedtrust.registry import Entry


def check(file: Path, overrides: Sequence[str], allow_plugins: Sequence[str], data_root: str | None) -> str:
    """Return what was found, as lines.

    Raises:
        InputError: what is wrong.
    """
    if file.suffix == ".py":
        if overrides:
            raise InputError("goes with a scenario, not with a plugin", "--set")
        return check_plugin(file, allow_plugins)
    from fedtrust import scenario, scenario_profiles
    from fedtrust.scenario_io import Document

    asked = scenario.load(file, overrides, allow_plugins, data_root)
    facts = scenario.check(asked)
    for name in scenario_profiles.names(Document.read(file).data):
        other = scenario.load(file, [*overrides, f"profile={name}"], allow_plugins, data_root)
        facts.append(f"profile '{name}': {len(other.cells())} runs of {other.rounds} rounds")
    return "\n".join([f"{file}: fine", *(f"  {fact}" for fact in facts)])


def check_plugin(file: Path, allow_plugins: Sequence[str]) -> str:
    """Run a plugin's file and play every component that it registers for two rounds on a few digits."""
    from fedtrust import plugins

    if not file.is_file():
        raise InputError("no such file", str(file))
    if file.stem not in allow_plugins:
        raise InputError(f"checking a plugin runs its code; if you trust it, add --allow-plugin {file.stem}", str(file))
    found = plugins.components(plugins.load_module(file))
    if not found:
        raise InputError('registers no component; is there a decorator such as @behaviour("name") above it?', str(file))
    lines = [f"{file}: fine"]
    for entry in found:
        _try(entry, file)
        lines.append(f"  {entry.kind} {file.stem}:{entry.name}: played 2 rounds")
    return "\n".join(lines)


def _try(entry: Entry, file: Path) -> None:
    from fedtrust import runner, scenario
    from fedtrust.runs import CLIENTS, RunDirectory

    where = f"{file}: {entry.kind} '{entry.name}'"
    required = [name for name, field in entry.schema.model_fields.items() if field.is_required()]
    if required:
        raise InputError(f"parameter '{required[0]}' has no default, so it cannot be tried; give it one", where)
    document = tiny(entry, f"{file.stem}:{entry.name}")
    with tempfile.TemporaryDirectory(prefix="fedtrust-check-") as folder:
        try:
            asked = scenario.parse(document, file.parent, [file.stem])
            scenario.check(asked)
            result = runner.run(asked, Path(folder) / "run", engine="local", workers=1)
        except FedTrustError as error:
            raise InputError(str(error), where) from error
        faults = [f for r in RunDirectory(Path(folder) / "run").records(CLIENTS) if (f := r["fault"])]
    if result.status == "interrupted":
        raise KeyboardInterrupt
    if result.status != "finished":
        raise InputError(str(RunError(result.why)), where)
    if faults and not entry.meta.get("broken"):
        raise InputError(f"{len(faults)} updates were dropped; the first: {faults[0]}", where)


def tiny(entry: Entry, name: str) -> dict[str, Any]:
    """Return a small scenario in which a component takes part under the given name."""
    document: dict[str, Any] = {
        "title": "a tiny run",
        "rounds": 2,
        "data": {"source": {"name": "digits", "limit": 240}},
        "model": "logistic",
        "clients": {"count": 8, "train": {"batch_size": 10}},
        "attackers": [{"behaviour": "sign-flip", "count": 2}],
        "strategy": {"assumed_malicious": 2, "root_samples": 20},
    }
    clients, strategy, data = document["clients"], document["strategy"], document["data"]
    if entry.kind == "behaviour" and entry.meta.get("role") == "honest":
        clients["behaviour"] = name
    elif entry.kind == "behaviour":
        document["attackers"] = [{"behaviour": name, "count": 2}]
    elif entry.kind in ("loss", "optimiser"):
        clients["train"][entry.kind] = name
    elif entry.kind in ("filter", "step", "repair"):
        strategy[f"{entry.kind}s"] = [name]
    elif entry.kind == "aggregator":
        strategy["aggregator"] = name
    elif entry.kind == "probe":
        document["probes"] = [name]
    elif entry.kind == "answer":
        document["release"] = {"answers": "probabilities", "defences": [name]}
        document["probes"] = ["accuracy", "released-accuracy"]
    elif entry.kind == "sender":
        document["malicious_server"] = {"sender": name}
    elif entry.kind == "model":
        document["model"] = name
    else:
        data[entry.kind.replace("-", "_")] = name
    return document
