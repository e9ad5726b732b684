"""What a run writes about itself: rounds, clients, environment, summary. The format is docs/run-directory.md."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtrust import plugins
from fedtrust.engine import threads
from fedtrust.engine.flower import ARRAYS
from fedtrust.engine.validate import Valid
from fedtrust.runs import CLIENTS, ROUNDS, RunDirectory, write_json
from fedtrust.scenario import Cell, Scenario
from fedtrust.setup import Setup, entry_of, threat_cards

_PACKAGES = ("fedtrust", "torch", "flwr", "ray", "numpy", "scikit-learn", "mlxtend")


def round_record(
    number: int,
    asked: Sequence[int],
    valid: Valid,
    quorum: int,
    why: str,
    metrics: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    delta_norm: float,
    times: Sequence[float],
) -> dict[str, Any]:
    """Return the line of `rounds.jsonl` for a round; `times` are the clock at its start and after each of its three parts."""
    losses = [r["loss"] for r in rows if r["fault"] is None and r["loss"] is not None]
    train, aggregate, probe = (after - before for before, after in itertools.pairwise(times))
    return {
        "round": number,
        "counted": not why,
        **({"why": why} if why else {}),
        "cohort": list(asked),
        "valid": len(valid.clients),
        "quorum": quorum,
        "faults": {str(c): reason for c, reason in valid.faults.items()},
        "metrics": dict(metrics),
        "train_loss": sum(losses) / len(losses) if losses else None,
        "delta_norm": delta_norm,
        "seconds": {"train": round(train, 4), "aggregate": round(aggregate, 4), "probe": round(probe, 4)},
    }


def client_rows(
    setup: Setup, number: int, asked: Sequence[int], valid: Valid, losses: Mapping[int, float], trust: Tensor | None
) -> list[dict[str, Any]]:
    """Return the lines of `clients.jsonl` for a round."""
    place = {c: i for i, c in enumerate(valid.clients)}
    rows = []
    for client in asked:
        group = setup.roster.group(client, number)
        i = place.get(client)
        norm = None if i is None else _norm(valid.messages[i].content.array_records[ARRAYS])
        loss = losses.get(client)
        rows.append(
            {
                "round": number,
                "client": client,
                "malicious": group is not None,
                "behaviour": setup.scenario.clients.behaviour.name if group is None else group.name,
                "norm": norm,
                "trust": None if trust is None or i is None else float(trust[i]),
                "loss": loss if loss is not None and abs(loss) != float("inf") and loss == loss else None,
                "examples": setup.world.examples(client),
                "fault": valid.faults.get(client),
            }
        )
    return rows


def _norm(record: Any) -> float | None:
    delta = getattr(record, "delta", None)
    return None if delta is None else float(delta.double().norm())


def write_environment(directory: RunDirectory, scenario: Scenario, engine: str, reason: str) -> None:
    """Write `environment.json`: everything beside the scenario that a reader may want to know."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    origin = scenario.origin
    write_json(
        directory.path / "environment.json",
        {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": versions,
            "git": _git_state(),
            "seed": scenario.seed,
            "devices": gpus or ["cpu"],
            "cores": threads.cores(),
            "server_threads": threads.SERVER,
            "engine": engine,
            "engine_reason": reason,
            "path": scenario.engine.path,
            "data_root": scenario.data.source.params.get("root"),
            "plugins": list(origin.allow_plugins) if origin else [],
        },
    )


def _git_state() -> str:
    """Return the commit of the source tree that fedtrust runs from, or an empty string outside a git tree."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603 -- fixed command
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def keep_plugins(out: Path) -> None:
    """Copy the plugin files that a scenario uses into the run directory: the code is part of what was run."""
    for module in plugins.loaded_modules():
        file = getattr(module, "__file__", None)
        if file:
            shutil.copyfile(file, out / Path(file).name)


def run_summary(setup: Setup, directory: RunDirectory, final: tuple[str, Tensor], seconds: float, engine: str) -> dict[str, Any]:
    """Return what `summary.json` says about a run, read back from its records."""
    scenario = setup.scenario
    rounds = directory.records(ROUNDS)
    missed = [r["round"] for r in rounds if not r["counted"]]
    cards = threat_cards(setup)
    idle = [] if missed else _never_valid(setup, directory)
    why = f"{len(missed)} of {scenario.rounds} rounds did not count (first: round {missed[0]}: {_why(rounds, missed[0])})" if missed else ""
    why = why or "; ".join(idle)
    return {
        "kind": "run",
        "title": scenario.title,
        "status": "failed" if why else "finished",
        "why": why,
        "rounds": scenario.rounds,
        "rounds_counted": sum(r["counted"] for r in rounds if r["round"] > 0),
        "seed": scenario.seed,
        "strategy": scenario.strategy.label,
        "attack": " + ".join(c["behaviour"] for c in cards) or "none",
        "metrics": rounds[-1]["metrics"],
        "model_sha256": final[0],
        "seconds": round(seconds, 2),
        "engine": engine,
        "threats": cards,
        "federation": federation(setup),
        "assumed_malicious": scenario.strategy.assumed_malicious,
        "trust_mean": _trust_mean(directory),
        "warnings": _warnings(rounds),
    }


def _why(rounds: Sequence[Mapping[str, Any]], number: int) -> str:
    return str(next(r.get("why", "") for r in rounds if r["round"] == number))


def federation(setup: Setup) -> dict[str, Any]:
    """Return who has what, and who is malicious: the teacher's view of the clients."""
    data = setup.world.data
    labels = list(data.task.labels) or [str(c) for c in range(data.task.classes)]
    return {
        "labels": labels if data.task.kind == "classification" else ["samples"],
        "label_counts": data.label_counts().tolist(),
        "malicious": sorted(setup.roster.malicious()),
        "samples": int(sum(len(p) for p in data.parts)),
    }


def _never_valid(setup: Setup, directory: RunDirectory) -> list[str]:
    """Return a line for every adversary of which not one update was valid: that is a bug, and no victory of the defence.

    Behaviours that are broken on purpose declare `broken=True`.
    """
    rows = [r for r in directory.records(CLIENTS) if r["malicious"]]
    found = []
    for group in setup.roster.groups:
        faults = [r["fault"] for r in rows if r["client"] in group.members]
        if not faults or None in faults or entry_of("behaviour", group.name, setup.scenario).meta.get("broken"):
            continue
        found.append(f"the attack '{group.name}' never sent a valid update, so nothing was defended against ({faults[0]})")
    return found


def _trust_mean(directory: RunDirectory) -> dict[str, float]:
    seen: dict[int, list[float]] = defaultdict(list)
    for row in directory.records(CLIENTS):
        if row["trust"] is not None:
            seen[row["client"]].append(row["trust"])
    return {str(c): sum(v) / len(v) for c, v in sorted(seen.items())}


def _warnings(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    dropped = sum(len(r.get("faults", {})) for r in rounds)
    if not dropped:
        return []
    first = next((c, why) for r in rounds for c, why in r.get("faults", {}).items())
    return [f"{dropped} replies were dropped; the first was client {first[0]}'s: {first[1]}"]


def matrix_summary(scenario: Scenario, results: Sequence[tuple[Cell, Mapping[str, Any]]], wanted: int) -> dict[str, Any]:
    """Return what `summary.json` says about a matrix, of which the given cells have been played."""
    axes = scenario.axes()
    cells, threats = [], {}
    for cell, summary in results:
        cells.append(
            {
                "cell": cell.name,
                **cell.labels,
                "status": summary["status"],
                "why": summary.get("why", ""),
                "metrics": summary["metrics"],
                "model_sha256": summary.get("model_sha256", ""),
                "seconds": summary["seconds"],
            }
        )
        if summary.get("threats") is not None:
            threats[cell.labels["attackers"]] = summary["threats"]
    failed = [c["cell"] for c in cells if c["status"] != "finished"]
    status = "failed" if failed else ("finished" if len(cells) == wanted else "running")
    why = f"{len(failed)} of {wanted} cells failed (first: {failed[0]})" if failed else ""
    return {
        "kind": "matrix",
        "title": scenario.title,
        "status": status,
        "why": why,
        "seconds": round(sum(c["seconds"] for c in cells), 2),
        "axes": {name: list(values) for name, values in axes.items()},
        "cells": cells,
        "threats": threats,
    }


def write_summary(directory: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` atomically."""
    write_json(directory.path / "summary.json", summary)
