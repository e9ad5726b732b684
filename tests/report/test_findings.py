"""What the report says of adversaries beside the clients, and of what is not theirs."""

from __future__ import annotations

from typing import Any

from fedtrust.report import findings, verdict

EXACT = {"robbing/exact": 0.75, "robbing/psnr": 118.0, "robbing/mse": 0.0}
BLURRED = {"dlg/exact": 0.0, "dlg/psnr": 15.3, "dlg/mse": 0.03}
SHARP = {"ig/exact": 0.02, "ig/psnr": 31.4, "ig/mse": 0.001}
MEMBERS = {"lira/auc": 0.724, "lira/auc-low": 0.68, "lira/auc-high": 0.76}


def test_what_was_found_most_plainly_comes_first() -> None:
    said = findings.sentences({**BLURRED, **MEMBERS, **EXACT, **SHARP, "accuracy": 0.9})
    assert said == [
        "Lira tells which is which with an AUC of 0.72.",
        "Robbing gets 75.0 % of the samples exactly.",
        "Ig reconstructs samples at 31.4 dB (median).",
        "Dlg reconstructs samples at 15.3 dB (median).",
    ]


def test_metrics_that_are_no_guesses_are_left_alone() -> None:
    assert findings.sentences({"detection/auc": 0.9, "recall/3": 0.5, "accuracy": 0.9, "rare/samples": 4.0}) == []


def test_a_run_begins_with_what_was_stolen() -> None:
    run: dict[str, Any] = {
        "kind": "run",
        "status": "finished",
        "strategy": "mean",
        "attack": "none",
        "metrics": {"accuracy": 0.108, **EXACT},
    }
    assert verdict.sentences(run) == ["Robbing gets 75.0 % of the samples exactly.", "Accuracy ends at 10.8 %."]
    assert verdict.sentences({**run, "metrics": {"accuracy": 0.9}}) == ["Mean without an attack: accuracy ends at 90.0 %."]


def test_a_matrix_says_it_strategy_by_strategy() -> None:
    def cell(strategy: str, **metrics: float) -> dict[str, Any]:
        return {"cell": strategy, "attackers": "none", "strategies": strategy, "partitions": "iid", "seed": "1", "metrics": metrics}

    cells = [cell("mean", accuracy=0.9, **EXACT), cell("local", accuracy=0.7, **{**EXACT, "robbing/exact": 0.0, "robbing/psnr": 4.7})]
    axes = {"attackers": ["none"], "strategies": ["mean", "local"], "partitions": ["iid"], "seeds": ["1"]}
    said = verdict.sentences({"kind": "matrix", "status": "finished", "cells": cells, "axes": axes, "threats": {"none": []}})
    assert said[0] == "Robbing gets 75.0 % (mean) of the samples exactly; it reconstructs samples at 4.7 (local) dB (median)."


def test_the_measures_of_a_matrix_are_those_of_its_guesses() -> None:
    values = {"accuracy": [0.9], "detection/auc": [0.5], "recall/3": [0.1]}
    values |= {"lira/auc": [0.7], "lira/auc-low": [0.6], "gan-attack/likeness": [0.8], "gan-attack/taken-for-it": [1.0]}
    values |= {"dlg/exact": [0.0, 0.04], "dlg/psnr": [15.0, 31.0], "dlg/mse": [0.1, 0.0]}
    assert findings.measures(values) == ["lira/auc", "gan-attack/likeness", "dlg/psnr"]
    assert findings.measures({**values, "dlg/exact": [0.0, 0.5]})[2:] == ["dlg/exact", "dlg/psnr"]
