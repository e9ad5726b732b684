"""How long it takes from `fedtrust run` to the first round's record, and what the imports cost.

    python -m bench.startup [--engine local ray] [--repeat 3] [--json FILE]

A small scenario (1000 digits, 10 clients) is played as a user would, and the time is taken from the start of the process until the line
of round 1 stands in rounds.jsonl: at most 6 s with `local`, 12 s with `ray`. Every import is timed in a process of its own, from nothing,
so the packages that others bring along are counted again. Medians; exit 1 if one is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import machine
from bench.contender import ROOT
from bench.options import Options, natural

LIMITS = {"local": 6.0, "ray": 12.0}
IMPORTS = (
    "numpy", "pydantic", "torch", "torchvision", "flwr.serverapp", "ray", "sklearn.datasets", "mlxtend.data", "rich.live", "typer",
    "fedtrust.cli", "fedtrust.scenario", "fedtrust.runner",
)  # fmt: skip
PATIENCE = 120.0

SCENARIO = """title = "bench: start"
rounds = 2
[data]
source = { name = "mnist5k", limit = 1000 }
[model]
name = "cnn"
[clients]
count = 10
[strategy]
aggregator = "weighted-mean"
"""


class StartError(Exception):
    """A run did not get to its first round; says why in one line."""


def first_round(engine: str) -> float:
    """Return the seconds from the start of `fedtrust run` to the record of its first round."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as noise:
        scenario, out = Path(folder) / "start.toml", Path(folder) / "run"
        scenario.write_text(SCENARIO)
        command = [sys.executable, "-m", "fedtrust", "run", str(scenario), "--engine", engine, "--out", str(out)]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=noise, stderr=noise, start_new_session=True)
        try:
            while not _has_round(out / "rounds.jsonl"):
                if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                    noise.seek(0)
                    said = noise.read().decode(errors="replace").strip().splitlines() or ["nothing"]
                    raise StartError(f"fedtrust run --engine {engine}: no round after {time.perf_counter() - began:.0f} s: {said[-1]}")
                time.sleep(0.01)
            seconds = time.perf_counter() - began
            process.wait(timeout=PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return seconds


def _has_round(records: Path) -> bool:
    try:
        lines = records.read_text().splitlines(keepends=True)
    except OSError:
        return False
    return any(line.endswith("\n") and json.loads(line)["round"] == 1 for line in lines)


def import_seconds(module: str) -> float:
    """Return how long a module takes to import in a fresh interpreter."""
    code = f"import time; began = time.perf_counter(); import {module}; print(time.perf_counter() - began)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if done.returncode:
        raise StartError(f"import {module}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure, print a line each, and exit 1 if a start is over its limit."""
    parser = Options("bench.startup", __doc__)
    parser.add_argument("--engine", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--repeat", type=natural, default=3, help="repetitions (default: 3)")
    asked = parser.read()
    try:
        imports = {module: [import_seconds(module) for _ in range(asked.repeat)] for module in IMPORTS}
        starts = {engine: [first_round(engine) for _ in range(asked.repeat)] for engine in asked.engine}
    except StartError as error:
        sys.exit(f"FAILED {error}")
    found: dict[str, Any] = {"machine": machine.facts(), "imports": imports, "starts": starts}
    for module, times in imports.items():
        print(f"import {module:20} {statistics.median(times):6.2f} s")
    ok = True
    for engine, times in starts.items():
        seconds = statistics.median(times)
        ok &= seconds <= LIMITS[engine]
        word = "ok" if seconds <= LIMITS[engine] else "OVER"
        print(f"fedtrust run --engine {engine}: first round after {seconds:.1f} s (limit {LIMITS[engine]:g} s): {word}")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
