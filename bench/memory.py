"""How much memory a run takes, and whether it grows.

    python -m bench.memory [--engine local|ray] [--only cohort|flat] [--clients N] [--rounds N] [--json FILE]

`cohort`: FedAvg with 10,000 clients a round, of one sample each, and the 1.2M-parameter CNN must stay below 4 GiB in all, measured as the
largest memory of the whole process tree at any time. `flat`: 1,000 clients × 100 rounds of the CNN must not grow after round 5: the memory
that the driver and the Ray workers allocated is read after every round. Both are whole runs (`fedtrust.runner.run`: probes, records,
checkpoints) in a process of their own. Exit 1 if one is over.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import machine
from bench.contender import Contender, ContenderError, channel, closing, say
from bench.options import Options, natural

LIMIT = 4 * 1024**3
#: What "no growth" allows: less than a tenth of a [d] vector of the CNN a round, over the hundred rounds.
GROWTH = 4 * machine.MIB
SETTLED = 5


def scenario(case: str, clients: int, rounds: int) -> dict[str, Any]:
    """Return the scenario of a case as a document."""
    source: Any = {"name": "bench-tiles", "copies": -(-clients // 4000)} if case == "cohort" else "mnist5k"
    return {
        "title": f"bench: {case}",
        "rounds": rounds,
        "data": {"source": source},
        "model": "cnn-large" if case == "cohort" else "cnn",
        "clients": {"count": clients, "train": {"lr": 0.05, "batch_size": 10}},
        "strategy": {"aggregator": "weighted-mean"},
    }


def play(case: str, clients: int, rounds: int, engine: str) -> None:
    """Play the run in this process; after every round say so and wait for a line before going on."""
    import bench.tiles  # noqa: F401  # registers the source
    from fedtrust.listener import SilentListener
    from fedtrust.runner import run
    from fedtrust.scenario import parse

    answers = channel()

    class Stepping(SilentListener):
        def round_done(self, name: str, record: Mapping[str, Any]) -> None:
            say(answers, round=record["round"], counted=record["counted"])
            sys.stdin.readline()

    with tempfile.TemporaryDirectory() as folder:
        result = run(parse(scenario(case, clients, rounds)), Path(folder) / "run", engine=engine, workers=2, listener=Stepping())
        say(answers, status=result.status, why=result.why, seconds=result.summary["seconds"])


class Watched:
    """A run that is played round by round in its own process."""

    def __init__(self, case: str, clients: int, rounds: int, engine: str) -> None:
        options = ["--clients", str(clients), "--rounds", str(rounds), "--engine", engine]
        self.contender = Contender(f"{case}, {engine}", [sys.executable, "-m", "bench.memory", "--play", case, *options])

    def rounds(self) -> Any:
        """Yield the number of each round when it is done, the run standing still meanwhile."""
        answer = self.contender.read()
        while "round" in answer:
            if not answer["counted"]:
                raise ContenderError(f"{self.contender.name}: round {answer['round']} did not count")
            yield answer["round"]
            answer = self.contender.ask("on")
        if answer["status"] != "finished":
            raise ContenderError(f"{self.contender.name}: {answer['status']}: {answer['why']}")


def cohort(clients: int, rounds: int, engine: str) -> dict[str, Any]:
    """Return the largest memory of a run with a large cohort and a large model."""
    watched = Watched("cohort", clients, rounds, engine)
    with closing(watched.contender), machine.watching(watched.contender.pid, every=0.05) as peak:
        for _ in watched.rounds():
            pass
    return {"case": "cohort", "clients": clients, "rounds": rounds, "engine": engine, "peak": peak.bytes, "ok": peak.bytes < LIMIT}


def flat(clients: int, rounds: int, engine: str) -> dict[str, Any]:
    """Return the memory after each round of a long run, by role, and how much it grew after it had settled."""
    watched = Watched("flat", clients, rounds, engine)
    series: dict[str, list[int]] = {"driver": [], "workers": [], "shared": []}
    with closing(watched.contender):
        for number in watched.rounds():
            if number:
                for role, size in _by_role(watched.contender.pid).items():
                    series[role].append(size)
    growth = {role: _growth(sizes) for role, sizes in series.items()}
    ok = all(size <= GROWTH for size in growth.values())
    return {"case": "flat", "clients": clients, "rounds": rounds, "engine": engine, "bytes": series, "growth": growth, "ok": ok}


def _by_role(root: int) -> dict[str, int]:
    """Return what the driver allocated, what the Ray workers did, and the shared memory of all (Ray's object store)."""
    tree = machine.tree_memory(root)
    titles = {pid: machine.command(pid) for pid in tree}
    return {
        "driver": tree[root].own,
        "workers": sum(tree[pid].own for pid, title in titles.items() if title.startswith("ray::") and "Agent" not in title),
        "shared": sum(memory.shared for memory in tree.values()),
    }


def _growth(sizes: list[int]) -> int:
    """Return by how much the last third of the rounds after the run has settled is above the first, by medians.

    A third, because memory goes up and down: what lies free between what is held is given back every few rounds.
    """
    rest = sizes[SETTLED:]
    window = max(1, len(rest) // 3)
    return int(statistics.median(rest[-window:]) - statistics.median(rest[:window]))


def verdict(found: dict[str, Any]) -> str:
    """Return a case's outcome in one line."""
    word = "ok" if found["ok"] else "OVER"
    what = f"{found['case']}: {found['clients']} clients × {found['rounds']} rounds, {found['engine']}"
    if found["case"] == "cohort":
        return f"{what}: peak {found['peak'] / 1024**3:.2f} GiB (limit {LIMIT / 1024**3:g} GiB): {word}"
    grown = ", ".join(
        f"{role} {found['bytes'][role][-1] / machine.MIB:.0f} MiB ({size / machine.MIB:+.1f})" for role, size in found["growth"].items()
    )
    return f"{what}: {grown} since round {SETTLED} (limit {GROWTH / machine.MIB:+g} MiB): {word}"


def main() -> None:
    """Play both cases, print a line each, and exit 1 if one is over."""
    parser = Options("bench.memory", __doc__)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--only", choices=["cohort", "flat"])
    parser.add_argument("--clients", type=natural, help="instead of 10000 and 1000")
    parser.add_argument("--rounds", type=natural, help="instead of 2 and 100")
    parser.add_argument("--play", choices=["cohort", "flat"], help=argparse.SUPPRESS)
    asked = parser.read()
    if asked.play:
        play(asked.play, asked.clients, asked.rounds, asked.engine)
        return
    if asked.only != "cohort" and asked.rounds is not None and asked.rounds < SETTLED + 2:
        parser.error(f"--rounds: growth is looked for after round {SETTLED}, so at least {SETTLED + 2}")
    cases = {"cohort": (cohort, 10_000, 2), "flat": (flat, 1000, 100)}
    found = []
    for name, (measure, clients, rounds) in cases.items():
        if asked.only in (None, name):
            try:
                found.append(measure(asked.clients or clients, asked.rounds or rounds, asked.engine))
            except ContenderError as error:
                sys.exit(f"FAILED {error}")
            print(verdict(found[-1]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine.facts(), "cases": found}, indent=1) + "\n")
    sys.exit(0 if all(case["ok"] for case in found) else 1)


if __name__ == "__main__":
    main()
