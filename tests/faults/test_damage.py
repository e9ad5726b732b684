"""Run directories that are damaged, finished, in use or half there."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrust.errors import InputError
from fedtrust.runs import RunDirectory

from .conftest import Note
from .kit import STATEFUL, Bits, Starter, files, status
from .table import DAMAGE


@pytest.fixture(scope="module")
def stopped(zygote: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its third commit."""
    starter = Starter(zygote, tmp_path_factory.mktemp("stopped"), "stopped")  # type: ignore[arg-type]
    out = starter.folder / "run"
    fail = {"root": out, "act": "kill", "file": "clients.jsonl", "moment": "half written", "nth": 4}
    ended = starter.play("run", starter.scenario(), "--engine", "local", "--out", out, "--quiet", fail=fail)
    assert ended.code == -signal.SIGKILL
    return out


@pytest.fixture
def out(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


HARM: dict[str, Callable[[Path], object]] = {
    "the checkpoint is empty": lambda out: cut(out / "checkpoint.safetensors", 0),
    "the checkpoint is cut in its head": lambda out: cut(out / "checkpoint.safetensors", 100),
    "the checkpoint lacks its last byte": lambda out: cut(out / "checkpoint.safetensors", -1),
    "a bit of the checkpoint's weights is flipped": lambda out: flip(out / "checkpoint.safetensors", -1),
    "the checkpoint is gone": lambda out: (out / "checkpoint.safetensors").unlink(),
    "the record of rounds is empty": lambda out: cut(out / "rounds.jsonl", 0),
    "the record of clients is gone": lambda out: (out / "clients.jsonl").unlink(),
    "a bit of the record of rounds is flipped": lambda out: flip(out / "rounds.jsonl", 40),
    "the status is not JSON": lambda out: cut(out / "status.json", 10),
    "the status is another JSON": lambda out: (out / "status.json").write_text("[]"),
    "the status says nothing": lambda out: (out / "status.json").write_text("{}"),
    "the environment is not JSON": lambda out: cut(out / "environment.json", 10),
    "the scenario is cut": lambda out: cut(out / "scenario.toml", 200),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(starter: Starter, out: Path, happened: Note, damage: str) -> None:
    HARM[damage](out)
    ended = starter.play("run", "--resume", out, "--engine", "local")
    assert ended.code == 2, ended
    assert not (out / "model.safetensors").exists()
    happened(damage, ended.said)


@pytest.mark.slow
def test_no_flipped_bit_of_a_checkpoint_goes_unseen(out: Path) -> None:
    path = out / "checkpoint.safetensors"
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good)
        flip(path, place)
        with pytest.raises(InputError, match="damaged"):
            RunDirectory(out).restore()
    path.write_bytes(good)
    assert RunDirectory(out).restore() is not None


def test_a_finished_run_is_left_alone(starter: Starter, happened: Note) -> None:
    scenario, out = starter.scenario(STATEFUL.replace("rounds = 4", "rounds = 1")), starter.folder / "run"
    assert starter.play("run", scenario, "--engine", "local", "--out", out).code == 0
    before = files(out)
    again = starter.play("run", scenario, "--engine", "local", "--out", out)
    resumed = starter.play("run", "--resume", out, "--engine", "local")
    assert (again.code, resumed.code) == (2, 2)
    assert files(out) == before
    happened("a finished run is played again into its folder", f"{again.said}; not a byte is changed")
    happened("a finished run is resumed", f"{resumed.said}; not a byte is changed")


def test_a_run_that_goes_on_is_not_resumed_beside_itself(starter: Starter, out: Path, whole: Bits, happened: Note) -> None:
    with RunDirectory(out).lock():
        before = files(out)
        second = starter.play("run", "--resume", out, "--engine", "local")
        assert second.code == 2
        assert files(out) == before
    assert starter.play("run", "--resume", out, "--engine", "local", "--quiet").code == 0
    assert Bits.of(out) == whole
    happened("a run is resumed while it is played", f"{second.said}; the first goes on undisturbed")


def test_a_folder_that_cannot_be_locked(starter: Starter, out: Path) -> None:
    (out / ".lock").unlink()
    (out / ".lock").mkdir()
    ended = starter.play("run", "--resume", out, "--engine", "local")
    assert (ended.code, "cannot be written" in ended.complaint) == (2, True)


def test_the_report_of_a_killed_run(starter: Starter, out: Path, happened: Note) -> None:
    assert not (out / "clients.jsonl").read_text().endswith("\n")
    ended = starter.play("report", out)
    assert (out / "report.html").exists() == (ended.code == 0)
    assert status(out) == "running"
    happened("a killed run is reported on", ended.said)
