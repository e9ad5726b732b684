"""Extraction and privacy on Ray workers: the same records, pictures and bits as in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtrust.runner import run
from fedtrust.scenario import load, parse
from tests.conftest import SMALL, merged

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own sockets and deprecations


PRIVATE: dict[str, Any] = {
    "clients": {"count": 20, "per_round": 8},
    "strategy": {"privacy": {"clip": {"kind": "adaptive", "initial": 0.1}, "epsilon": 8.0}},
}
RECORDS: dict[str, Any] = {"model": {"name": "mlp", "hidden": [8]}, "clients": {"behaviour": {"name": "dp-sgd", "epsilon": 8.0}}}
NOISED_SUM: dict[str, Any] = {
    "strategy": {"filters": ["distributed-discrete-gaussian"]},
    "clients": {"system": {"dropout": 0.2}},
    "probes": ["accuracy", {"name": "label-recovery", "at_round": 2}],
}
TRAP: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [64, 16]},
    "malicious_server": {"sender": "robbing-the-fed", "params": {"victims": 3}},
    "clients": {"train": {"batch_size": 64}},
    "probes": ["accuracy", {"name": "robbing-the-fed-readout", "at_round": 2}],
}
SHADOWS: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [16]},
    "release": {"answers": "probabilities", "defences": ["prediction-poisoning"]},
    "probes": ["accuracy", {"name": "lira", "models": 4, "samples": 60}, {"name": "knockoff", "queries": [20, 40], "epochs": 2}],
}


def left(folder: Path) -> dict[str, Any]:
    """Return what a run left, but for times and what computed it."""
    summary = json.loads((folder / "summary.json").read_text())
    found: dict[str, Any] = {key: summary[key] for key in ("status", "metrics", "model_sha256", "privacy") if key in summary}
    found["rounds"] = [{**json.loads(line), "seconds": None} for line in (folder / "rounds.jsonl").read_text().splitlines()]
    found["clients"] = (folder / "clients.jsonl").read_text()
    return found | {path.name: path.read_bytes() for path in sorted((folder / "artefacts").glob("*"))}


@pytest.mark.parametrize(
    "changes", [PRIVATE, RECORDS, NOISED_SUM, TRAP, SHADOWS], ids=["private", "records", "noised-sum", "trap", "shadows"]
)
def test_a_run_is_the_same_on_both_engines(changes: dict[str, Any], tmp_path: Path) -> None:
    scenario = parse(merged(SMALL, changes))
    for engine, workers in (("local", 1), ("ray", 2)):
        assert run(scenario, tmp_path / engine, engine=engine, workers=workers).status == "finished"
    here, there = left(tmp_path / "local"), left(tmp_path / "ray")
    assert here == there
    assert len(here["metrics"]) > 1 or "privacy" in here


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "name", ["gradient-inversion", "class-inference", "model-stealing", "language-model-secrets", "differential-privacy"]
)
def test_a_scenario_of_the_course_is_the_same_on_both_engines(name: str, tmp_path: Path) -> None:
    scenario = load(Path(__file__).parents[2] / "scenarios" / f"{name}.toml")
    for engine, workers in (("local", 2), ("ray", 2)):
        assert run(scenario, tmp_path / engine, engine=engine, workers=workers).status == "finished"
    cells = [path.relative_to(tmp_path / "local").parent for path in sorted((tmp_path / "local").rglob("rounds.jsonl"))]
    assert cells
    for cell in cells:
        assert left(tmp_path / "local" / cell) == left(tmp_path / "ray" / cell), cell
