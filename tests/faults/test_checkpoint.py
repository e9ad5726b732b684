"""The driver dies at every moment of what it writes; the run goes on with the very bits it would have had."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import Note
from .kit import HERE, MATRIX, SHORT, Bits, Starter, files, quickly, status
from .table import COMMITS, EDGES


def struck(starter: Starter, **fail: Any) -> Path:
    """Play the stateful run until it is killed; return its folder."""
    out = starter.folder / "run"
    ended = starter.play("run", starter.scenario(), "--engine", "local", "--out", out, "--quiet", fail={"root": out, "act": "kill", **fail})
    assert ended.code == -signal.SIGKILL, ended
    return out


def resumed(starter: Starter, out: Path, whole: Bits) -> str:
    """Resume, compare with the undisturbed run and say how it went; a finished run is not touched."""
    before = files(out) if status(out) == "finished" else None
    ended = starter.play("run", "--resume", out, "--engine", "local", "--quiet")
    if before is None:
        assert (ended.code, ended.err) == (0, "")
    else:
        assert (ended.code, "this run is finished" in ended.err) == (2, True)
        assert files(out) == before
    assert Bits.of(out) == whole
    assert status(out) == "finished"
    return "resumed: exit 0, the same bits" if before is None else f"was finished, the same bits; a resume is refused: {ended.said}"


@pytest.mark.parametrize(("file", "moment"), quickly(COMMITS, "half written", "renaming"))
def test_killed_while_a_round_is_committed(starter: Starter, whole: Bits, happened: Note, file: str, moment: str) -> None:
    out = struck(starter, file=file, moment=moment, nth=3)
    assert status(out) == "running"
    happened(next(k for k, v in COMMITS.items() if v == (file, moment)), resumed(starter, out, whole))


@pytest.mark.parametrize(("file", "moment"), quickly(EDGES, "model", "status", "summary, half"))
def test_killed_at_the_beginning_or_the_end(starter: Starter, whole: Bits, happened: Note, file: str, moment: str) -> None:
    out = struck(starter, file=file, moment=moment)
    happened(next(k for k, v in EDGES.items() if v == (file, moment)), resumed(starter, out, whole))


def test_killed_before_there_is_a_scenario(starter: Starter, happened: Note) -> None:
    out = struck(starter, file="scenario.toml", moment="half written")
    ended = starter.play("run", "--resume", out, "--engine", "local")
    assert ended.code == 2
    happened("killed before its scenario is written", f"nothing was run; a resume is refused: {ended.said}")


PLUGIN = ("--engine", "local", "--quiet", "--allow-plugin", "faulty")
PLUGIN_MOMENTS = {
    "killed: the plugin, half written": ("faulty.py", "half written"),
    "killed: the scenario that wants a plugin, after renaming": ("scenario.toml", "after renaming"),
}


@pytest.mark.parametrize("fault", PLUGIN_MOMENTS)
def test_there_is_no_scenario_without_its_plugin(starter: Starter, happened: Note, fault: str) -> None:
    code = (HERE / "plugin.py").read_bytes()
    (starter.folder / "faulty.py").write_bytes(code)
    scenario = starter.scenario(SHORT.replace('"trimmed-mean"', '"faulty:faulty-rule"'))
    file, moment = PLUGIN_MOMENTS[fault]
    out, whole = starter.folder / "run", starter.folder / "whole"
    fail = {"root": out, "act": "kill", "file": file, "moment": moment}
    assert starter.play("run", scenario, *PLUGIN, "--out", out, fail=fail).code == -signal.SIGKILL
    if file == "faulty.py":
        assert not (out / file).exists()
        ended = starter.play("run", "--resume", out, *PLUGIN)
        assert ended.code == 2
        happened(fault, f"nothing was run; a resume is refused: {ended.said}")
        return
    assert (out / "faulty.py").read_bytes() == code
    for command in (("run", scenario, "--out", whole), ("run", "--resume", out)):
        ended = starter.play(*command, *PLUGIN)
        assert (ended.code, ended.err) == (0, "")
    assert Bits.of(out) == Bits.of(whole)
    happened(fault, "resumed: exit 0, the same bits")


@pytest.mark.parametrize("moment", ["before cutting", "after cutting"])
def test_killed_while_a_resume_cuts_the_records(starter: Starter, whole: Bits, happened: Note, moment: str) -> None:
    out = struck(starter, file="clients.jsonl", moment="after fsync", nth=3)
    ended = starter.play(
        "run", "--resume", out, "--engine", "local", fail={"root": out, "act": "kill", "file": "rounds.jsonl", "moment": moment}
    )
    assert ended.code == -signal.SIGKILL
    happened("killed while a resume cuts the records", resumed(starter, out, whole))


def moments(starter: Starter, out: Path, *argv: str | Path) -> list[str]:
    """Return the moments that a command passes, each as its word and its file."""
    log = starter.folder / "moments"
    assert starter.play(*argv, "--engine", "local", "--quiet", fail={"root": out, "act": "log", "log": log}).code == 0
    found = log.read_text().splitlines()
    log.unlink()
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_every_single_moment(starter: Starter, short: Bits, happened: Note) -> None:
    """Also at those that the table does not name, and the resume is killed a few moments later as well."""
    scenario = starter.scenario(SHORT)
    passed = moments(starter, starter.folder / "log", "run", scenario, "--out", starter.folder / "log")
    assert {moment.split("\t")[1] for moment in passed} >= {file for file, _ in (*COMMITS.values(), *EDGES.values())}
    begun = 0
    for at in range(len(passed)):
        out = starter.folder / f"at-{at}"
        fail = {"root": out, "act": "kill", "at": at}
        ended = starter.play("run", scenario, "--engine", "local", "--out", out, "--quiet", fail=fail)
        assert ended.code == -signal.SIGKILL, (at, ended)
        if not (out / "scenario.toml").exists():
            assert not begun
            continue
        begun += 1
        if status(out) != "finished":
            starter.play("run", "--resume", out, "--engine", "local", fail={**fail, "at": random.Random(at).randrange(40)})
        resumed(starter, out, short)
    assert begun > 80
    happened("killed at every single moment of everything a run writes", "every time resumed: exit 0, the same bits")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_sixty_random_moments(starter: Starter, happened: Note) -> None:
    """A run of a second or so; a kill may come before the first file or after the last."""
    text = starter.scenario().read_text().replace("rounds = 4", "rounds = 40")
    scenario = starter.scenario(text)
    began = time.monotonic()
    starter.play("run", scenario, "--engine", "local", "--out", "whole", "--quiet")
    lasted = time.monotonic() - began
    bits = Bits.of(starter.folder / "whole")
    rng = random.Random(60)
    killed = 0
    for number in range(60):
        out = starter.folder / f"run-{number}"
        playing = starter.start("run", scenario, "--engine", "local", "--out", out, "--quiet")
        time.sleep(rng.uniform(0.0, lasted))
        playing.signal(signal.SIGKILL)
        ended = playing.wait()
        assert ended.code in (0, -signal.SIGKILL)
        killed += ended.code != 0
        if not (out / "scenario.toml").exists():  # it had not begun
            assert starter.play("run", "--resume", out, "--engine", "local").code == 2
            continue
        resumed(starter, out, bits)
    assert killed >= 30
    happened("killed at sixty random moments", "every time resumed: exit 0, the same bits")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_matrix_killed_at_every_fifth_moment(starter: Starter, happened: Note) -> None:
    scenario = starter.scenario(MATRIX, "matrix")
    total = len(moments(starter, starter.folder / "whole", "run", scenario, "--out", starter.folder / "whole"))
    cells = sorted(p.name for p in (starter.folder / "whole" / "cells").iterdir())
    whole = [Bits.of(starter.folder / "whole" / "cells" / c) for c in cells]
    for at in range(0, total, 5):
        out = starter.folder / f"at-{at}"
        fail = {"root": out, "act": "kill", "at": at}
        ended = starter.play("run", scenario, "--engine", "local", "--out", out, "--quiet", fail=fail)
        assert ended.code == -signal.SIGKILL, (at, ended)
        if (out / "scenario.toml").exists() and status(out) != "finished":
            ended = starter.play("run", "--resume", out, "--engine", "local", "--quiet")
            assert (ended.code, ended.err) == (0, ""), at
            assert [Bits.of(out / "cells" / c) for c in cells] == whole
    happened("a matrix killed at any moment", "every time resumed cell by cell: exit 0, the same bits in every cell")
