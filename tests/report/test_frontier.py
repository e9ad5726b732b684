"""The picture of what privacy costs and buys: which lines it draws, where their points lie, and when there is nothing to draw."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

from fedtrust.report import frontier
from fedtrust.report.load import Cell, Matrix


def cell(strategy: str, accuracy: float, privacy: list[dict[str, Any]], seed: str = "1", **metrics: float) -> Cell:
    return Cell.model_validate(
        {"cell": strategy + seed, "strategies": strategy, "seed": seed, "metrics": {"accuracy": accuracy, **metrics}, "privacy": privacy}
    )


def central(epsilon: float | None) -> list[dict[str, Any]]:
    return [{"by": "server", "unit": "client", "epsilon": epsilon}]


def matrix(*cells: Cell) -> Matrix:
    return cast(Matrix, SimpleNamespace(summary=SimpleNamespace(cells=list(cells))))


def marks(svg: str, style: int) -> list[float]:
    """Where a line's markers lie from left to right; the last is that of its label."""
    found = re.findall(rf'translate\(([\d.]+) [\d.]+\)" class="mark s{style}"', svg)
    return [float(x) for x in found][:-1] if len(re.findall(r"polyline", svg)) > 1 else [float(x) for x in found]


def test_a_line_for_each_kind_of_privacy_over_epsilon() -> None:
    record = [{"by": "clients", "unit": "record", "epsilon": 4.0}]
    found = frontier.section(
        matrix(
            cell("plain", 0.9, [], auc=1.0),
            cell("c1", 0.3, central(1.0)),
            cell("c2", 0.4, central(2.0)),
            cell("c8", 0.7, central(8.0), **{"loss-threshold/auc": 0.55}),
            cell("r4", 0.8, record),
        )
    )
    assert found is not None
    assert [panel["title"] for panel in found["panels"]] == ["Accuracy", "Loss threshold: auc"]
    svg = str(found["panels"][0]["svg"])
    one, two, eight, none = marks(svg, 0)  # equal factors of ε are equal distances
    assert round((eight - one) / (two - one), 1) == 3.0
    assert none > eight
    assert len(marks(svg, 1)) == 2  # ε = 4, and without privacy
    for label in (">1<", ">8<", ">none<", "central, client", "record"):
        assert label in svg
    assert "central, client, ε 8: 70.0 %" in svg
    assert "central, client, ε none: 90.0 %" in svg
    assert "bands" not in found["note"]


def test_seeds_are_averaged_and_shown_as_a_band() -> None:
    cells = [cell(f"c{e:g}", 0.1 * e + 0.01 * int(s), central(e), s) for e in (1.0, 4.0) for s in ("1", "3")]
    found = frontier.section(matrix(*cells))
    assert found is not None
    svg = str(found["panels"][0]["svg"])
    assert "ε 4: 42.0 %" in svg
    assert "polygon" in svg
    assert ">none<" not in svg
    assert "bands" in found["note"]


def test_without_two_values_of_epsilon_there_is_no_picture() -> None:
    assert frontier.section(matrix(cell("plain", 0.9, []), cell("c1", 0.3, central(1.0)))) is None
    assert frontier.section(matrix(cell("plain", 0.9, []), cell("unbounded", 0.3, central(None)))) is None
