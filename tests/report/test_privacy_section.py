"""What a reader is told of a run's guarantees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sample
from reading import page

from fedtrust.report import frontier, verdict, write
from fedtrust.report.load import Guarantee
from fedtrust.report.privacy import card, sentence

CENTRAL: dict[str, Any] = {
    "by": "server", "mechanism": "dp-fedavg", "unit": "client", "relation": "add-or-remove-one", "sampling": "poisson",
    "sampled": "Poisson, each of 200 clients with q = 0.2", "clip_kind": "adaptive", "clip_norm": 0.31, "noise_multiplier": 1.25,
    "sensitivity": "the clip", "noise_to_clip": 14.3, "delta": 1e-5, "releases": 20, "epsilon": 6.6161, "epsilon_pld": 6.6161,
    "epsilon_rdp": 7.52,
}  # fmt: skip
LOCAL: dict[str, Any] = {
    "by": "clients", "unit": "client", "relation": "replace-one", "sampling": "none", "clip": 0.5, "noise_multiplier": 2.0, "delta": 1e-5,
    "releases": 4, "epsilon": None, "epsilon_rdp": None, "worst_client": 3, "clients": 8,
}  # fmt: skip


def guarantee(**changes: Any) -> Guarantee:
    return Guarantee.model_validate(changes)


def test_a_guarantee_is_said_with_its_unit_its_delta_and_its_neighbours() -> None:
    said = sentence(guarantee(**CENTRAL))
    assert said == ("Privacy of a client with all its data: ε = 6.62 at δ = 1e-05 by dp-fedavg (one more or one less; 20 releases).")
    said = sentence(guarantee(**LOCAL))
    assert "no finite ε" in said
    assert "for client 3, which paid most (one replaced by another; 4 releases)" in said
    assert sentence(guarantee(**{**LOCAL, "unit": "record"})).startswith("Privacy of a record:")


def test_a_card_says_whom_it_trusts_and_leaves_out_what_is_not_known() -> None:
    facts = dict(card(guarantee(**CENTRAL))["facts"])
    assert facts["Clip"] == "0.31, adaptive"
    assert facts["ε by PLD"] == "6.616"
    assert facts["A round's noise"] == "14.3 times the longest update"
    assert "every update" in facts["Trusts"]
    facts = dict(card(guarantee(**LOCAL))["facts"])
    assert facts["Trusts"] == "nobody"
    assert facts["Worst client"] == "client 3 of 8"
    assert "ε by PLD" not in facts


def test_the_page_of_a_private_run_has_a_card_and_the_curve(tmp_path: Path) -> None:
    folder = sample.run(tmp_path / "run", privacy=[CENTRAL, {**LOCAL, "mechanism": "<b>"}])
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text("utf-8").splitlines()]
    sample.write_lines(folder / "rounds.jsonl", [row | ({"epsilon": 0.5 * row["round"]} if row["round"] else {}) for row in rows])
    found = page(write(folder))
    assert "privacy" in found.ids()
    assert "ε spent by round" in found.words
    assert "14.3 times the longest update" in found.words.replace("\u202f", " ")
    assert "Privacy of a client with all its data" in " ".join(verdict.sentences(json.loads((folder / "summary.json").read_text())))


def test_a_run_that_promises_nothing_says_nothing_of_privacy(tmp_path: Path) -> None:
    found = page(write(sample.run(tmp_path / "run")))
    assert "privacy" not in found.ids()


def test_central_privacy_that_is_spent_otherwise_is_a_line_of_its_own() -> None:
    ways = ({}, {"sampling": "fixed"}, {"mechanism": "dp-ftrl", "sampling": "round-robin"})
    kinds = [frontier._kind(guarantee(**{**CENTRAL, "clip_kind": "fixed", **way})) for way in ways]
    assert kinds == ["central, client", "fixed cohorts", "DP-FTRL"]
    assert frontier._kind(guarantee(**CENTRAL)) == "adaptive clip"
