"""A contender in a process of its own, that plays a round when it is told to.

The bench starts one such process a contender and has them play in turn: they are interleaved, none profits from another's settings
(malloc, threads, warm caches of the process), and the memory of each can be read. One JSON object a line each way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent


class ContenderError(Exception):
    """A contender could not be run; says why in one line."""


class Contender:
    """The bench's end: a process that answers a line with a line, and what it said beside that, kept out of the table."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._noise: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        environment = os.environ | {"PYTHONWARNINGS": "ignore", "RAY_DEDUP_LOGS": "0", "FLWR_TELEMETRY_ENABLED": "0"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._noise, start_new_session=True
        )

        self._ready: dict[str, Any] | None = None

    @property
    def ready(self) -> dict[str, Any]:
        """What it said when it had set itself up; waits until then."""
        if self._ready is None:
            self._ready = self.read()
        return self._ready

    @property
    def pid(self) -> int:
        """The process at the root of the contender's tree."""
        return self._process.pid

    def ask(self, order: str) -> dict[str, Any]:
        """Send a line and return the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(order.encode() + b"\n")
            self._process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            ContenderError: there is none, or it says what went wrong.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(f"{self.name}: ended with code {self._process.wait()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContenderError(f"{self.name}: {answer['error']}")
        return answer

    def finish(self) -> None:
        """Wait for the end of a contender that plays at its own pace.

        Raises:
            ContenderError: it did not end well.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait():
            raise ContenderError(f"{self.name}: ended with code {self._process.returncode}: {self._last_words()}")

    def _last_words(self) -> str:
        self._noise.seek(0)
        lines = [line for line in self._noise.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it said nothing"

    def close(self, patience: float = 20.0) -> None:
        """Let it end for so many seconds; whatever is then left of its process group is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._noise.close()


@contextlib.contextmanager
def closing(*contenders: Contender) -> Iterator[None]:
    """Close contenders when the block is done; at once where it was broken off."""
    try:
        yield
    except BaseException:
        for contender in contenders:
            contender.close(patience=0.0)
        raise
    for contender in contenders:
        contender.close()


def channel() -> IO[str]:
    """Return the process's standard output for answers, and send whatever else is printed to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def say(answers: IO[str], **what: Any) -> None:
    """Send one answer."""
    answers.write(json.dumps(what) + "\n")


def main() -> None:
    """Set the contender up, then do what the lines on standard input say: `round`, `pure` or `save FILE`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["pure", "loop", "vmap", "fused", "auto"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--engine", default="local")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--aggregator", default="weighted-mean")
    parser.add_argument("--precision", default="float32")
    asked = parser.parse_args()
    answers = channel()
    try:
        from bench import work  # here, so that an import that fails is told like everything else

        job = work.Work(asked.model, asked.clients, asked.samples)
        way = work.Way(asked.kind, asked.engine, asked.workers, asked.aggregator, asked.precision)
        player: Any = work.PureLoop(job) if asked.kind == "pure" else work.Player(job, way)
        try:
            path = work.path_of(player.world) if asked.kind == "auto" else asked.kind
            say(answers, path=path, flops=work.round_flops(player.world), params=player.world.layout.size)
            for line in sys.stdin:
                order, _, rest = line.strip().partition(" ")
                if order == "save":
                    work.save(player.params, rest)
                    say(answers)
                else:
                    say(answers, **getattr(player, order)())
        finally:
            player.close()
    except Exception as error:
        say(answers, error=f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
