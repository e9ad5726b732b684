"""Small worlds to play in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtrust.scenario import Scenario, parse

# Same bits on any number of workers is promised on the CPU; tests marked `gpu` are run with FEDTRUST_TEST_GPU=1.
if not os.environ.get("FEDTRUST_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

SMALL: dict[str, Any] = {
    "title": "small",
    "rounds": 2,
    "seed": 3,
    "data": {"source": {"name": "digits", "limit": 300}, "partition": {"kind": "dirichlet", "alpha": 1.0}},
    "model": "logistic",
    "clients": {"count": 8, "train": {"lr": 0.1, "batch_size": 16}},
    "probes": ["accuracy"],
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, table by table."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


@pytest.fixture
def small() -> Callable[..., Scenario]:
    """A scenario that plays in a fraction of a second, with changes laid over it."""
    return lambda **changes: parse(merged(SMALL, changes))


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's data folder."""
    monkeypatch.delenv("FEDTRUST_DATA", raising=False)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that does not exist yet."""
    return tmp_path / "run"
