"""What a matrix says of backdoors whose attack ended before the run did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reading import page
from test_arena_page import arena, rows, words

from fedtrust.report import write

#: Success when the attack stopped, how many rounds longer it worked, and whether it still worked at the end: by rule and seed.
LASTING: dict[tuple[str, int], tuple[float, float, float]] = {
    ("mean", 1): (0.9, 6.0, 1.0),
    ("mean", 2): (0.7, 3.0, 0.0),
    ("median", 1): (0.2, 0.0, 0.0),
    ("median", 2): (0.4, 1.0, 0.0),
}


def lasting(folder: Path) -> Path:
    """A matrix in which the probe `durability` ran for the one attack that has a goal."""
    summary: dict[str, Any] = json.loads((arena(folder) / "summary.json").read_text("utf-8"))
    for cell in summary["cells"]:
        known = LASTING.get((cell["strategies"], cell["seed"]))
        if cell["attackers"] == "backdoor" and known and cell["status"] == "finished":
            names = ("durability/at-stop", "durability/lifespan", "durability/outlived")
            cell["metrics"] |= dict(zip(names, known, strict=True))
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    return folder


def test_how_long_a_backdoor_outlasts_its_attack(tmp_path: Path) -> None:
    """Only the attack that stopped has a row; a mean in which a seed's backdoor was still alive at the end is a lower bound."""
    text = write(lasting(tmp_path / "m")).read_text("utf-8")
    found = page(tmp_path / "m" / "report.html")

    def table(title: str) -> list[list[str]]:
        return [words(row) for row in rows(found, text[text.index(f"<caption>{title}") - 200 :], "heat")]

    at_stop = table("Attack success in the attack&#39;s last round (share of attacked inputs, %)")
    assert at_stop == [["", "mean", "median", "krum"], ["backdoor", "80.0± 14.1", "30.0± 14.1", "–"]]
    assert table("How many rounds longer the backdoor worked")[1:] == [["backdoor", "≥ 4.5± 2.1", "0.5± 0.71", "–"]]
    scale = text[text.index("<caption>How many rounds longer") :]
    assert '<span>0</span><i class="h0">' in scale[: scale.index("<figcaption>")]


def test_without_the_probe_nothing_is_said_of_it(tmp_path: Path) -> None:
    assert "rounds longer" not in write(arena(tmp_path / "m")).read_text("utf-8")
