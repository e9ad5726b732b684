"""The verdict says what the numbers say."""

from __future__ import annotations

from typing import Any

import pytest
from sample import STORY, THREATS

from fedtrust.errors import InputError
from fedtrust.report.verdict import cell_outcome, sentences

BACKDOOR = THREATS["pixel backdoor"]


def matrix(values: dict[tuple[str, str], tuple[float | None, float | None]], **changes: Any) -> dict[str, Any]:
    cells = []
    for (attack, strategy), (accuracy, success) in values.items():
        metrics = {"accuracy": accuracy, "attack-success": success}
        cells.append({"cell": f"{attack}{strategy}", "attackers": attack, "strategies": strategy, "partitions": "iid", "seed": 7})
        cells[-1] |= {"status": "finished", "metrics": {name: value for name, value in metrics.items() if value is not None}}
    return {"kind": "matrix", "cells": cells, "threats": THREATS} | changes


@pytest.mark.parametrize(
    ("accuracy", "baseline", "success", "expected"),
    [
        (0.95, 0.95, 0.50, "won"),
        (0.95, 0.95, 0.499, "partial"),
        (0.95, 0.95, 0.10, "held"),
        (0.95, 0.95, 0.101, "partial"),
        (0.85, 0.95, None, "won"),
        (0.851, 0.95, None, "partial"),
        (0.91, 0.95, None, "held"),
        (0.909, 0.95, None, "partial"),
        (0.99, 0.95, 0.0, "held"),
        (0.80, 0.95, 0.0, "won"),
        (0.95, None, 0.9, "won"),
        (0.95, None, None, "unknown"),
        (None, 0.95, None, "unknown"),
        (None, None, 0.0, "held"),
    ],
)
def test_thresholds(accuracy: float | None, baseline: float | None, success: float | None, expected: str) -> None:
    assert cell_outcome(accuracy, baseline, success) == expected


def test_the_quickstarts_story() -> None:
    assert sentences(matrix(STORY)) == [
        "Median and multi-krum held against both attacks; mean lost to label flip and pixel backdoor.",
        "Label flip beats mean (26.1 points of accuracy lost, 95.8 → 69.7 %); "
        "median and multi-krum hold it (at most 1.6 points of accuracy lost).",
        "Pixel backdoor beats mean (99.8 % of the triggered inputs go to class 2, while accuracy stays at 95.0 %); "
        "median and multi-krum hold it (attack success at most 1.2 %, at most 0.3 points of accuracy lost).",
        "Without an attack accuracy is 95.8 % with mean, 95.4 % with multi-krum and 94.4 % with median.",
        "One seed: a difference of a point or two may be chance.",
    ]


def test_an_attack_that_wins_everywhere() -> None:
    said = sentences(matrix({("none", "mean"): (0.95, None), ("sign flip", "mean"): (0.10, None)}))
    assert said[0] == "Mean lost to sign flip."
    assert "85.0 points of accuracy lost, 95.0 → 10.0 %" in said[1]


def test_in_part() -> None:
    said = sentences(matrix({("none", "clip"): (0.95, None), ("backdoor", "clip"): (0.94, 0.3)}))
    assert said[0] == "Clip held only in part."
    assert said[1] == "Backdoor gets part of its way against clip (30.0 %)."


def test_a_model_that_has_not_learnt_is_no_evidence() -> None:
    said = sentences(matrix({("none", "mean"): (0.19, None), ("flip", "mean"): (0.18, None)}))
    assert said[0].startswith("Nothing can be judged yet: even without an attack the best rule reaches only 19.0 %")


def test_the_threats_own_words_for_its_goal() -> None:
    threats = {"none": [], "trap": [{"behaviour": "trap", "goal": "poisoned questions get the wrong answer", "params": {"target": 2}}]}
    said = sentences(matrix({("none", "mean"): (0.95, None), ("trap", "mean"): (0.95, 0.7)}, threats=threats))
    assert said[1] == "Trap beats mean (70.0 % of the poisoned questions get the wrong answer, while accuracy stays at 95.0 %)."


def test_without_a_cell_without_attack() -> None:
    said = sentences(matrix({("backdoor", "mean"): (0.94, 0.9), ("flip", "mean"): (0.6, None)}))
    assert said[0] == "Mean lost to backdoor."
    assert any(sentence.startswith("No cell was played without an attack") for sentence in said)
    assert not any("Flip" in sentence for sentence in said), "what cannot be judged is not judged"


def test_an_attack_free_cell_is_known_by_its_threats() -> None:
    summary = matrix({("calm", "mean"): (0.95, None), ("flip", "mean"): (0.6, None)}, threats={"calm": [], "flip": [{"behaviour": "flip"}]})
    assert sentences(summary)[0] == "Mean lost to flip."


def test_seeds_are_averaged_and_failed_cells_left_out() -> None:
    summary = matrix({("none", "mean"): (0.90, None)})
    for seed, accuracy, status in ((1, 0.70, "finished"), (2, 0.86, "finished"), (3, 0.0, "failed")):
        cell = {"cell": f"flip{seed}", "attackers": "flip", "strategies": "mean", "partitions": "iid", "seed": seed}
        summary["cells"].append({**cell, "status": status, "metrics": {"accuracy": accuracy}})
    said = sentences(summary)
    assert said[1] == "Flip beats mean (12.0 points of accuracy lost, 90.0 → 78.0 %)."
    assert "1 of 4 cells did not finish and is left out (flip against mean)." in said


def test_the_partition_that_decides_is_named() -> None:
    cells = [
        {"cell": f"{p}{a}", "attackers": a, "strategies": "krum", "partitions": p, "seed": 1, "metrics": {"accuracy": value}}
        for p, a, value in (("iid", "none", 0.95), ("iid", "flip", 0.94), ("skewed", "none", 0.9), ("skewed", "flip", 0.5))
    ]
    said = sentences({"kind": "matrix", "cells": cells})
    assert said[0] == "Krum lost to flip."
    assert "The spread of the data decides: krum against flip lost on skewed and held on iid." in said


def test_only_losses() -> None:
    cells = [
        {"cell": a, "attackers": a, "strategies": "mean", "partitions": "iid", "seed": 1, "metrics": {"loss": value}}
        for a, value in (("none", 0.2), ("flip", 1.4))
    ]
    said = sentences({"kind": "matrix", "cells": cells})
    assert said[0] == "No outcome can be judged from these numbers."
    assert said[1] == "Flip: only the loss is known (mean 1.4)."


def test_many_rules_stay_short() -> None:
    values: dict[tuple[str, str], tuple[float | None, float | None]] = {("none", f"rule{n}"): (0.9, None) for n in range(12)}
    values |= {("flip", f"rule{n}"): (0.5 if n < 7 else 0.89, None) for n in range(12)}
    said = sentences(matrix(values))
    assert "and 3 more" in said[1]
    assert max(map(len, said)) < 300


@pytest.mark.parametrize(
    ("summary", "first"),
    [
        ({"attack": "badnets", "strategy": "mean", "metrics": {"accuracy": 0.95, "attack-success": 0.998}, "threats": BACKDOOR},
         "Badnets beats mean: 99.8 % of the triggered inputs go to class 2."),
        ({"attack": "none", "strategy": "median", "metrics": {"accuracy": 0.944}}, "Median without an attack: accuracy ends at 94.4 %."),
        ({"attack": "flip", "strategy": "median", "metrics": {"accuracy": 0.9}}, "Median under flip: accuracy ends at 90.0 %."),
        ({"attack": None, "strategy": "mean", "metrics": {"loss": 0.31}},
         "Mean without an attack ends at a loss of 0.31; no accuracy was measured."),
        ({"status": "interrupted", "metrics": {}}, "The run was interrupted; the numbers are those of its last round."),
        ({}, "The run left no numbers to judge."),
    ],
)  # fmt: skip
def test_a_single_run(summary: dict[str, Any], first: str) -> None:
    assert sentences({"kind": "run", **summary})[0] == first


def test_a_damaged_summary_is_one_line() -> None:
    with pytest.raises(InputError, match="damaged at cells"):
        sentences({"kind": "matrix", "cells": 3})
