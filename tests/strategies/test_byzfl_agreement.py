"""ByzFL's aggregators and ours on the same updates, where ByzFL follows the papers: median, trimmed mean, geometric median.

ByzFL is no dependency: what it makes of the rows below was computed with byzfl 0.0.11 (`Median()`, `TrMean(f)`, `GeometricMedian(nu=1e-6,
T=2000)`, which starts from zero where ours starts from the mean, and is run until both stand still). With byzfl installed it is asked
itself, on other rows. Its Krum sums n − f − 1 neighbours where Blanchard et al. have n − f − 2 (see `krum`) and is not compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.strategies.rules_kit import normal, verdict

ROWS = torch.tensor([
    [0.0, 3.3, 5.0, 4.2], [0.7, -5.0, 0.7, 4.8], [-1.4, 3.3, -4.5, 5.0], [2.1, 0.7, -3.3, 4.8], [-2.7, -4.2, 2.6, 4.3],
    [3.3, 4.8, 4.8, 3.4], [-3.8, -2.0, 0.1, 2.2], [84.0, -42.0, -96.0, 16.0], [-84.0, 42.0, 96.0, -16.0],
])  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "rule", "params", "expected"),
    [
        (9, "median", {}, [0.0, 0.7, 0.7, 4.3]),
        (8, "median", {}, [0.35, -0.65, 0.4, 4.55]),
        (9, "trimmed-mean", {"trim": 2}, [-0.26, 0.22, 0.98, 4.3]),
        (9, "trimmed-mean", {"trim": 4}, [0.0, 0.7, 0.7, 4.3]),
        (9, "geometric-median", {}, [-0.532449, -0.417227, 0.625332, 4.002358]),
    ],
)
def test_what_byzfl_makes_of_these_rows(rows: int, rule: str, params: dict[str, Any], expected: list[float]) -> None:
    found = verdict("aggregator", rule, ROWS[:rows], **params).value
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-3 if rule == "geometric-median" else 1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_byzfl_itself_agrees(seed: int) -> None:
    byzfl = pytest.importorskip("byzfl")
    rows = torch.cat([normal(9, 30, seed), 50 * normal(2, 30, seed + 10)])
    asked: dict[str, tuple[Any, dict[str, Any]]] = {
        "median": (byzfl.Median(), {}),
        "trimmed-mean": (byzfl.TrMean(2), {"trim": 2}),
        "geometric-median": (byzfl.GeometricMedian(nu=1e-6, T=2000), {}),
    }
    for rule, (theirs, params) in asked.items():
        expected: Tensor = theirs(rows)
        torch.testing.assert_close(verdict("aggregator", rule, rows, **params).value, expected, atol=2e-3, rtol=1e-3)
