"""A matrix with cells that cannot be, and what its summary says of them, of claims and of breaking points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtrust.cli import main
from fedtrust.errors import InputError
from fedtrust.listener import SilentListener
from fedtrust.report import write
from fedtrust.runner import resume, run
from fedtrust.scenario import Scenario, check

Small = Callable[..., Scenario]

SWEEP: dict[str, Any] = {
    "sweep": {
        "attackers": {"none": [], "sign flip": [{"behaviour": "sign-flip", "params": {"scale": 4.0}}]},
        "strategies": ["mean", "krum"],
        "shares": [0.25, 0.5],
        "assumed": "truth",
        "infeasible": "skip",
    },
    "claims": [{"text": "mean copes", "strategies": "mean", "expect": "copes"}, {"text": "krum", "strategies": "krum", "expect": "copes"}],
}


class Notes(SilentListener):
    """Keep what was said."""

    def __init__(self) -> None:
        self.said, self.cells, self.done = list[str](), list[str](), list[str]()

    def note(self, text: str) -> None:
        self.said.append(text)

    def matrix_started(self, cells: Any, rounds: int) -> None:
        self.cells = list(cells)

    def cell_done(self, name: str, summary: Any) -> None:
        self.done.append(name)


def test_refused_cells_are_recorded_and_the_others_played(small: Small, out: Path) -> None:
    listener = Notes()
    result = run(small(**SWEEP), out, engine="local", listener=listener)
    assert (result.status, result.summary["why"]) == ("finished", "")
    rows = {row["cell"]: row for row in result.summary["cells"]}
    refused = rows["sign-flip-50__krum__dirichlet__seed3"]
    assert (refused["status"], refused["metrics"], refused["seconds"], refused["model_sha256"]) == ("refused", {}, 0.0, "")
    assert "n = 8 and the defender assumes f = 4" in refused["why"]
    assert (refused["attack"], refused["share"], refused["attackers"]) == ("sign flip", 0.5, "sign flip, 50 %")
    assert [row["status"] for row in rows.values()].count("finished") == 5
    assert not (out / "cells" / refused["cell"]).exists()
    assert refused["cell"] not in listener.cells
    assert sorted(listener.done) == sorted(listener.cells)
    assert [said for said in listener.said if said.startswith("1 of 6 cells are refused (first: sign-flip-50__krum")]
    assert json.loads((out / "status.json").read_text())["status"] == "finished"


def test_the_summary_holds_claims_and_breaking_points(small: Small, out: Path) -> None:
    summary = run(small(**SWEEP), out, engine="local").summary
    accuracy = {(row["attackers"], row["strategies"]): row["metrics"].get("accuracy") for row in summary["cells"]}
    mean, krum = summary["claims"]
    case = mean["results"][0]["cases"][0]
    assert case["mean"] == pytest.approx(accuracy["none", "mean"] - accuracy["sign flip, 25 %", "mean"])
    assert [case["outcome"] for case in krum["results"][0]["cases"]][1] == "refused"
    points = {point["strategy"]: point for point in summary["breaking_points"]}
    assert (points["krum"]["refused"], points["krum"]["tried"], points["mean"]["tried"]) == ([0.5], [0.25], [0.25, 0.5])
    assert json.loads((out / "summary.json").read_text())["claims"] == summary["claims"]


@pytest.mark.parametrize("more", [False, True])
def test_an_interrupted_matrix_with_refused_cells_goes_on(more: bool, small: Small, out: Path) -> None:
    """With `more`, a cell that its model refuses too."""

    class Stop(SilentListener):
        def cell_done(self, name: str, summary: Any) -> None:
            raise KeyboardInterrupt

    strategies = {"mean": {}, "krum": {"aggregator": "krum"}} | ({"votes": {"behaviour": "dpa"}} if more else {})
    sweep = {**SWEEP["sweep"], "strategies": strategies}
    assert run(small(sweep=sweep), out, engine="local", cells=1, listener=Stop()).status == "interrupted"
    result = resume(out, engine="local")
    assert result.status == "finished"
    assert [row["status"] for row in result.summary["cells"]].count("refused") == (4 if more else 1)
    assert len(result.summary["cells"]) == (9 if more else 6)


def test_a_matrix_without_the_word_is_refused_as_a_whole(small: Small, out: Path) -> None:
    sweep = {**SWEEP["sweep"], "infeasible": "refuse"}
    with pytest.raises(InputError, match=r"sweep\.strategies\.krum\.aggregator: against 50 % sign flip: 'krum' cannot work here"):
        small(**{**SWEEP, "sweep": sweep})


def test_the_command_line_ends_well_and_shows_the_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text(
        """
        title = "claims"
        rounds = 1
        model = "logistic"
        data = { source = { name = "digits", limit = 200 } }
        clients = { count = 8 }
        [sweep]
        strategies = ["mean", "krum"]
        shares = [0.5]
        assumed = "truth"
        infeasible = "skip"
        [sweep.attackers]
        none = []
        "sign flip" = [{ behaviour = "sign-flip" }]
        [[claims]]
        text = "copes"
        expect = "copes"
        """,
        encoding="utf-8",
    )
    assert main(["run", "s.toml", "--out", "out", "--plain"]) == 0
    said = capsys.readouterr().out
    assert "1 of 4 cells are refused" in said
    assert "claimed → measured" in said
    assert "not measured" in said
    assert "Krum against sign flip, 50 %" not in said
    assert "1 of 4 cells were not played: their rule cannot work as it stands (krum against sign flip, 50 %)." in " ".join(said.split())


def test_a_refused_cell_is_hatched_with_its_reason_and_no_alarm(small: Small, out: Path) -> None:
    run(small(**SWEEP), out, engine="local")
    text = write(out).read_text("utf-8")
    assert 'class="failed" title="&#39;krum&#39; cannot work here: needs n' in text
    assert "<small>refused</small>" in text
    assert 'class="alert"' not in text
    assert "did not finish" not in text


#: On a logistic model: an attack that needs hidden layers, a repair that needs them, and honest software that needs an ensemble.
UNFIT: dict[str, Any] = {
    "sweep": {
        "attackers": {"none": [], "chameleon": [{"behaviour": "chameleon", "count": 2}]},
        "strategies": {"mean": {}, "pruned": {"repairs": ["fine-pruning"], "root_samples": 20}, "votes": {"behaviour": "dpa"}},
        "infeasible": "skip",
    },
}


def test_what_does_not_go_with_the_model_is_a_refused_cell(small: Small, out: Path) -> None:
    scenario = small(**UNFIT)
    facts = check(scenario)
    assert [fact for fact in facts if fact.startswith("5 of its runs will be refused; the first, none__pruned__dirichlet__seed3:")]
    result = run(scenario, out, engine="local")
    assert result.status == "finished"
    why = {(row["attackers"], row["strategies"]): row["why"] for row in result.summary["cells"]}
    assert why["none", "mean"] == ""
    assert "'chameleon' cannot work here: the model has no layer before its last" in why["chameleon", "mean"]
    assert why["none", "pruned"] == "'fine-pruning' cannot work here: the model has no hidden layer to prune"
    assert why["none", "votes"] == "'dpa' cannot work here: needs the model 'ensemble' with at least two members"
    assert [row["status"] for row in result.summary["cells"]].count("refused") == 5


def test_shares_of_an_unfit_attack_are_all_refused(small: Small, out: Path) -> None:
    sweep = {"attackers": {"none": [], "chameleon": [{"behaviour": "chameleon"}]}, "shares": [0.25, 0.5], "infeasible": "skip"}
    cells = run(small(sweep=sweep), out, engine="local").summary["cells"]
    assert [(row["attackers"], row["status"]) for row in cells] == [
        ("none", "finished"),
        ("chameleon, 25 %", "refused"),
        ("chameleon, 50 %", "refused"),
    ]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"infeasible": "refuse"}, r"sweep\.attackers\.chameleon\[0\]\.behaviour: 'chameleon' cannot work here"),
        (
            {"strategies": {"pruned": {"repairs": ["fine-pruning"], "root_samples": 20}}},
            "sweep: every cell would be refused; the last because",
        ),
    ],
)
def test_an_unfit_matrix_is_refused_where_cells_are_not_skipped_or_none_is_left(small: Small, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError, match=where):
        check(small(sweep={**UNFIT["sweep"], **changes}))
