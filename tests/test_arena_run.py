"""What a matrix that is really played leaves behind for the arena, against the cells' own records and models."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from safetensors.torch import load_file

from fedtrust.client import overrides
from fedtrust.registry import REGISTRY, Entry
from fedtrust.runner import run
from fedtrust.scenario import Scenario, load, parse
from fedtrust.setup import build
from tests.conftest import SMALL, merged

ARENA: dict[str, Any] = {
    "rounds": 3,
    "probes": ["accuracy", "attack-success", "detection", "rare-clients"],
    "sweep": {
        "strategies": ["mean", "geometric-median"],
        "attackers": {
            "none": [],
            "flipped": [{"behaviour": "label-flip", "count": 2}],
            "two goals": [{"behaviour": "badnets", "count": 1, "params": {"size": 2}}, {"behaviour": "label-flip", "count": 1}],
            "wrong sign": [{"behaviour": "sign-flip", "count": 2}],
        },
    },
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("arena") / "run"
    assert run(parse(merged(SMALL, ARENA)), out, engine="local", workers=2).status == "finished"
    return out


def cells(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((out / "summary.json").read_text("utf-8"))["cells"]
    return {(row["attackers"], row["strategies"]): row for row in rows}


def test_a_clean_cell_says_what_its_model_does_by_itself(played: Path) -> None:
    """Mirrored labels, by hand: the share of the test samples that the clean model takes for 9 − y (9 − y is never y)."""
    scenario = parse(merged(SMALL, {"probes": ARENA["probes"]}))
    setup = build(scenario)
    for strategy in ("mean", "geometric-median"):
        row = cells(played)["none", strategy]
        parts = load_file(played / "cells" / row["cell"] / "model.safetensors")
        weight, bias = (parts[name] for name in sorted(parts, key=lambda name: "bias" in name))
        said = (setup.world.data.x_test.flatten(1) @ weight.T + bias).argmax(1)
        mirrored = 9 - setup.world.data.y_test
        assert set(row["clean_success"]) == {"flipped", "two goals"}
        assert row["clean_success"]["flipped"] == pytest.approx(float((said == mirrored).double().mean()))
        assert row["clean_success"]["two goals"] >= row["clean_success"]["flipped"], "of two goals the larger success"


def test_only_clean_cells_say_so(played: Path, tmp_path: Path) -> None:
    assert not any("clean_success" in row for (attack, _), row in cells(played).items() if attack != "none")
    blind = merged(SMALL, merged(ARENA, {"probes": ["accuracy"], "rounds": 1}))
    run(parse(blind), tmp_path / "run", engine="local", workers=2)
    assert not any("clean_success" in row for row in cells(tmp_path / "run").values()), "nobody asked for attack success"


def test_floor_and_rule(played: Path) -> None:
    y = build(parse(SMALL)).world.data.y_test
    for (_, strategy), row in cells(played).items():
        assert row["floor"] == pytest.approx(float(y.bincount().max() / len(y)), abs=1e-6)
        assert row["rule"] == strategy


def test_means_over_the_rounds(played: Path) -> None:
    for row in cells(played).values():
        lines = [json.loads(line) for line in (played / "cells" / row["cell"] / "rounds.jsonl").read_text("utf-8").splitlines()][1:]
        for place in ("train", "aggregate", "probe", "aggregator"):
            assert row["round_means"]["seconds"][place] == pytest.approx(fmean(line["seconds"][place] for line in lines), abs=1e-6)
        names = {name for line in lines for name in line["metrics"] if name.split("/")[0] in ("detection", "rare", "common")}
        assert set(row["round_means"]["metrics"]) == names
        for name in names:
            values = [line["metrics"][name] for line in lines if name in line["metrics"]]
            assert row["round_means"]["metrics"][name] == pytest.approx(fmean(values), abs=1e-6)
    assert cells(played)["none", "geometric-median"]["round_means"]["metrics"]["rare/trust"] > 0
    assert not cells(played)["none", "mean"]["round_means"]["metrics"]


def test_the_summary_of_a_run_has_the_test_counts(played: Path) -> None:
    row = cells(played)["none", "mean"]
    federation = json.loads((played / "cells" / row["cell"] / "summary.json").read_text("utf-8"))["federation"]
    assert federation["test_counts"] == build(parse(SMALL)).world.data.y_test.bincount(minlength=10).tolist()


def test_a_repair_is_timed_by_itself(tmp_path: Path) -> None:
    """What a repair takes after the last round is no part of the means over the rounds."""
    mended = merged(SMALL, {"strategy": {"root_samples": 20, "repairs": [{"name": "anp", "steps": 2}]}, "model": "mlp"})
    result = run(parse(mended), tmp_path / "run", engine="local", workers=2)
    assert result.summary["repair_seconds"] > 0
    assert "repair" not in result.summary["round_means"]["seconds"]


SCENARIOS = Path(__file__).parent.parent / "scenarios"
#: What no arena plays beside what honest clients do (a scenario has one behaviour for all of them), what only extracts something, and what
#: hides the updates: replies that are broken on purpose, rules that need a model or weights of their own, noise that clients add.
ELSEWHERE = {"malformed", "weighted-mean", "dpa", "distributed-discrete-gaussian"}


def damages(entry: Entry) -> bool:
    """Whether it is an attack on the model, or a rule that looks at the updates."""
    extracts = entry.kind == "behaviour" and overrides(entry.target, "claim")
    return not (entry.plugin or entry.name in ELSEWHERE or entry.meta.get("role") == "honest" or extracts or entry.meta.get("hides"))


def arenas(*overrides: str) -> dict[str, Scenario]:
    return {path.stem: load(path, overrides) for path in sorted(SCENARIOS.glob("arena-*.toml"))}


def test_every_attack_stands_in_an_arena_and_every_rule_in_each() -> None:
    """Whoever adds an attack or a rule has to enter it."""
    attacks = {entry.name for entry in REGISTRY if entry.kind == "behaviour" and damages(entry)}
    rules = {entry.name for entry in REGISTRY if entry.kind in ("aggregator", "filter") and damages(entry)}
    repairs = {entry.name for entry in REGISTRY if entry.kind == "repair" and not entry.plugin}
    found = arenas()
    played = {group.behaviour for scenario in found.values() for groups in scenario.axes()["attackers"].values() for group in groups}
    assert attacks - played == set()
    for name, scenario in found.items():
        defences = scenario.axes()["strategies"].values()
        assert rules - {ref.name for d in defences for ref in (*d.filters, d.aggregator)} == set(), name
        if name == "arena-backdoor":
            assert repairs - {ref.name for d in defences for ref in d.repairs} == set()


def test_the_small_arenas_leave_nothing_out_but_what_needs_a_convolution() -> None:
    whole = arenas()
    for name, scenario in arenas("profile=small").items():
        for axis in ("attackers", "strategies"):
            missing = set(whole[name].axes()[axis]) - set(scenario.axes()[axis])
            assert missing == ({"NAD"} if (name, axis) == ("arena-backdoor", "strategies") else set())
        assert not [cell.name for cell in scenario.cells() if cell.refused]
        assert {(g.size(scenario.clients.count)) for groups in scenario.axes()["attackers"].values() for g in groups} == {3}
