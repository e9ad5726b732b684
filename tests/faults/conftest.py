"""A zygote for the session, and the book in which every test writes what happened."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import kit, table

#: `make faults` sets it: docs/faults.md is written from what happened, in place of being compared with it.
WRITING = bool(os.environ.get("FEDTRUST_WRITE_FAULTS"))
_HAPPENED: dict[str, str] = {}

Note = Callable[[str, str], None]


@pytest.fixture
def happened() -> Note:
    """Note what happened to a fault of the table; it must be what docs/faults.md says."""

    def note(fault: str, what: str) -> None:
        assert fault in {row.fault for row in table.FAULTS}, f"no row for '{fault}'"
        _HAPPENED[fault] = what
        if not WRITING:
            assert table.documented()[fault].happened == what, "docs/faults.md says otherwise; if this is right: make faults"

    return note


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if WRITING:
        before = {fault: row.happened for fault, row in table.documented().items()} if table.DOCUMENT.exists() else {}
        table.DOCUMENT.write_text(table.text({**before, **_HAPPENED}), encoding="utf-8")


@pytest.fixture(scope="session")
def zygote() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(kit.HERE / "zygote.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if k != "FEDTRUST_DATA"},
    )
    yield process
    assert process.stdin
    process.stdin.close()
    process.wait(timeout=30)
    assert process.stdout
    process.stdout.close()


@pytest.fixture
def starter(zygote: subprocess.Popen[str], tmp_path: Path) -> Iterator[kit.Starter]:
    """Starts runs in the test's own folder, and sees that none of their processes stays."""
    made = kit.Starter(zygote, tmp_path, uuid.uuid4().hex)
    yield made
    made.nothing_left()


def _undisturbed(zygote: subprocess.Popen[str], folder: Path, scenario: str) -> kit.Bits:
    made = kit.Starter(zygote, folder, "whole")
    ended = made.play("run", made.scenario(scenario), "--engine", "local", "--out", "run", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    return kit.Bits.of(made.folder / "run")


@pytest.fixture(scope="session")
def whole(zygote: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> kit.Bits:
    """The bits of the stateful run when nothing happens to it."""
    return _undisturbed(zygote, tmp_path_factory.mktemp("whole"), kit.STATEFUL)


@pytest.fixture(scope="session")
def short(zygote: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> kit.Bits:
    """The bits of its short form."""
    return _undisturbed(zygote, tmp_path_factory.mktemp("short"), kit.SHORT)
