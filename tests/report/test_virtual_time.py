"""What the page shows of devices: curves over virtual time, who was there, and faults that were asked for as one line each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import sample
from reading import page

from fedtrust.errors import InputError
from fedtrust.report import compare, write
from fedtrust.report.devices import over_time, time_unit
from fedtrust.report.load import Run, read


def paths(text: str, name: str) -> dict[str, str]:
    """The shapes of a picture, by what they stand for."""
    picture = next(svg for svg in re.findall(r"<svg .*?</svg>", text, re.DOTALL) if name in svg[:300])
    return {title: d for d, title in re.findall(r'<path d="([^"]*)"[^>]*><title>([^<]*)</title>', picture)}


def test_a_run_with_devices(tmp_path: Path) -> None:
    folder = sample.with_devices(sample.run(tmp_path / "run", rounds=12))
    path = write(folder)
    found = page(path)
    assert "Over virtual time" in found.words
    assert "Accuracy over virtual time" in found.words
    assert "Virtual time (s)" in found.words
    assert "2 min of virtual time" in found.words
    assert "18 of 20 clients could be reached in a round. Of 84 clients asked 36 replied, 12 of them after partial work" in found.words
    assert "24 late, 12 dropped out and 12 surplus" in found.words
    shapes = paths(path.read_text("utf-8"), "Who could be reached")
    counted = {word: shapes[word].count("M") for word in ("replied", "partial work", "late", "dropped out", "surplus", "unreachable")}
    assert counted == {"replied": 24, "partial work": 12, "late": 24, "dropped out": 12, "surplus": 12, "unreachable": 24}
    faults = path.read_text("utf-8").split('id="faults"')[1].split('id="repeat"')[0]
    rows = re.findall(r'<th scope="row">([^<]*)</th><td>(\d+)</td>', faults)
    assert rows == [("late", "24"), ("dropped out", "12"), ("surplus", "12")]  # not a row for every needed time


def test_the_curve_stands_at_the_clock(tmp_path: Path) -> None:
    run = read(sample.with_devices(sample.run(tmp_path / "run", rounds=6), step=100.0))
    assert isinstance(run, Run)
    accuracy = [entry.metrics["accuracy"] for entry in run.rounds]
    assert over_time(run, "accuracy", 60.0) == [(100 * n / 60, value) for n, value in enumerate(accuracy)]
    best = max(v for v in accuracy if v is not None)
    first = next(n for n, v in enumerate(accuracy) if v is not None and v >= 0.9 * best)
    found = page(write(tmp_path / "run"))
    assert f"90 % of its best value ({100 * best:.1f} %) was reached after {100 * first / 60:.3g} min." in found.words.replace(
        "\u202f", " "
    )
    assert [time_unit(t) for t in (10, 3600, 36_000, 1e6)] == [(1.0, "s"), (60.0, "min"), (3600.0, "h"), (86_400.0, "days")]


def test_a_run_without_devices_or_time_shows_none(tmp_path: Path) -> None:
    for name in ("plain", "untimed"):
        folder = sample.run(tmp_path / name)
        found = page(write(sample.with_devices(folder, timed=False) if name == "untimed" else folder))
        assert "irtual time" not in found.words
        assert ("Who could be reached" in found.words) == (name == "untimed")


def test_a_round_without_anybody_says_so(tmp_path: Path) -> None:
    folder = sample.with_devices(sample.run(tmp_path / "run", rounds=2), counted=False, reachable=0, cohort=[], faults={}, fates={})
    assert "Quorum missed: round 1 (nobody could be reached), round 2 (nobody could be reached)." in page(write(folder)).words


def test_many_clients_are_counted_by_round(tmp_path: Path) -> None:
    folder = sample.with_devices(sample.run(tmp_path / "run", clients=300, rounds=5), clients=300, unreachable=[])
    found = page(write(folder))
    assert "Clients asked" in found.words
    assert "298 of 300 clients could be reached" in found.words
    assert "partial wo" in found.words  # a line for each fate, named at its end


def test_a_matrix_and_a_comparison(tmp_path: Path) -> None:
    folder = sample.matrix(tmp_path / "matrix", rounds=5, seeds=(1, 2))
    for n, cell in enumerate(sorted((folder / "cells").iterdir())):
        sample.with_devices(cell, step=10.0 + n % 2)
    found = page(write(folder))
    assert "Accuracy over virtual time" in found.words
    runs = [sample.with_devices(sample.run(tmp_path / name, rounds=5), step=step) for name, step in (("slow", 40.0), ("fast", 4.0))]
    both = page(compare([*runs, sample.run(tmp_path / "timeless", rounds=5)], tmp_path / "compare.html"))
    assert "Over virtual time" in both.words
    picture = next(
        svg for svg in re.findall(r"<svg .*?</svg>", (tmp_path / "compare.html").read_text("utf-8"), re.DOTALL) if "over virtual" in svg
    )
    assert "slow ends at" in picture
    assert "timeless" not in picture


ODD: list[dict[str, Any]] = [
    {"clock": None}, {"clock": "soon"}, {"clock": -3}, {"clock": 1e149}, {"reachable": None}, {"reachable": "some"},
    {"fates": {}}, {"fates": None}, {"fates": {"<b>": [1, 2]}}, {"fates": {"late": [10**9, -1, 2, 2]}}, {"unreachable": [10**9, -4]},
    {"unreachable": None}, {"cohort": []}, {"reachable": 0, "cohort": [], "fates": sample.FATES},
]  # fmt: skip


@pytest.mark.parametrize("changes", ODD, ids=str)
def test_odd_records(tmp_path: Path, changes: dict[str, Any]) -> None:
    page(write(sample.with_devices(sample.run(tmp_path / "run", rounds=3), **changes)))


def test_damaged_records_are_one_line(tmp_path: Path) -> None:
    folder = sample.with_devices(sample.run(tmp_path / "run", rounds=3), fates={"late": "client 3"})
    with pytest.raises(InputError, match=r"rounds.jsonl:2: damaged at fates.late"):
        write(folder)
