"""What a run writes about itself: rounds, clients, environment, summary. The format is docs/run-directory.md."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import Message
from torch import Tensor

from fedtrust import claims, plugins
from fedtrust.engine import threads
from fedtrust.engine.flower import ARRAYS, CohortReply
from fedtrust.engine.fused import describe_native
from fedtrust.engine.validate import Valid
from fedtrust.errors import InputError
from fedtrust.observers import observer_cards
from fedtrust.privacy.summary import guarantees
from fedtrust.runs import CLIENTS, ROUNDS, RunDirectory, write_atomic, write_json
from fedtrust.scenario import Cell, Scenario
from fedtrust.setup import Setup, entry_of, threat_cards

#: Metrics of a round about whom the strategy trusted.
_TRUSTED = ("detection/", "rare/", "common/")
_PACKAGES = ("fedtrust", "torch", "flwr", "ray", "numpy", "llvmlite", "scikit-learn", "mlxtend")


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


def repair_record(
    number: int, name: str, why: str, metrics: Mapping[str, float], delta_norm: float, times: Sequence[float]
) -> dict[str, Any]:
    """Return the line of `rounds.jsonl` for a repair; `times` are the clock at its start and after each of its two parts."""
    mending, probe = (after - before for before, after in itertools.pairwise(times))
    return {
        "round": number,
        "repair": name,
        "counted": not why,
        **({"why": why} if why else {}),
        "metrics": dict(metrics),
        "delta_norm": delta_norm,
        "seconds": {"repair": round(mending, 4), "probe": round(probe, 4)},
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
        norm = None if i is None else _norm(valid.messages[i])
        loss = losses.get(client)
        rows.append(
            {
                "round": number,
                "client": client,
                "malicious": group is not None and not group.behaviour.protects,
                "behaviour": setup.scenario.clients.behaviour.name if group is None else group.name,
                "norm": norm,
                "trust": None if trust is None or i is None else float(trust[i]),
                "loss": loss if loss is not None and abs(loss) != float("inf") and loss == loss else None,
                "examples": setup.world.examples(client),
                "fault": valid.faults.get(client),
            }
        )
    return rows


def _norm(message: Message) -> float | None:
    if isinstance(message, CohortReply) and message.norm is not None:
        return message.norm
    record = message if isinstance(message, CohortReply) else message.content.array_records[ARRAYS]
    delta = getattr(record, "delta", None)
    return None if delta is None else float(torch.linalg.vector_norm(delta, dtype=torch.float64))


def write_environment(directory: RunDirectory, scenario: Scenario, engine: str, reason: str) -> None:
    """Write `environment.json`: everything beside the scenario that a reader may want to know."""
    origin = scenario.origin
    write_json(
        directory.path / "environment.json",
        {
            **_machine(),
            "seed": scenario.seed,
            "cores": threads.cores(),
            "server_threads": threads.SERVER,
            "engine": engine,
            "engine_reason": reason,
            "path": scenario.engine.path,
            "data_root": scenario.data.source.params.get("root"),
            "plugins": list(origin.allow_plugins) if origin else [],
        },
    )


@functools.cache
def _machine() -> dict[str, Any]:
    """Return what stays the same while this process lives; asked for once, not by each of ten thousand cells."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "git": _git_state(),
        "devices": gpus or ["cpu"],
        "kernels": describe_native(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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
    """Copy the plugin files that a scenario uses into the run directory, each atomically: the code is part of what was run.

    Raises:
        InputError: a file cannot be read any more.
        RunError: the copy cannot be written.
    """
    for module in plugins.loaded_modules():
        file = getattr(module, "__file__", None)
        if file:
            try:
                code = Path(file).read_bytes()
            except OSError as error:
                raise InputError(f"cannot be read: {error.strerror or error}", file) from None
            write_atomic(out / Path(file).name, code)


def run_summary(
    setup: Setup,
    directory: RunDirectory,
    final: tuple[str, Tensor],
    seconds: float,
    engine: str,
    rivals: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """Return what `summary.json` says about a run, read back from its records.

    Args:
        setup: the run's parts.
        directory: where its records lie.
        final: the SHA-256 of the final model, and the model.
        seconds: how long it took.
        engine: what computed, in words.
        rivals: for a cell without attack: how often its model does what the attackers of other cells want, by their label.
    """
    scenario = setup.scenario
    rounds = directory.records(ROUNDS)
    missed = [r["round"] for r in rounds if not r["counted"]]
    cards = threat_cards(setup)
    idle = [] if missed else _never_valid(setup, directory)
    why = f"{len(missed)} of {len(rounds) - 1} rounds did not count (first: {_why(rounds, missed[0])})" if missed else ""
    why = why or "; ".join(idle)
    private = guarantees(setup.strategy, setup.roster, setup.world, directory.records(CLIENTS))
    return {
        "kind": "run",
        "title": scenario.title,
        "status": "failed" if why else "finished",
        "why": why,
        "rounds": scenario.rounds,
        "rounds_counted": sum(r["counted"] for r in rounds if r["round"] > 0 and "repair" not in r),
        "seed": scenario.seed,
        "strategy": scenario.strategy.label,
        "attack": " + ".join(c["behaviour"] for c in cards) or "none",
        "metrics": {**_found_once(setup, rounds), **rounds[-1]["metrics"]},
        "model_sha256": final[0],
        "seconds": round(seconds, 2),
        "engine": engine,
        "threats": cards,
        **_observers(scenario),
        "federation": federation(setup),
        "assumed_malicious": scenario.strategy.assumed_malicious,
        "trust_mean": _trust_mean(directory),
        **({"privacy": private} if private else {}),
        **_devices(rounds),
        **_repairs(rounds),
        **_averages(rounds),
        **({"clean_success": known} if (known := {k: v for k, v in (rivals or {}).items() if v is not None}) else {}),
        "warnings": _warnings(rounds) + [line for each in private for line in each["warnings"]],
    }


def _why(rounds: Sequence[Mapping[str, Any]], number: int) -> str:
    entry = next(r for r in rounds if r["round"] == number)
    name = f"repair '{entry['repair']}'" if "repair" in entry else f"round {number}"
    return f"{name}: {entry.get('why', '')}"


def _observers(scenario: Scenario) -> dict[str, Any]:
    """Return the cards of those who attack without being clients; nothing where there is nobody."""
    cards = observer_cards(scenario)
    return {"observers": cards} if cards else {}


def _found_once(setup: Setup, rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what probes measured that act in one round of their choice and say nothing in the others."""
    once = {bound.entry.name: bound.entry.meta["once"] for bound in setup.probes if bound.entry.meta.get("once")}
    names = {*once, *(guess for guess in once.values() if isinstance(guess, str))}
    return {key: value for r in rounds for key, value in r["metrics"].items() if key.split("/")[0] in names}


def _repairs(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was measured after the last round and after each repair; nothing for a run without."""
    mended = [r for r in rounds if "repair" in r]
    if not mended:
        return {}
    last = next(r for r in reversed(rounds) if "repair" not in r)
    return {"repairs": [{"repair": r.get("repair", ""), "round": r["round"], "metrics": r["metrics"]} for r in (last, *mended)]}


def _averages(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means over the rounds that counted: seconds by place, and whom the strategy trusted, which the last round alone says badly.

    What the repairs took after the last round is a sum of its own.
    """
    played = [r for r in rounds if r["round"] > 0 and r["counted"] and "repair" not in r]
    found: dict[str, dict[str, list[float]]] = {"metrics": defaultdict(list), "seconds": defaultdict(list)}
    for r in played:
        for name, value in r["metrics"].items():
            if name.startswith(_TRUSTED):
                found["metrics"][name].append(value)
        for place, value in r["seconds"].items():
            found["seconds"][place].append(value)
    means = {kind: {name: round(sum(v) / len(v), 6) for name, v in lists.items()} for kind, lists in found.items()}
    mending = [r["seconds"]["repair"] for r in rounds if "repair" in r]
    return {**({"round_means": means} if played else {}), **({"repair_seconds": round(sum(mending), 4)} if mending else {})}


def federation(setup: Setup) -> dict[str, Any]:
    """Return who has what, and who is malicious: the teacher's view of the clients."""
    data = setup.world.data
    labels = list(data.task.labels) or [str(c) for c in range(data.task.classes)]
    return {
        "labels": labels if data.task.kind == "classification" else ["samples"],
        "label_counts": data.label_counts().tolist(),
        "malicious": sorted(setup.roster.malicious()),
        "samples": int(sum(len(p) for p in data.parts)),
        **(
            {"test_counts": torch.bincount(data.y_test, minlength=data.task.classes).tolist()} if data.task.kind == "classification" else {}
        ),
    }


def _never_valid(setup: Setup, directory: RunDirectory) -> list[str]:
    """Return a line for every adversary of which not one update was valid: that is a bug, and no victory of the defence.

    Behaviours that are broken on purpose declare `broken=True`.
    """
    rows = directory.records(CLIENTS)
    found = []
    for group in setup.roster.groups:
        faults = [r["fault"] for r in rows if r["client"] in group.ids and r["behaviour"] == group.name]
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


def _devices(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what became of the clients that were asked, over all rounds; nothing for a world without devices."""
    told = [r for r in rounds if "fates" in r]
    if not told:
        return {}
    fates = {fate: sum(len(r["fates"][fate]) for r in told) for fate in told[0]["fates"]}
    asked = sum(len(r["cohort"]) for r in told)
    clock = {"virtual_seconds": rounds[-1]["clock"]} if "clock" in rounds[-1] else {}
    return {**clock, "fates": {"asked": asked, "replied": asked - sum(fates.values()), **fates}}


def _warnings(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line about replies that were dropped, those left aside that the scenario's devices simulate."""
    faults = []
    for r in rounds:
        simulated = {str(c) for fate, ids in r.get("fates", {}).items() if fate != "partial" for c in ids}
        faults += [(c, why) for c, why in r.get("faults", {}).items() if c not in simulated]
    if not faults:
        return []
    first, dropped = faults[0], len(faults)
    return [f"{dropped} replies were dropped; the first was client {first[0]}'s: {first[1]}"]


class CellResult(NamedTuple):
    """What the matrix keeps of a cell's summary: its line, and the threat cards of its attack."""

    row: dict[str, Any]
    threats: list[dict[str, Any]] | None


def cell_result(cell: Cell, summary: Mapping[str, Any]) -> CellResult:
    """Return what the matrix says about a cell that was played."""
    row = {
        "cell": cell.name,
        **cell.labels,
        "status": summary["status"],
        "why": summary.get("why", ""),
        "metrics": summary["metrics"],
        "model_sha256": summary.get("model_sha256", ""),
        "seconds": summary["seconds"],
        **{key: summary[key] for key in ("clean_success", "round_means", "repair_seconds", "privacy") if key in summary},
        **_nature(summary),
    }
    return CellResult(row, summary.get("threats"))


def _nature(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the components of a cell's strategy, and what a model scores that always says the commonest class."""
    counts = summary.get("federation", {}).get("test_counts")
    floor = {"floor": round(max(counts) / sum(counts), 6)} if counts and sum(counts) else {}
    return {**({"rule": summary["strategy"]} if "strategy" in summary else {}), **floor}


def matrix_summary(scenario: Scenario, results: Sequence[CellResult | None]) -> dict[str, Any]:
    """Return what `summary.json` says about a matrix.

    Args:
        scenario: with its sweep.
        results: one a cell, in the order of the file; `None` for those that have not been played to their end.
    """
    played = [r for r in results if r is not None]
    failed = [r.row["cell"] for r in played if r.row["status"] not in ("finished", "refused")]
    status = "failed" if failed else ("finished" if len(played) == len(results) else "running")
    why = f"{len(failed)} of {len(results)} cells failed (first: {failed[0]})" if failed else ""
    return {
        "kind": "matrix",
        "title": scenario.title,
        "status": status,
        "why": why,
        "seconds": round(sum(r.row["seconds"] for r in played), 2),
        "axes": {name: list(values) for name, values in scenario.axes().items()},
        "cells": [r.row for r in played],
        "threats": {r.row["attackers"]: r.threats for r in played if r.threats is not None},
        **_observers(scenario),
        **_tested(scenario, [r.row for r in played]),
    }


def _tested(scenario: Scenario, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what became of the scenario's claims, and where the rules break if shares were swept."""
    clean = {attack.label for attack in scenario.attacks().values() if not attack.groups}
    swept = scenario.sweep is not None and bool(scenario.sweep.shares)
    return {
        **({"claims": claims.judge(scenario.claims, rows, clean)} if scenario.claims else {}),
        **({"breaking_points": claims.breaking_points(rows, clean)} if swept else {}),
    }


def write_summary(directory: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` atomically."""
    write_json(directory.path / "summary.json", summary)
