"""Every odd folder gives a page, every broken one a single line."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sample
from reading import change, page

from fedtrust.errors import InputError, RunError
from fedtrust.report import compare, write

ODD: dict[str, dict[str, Any]] = {
    "nothing": {"metrics": {}, "threats": [], "assumed_malicious": None,
                 "federation": {}, "trust_mean": {}, "title": None, "strategy": None, "attack": None},
    "nulls": {"metrics": None, "threats": None, "engine": None,
               "federation": None, "trust_mean": None, "warnings": None, "seconds": None, "assumed_malicious": None},
    "not a number": {"metrics": {"accuracy": float("nan"), "loss": float("inf")}},
    "no trust": {"trust_mean": dict.fromkeys(map(str, range(20)))},
    "a count assumed": {"assumed_malicious": 5},
    "unknown metrics": {"metrics": {"plugin/psnr": 31.5, "exposure": 7, "note": "text", "flag": True}},
    "uneven counts": {"federation": {"labels": ["a"], "label_counts": [[1, 2, 3], [], [4]], "malicious": [99, -4]}},
    "a hundred classes": {"federation": {"labels": [f"class number {n}" for n in range(100)], "label_counts": [[1, 2, 3, 4] * 25] * 20}},
    "an absurd id": {"federation": {"malicious": [10**12]}, "trust_mean": {"999999999999": 0.5, "x": 0.5}},
    "odd threats": {"threats": [{}, {"rounds": "all", "params": None, "clients": None, "share": None, "knowledge": None, "paper": None}]},
    "a lone surrogate": {"title": "\ud800 \u202e\x00"},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_summaries(tmp_path: Path, name: str) -> None:
    folder = sample.run(tmp_path / "run", rounds=2)
    (folder / "summary.json").write_text(json.dumps(json.loads((folder / "summary.json").read_text("utf-8")) | ODD[name]), encoding="utf-8")
    page(write(folder))
    if name != "a lone surrogate":
        (folder / "clients.jsonl").unlink()
        (folder / "rounds.jsonl").write_text("", encoding="utf-8")
        page(write(folder))


def test_a_regression_run_has_only_a_loss(tmp_path: Path) -> None:
    folder = change(sample.run(tmp_path / "run", "none", "mean"), metrics={"loss": 0.31}, federation={"labels": [], "label_counts": []})
    sample.write_lines(folder / "rounds.jsonl", [{"round": n, "metrics": {"loss": 1 / (n + 1)}} for n in range(5)])
    found = page(write(folder))
    assert "Mean without an attack ends at a loss of 0.31" in found.words
    assert "Loss by round" in found.words


def test_one_client(tmp_path: Path) -> None:
    assert "1 clients" in page(write(sample.run(tmp_path / "run", "none", "mean", clients=1))).words


def test_a_killed_run_without_summary(tmp_path: Path) -> None:
    folder = sample.run(tmp_path / "run", rounds=3)
    (folder / "summary.json").unlink()
    sample.write_json(folder / "status.json", {"status": "running", "why": ""})
    with (folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 4, "metr')
    words = page(write(folder)).words
    assert "This run has not ended after round 3" in words
    assert "Accuracy: accuracy" not in words


def test_a_round_played_twice_counts_once(tmp_path: Path) -> None:
    folder = sample.run(tmp_path / "run", rounds=3)
    with (folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "metrics": {"accuracy": 0.123}}\n')
    assert "accuracy ends at 12.3 %" in page(write(folder)).words.lower()


DAMAGE: dict[str, tuple[str, str, str]] = {
    "no json": ("summary.json", "{", "not valid JSON"),
    "a list": ("summary.json", "[]", "JSON object"),
    "an unknown kind": ("summary.json", '{"kind": "zoo"}', "unknown kind"),
    "a wrong type": ("summary.json", '{"metrics": [1]}', "damaged at metrics"),
    "a torn line inside": ("rounds.jsonl", '{"round": 1}\n{"rou\n{"round": 3}\n', "rounds.jsonl:2"),
    "a line without round": ("rounds.jsonl", "{}\n", "damaged at round"),
    "a client without id": ("clients.jsonl", '{"round": 1}\n', "clients.jsonl:1"),
    "status": ("status.json", "nope", "not valid JSON"),
    "nested without end": ("environment.json", "[" * 100_000, "environment.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(tmp_path: Path, name: str) -> None:
    file, text, expected = DAMAGE[name]
    folder = sample.run(tmp_path / "run", rounds=1)
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        write(folder)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


def test_folders_that_are_none(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError):
            write(folder)
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="UTF-8"):
        write(tmp_path)
    with pytest.raises(InputError, match="nothing to compare"):
        compare([], tmp_path / "out.html")


def test_a_cell_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    sample.run(tmp_path / "other")
    folder = sample.matrix(tmp_path / "matrix", rounds=1)
    raw = json.loads((folder / "summary.json").read_text("utf-8"))
    change(folder, cells=[cell | {"cell": "../../other"} for cell in raw["cells"][:1]])
    assert "Triggered images" not in page(write(folder)).words


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    folder = sample.run(tmp_path / "run", rounds=1)
    with pytest.raises(RunError, match="cannot be written"):
        compare([folder], tmp_path / "no such folder" / "out.html")


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in _places(part, (*path, key)))]


def test_no_mutation_of_a_summary_escapes_as_a_traceback(tmp_path: Path) -> None:
    """Any value anywhere becomes any other: a page or one InputError, nothing else."""
    r = random.Random(5)
    odd = [
        None,
        "",
        "x",
        "<b>",
        -1,
        0,
        10**400,
        1e308,
        -1e308,
        5e-324,
        float("nan"),
        True,
        [],
        {},
        [[]],
        [None],
        {"a": None},
        [1, "2"],
        {"1": {}},
    ]
    folders = [sample.run(tmp_path / "run", rounds=2, faults=True), sample.matrix(tmp_path / "matrix", rounds=1)]
    good, lines = 0, list[str]()
    for turn in range(100):
        folder = folders[turn % 2]
        whole = json.loads((folder / "summary.json").read_text("utf-8"))
        broken = copy.deepcopy(whole)
        for _ in range(r.choice((1, 1, 2))):
            *way, last = r.choice([place for place in _places(broken) if place])
            target = broken
            for key in way:
                target = target[key]
            target[last] = r.choice(odd)
        (folder / "summary.json").write_text(json.dumps(broken), encoding="utf-8")
        try:
            write(folder)
            good += 1
        except InputError as error:
            lines.append(str(error))
        (folder / "summary.json").write_text(json.dumps(whole), encoding="utf-8")
    assert good > 50
    assert lines
    assert not any("\n" in line for line in lines)
