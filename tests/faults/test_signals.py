"""Ctrl-C, SIGTERM, a terminal that is closed: out soon, checkpoint written, status said, no process left, the same bits later."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrust.errors import InputError
from fedtrust.runner import run
from fedtrust.runs import RunDirectory
from fedtrust.scenario import Scenario

from .conftest import Note
from .kit import HERE, STATEFUL, Bits, Playing, Starter, rows, status

#: The time that issue 3 gives a run to leave, and what a machine that does other things as well may need in addition.
LEAVES = 5.0 + 10.0

SLOW = STATEFUL.replace("per_round = 6", 'per_round = 6\nbehaviour = { name = "faulty:diary", folder = "FOLDER", seconds = SECONDS }')


def diary(starter: Starter, seconds: float, text: str = SLOW) -> Path:
    """Write a scenario whose honest clients take their time, with the plugin beside it."""
    (starter.folder / "faulty.py").write_text((HERE / "plugin.py").read_text())
    notes = starter.folder / "notes"
    notes.mkdir(exist_ok=True)
    return starter.scenario(text.replace("FOLDER", str(notes)).replace("SECONDS", str(seconds)))


@pytest.fixture(scope="module")
def undisturbed(zygote: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Bits:
    starter = Starter(zygote, tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    ended = starter.play("run", diary(starter, 0.0), "--engine", "local", "--out", "run", "--quiet", "--allow-plugin", "faulty")
    assert (ended.code, ended.err) == (0, "")
    return Bits.of(starter.folder / "run")


RUN = ("--engine", "local", "--allow-plugin", "faulty")


def at_round(playing: Playing, out: Path, number: int) -> None:
    playing.until(lambda: (out / "rounds.jsonl").exists() and len((out / "rounds.jsonl").read_bytes().splitlines()) > number)


def resumed(starter: Starter, out: Path, undisturbed: Bits) -> str:
    assert len(rows(out)) < 5
    ended = starter.play("run", "--resume", out, *RUN, "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert Bits.of(out) == undisturbed
    return "a resume ends with exit 0 and the same bits"


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_run_that_can_go_on(starter: Starter, undisturbed: Bits, happened: Note, how: str) -> None:
    """Ctrl-C goes to every process of the group, the others to the run alone; `python -m fedtrust` from the beginning for Ctrl-C."""
    out = starter.folder / "run"
    start = starter.real if how == "SIGINT" else starter.start
    playing = start("run", diary(starter, 0.1), *RUN, "--out", out, "--quiet")
    at_round(playing, out, 2)
    if how == "SIGINT":
        os.killpg(playing.pid, signal.SIGINT)
    else:
        playing.signal(signal.Signals[how])
    ended = playing.wait(LEAVES)
    starter.nothing_left()
    assert (ended.code, status(out)) == (130, "interrupted")
    assert (out / "checkpoint.safetensors").exists()
    fault = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}[how]
    happened(fault, f"{ended.said}; status interrupted, no process left; {resumed(starter, out, undisturbed)}")


def test_a_signal_while_the_last_word_is_written(starter: Starter, whole: Bits, happened: Note) -> None:
    """Nothing is let go before the status is written: neither the handlers nor the folder's lock."""
    out = starter.folder / "run"
    fail = {"root": out, "act": "term", "file": "summary.json", "moment": "half written"}
    ended = starter.play("run", starter.scenario(), "--engine", "local", "--out", out, "--quiet", fail=fail)
    starter.nothing_left()
    assert (ended.code, status(out)) == (130, "interrupted")
    assert starter.play("run", "--resume", out, "--engine", "local", "--quiet").code == 0
    assert Bits.of(out) == whole
    said = f"{ended.said}; status interrupted, no process left; a resume ends with exit 0 and the same bits"
    happened("SIGTERM while the summary is written", said)


def test_nohup(starter: Starter, undisturbed: Bits, happened: Note) -> None:
    out = starter.folder / "run"
    playing = starter.start("run", diary(starter, 0.05), *RUN, "--out", out, "--quiet", ignore=["SIGHUP"])
    at_round(playing, out, 1)
    playing.signal(signal.SIGHUP)
    ended = playing.wait()
    assert Bits.of(out) == undisturbed
    happened("SIGHUP under nohup", f"{ended.said}: it plays on, the same bits")


def test_an_impatient_user(starter: Starter, undisturbed: Bits, happened: Note) -> None:
    out = starter.folder / "run"
    playing = starter.start("run", diary(starter, 0.1), *RUN, "--out", out, "--quiet")
    at_round(playing, out, 1)
    for _ in range(5):
        with contextlib.suppress(ProcessLookupError):
            playing.signal(signal.SIGINT)
        time.sleep(0.02)
    ended = playing.wait(LEAVES)
    assert ended.code == 130
    happened("Ctrl-C five times in a row", f"{ended.said}; status {status(out)}; {resumed(starter, out, undisturbed)}")


HANGS = SLOW.replace('behaviour = "sign-flip"', 'behaviour = "faulty:faulty"\nparams = { hook = "HOOK", how = "HOW", when = 2 }')


@pytest.mark.parametrize(("hook", "how"), [("poison", "hang"), ("loss", "spin")])
def test_ctrl_c_while_a_client_hangs(starter: Starter, happened: Note, hook: str, how: str) -> None:
    out = starter.folder / "run"
    text = HANGS.replace("HOOK", hook).replace("HOW", how).replace("per_round = 6", "per_round = 8")
    playing = starter.start("run", diary(starter, 0.05, text), *RUN, "--out", out, "--quiet")
    at_round(playing, out, 1)
    playing.signal(signal.SIGINT)
    ended = playing.wait(LEAVES)
    assert (ended.code, status(out), len(rows(out))) == (130, "interrupted", 2)
    happened(f"Ctrl-C while a client {how}s in `{hook}`", f"{ended.said}; status interrupted, no process left")


def test_the_terminal_is_closed(starter: Starter, undisturbed: Bits, happened: Note) -> None:
    """A real pseudo-terminal: its end sends SIGHUP and makes every further write fail."""
    out = starter.folder / "run"
    master, slave = pty.openpty()
    playing = starter.start("run", diary(starter, 0.1), *RUN, "--out", out, out=os.ttyname(slave))
    os.close(slave)
    at_round(playing, out, 2)
    os.close(master)
    ended = playing.wait(LEAVES)
    assert (ended.code, status(out)) == (130, "interrupted")
    happened("the terminal is closed", f"exit {ended.code}; status interrupted; {resumed(starter, out, undisturbed)}")


MATRIX = SLOW + '[sweep]\nstrategies = ["mean", "median", "trimmed-mean"]\n'


def test_ctrl_c_in_a_matrix(starter: Starter, happened: Note) -> None:
    whole, out = starter.folder / "whole", starter.folder / "run"
    assert starter.play("run", diary(starter, 0.0, MATRIX), *RUN, "--out", whole, "--quiet").code == 0
    playing = starter.start("run", diary(starter, 0.05, MATRIX), *RUN, "--out", out, "--quiet")
    playing.until(lambda: any(len(p.read_bytes().splitlines()) > 2 for p in out.glob("cells/*/rounds.jsonl")))
    playing.signal(signal.SIGINT)
    ended = playing.wait(LEAVES)
    assert (ended.code, status(out)) == (130, "interrupted")
    assert starter.play("run", "--resume", out, *RUN, "--quiet").code == 0
    for cell in sorted(p.name for p in (whole / "cells").iterdir()):
        assert Bits.of(out / "cells" / cell) == Bits.of(whole / "cells" / cell)
    happened("Ctrl-C in a matrix", f"{ended.said}; a resume ends with exit 0, every cell has the same bits")


def test_the_folder_is_locked_while_the_last_word_is_written(
    small: Callable[..., Scenario], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else may play into a folder before its status says how the run ended."""
    tried: list[str] = []
    write = RunDirectory.status

    def status_of(self: RunDirectory, status: str, why: str = "") -> None:
        with pytest.raises(InputError, match="is being played by another process"), RunDirectory(out).lock():
            tried.append("it could be locked")
        tried.append(status)
        write(self, status, why)

    monkeypatch.setattr(RunDirectory, "status", status_of)
    assert run(small(), out, engine="local").status == "finished"
    assert tried == ["running", "finished"]
