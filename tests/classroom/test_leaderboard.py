"""What students and teacher read after a tournament."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from fedtrust.classroom import exercise, feedback, folder, leaderboard, submissions, tournament
from fedtrust.classroom.scoring import Fault, Outcome
from fedtrust.errors import InputError
from tests.classroom.small import exercise_file, hand_in

SECRET = b"a secret that nobody can guess at all"
#: (attack, defence) → accuracy on seeds 0 and 1; nobody plays these, the leaderboard only reads them.
ACCURACY = {
    (None, "FedAvg"): (0.90, 0.92), (None, "median"): (0.80, 0.84), (None, "ann"): (0.89, 0.91), (None, "<b>bob"): (0.90, 0.92),
    ("sign flip", "FedAvg"): (0.50, 0.60), ("sign flip", "median"): (0.80, 0.82), ("sign flip", "ann"): (0.85, 0.87),
    ("ann", "FedAvg"): (0.40, 0.30), ("ann", "median"): (0.60, 0.62), ("ann", "ann"): (0.70, 0.72),
}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    return exercise.load(exercise_file(tmp_path / "exercise"))


def played(out, small, phase="public", **more):
    """A folder as a tournament leaves it; bob's defence crashes against everybody."""
    files = {"ann/attack.py": "#", "ann/defence.py": "#", "<b>bob/defence.py": "#"}
    given = submissions.found(hand_in(out.parent / "handed", files), small.sides)
    about = folder.create(out, small, given, phase, **more)
    bob = next(s.student for s in about.submissions if s.student != "ann")
    cells = []
    for (attack, defence), values in ACCURACY.items():
        for seed, value in enumerate(values):
            label = bob if defence == "<b>bob" else defence
            cells.append(Outcome(attack, label, "dirichlet", seed, accuracy=value, worst=0.6, floor=0.1))
    sentence = "line 7: ValueError: <script>alert(1)</script>"
    for attack in ("sign flip", "ann"):
        cells += [Outcome(attack, bob, "dirichlet", seed, fault=Fault("defence", "crash", sentence)) for seed in (0, 1)]
    (out / folder.CELLS).write_text("".join(json.dumps(folder.record(cell)) + "\n" for cell in cells))
    return about, bob


def rows(out, name="leaderboard.csv"):
    return list(csv.DictReader(io.StringIO((out / "report" / name).read_text())))


def test_csv_json_and_marks_say_the_same(small, tmp_path):
    _, bob = played(tmp_path / "out", small)
    leaderboard.write(tmp_path / "out")
    table = {(r["side"], r["name"]): r for r in rows(tmp_path / "out")}
    assert table["attack", "ann"]["rank"] == "1"
    # D of ann against FedAvg 0.5 / 0.8 and 0.62 / 0.82, and so on; bob counts as FedAvg
    damages = [(0.5 / 0.8 + 0.62 / 0.82) / 2, (0.2 / 0.7 + 0.22 / 0.74) / 2, (0.19 / 0.79 + 0.19 / 0.81) / 2]
    assert float(table["attack", "ann"]["effect"]) == pytest.approx((2 * damages[0] + damages[1] + damages[2]) / 4, abs=1e-6)
    assert table["defence", "median"]["score"] == "0.0"
    assert "points of accuracy" in table["defence", "median"]["gate"]
    assert table["defence", bob]["faults"] == "4"
    assert float(table["defence", bob]["penalty"]) == pytest.approx(0.2)
    given = json.loads((tmp_path / "out" / "report" / "leaderboard.json").read_text())
    assert {(ln["side"], ln["name"], ln["score"]) for ln in given["lines"]} == {(s, n, float(r["score"])) for (s, n), r in table.items()}
    marks = {r["student"]: r for r in rows(tmp_path / "out", "marks.csv")}
    assert marks["ann"] == {"student": "ann", "attack": "100", "defence": "100", "mark": "100.0", "handed in as": "ann"}
    assert marks[bob]["attack"] == "0"  # nothing was handed in
    assert float(marks[bob]["mark"]) == float(marks[bob]["defence"]) / 2


def test_the_page_is_whole_and_escapes_what_students_wrote(small, tmp_path):
    _, bob = played(tmp_path / "out", small)
    page = leaderboard.write(tmp_path / "out").read_text()
    assert "ann leads the attacks" in page
    assert f"entries/{bob}.html" in page
    feedback = (tmp_path / "out" / "report" / "entries" / f"{bob}.html").read_text()
    assert "line 7: ValueError: &lt;script&gt;alert(1)" in feedback
    for text in (page, feedback):
        assert "<script>alert" not in text
        assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert "4×" in feedback
    assert "against sign flip, dirichlet, seed 1" in feedback
    assert "Not finished: 20 of 32" not in page


def test_feedback_gives_the_parts_of_the_score(small, tmp_path):
    about, _ = played(tmp_path / "out", small)
    board = tournament.board(about, folder.outcomes(tmp_path / "out"))
    page = feedback.entry_page(about, board, folder.outcomes(tmp_path / "out"), "ann")
    attack, defence = page["parts"]
    assert {o["name"]: o["damage"] for o in attack["opponents"]}["median"] == "29.2"
    how = dict(defence["how"])
    assert how["Accuracy without an attack"] == "90.0"
    assert how["… less than FedAvg by"] == "1.0"
    assert how["Worst attack's damage"] == "23.8"
    assert defence["faults"] == []


def test_the_daily_phase_tells_rounded_scores_and_nothing_else(small, tmp_path):
    about, bob = played(tmp_path / "out", small, "hidden", secret=SECRET, day="2026-01-02")
    page = leaderboard.write(tmp_path / "out").read_text()
    table = rows(tmp_path / "out")
    assert all(round(float(r["score"]) / 0.05, 6).is_integer() for r in table)
    assert all(r[key] == "" for r in table for key in ("rank", "mark", "low", "high", "effect", "cost"))
    assert json.loads((tmp_path / "out" / "report" / "leaderboard.json").read_text())["pairs"] == []
    assert not (tmp_path / "out" / "report" / "marks.csv").exists()
    written = page + (tmp_path / "out" / "report" / "entries" / f"{bob}.html").read_text()
    written += (tmp_path / "out" / "report" / "leaderboard.json").read_text()
    assert not any(str(seed) in written for seed in about.seeds)
    assert "opponent by opponent" not in written
    assert "against sign flip" not in written
    assert "it raised an error" in written
    assert "ValueError" not in written  # a submission's own words could carry out what it has seen


def test_the_final_page_shows_the_commitment_and_what_was_verified(small, tmp_path):
    about, _ = played(tmp_path / "out", small, "final", secret=SECRET)
    page = leaderboard.write(tmp_path / "out").read_text()
    assert about.commitment in page
    assert str(about.seeds[0]) not in page
    page = leaderboard.write(tmp_path / "out", SECRET).read_text()
    assert f"The 2 hidden seeds follow from the file whose SHA-256 is {about.commitment}." in page
    assert str(about.seeds[0]) in page
    with pytest.raises(InputError):
        leaderboard.write(tmp_path / "out", b"another secret that nobody can guess")


def test_an_unfinished_tournament_says_so(small, tmp_path):
    played(tmp_path / "out", small)
    path = tmp_path / "out" / folder.CELLS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "Not finished: 23 of 24 games" in leaderboard.write(tmp_path / "out").read_text()
    path.unlink()
    with pytest.raises(InputError, match="no cell"):
        leaderboard.write(tmp_path / "out")


def test_names_that_a_spreadsheet_would_compute_are_defused():
    text = leaderboard.as_csv(("name", "score"), [{"name": "=HYPERLINK(1)", "score": 0.5}, {"name": "ann", "score": -0.1}])
    assert text.splitlines()[1:] == ["'=HYPERLINK(1),0.5", "ann,-0.1"]
