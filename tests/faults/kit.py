"""Runs as processes: started, struck, waited for, resumed and compared."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent
#: Seconds after which a process counts as hanging; far above what anything here takes.
HANGS = 60.0
#: Every process of a run carries this in its environment, and so do those that it starts.
MARK = "FEDTRUST_FAULT_TEST"

#: A run with a state in every place that a resume has to bring back.
STATEFUL = """
title = "to be struck"
rounds = 4
seed = 3
probes = ["accuracy", "detection"]
[data]
source = { name = "digits", limit = 300 }
partition = { kind = "dirichlet", alpha = 1.0 }
[model]
name = "logistic"
[clients]
count = 8
per_round = 6
train = { lr = 0.1, batch_size = 16, momentum = 0.9 }
[[attackers]]
behaviour = "sign-flip"
count = 2
[strategy]
filters = ["norm-clip"]
aggregator = "trimmed-mean"
steps = ["fedadam"]
assumed_malicious = 1
"""

#: The same, for what is done at every single moment.
SHORT = STATEFUL.replace("rounds = 4", "rounds = 2")
MATRIX = SHORT + '[sweep]\nstrategies = ["mean", "median"]\n'


def quickly(faults: Mapping[str, Any], *words: str) -> list[Any]:
    """Return the faults as parameters of a test; those in whose names none of the words stands are slow."""
    slow = [pytest.mark.slow]
    return [pytest.param(*(how if isinstance(how, tuple) else (how,)), id=fault, marks=[] if any(word in fault for word in words) else slow)
            for fault, how in faults.items()]  # fmt: skip


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: the signal that killed it) and what it said."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The exit code and the complaint, for the table."""
        return self.how + (f', "{self.complaint}"' if self.complaint else "")

    @property
    def how(self) -> str:
        """The exit code in words."""
        return f"exit {self.code}" if self.code >= 0 else f"killed by {signal.Signals(-self.code).name}"

    @property
    def complaint(self) -> str:
        """What stands on stderr, which must be one line; paths made short."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) <= 1, self.err
        words = (lines[0] if lines else "").split()
        return " ".join("RUN" + word[len(word.rstrip(":,)")) :] if word.startswith("/") else word for word in words)


class Playing:
    """A run that is going on in a process group of its own."""

    def __init__(self, pid: int, poll: Callable[[], int | None], out: Path, err: Path) -> None:
        self.pid, self._poll, self._out, self._err = pid, poll, out, err

    def wait(self, seconds: float = HANGS) -> Ended:
        """Return how it ended; one that does not end is killed, and the test fails."""
        end = time.monotonic() + seconds
        while (code := self._poll()) is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                while self._poll() is None:
                    time.sleep(0.01)
                raise AssertionError(f"hung for {seconds:g} s; it had said {self._read(self._out)!r} and {self._read(self._err)!r}")
            time.sleep(0.01)
        return Ended(code, self._read(self._out), self._read(self._err))

    def until(self, what: Callable[[], bool]) -> None:
        """Wait until something holds while the run goes on."""
        end = time.monotonic() + HANGS
        while not what():
            assert self._poll() is None, (self._read(self._out), self._read(self._err))
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.005)

    def still_runs(self, seconds: float) -> None:
        """Fail if it ends within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self._poll() is None, self._read(self._err)
            time.sleep(0.05)

    def signal(self, how: signal.Signals) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, how)

    @staticmethod
    def _read(path: Path) -> str:
        return path.read_text(errors="replace") if path.is_file() else ""


class Starter:
    """Starts `fedtrust` commands in a folder: forked from the zygote, or as `python -m fedtrust` from the beginning."""

    def __init__(self, zygote: subprocess.Popen[str], folder: Path, mark: str) -> None:
        self.folder, self._zygote, self._mark = folder, zygote, mark
        self._count = 0

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._zygote.stdin
        assert self._zygote.stdout
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        return json.loads(self._zygote.stdout.readline())

    def start(
        self,
        *argv: str | Path,
        fail: Mapping[str, Any] | None = None,
        out: str | None = "",
        ignore: Sequence[str] = (),
        limit: int | None = None,
    ) -> Playing:
        """Start a command in a fork of the zygote.

        Args:
            argv: the arguments of `fedtrust`.
            fail: a failpoint, see `failpoints.install`.
            out: where stdout goes; by default a file, `None`: it is closed.
            ignore: signals that it ignores from the beginning, as under nohup.
            limit: the largest size of a file that it may write, in bytes.
        """
        self._count += 1
        files = [self.folder / f"{stream}-{self._count}" for stream in ("out", "err")]
        request = {
            "argv": [str(a) for a in argv],
            "cwd": str(self.folder),
            "out": str(files[0]) if out == "" else out,
            "err": str(files[1]),
            "env": {MARK: self._mark},
            "fail": fail and {k: str(v) if isinstance(v, Path) else v for k, v in fail.items()},
            "ignore": list(ignore),
            "limit": limit,
        }
        pid = self._ask(request)
        return Playing(pid, lambda: self._ask({"poll": pid}), *files)

    def play(self, *argv: str | Path, **how: Any) -> Ended:
        """Start a command and wait for its end."""
        return self.start(*argv, **how).wait()

    def real(self, *argv: str | Path, env: Mapping[str, str] | None = None) -> Playing:
        """Start `python -m fedtrust` from nothing."""
        self._count += 1
        files = [self.folder / f"{stream}-{self._count}" for stream in ("out", "err")]
        with files[0].open("wb") as out, files[1].open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedtrust", *map(str, argv)],
                cwd=self.folder,
                env={**os.environ, MARK: self._mark, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return Playing(process.pid, process.poll, *files)

    def scenario(self, text: str = STATEFUL, name: str = "scenario") -> Path:
        """Write a scenario and return its file."""
        path = self.folder / f"{name}.toml"
        path.write_text(text)
        return path

    def left(self) -> list[int]:
        """Return the processes that this starter's commands have left behind, wherever they hang in the tree."""
        marked = f"{MARK}={self._mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                    if not zombie and marked in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:  # it has ended in the meantime, or is none of ours
                    continue
        return found

    def nothing_left(self, seconds: float = 15.0) -> None:
        """Fail if a process of this starter is still there; daemons that notice their end get a moment."""
        end = time.monotonic() + seconds
        while self.left():
            if time.monotonic() > end:
                names = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:120] for pid in self.left()]
                raise AssertionError(f"left behind: {names}")
            time.sleep(0.05)


def rows(folder: Path, name: str = "rounds.jsonl") -> list[dict[str, Any]]:
    """Return a record without its timings."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / name).read_text().splitlines()]


def status(folder: Path) -> str:
    """Return what the status file says; `none` if there is none."""
    path = folder / "status.json"
    return str(json.loads(path.read_text())["status"]) if path.exists() else "none"


class Bits(NamedTuple):
    """Everything of a finished run that must not depend on what happened on the way."""

    model: str
    rounds: list[dict[str, Any]]
    clients: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Bits:
        """Read a run directory."""
        summary = json.loads((folder / "summary.json").read_text())
        model = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert model == summary["model_sha256"]
        for times in (summary, summary.get("round_means", {})):  # how long it took is nobody's promise
            times.pop("seconds", None)
        summary.pop("repair_seconds", None)
        return cls(model, rows(folder), rows(folder, "clients.jsonl"), summary)


def files(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
