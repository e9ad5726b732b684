"""What a matrix says while it is played: the cells side by side, in 80 columns or in plain lines."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fedtrust import cli_run, console
from fedtrust.console import PlainListener, RichListener, Tracker
from fedtrust.listener import OneAtATime, SilentListener

CELLS = [f"{a}__{s}__dirichlet__seed{n}" for a in ("none", "an-attack-with-a-long-name") for s in ("mean", "krum") for n in range(1, 5)]


def record(number: int, **metrics: float) -> dict[str, Any]:
    return {"round": number, "counted": True, "metrics": metrics, "seconds": {}}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is set."""
    time = [100.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: time[0]))
    return time


def shown(listener: RichListener, screen: Console) -> list[str]:
    with screen.capture() as capture:
        screen.print(listener.render())
    return capture.get().splitlines()


def test_the_cells_that_are_played_stand_side_by_side(now: list[float]) -> None:
    screen = Console(width=80, height=24, force_terminal=True, color_system=None)
    listener = RichListener(screen)
    assert shown(listener, screen) == ["starting …"]
    listener.matrix_started(CELLS, 10)
    for cell in CELLS[10:12]:
        listener.cell_started(cell, {}, 10, 0)
    listener.round_done(CELLS[10], record(3, accuracy=0.5, **{"attack-success": 0.25}))
    listener.round_done(CELLS[11], record(1, loss=2.5))
    listener.cell_done(CELLS[0], {"status": "finished", "metrics": {"accuracy": 0.75}})
    now[0] += 28
    lines = shown(listener, screen)
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("1/16 runs")
    assert "8 %" in lines[0]  # ten rounds and three and one, of 160
    assert lines[0].rstrip().endswith("0:28, 34:04 left")  # two rounds were played in 28 s, 146 are left
    assert lines[1].split() == [CELLS[10], "round", "3/10", "50.0", "%", "/", "25.0", "%"]
    assert lines[2].split() == [CELLS[11], "round", "1/10", "loss", "2.5"]
    table = "\n".join(lines[3:])
    assert "75.0" in table
    assert table.count("…") == 1  # where the cells that are played will stand
    assert table.count("·") == 2
    for cell in CELLS[1:7]:
        listener.cell_started(cell, {}, 10, 0)
    lines = shown(listener, screen)
    assert len(lines) <= 24
    assert "and 4 more" in lines[5]
    with screen.capture() as capture:
        listener.cell_done(CELLS[10], {"status": "failed", "why": "not today", "metrics": {}})
    assert capture.get() == f"{CELLS[10]}: failed: not today\n"
    assert not any(line.startswith(CELLS[10]) for line in shown(listener, screen))


def test_plain_lines_tell_of_cells_as_they_end(now: list[float]) -> None:
    screen = Console(width=80, soft_wrap=True)
    listener = PlainListener(screen)
    with screen.capture() as capture:
        listener.matrix_started(CELLS[:3], 10)
        listener.cell_done(CELLS[0], {"status": "finished", "metrics": {"accuracy": 0.5}})  # was done before
        listener.cell_started(CELLS[1], {}, 10, 4)
        listener.cell_started(CELLS[2], {}, 10, 0)
        now[0] += 10
        for number in (5, 6):
            listener.round_done(CELLS[1], record(number))
        listener.round_done(CELLS[2], record(0))
        now[0] += 50
        listener.round_done(CELLS[2], record(1))
        listener.cell_done(CELLS[2], {"status": "failed", "why": "it hurt", "metrics": {}})
        listener.cell_done(CELLS[1], {"status": "finished", "metrics": {"accuracy": 1.0}})
    assert capture.get().splitlines() == [
        "3 runs of 10 rounds",
        f"[1/3] {CELLS[0]}: accuracy 50.0 %",
        f"56 % (4:20 left); now {CELLS[1]} (round 6/10), {CELLS[2]} (round 1/10)",
        f"[2/3] {CELLS[2]}: failed: it hurt (1:20 left)",
        f"[3/3] {CELLS[1]}: accuracy 100.0 %",
    ]


def test_a_tracker_keeps_little_of_each_of_many_cells() -> None:
    tracker = Tracker()
    tracker.matrix_started(CELLS, 2)
    for cell in CELLS:
        tracker.cell_started(cell, {}, 2, 0)
        for number in range(3):
            tracker.round_done(cell, record(number))
        tracker.cell_done(cell, {"status": "finished", "metrics": {"accuracy": 1.0}, "federation": list(range(1000))})
    assert tracker.done == tracker.total == 32
    assert tracker.left() == 0
    assert not tracker.playing
    assert all(result.keys() == {"status", "metrics"} for result in tracker.results.values())


def test_a_listener_is_called_by_one_thread_at_a_time() -> None:
    class Slow(SilentListener):
        def __init__(self) -> None:
            self.inside, self.most, self.calls = 0, 0, 0

        def round_done(self, name: str, record: Any) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            pause.wait(0.005)
            self.calls += 1
            self.inside -= 1

        cell_done = note = round_done  # type: ignore[assignment]

    pause, slow = threading.Event(), Slow()
    slow.note = lambda text: slow.round_done(text, None)  # type: ignore[method-assign]
    one = OneAtATime(slow)
    calls = [lambda: one.round_done("a", {}), lambda: one.cell_done("a", {}), lambda: one.note("a")] * 3
    callers = [threading.Thread(target=call) for call in calls]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert (slow.most, slow.calls) == (1, 9)


def test_the_result_shows_as_shares_what_the_report_does() -> None:
    """An area, a likeness and a decibel are no shares, though two of them lie between 0 and 1."""
    metrics = {"accuracy": 0.5, "lira/auc": 0.72, "lira/tpr-at-1pct": 0.1, "gan-attack/likeness": 0.9, "dlg/exact": 1.0, "loss": 0.25}
    screen = Console(width=80, color_system=None)
    with screen.capture() as capture:
        cli_run.show(screen, {"kind": "run", "title": "t", "status": "finished", "metrics": metrics, "strategy": "mean", "attack": "none"})
    rows = dict(line.split(maxsplit=1) for line in capture.get().splitlines() if line.split()[:1] and line.split()[0] in metrics)
    assert {key: value.strip() for key, value in rows.items()} == {
        "accuracy": "50.0 %",
        "lira/auc": "0.72",
        "lira/tpr-at-1pct": "10.0 %",
        "gan-attack/likeness": "0.9",
        "dlg/exact": "100.0 %",
        "loss": "0.25",
    }
