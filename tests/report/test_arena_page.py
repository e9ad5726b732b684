"""The arena on the page of a matrix: shown for what is large enough, every number where it belongs, nothing from a file unescaped."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import sample
from reading import Page, page

from fedtrust.report import write

#: Accuracy (and attack success) after the last round, by attack and defence, for two seeds; the floor is 0.1. Damages by hand:
#: noise: mean (0.5, 0.25), median (0, 0), krum refused; lies: mean (0.25, 0.25), median (0.25, 0.5), krum (0, 0);
#: backdoor, less 0.05: mean (0.9, 0.8), krum (0, 0), median (0.5, 0.5): its success of 0.1 is less than what it breaks, 0.9 → 0.5.
STORY: dict[tuple[str, str], list[tuple[float, float | None]]] = {
    ("none", "mean"): [(0.9, None), (0.9, None)],
    ("none", "median"): [(0.9, None), (0.9, None)],
    ("none", "krum"): [(0.9, None), (0.82, None)],
    ("noise", "mean"): [(0.5, None), (0.7, None)],
    ("noise", "median"): [(0.9, None), (0.92, None)],
    ("noise", "krum"): [],
    ("lies", "mean"): [(0.7, None), (0.7, None)],
    ("lies", "median"): [(0.7, None), (0.5, None)],
    ("lies", "krum"): [(0.9, None), (0.82, None)],
    ("backdoor", "mean"): [(0.9, 0.95), (0.9, 0.85)],
    ("backdoor", "median"): [(0.5, 0.15), (0.5, 0.15)],
    ("backdoor", "krum"): [(0.9, 0.05), (0.82, 0.05)],
}
SECONDS = {"mean": 0.00002, "median": 0.004, "krum": 0.25}


def arena(folder: Path, attacks: tuple[str, ...] = ("none", "noise", "lies", "backdoor"), **changes: Any) -> Path:
    """Write a matrix without cells' folders, as the arena reads its summary alone."""
    cells = []
    for (attack, defence), played in STORY.items():
        if attack not in attacks:
            continue
        for seed in (1, 2):
            cell: dict[str, Any] = {"cell": f"{attack}__{defence}__iid__seed{seed}", "attackers": attack, "strategies": defence}
            cell |= {"partitions": "iid", "seed": seed, "status": "finished", "seconds": 1.0, "rule": defence, "floor": 0.1}
            if not played:
                cells.append(cell | {"status": "refused", "why": "needs n > 2f + 2 updates", "metrics": {}})
                continue
            accuracy, success = played[seed - 1]
            cell["metrics"] = {"accuracy": accuracy} | ({} if success is None else {"attack-success": success})
            cell["round_means"] = {"seconds": {"train": 9.0, "aggregate": 8.0, "probe": 7.0, "aggregator": SECONDS[defence]}, "metrics": {}}
            if attack == "none":
                cell["clean_success"] = {"backdoor": 0.05}
            if defence == "krum":
                cell["round_means"]["metrics"] = {
                    "detection/fpr": 0.5,
                    "detection/excluded-honest": 0.2,
                    "rare/fpr": 0.9,
                    "common/fpr": 0.4,
                    "rare/trust": 0.1,
                }
            cells.append(cell)
    folder.mkdir(parents=True)
    summary = {"kind": "matrix", "title": "arena", "status": "finished", "cells": cells, "threats": {"none": []}}
    sample.write_json(folder / "summary.json", summary | changes)
    return folder


def rows(found: Page, text: str, name: str) -> list[str]:
    """The cells' texts of the table row that begins with this name, in the table with this class."""
    table = text[text.index(f'<table class="{name}">') :]
    return re.findall(r"<tr.*?</tr>", table[: table.index("</table>")], re.DOTALL)


def words(row: str) -> list[str]:
    return [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)]


def test_the_heat_map_by_hand(tmp_path: Path) -> None:
    """Rows and columns stand in the order of their ranks; noise 0.19, lies 0.21, backdoor 0.45 on average."""
    text = write(arena(tmp_path / "m")).read_text("utf-8")
    found = page(tmp_path / "m" / "report.html")
    assert "arena" in found.ids()
    table = [words(row) for row in rows(found, text, "arena")]
    assert table == [
        ["", "backdoor", "lies", "noise", "average"],
        ["krum", "0", "0", "×", "0"],
        ["median", "50†", "38", "0", "29"],
        ["mean", "85", "25", "38", "49"],
        ["average", "45", "21", "19", ""],
    ]
    assert 'class="failed" title="noise against krum: refused: needs n &gt; 2f + 2 updates"' in text
    assert 'title="lies against median: damage 37.5 % (95 % interval 25 to 50 %)"' in text
    assert 'class="h8" title="backdoor against mean' in text
    assert "damage 50.0 % (95 % interval 50 to 50 %); success beyond a clean model's 10.0 %" in text.replace("&#39;", "'")


def test_rankings_costs_and_who_was_shut_out(tmp_path: Path) -> None:
    write(arena(tmp_path / "m"))
    found = page(tmp_path / "m" / "report.html")
    assert "Krum lets the least through: a damage of 0.0\u202f% on average (95\u202f% interval 0 to 0\u202f%); " in found.words
    assert "; without an attack it gives up 4.0 points of accuracy." in found.words
    assert "Backdoor does the most damage: 45.0\u202f% on average" in found.words
    assert "bootstrap interval over 2 seeds (all 4 resamples)" in found.words
    text = (tmp_path / "m" / "report.html").read_text("utf-8")
    costs = [words(row) for row in rows(found, text[text.index("What the defences cost") :], "plain num")]
    assert costs[1] == ["krum", "1", "0.0\u202f% (2 of 3)", "lies, 0\u202f%", "86.0\u202f%", "4.0 points", "0.25 s", "0.989"]
    assert costs[2][1:6] == ["2", "29.2\u202f%", "backdoor, 50\u202f%", "90.0\u202f%", "0.0 points"]
    assert [row[6] for row in costs[1:]] == ["0.25 s", "4 ms", "&lt; 0.1 ms"]
    shut = [words(row) for row in rows(found, text[text.index("Honest clients that were") :], "plain num")]
    assert shut[1:] == [["krum", "50.0\u202f%", "20.0\u202f%", "90.0\u202f%", "40.0\u202f%", "+50.0 points", "0.10", "–"]]
    assert "2 more have no notion of trust" in found.words


def test_shared_ranks_are_marked(tmp_path: Path) -> None:
    """Noise (0.25 to 0.38 against mean and median …) and lies overlap over the seeds, and so does the backdoor."""
    write(arena(tmp_path / "m"))
    words = page(tmp_path / "m" / "report.html").words
    assert "Attacks by mean damage" in words
    assert re.search(r"=2\s*lies", words)
    assert re.search(r"=2\s*noise", words)


def test_the_csv_has_every_attacked_cell(tmp_path: Path) -> None:
    write(arena(tmp_path / "m"))
    with (tmp_path / "m" / "arena.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 18
    by = {(line["attack"], line["defence"], line["seed"]): line for line in lines}
    assert by["noise", "mean", "1"]["damage"] == "0.5"
    assert (by["noise", "krum", "1"]["status"], by["noise", "krum", "1"]["damage"]) == ("refused", "")
    expected = {
        "damage": "0.5",
        "accuracy_damage": "0.5",
        "attack_success": "0.15",
        "clean_attack_success": "0.05",
        "clean_accuracy": "0.9",
    }
    expected |= {"floor": "0.1", "defence_seconds": "0.004", "accuracy": "0.5", "partition": "iid", "share": "", "status": "finished"}
    assert {key: by["backdoor", "median", "1"][key] for key in expected} == expected


def test_a_small_matrix_has_no_arena(tmp_path: Path) -> None:
    write(arena(tmp_path / "m", attacks=("none", "noise", "backdoor")))
    assert "arena" not in page(tmp_path / "m" / "report.html").ids()
    assert not (tmp_path / "m" / "arena.csv").exists()
    write(sample.matrix(tmp_path / "story", rounds=2))
    assert "arena" not in page(tmp_path / "story" / "report.html").ids()


def test_without_a_clean_run_and_without_a_plain_mean(tmp_path: Path) -> None:
    folder = arena(tmp_path / "m", attacks=("noise", "lies", "backdoor"))
    write(folder)
    found = page(folder / "report.html")
    assert "There is no plain mean" not in found.words
    text = (folder / "report.html").read_text("utf-8")
    assert words(rows(found, text, "arena")[1])[:2] == ["krum", "5"], "only success can be judged, with nothing to subtract"
    text = (folder / "summary.json").read_text("utf-8").replace('"mean"', '"averaging"')
    (folder / "summary.json").write_text(text, encoding="utf-8")
    write(folder)
    assert "There is no plain mean to lose against" in page(folder / "report.html").words


def test_shares_are_settings_of_one_attack(tmp_path: Path) -> None:
    """With a swept share the attack's own label is the column; the clean cell serves both shares."""
    folder = arena(tmp_path / "m", attacks=("none", "lies", "backdoor"))
    calm: dict[str, Any] = {
        "cell": "c",
        "attackers": "none",
        "attack": "none",
        "share": None,
        "strategies": "mean",
        "partitions": "iid",
        "seed": 1,
    }
    calm |= {"metrics": {"accuracy": 0.9}, "rule": "mean", "floor": 0.1}
    cells = [calm | {"strategies": d} for d in ("mean", "median", "krum")]
    for attack in ("noise", "lies", "zero"):
        for share, accuracy in ((0.1, 0.7), (0.4, 0.3)):
            cells += [
                calm
                | {"attackers": f"{attack}, {share}", "attack": attack, "share": share, "strategies": d, "metrics": {"accuracy": accuracy}}
                for d in ("mean", "median", "krum")
            ]
    sample.write_json(folder / "summary.json", {"kind": "matrix", "title": "shares", "cells": cells, "threats": {"none": []}})
    text = write(folder).read_text("utf-8")
    table = [words(row) for row in rows(page(folder / "report.html"), text, "arena")]
    assert table[0] == ["", "noise", "lies", "zero", "average"]
    assert table[1] == ["mean", "50", "50", "50", "50"]


def test_a_large_arena_folds_its_sentences(tmp_path: Path) -> None:
    cells = []
    for attack in ["none", *(f"attack {n}" for n in range(7))]:
        for n in range(6):
            accuracy = 0.9 if attack == "none" or n else 0.3
            cells.append({"cell": f"{attack}{n}", "attackers": attack, "strategies": f"rule {n}", "partitions": "iid", "seed": 1})
            cells[-1] |= {"metrics": {"accuracy": accuracy}, "floor": 0.1}
    folder = tmp_path / "m"
    folder.mkdir()
    sample.write_json(folder / "summary.json", {"kind": "matrix", "title": "large", "cells": cells, "threats": {"none": []}})
    text = write(folder).read_text("utf-8")
    found = page(folder / "report.html")
    assert '<p class="headline">Rule 1 lets the least through' in text
    assert text.count("lets the least through") == 1  # not again where the arena begins
    assert "tied with rule 2, rule 3, rule 4 and rule 5" in found.words
    assert "One seed: there are no intervals" in found.words
    folded = text[text.index("Attack by attack") :]
    assert "Attack 0 beats rule 0" in folded[: folded.index("</details>")]


def test_labels_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'"
    folder = arena(tmp_path / "m")
    text = (folder / "summary.json").read_text("utf-8").replace('"noise"', '"<script>alert(1)</script>\\"\'"')
    (folder / "summary.json").write_text(text.replace('"median"', '"<img src=x onerror=alert(2)>"'), encoding="utf-8")
    write(folder)
    found = page(folder / "report.html")
    assert found.count("script") == 1
    assert evil in found.words
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)


def test_a_damaged_summary_is_one_line(tmp_path: Path) -> None:
    """Odd values are missing ones; the page is written all the same."""
    folder = arena(tmp_path / "m")
    text = (
        (folder / "summary.json").read_text("utf-8").replace('"floor": 0.1', '"floor": "x"').replace('"backdoor": 0.05', '"backdoor": null')
    )
    (folder / "summary.json").write_text(text, encoding="utf-8")
    text = write(folder).read_text("utf-8")
    assert [words(row) for row in rows(page(folder / "report.html"), text, "arena")][1][-1] == "5"
