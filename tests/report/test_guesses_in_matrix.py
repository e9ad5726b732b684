"""What observers found out in a matrix: heat maps of it, and the curves of all cells in one picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtrust.report import write
from fedtrust.report.curves import together
from fedtrust.report.heat import heat_maps
from fedtrust.report.load import Matrix, read
from fedtrust.report.parts import Budget
from fedtrust.runner import run
from fedtrust.scenario import Scenario

Small = Callable[..., Scenario]

SWEEP: dict[str, Any] = {
    "model": "mlp",
    "rounds": 1,
    "data": {"feature_skew": {"kind": "property", "what": "thick", "share": 0.5}, "partition": "iid"},
    "probes": ["accuracy", "loss-threshold", {"name": "property-inference", "clients": 8}],
    "sweep": {"strategies": ["mean", "median"], "attackers": {"none": [], "sign flip": [{"behaviour": "sign-flip", "count": 1}]}},
}


@pytest.fixture
def matrix(small: Small, out: Path) -> Matrix:
    assert run(small(**SWEEP), out, engine="local").status == "finished"
    found = read(out)
    assert isinstance(found, Matrix)
    return found


def test_every_scored_guess_has_a_heat_map_with_the_numbers_of_the_cells(matrix: Matrix) -> None:
    tables = {table["title"]: table for table in heat_maps(matrix)[0]["tables"]}
    assert {"Loss threshold: auc", "Property inference: auc"} <= tables.keys()
    table = tables["Property inference: auc"]
    shown = {(row["name"], s): cell for row in table["rows"] for s, cell in zip(table["columns"], row["cells"], strict=True)}
    assert len(shown) == 4
    for cell in matrix.summary.cells:
        value = cell.metrics["property-inference/auc"]
        assert value is not None
        here = shown["no attack" if cell.attackers == "none" else cell.attackers, cell.strategies]
        assert here["value"] == f"{value:.4g}"
        assert here["heat"] == int(10 * min(max((value - 0.5) / 0.5, 0), 1) + 1e-9)
    assert table["scale"] == ["0.5", "1"]


def test_the_curves_of_all_cells_stand_in_one_picture_and_what_they_share_once(matrix: Matrix) -> None:
    (item,) = together(matrix, Budget(250_000))
    svg = str(item["svg"])
    names = ["none, mean", "none, median", "sign flip, mean", "sign flip, median", "guessing"]
    assert [name for name in names if f" {name} ends at " in svg] == names
    assert svg.count(" ends at ") == 2 * len(names)  # in the name of the picture and in its description
    page = write(matrix.folder.path).read_text("utf-8")
    assert page.count("ROC of a membership inference") >= 1
    assert page.count("<h3>ROC of a membership inference") == 1


def test_more_lines_than_can_be_told_apart_go_into_further_pictures(matrix: Matrix) -> None:
    file = next((matrix.folder.path / "cells").glob("*/artefacts/*loss-threshold*.json"))
    raw = json.loads(file.read_text())
    raw["series"] |= {f"more {n}": [[-1.0, n / 20.0], [0.0, 0.0]] for n in range(12)}
    file.write_text(json.dumps(raw))
    again = read(matrix.folder.path)
    assert isinstance(again, Matrix)
    pictures = [str(item["svg"]) for item in together(again, Budget(250_000))]
    assert len(pictures) == 2  # 16 lines of their own and one that all share, twelve in a picture
    assert all("guessing ends at" in svg for svg in pictures)
