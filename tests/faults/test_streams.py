"""Nobody reads what a run prints, or there is no room for it: the run is none the worse for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .conftest import Note
from .kit import Bits, Ended, Starter


def well(ended: Ended, out: Path, whole: Bits) -> None:
    assert ended.code == 0, ended
    assert "a fault in fedtrust" not in ended.err
    assert "Traceback" not in ended.err
    assert Bits.of(out) == whole


@pytest.mark.parametrize("quiet", [False, True])
def test_a_reader_that_leaves(starter: Starter, whole: Bits, happened: Note, quiet: bool) -> None:
    """`fedtrust run … | head -1`."""
    pipe, out = starter.folder / "pipe", starter.folder / "run"
    os.mkfifo(pipe)
    playing = starter.start("run", starter.scenario(), "--engine", "local", "--out", out, *(["--quiet"] if quiet else []), out=str(pipe))
    with pipe.open() as reader:
        assert quiet or reader.readline().startswith("1 run")
    ended = playing.wait()
    well(ended, out, whole)
    happened("stdout is closed by its reader (`| head -1`)", f"{ended.said}; it plays on to the same bits")


@pytest.mark.parametrize("quiet", [False, True])
def test_stdout_is_full(starter: Starter, whole: Bits, happened: Note, quiet: bool) -> None:
    out = starter.folder / "run"
    ended = starter.play("run", starter.scenario(), "--engine", "local", "--out", out, *(["--quiet"] if quiet else []), out="/dev/full")
    well(ended, out, whole)
    happened("stdout is full (`> /dev/full`)", f"{ended.said}; it plays on to the same bits")


@pytest.mark.parametrize("quiet", [False, True])
def test_there_is_no_stdout(starter: Starter, whole: Bits, happened: Note, quiet: bool) -> None:
    out = starter.folder / "run"
    ended = starter.play("run", starter.scenario(), "--engine", "local", "--out", out, *(["--quiet"] if quiet else []), out=None)
    well(ended, out, whole)
    happened("there is no stdout (`>&-`)", f"{ended.said}; it plays on to the same bits")


def test_a_listing_that_cannot_be_written(starter: Starter, happened: Note) -> None:
    ended = starter.play("list", out="/dev/full")
    assert ended.code == 1
    assert "a fault in fedtrust" not in ended.err
    happened("stdout of `fedtrust list` is full", ended.said)
