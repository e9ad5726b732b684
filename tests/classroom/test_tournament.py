"""A tournament is played cell by cell, goes on where it stopped, and makes outcomes of whatever submissions do."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedtrust.classroom import cells, exercise, folder, hall, leaderboard, playing, secret, submissions, tournament
from fedtrust.classroom.scoring import Field
from fedtrust.errors import InputError, RunError
from tests.classroom.small import STUDENTS, exercise_file, hand_in
from tests.classroom.trusted import TrustedPlayer, TrustedSeat, trusted

SECRET = b"a secret that nobody can guess at all"


@pytest.fixture
def small(tmp_path):
    return exercise.load(exercise_file(tmp_path / "exercise"))


@pytest.fixture
def handed(tmp_path):
    return hand_in(tmp_path / "handed", STUDENTS)


def made(out, small, handed, phase="public", **more):
    return folder.create(out, small, submissions.found(handed, small.sides), phase, **more)


def board_files(out):
    leaderboard.write(out)
    return [(out / "report" / name).read_bytes() for name in ("leaderboard.csv", "leaderboard.json", "marks.csv", "index.html")]


class Stop:
    """Interrupts after so many cells, as Ctrl-C does."""

    def __init__(self, after):
        self.after = after

    def began(self, cells, done):
        pass

    def played(self, cell, outcome, left):
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt


def test_every_attack_meets_every_defence_and_nobody_too(small, handed, tmp_path):
    about = made(tmp_path / "out", small, handed)
    result = tournament.run(tmp_path / "out", trusted, count=2)
    assert result.status == "finished"
    found = folder.outcomes(tmp_path / "out")
    attacks, defences = {None, "sign flip", "ann", "bob"}, {"FedAvg", "median", "ann", "bob", "cleo"}
    assert {o.key for o in found} == {(a, d, "dirichlet", s) for a in attacks for d in defences for s in (0, 1)}
    assert len(found) == result.cells == 40
    assert TrustedPlayer.up == 0  # nobody is left behind
    board = tournament.board(about, found)
    assert next(ln for ln in board.lines["attack"] if ln.name == "ann").score > 0
    cleo, plain = ({o.key[:1] + o.key[2:]: o.accuracy for o in found if o.defence == d} for d in ("cleo", "FedAvg"))
    sound = [key for key in plain if key[0] != "bob"]
    assert [cleo[k] for k in sound] == [plain[k] for k in sound]  # a handed-in mean is FedAvg, bit by bit


def test_what_is_handed_in_plays_as_the_house_would(small, handed, tmp_path):
    table = cells.Table(small, [1], hidden=False)
    executor = tournament.workers.make("local", 1, None, 60.0, 1)
    copy = hand_in(tmp_path / "copy", {"eve/attack.py": "# play: sign-flip\n", "eve/defence.py": "# play: median\n"})
    attack, defence = (
        TrustedSeat(s, name, "") for s, name in zip(submissions.found(copy, small.sides), ("sign-flip", "median"), strict=True)
    )
    try:
        house = table.play(cells.Planned("sign flip", "median", "dirichlet", 0), executor)
        other = table.play(cells.Planned("eve", "eve", "dirichlet", 0), executor, attack, defence)
        calm = table.play(cells.Planned(None, "median", "dirichlet", 0), executor)
    finally:
        executor.close()
    assert other.accuracy == house.accuracy != calm.accuracy


def test_faults_are_outcomes_with_the_side_they_belong_to(small, handed, tmp_path):
    made(tmp_path / "out", small, handed)
    tournament.run(tmp_path / "out", trusted, count=1)
    faults = {(o.attack, o.defence): o.fault for o in folder.outcomes(tmp_path / "out") if o.fault is not None}
    assert all(fault.side == "attack" and fault.kind == "crash" for (a, d), fault in faults.items() if a == "bob" and d != "bob")
    assert {(a, f.side, f.kind) for (a, d), f in faults.items() if d == "bob" and a != "bob"} == {
        (a, "defence", "timeout") for a in (None, "sign flip", "ann")
    }
    assert {key for key in faults if "bob" not in key} == set()


def test_a_submission_that_cannot_be_loaded_is_a_fault_in_every_game_and_ends_nothing(small, tmp_path):
    handed = hand_in(tmp_path / "handed", {"zoe/attack.py": "# fault: unusable\n", "ann/attack.py": "# play: ipm\n"})
    (handed / "max").mkdir()
    (handed / "max" / "attack.py").symlink_to("/etc/hostname")
    about = made(tmp_path / "out", small, handed)
    assert tournament.run(tmp_path / "out", trusted, count=1).status == "finished"
    found = folder.outcomes(tmp_path / "out")
    assert {o.fault.kind for o in found if o.attack in ("zoe", "max")} == {"unusable"}
    assert "link" in next(o.fault.sentence for o in found if o.attack == "max")
    assert not (tmp_path / "out" / "submissions" / "max").exists()  # nothing was read through the link
    board = tournament.board(about, found)
    assert {ln.name: ln.score for ln in board.lines["attack"] if ln.name in ("zoe", "max")} == {"zoe": 0.0, "max": 0.0}


def test_interrupted_and_gone_on_with_it_is_the_same_leaderboard(small, handed, tmp_path):
    made(tmp_path / "whole", small, handed)
    tournament.run(tmp_path / "whole", trusted, count=2)
    made(tmp_path / "cut", small, handed)
    first = tournament.run(tmp_path / "cut", trusted, count=1, tell=Stop(7))
    assert first.status == "interrupted"
    assert 0 < len(folder.outcomes(tmp_path / "cut")) < 40
    assert TrustedPlayer.up == 0
    with (tmp_path / "cut" / folder.CELLS).open("ab") as file:
        file.write(b'{"attack": "ann", "defen')  # the line that was being written when the power went
    assert tournament.run(tmp_path / "cut", trusted, count=2).status == "finished"
    lines = (tmp_path / "cut" / folder.CELLS).read_text().splitlines()
    assert len({(r["attack"], r["defence"], r["partition"], r["seed"]) for r in map(json.loads, lines)}) == len(lines) == 40
    assert board_files(tmp_path / "cut") == board_files(tmp_path / "whole")


_PLAY = """
import sys
from pathlib import Path
from fedtrust.classroom import tournament
from tests.classroom.trusted import trusted
tournament.run(Path(sys.argv[1]), trusted, count=1)
"""


def test_killed_it_goes_on_to_the_same_leaderboard(small, handed, tmp_path):
    made(tmp_path / "whole", small, handed)
    tournament.run(tmp_path / "whole", trusted, count=1)
    made(tmp_path / "cut", small, handed)
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", _PLAY, str(tmp_path / "cut")], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    path = tmp_path / "cut" / folder.CELLS
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(folder.outcomes(tmp_path / "cut")) < 40
    assert tournament.run(tmp_path / "cut", trusted, count=2).status == "finished"
    assert board_files(tmp_path / "cut") == board_files(tmp_path / "whole")


def test_a_host_that_fails_ends_it_and_it_can_be_gone_on_with(small, tmp_path):
    handed = hand_in(tmp_path / "handed", {"ann/attack.py": "# play: ipm\n", "bob/attack.py": "# host: no sandbox comes up\n"})
    about = made(tmp_path / "out", small, handed)
    with pytest.raises(RunError, match="no sandbox comes up"):
        tournament.run(tmp_path / "out", trusted, count=1)
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["status"], status["why"]) == ("failed", "no sandbox comes up")
    before = len(folder.outcomes(tmp_path / "out"))
    assert before > 0
    bob = next(s for s in about.submissions if s.student == "bob")

    def mended(one, exercise):
        return trusted(about.submissions[0] if one == bob else one, exercise)

    assert tournament.run(tmp_path / "out", mended, count=1).status == "finished"
    assert len(folder.outcomes(tmp_path / "out")) == 16


def test_the_number_of_workers_changes_nothing(small, handed, tmp_path):
    for count in (1, 3):
        made(tmp_path / f"{count}", small, handed)
        tournament.run(tmp_path / f"{count}", trusted, count=count)
    assert board_files(tmp_path / "1") == board_files(tmp_path / "3")


def test_what_was_handed_in_is_copied_and_what_was_changed_is_refused(small, handed, tmp_path):
    out = tmp_path / "out"
    made(out, small, handed)
    (handed / "ann" / "attack.py").write_text("# play: zero\n")
    assert (out / "submissions" / "ann" / "attack.py").read_text() == "# play: ipm\n"
    (out / "submissions" / "ann" / "attack.py").write_text("# play: zero\n")
    with pytest.raises(InputError, match="not what was handed in"):
        tournament.run(out, trusted)


def test_an_exercise_that_was_changed_is_refused(small, handed, tmp_path):
    made(tmp_path / "out", small, handed)
    path = tmp_path / "out" / folder.EXERCISE
    path.write_text(path.read_text().replace("rounds = 2", "rounds = 3"))
    with pytest.raises(InputError, match="changed since"):
        tournament.run(tmp_path / "out", trusted)


def test_a_damaged_line_in_the_middle_is_refused(small, handed, tmp_path):
    made(tmp_path / "out", small, handed)
    (tmp_path / "out" / folder.CELLS).write_text('{"attack": null}\n')
    with pytest.raises(InputError, match=r"cells\.jsonl:1 is damaged"):
        tournament.run(tmp_path / "out", trusted)


def test_a_folder_that_is_taken_is_refused(small, handed, tmp_path):
    made(tmp_path / "out", small, handed)
    with pytest.raises(InputError):
        made(tmp_path / "out", small, handed)
    with pytest.raises(InputError, match="not a tournament"):
        tournament.run(tmp_path / "elsewhere", trusted)


# -------------------------------------------------------------------------------------------------------------------- hidden seeds


def test_hidden_seeds_follow_from_the_secret_and_are_verified(small, handed, tmp_path):
    about = made(tmp_path / "out", small, handed, "final", secret=SECRET)
    assert about.seeds == secret.seeds(SECRET, "small", "final", "", 2)
    assert about.commitment == secret.commitment(SECRET)
    assert about.commitment in folder.verify(folder.load(tmp_path / "out"), SECRET)
    with pytest.raises(InputError, match="is not the file"):
        folder.verify(about, b"another secret that nobody can guess")
    path = tmp_path / "out" / folder.ABOUT
    path.write_text(path.read_text().replace(str(about.seeds[0]), "17"))
    with pytest.raises(InputError, match="not the seeds"):
        folder.verify(folder.load(tmp_path / "out"), SECRET)


def test_seeds_differ_by_phase_day_exercise_and_secret():
    names = [("a", "hidden", "2026-01-01"), ("a", "hidden", "2026-01-02"), ("a", "final", ""), ("b", "final", "")]
    drawn = [seed for name in names for key in (SECRET, SECRET + b"!") for seed in secret.seeds(key, *name, 3)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_a_secret_other_than_the_committed_one_is_refused(handed, tmp_path):
    text = (exercise_file(tmp_path / "x").read_text()).replace(
        'kind = "both"', f'kind = "both"\ncommitment = "{secret.commitment(SECRET)}"'
    )
    committed = exercise.load(exercise_file(tmp_path / "y", text))
    with pytest.raises(InputError, match="committed to"):
        made(tmp_path / "out", committed, handed, "final", secret=b"another secret that nobody can guess")
    with pytest.raises(InputError, match="secret file"):
        made(tmp_path / "out", committed, handed, "hidden")
    with pytest.raises(InputError, match="YYYY-MM-DD"):
        made(tmp_path / "out", committed, handed, "hidden", secret=SECRET, day="tomorrow")
    assert not (tmp_path / "out").exists()
    assert made(tmp_path / "out", committed, handed, "hidden", secret=SECRET, day="2026-01-02").day == "2026-01-02"


def test_a_short_secret_is_refused_and_a_new_one_is_for_its_owner_alone(tmp_path):
    (tmp_path / "short").write_text("1234")
    with pytest.raises(InputError, match="at least 16 bytes"):
        secret.read(tmp_path / "short")
    content = secret.create(tmp_path / "new")
    assert secret.read(tmp_path / "new") == content
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="never overwritten"):
        secret.create(tmp_path / "new")


# ------------------------------------------------------------------------------------------------------------------- submissions


def test_single_files_will_do_where_one_kind_is_asked_for(tmp_path):
    folder = hand_in(tmp_path, {"Ann B.py": "", "bob/attack.py": "", "notes.txt": ""})
    found = submissions.found(folder, ("attack",))
    assert [(s.student, s.side) for s in found] == [("ann-b", "attack"), ("bob", "attack")]
    with pytest.raises(InputError, match="holds no submission"):
        submissions.found(hand_in(tmp_path / "none", {"ann.py": ""}), ("attack", "defence"))


def test_a_student_called_like_the_house_gets_a_label_of_his_own(small, tmp_path):
    files = {"Median/defence.py": "", "Median/attack.py": "", "FedAvg/defence.py": ""}
    handed = submissions.found(hand_in(tmp_path / "handed", files), small.sides)
    defences = folder.field_of(small, handed).defences
    assert set(defences.items()) == {
        ("FedAvg", True), ("median", True), ("median (student)", False), ("fedavg (student)", False)
    }  # fmt: skip
    assert folder.field_of(small, handed).attacks == {"sign flip": True, "median": False}


def test_nobody_is_forgotten_and_every_name_can_be_traced(small, tmp_path):
    files = {
        "ann/attack.py": "# play: ipm\n",
        "A b/defence.py": "# play: mean\n",
        "a-b/defence.py": "# play: mean\n",
        "wrong/atack.py": "",
        "empty/x": "",
    }
    handed = hand_in(tmp_path / "handed", files)
    (handed / "empty" / "x").unlink()
    about = made(tmp_path / "out", small, handed)
    assert [(s.student, s.given) for s in about.submissions] == [
        ("a-b", "A b"), ("a-b-2", "a-b"), ("ann", "ann"), ("empty", "empty"), ("wrong", "wrong")
    ]  # fmt: skip
    assert folder.load(tmp_path / "out").submissions == about.submissions
    problems = {s.student: s.problem for s in about.submissions if s.problem}
    assert problems == {
        "empty": "nothing was handed in: its folder holds no attack.py, defence.py; it is empty",
        "wrong": "nothing was handed in: its folder holds no attack.py, defence.py, but atack.py",
    }
    tournament.run(tmp_path / "out", trusted, count=1)
    leaderboard.write(tmp_path / "out")
    with (tmp_path / "out" / "report" / "marks.csv").open() as file:
        marks = {row["student"]: row for row in csv.DictReader(file)}
    assert (marks["a-b-2"]["handed in as"], marks["wrong"]["mark"]) == ("a-b", "0.0")
    assert "handed in as A b" in (tmp_path / "out" / "report" / "entries" / "a-b.html").read_text()
    assert "but atack.py" in (tmp_path / "out" / "report" / "entries" / "wrong.html").read_text()


def test_a_tournament_is_not_gone_on_with_under_another_secret(small, handed, tmp_path, capsys):
    right, other = tmp_path / "right", tmp_path / "other"
    right.write_text("a secret that nobody can guess")
    other.write_text("another one that nobody guesses")
    made(tmp_path / "out", small, handed, "final", secret=right.read_bytes())
    with pytest.raises(InputError, match="is not the file whose SHA-256"):
        playing.resume(tmp_path / "out", 1, other, quiet=True, open_=trusted)
    assert folder.outcomes(tmp_path / "out") == []
    assert playing.resume(tmp_path / "out", 1, right, quiet=True, open_=trusted) == 0


def test_files_that_are_too_large_are_kept_out(small, tmp_path):
    handed = hand_in(tmp_path / "handed", {"ann/attack.py": "#" * (submissions.MOST_BYTES + 1)})
    about = made(tmp_path / "out", small, handed)
    assert "larger than" in about.submissions[0].problem


# ------------------------------------------------------------------------------------------------------------------------- plans


def test_rows_keep_a_block_of_defences_and_all_cells_are_there_once():
    who = Field({f"a{i}": False for i in range(3)}, {f"d{i}": False for i in range(12)}, "d0")
    rows = tournament.plan(who, ["p", "q"], 2)
    every = [cell for row in rows for cell in row]
    assert len(every) == len(set(every)) == 4 * 12 * 4
    assert max(len({cell.defence for cell in row}) for row in rows) == hall.BLOCK
    house = Field({"a": False}, {f"h{i}": True for i in range(4)} | {f"d{i}": False for i in range(12)}, "h0")
    assert [len({cell.defence for cell in row}) for row in tournament.plan(house, ["p"], 1)] == [14, 14, 2, 2]
    assert all(len({cell.attack for cell in row}) == 1 for row in rows)
    few = {cell for row in tournament.plan(who, ["p"], 1, {"a1"}) for cell in row}
    assert {c.attack for c in few if c.defence == "d5"} == {None, "a1"}
    assert {c.attack for c in few if c.defence == "d0"} == {None, "a0", "a1", "a2"}


def test_no_more_games_side_by_side_than_there_is_memory_for(small, handed, tmp_path, monkeypatch):
    about = made(tmp_path / "out", small, handed)  # three defences: with two more, five sandboxes a game
    monkeypatch.setattr(tournament.threads, "cores", lambda: 8)
    for free, wanted in ((None, 8), (2**40, 8), (2 * 5 * 3 * hall.SANDBOX, 3), (1, 1)):
        monkeypatch.setattr(tournament.memory, "free", lambda free=free: free)
        assert tournament.at_once(about) == wanted


def test_a_crew_keeps_few_players_up_and_those_that_are_used(small, tmp_path):
    opened = []

    def opener(one, exercise):
        opened.append(one.student)
        return trusted(one, exercise)

    handed = submissions.found(hand_in(tmp_path / "in", {f"s{i}/attack.py": "# play: ipm\n" for i in range(4)}), ("attack",))
    crew = hall.Crew(opener, small, most=2)
    for i in (0, 1, 0, 2, 0, 1):
        crew.seat(handed[i])
    assert opened == ["s0", "s1", "s2", "s1"]
    assert TrustedPlayer.up == 2
    crew.close()
    assert TrustedPlayer.up == 0


def test_an_audit_is_played_and_scored_by_the_engines_own_scorer(tmp_path):
    text = exercise.find("who-was-in-the-training-set").read_text().replace("rounds = 15", "rounds = 2")
    audit = exercise.load(exercise_file(tmp_path / "x", text))
    handed = hand_in(tmp_path / "handed", {"ann.py": "# play: x\n", "bob.py": "# fault: crash\n"})
    about = made(tmp_path / "out", audit, handed)
    tournament.run(tmp_path / "out", trusted, count=1)
    found = folder.outcomes(tmp_path / "out")
    assert {o.attack for o in found} == {"loss threshold", "ann", "bob"}
    by = {(o.attack, o.seed): o.measure for o in found}
    # the trusted player scores candidates by their loss, as the house's audit does: the same game, the same area
    assert [by["ann", s] for s in range(3)] == pytest.approx([by["loss threshold", s] for s in range(3)])
    assert 0.4 < by["ann", 0] < 0.9
    board = tournament.board(about, found)
    assert next(ln for ln in board.lines["audit"] if ln.name == "bob").score == 0.0
