"""The disk is full at every place where a run writes: it says so, ends with exit 1, and goes on to the same bits once there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Note
from .failpoints import CAN_FAIL
from .kit import HERE, SHORT, Bits, Ended, Starter, quickly, rows, status
from .table import FULL
from .test_checkpoint import moments


def goes_on(starter: Starter, out: Path, whole: Bits) -> str:
    """There is room again: resume and compare."""
    ended = starter.play("run", "--resume", out, "--engine", "local", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert Bits.of(out) == whole
    return "with room again a resume ends with exit 0 and the same bits"


def said_so(ended: Ended) -> None:
    assert ended.code == 1, ended
    assert "No space left on device" in ended.complaint
    assert "a fault in fedtrust" not in ended.complaint


@pytest.mark.parametrize("file", quickly(FULL, "the checkpoint", "the summary"))
def test_the_disk_is_full_from_then_on(starter: Starter, whole: Bits, happened: Note, file: str) -> None:
    heard = set()
    for moment in ("before opening", "half written", "before fsync"):
        out = starter.folder / moment
        fail = {"root": out, "act": "full", "file": file, "moment": moment, "nth": 3 if file[-1] == "l" or "check" in file else 1}
        ended = starter.play("run", starter.scenario(), "--engine", "local", "--out", out, "--quiet", fail=fail)
        said_so(ended)
        assert not list(out.glob("*.tmp")), "what was half written takes up space"
        heard.add(f"{ended.said}; {goes_on(starter, out, whole)}")
    assert len(heard) == 1, heard
    happened(next(k for k, v in FULL.items() if v == file), heard.pop())


def test_the_first_reason_is_what_is_said(starter: Starter, happened: Note) -> None:
    """A student's rule raises, and then the disk has no room for the status that says so."""
    out = starter.folder / "run"
    (starter.folder / "faulty.py").write_text((HERE / "plugin.py").read_text())
    scenario = starter.scenario(SHORT.replace('"trimmed-mean"', '{ name = "faulty:faulty-rule", how = "raise" }'))
    fail = {"root": out, "act": "full", "file": "status.json", "moment": "before opening", "nth": 2}
    ended = starter.play("run", scenario, "--engine", "local", "--allow-plugin", "faulty", "--out", out, "--quiet", fail=fail)
    assert (ended.code, status(out)) == (1, "running")
    assert "a student's bug" in ended.complaint
    happened("the disk is full when a run says why it failed", f"{ended.said}; status running")


def test_an_interrupt_on_a_full_disk(starter: Starter, whole: Bits, happened: Note) -> None:
    out = starter.folder / "run"
    fail = {"root": out, "act": "term, full", "file": "rounds.jsonl", "moment": "after fsync", "nth": 3}
    ended = starter.play("run", starter.scenario(), "--engine", "local", "--out", out, "--quiet", fail=fail)
    assert (ended.code, status(out), len(rows(out))) == (130, "running", 3)
    happened("the disk is full when a run is interrupted", f"{ended.said}; status running; {goes_on(starter, out, whole)}")


def test_a_file_grows_too_large(starter: Starter, whole: Bits, happened: Note) -> None:
    """The kernel itself says no (RLIMIT_FSIZE), in the middle of the first checkpoint; the small files still fit."""
    out = starter.folder / "run"
    ended = starter.play("run", starter.scenario(), "--engine", "local", "--out", out, "--quiet", limit=2500)
    assert ended.code == 1
    assert status(out) == "failed"
    assert rows(out) == whole.rounds[:1]
    happened("a file may not grow any more", f"{ended.said}; status {status(out)}; {goes_on(starter, out, whole)}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_disk_is_full_at_every_single_moment(starter: Starter, short: Bits, happened: Note) -> None:
    scenario = starter.scenario(SHORT)
    passed = moments(starter, starter.folder / "log", "run", scenario, "--out", starter.folder / "log")
    failed = 0
    for at, moment in enumerate(passed):
        if moment.split("\t")[0] not in CAN_FAIL:
            continue
        out = starter.folder / f"at-{at}"
        fail = {"root": out, "act": "full", "at": at}
        ended = starter.play("run", scenario, "--engine", "local", "--out", out, "--quiet", fail=fail)
        if status(out) == "finished":  # the last word was written; what failed came after it: the folder's fsync, or the report
            assert ended.code == 0 or moment == "before fsync\t.", (at, ended)
            assert Bits.of(out) == short
            continue
        said_so(ended)
        if (out / "scenario.toml").exists():
            failed += 1
            goes_on(starter, out, short)
    assert failed > 40
    happened("the disk is full at every single moment", "every time exit 1 with the reason; with room again a resume has the same bits")
