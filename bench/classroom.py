"""A tournament of 20 attacks and 10 defences on `digits`, in the sandbox: how long it takes, and whether a killed one ends alike.

    python bench/classroom.py OUT [--attacks 20] [--defences 10] [--workers 2] [--kill [SECONDS]]

With --kill the tournament is played twice: once whole, once killed (SIGKILL) after so many seconds, or at a random moment of the time that
the whole one took, and gone on with. Leaderboard, marks and every student's page must be the same, byte by byte; if not it exits with 1.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ATTACKS = {
    "reverse": "    return (-{p} * updates.mean(0)).expand_as(updates).contiguous()",
    "shift": "    return (updates.mean(0) - {p} * updates.std(0)).expand_as(updates).contiguous()",
    "noise": "    return updates + {p} * updates.std() * torch.randn(updates.shape, generator=view.rng)",
    "own": "    return -{p} * updates",
}
DEFENCES = {
    "clip": (
        "    n = updates.norm(dim=1, keepdim=True).clamp(min=1e-12)\n    return (({p} * n.median() / n).clamp(max=1) * updates).mean(0)"
    ),
    "trim": "    k = max(1, int({p} * len(updates) / 6))\n    return updates.sort(0).values[k : len(updates) - k].mean(0)",
    "near": (
        "    far = torch.cdist(updates, updates).sum(1)\n    keep = far.argsort()[: max(1, int(len(updates) * (1 - {p} / 6)))]\n"
        "    return updates[keep].mean(0)"
    ),
}


def hand_in(folder: Path, attacks: int, defences: int) -> None:
    """Write that many different submissions."""
    for kinds, name, count, header in (
        (ATTACKS, "attack.py", attacks, "def craft(updates, view):"),
        (DEFENCES, "defence.py", defences, "def aggregate(updates, ctx):"),
    ):
        for number in range(count):
            kind = list(kinds)[number % len(kinds)]
            power = f"{0.5 + 0.5 * (number // len(kinds)):g}"
            target = folder / f"{kind}-{power}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f"import torch\n\n\n{header}\n{kinds[kind].format(p=power)}\n")


def play(arguments: list[str], kill: float | None = None) -> float:
    """Run the command line; return the seconds that it took."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "fedtrust", "tournament", "run", *arguments])
    try:
        process.wait(kill)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return time.monotonic() - began


def same(whole: Path, cut: Path) -> list[str]:
    """Return which files of two reports differ; times and processor seconds on students' pages are left out."""

    def told(report: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(report)): b"\n".join(line for line in path.read_bytes().splitlines() if b"_seconds" not in line)
            for path in sorted(report.rglob("*.*"))
        }

    one, other = told(whole / "report"), told(cut / "report")
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def main() -> None:
    """Play."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--attacks", type=int, default=20)
    parser.add_argument("--defences", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill", type=float, nargs="?", const=-1.0)
    given = parser.parse_args()
    from fedtrust.classroom import exercise

    given.out.mkdir(parents=True, exist_ok=True)
    text = exercise.find("break-the-median").read_text().replace('kind = "attack"', 'kind = "both"')
    (given.out / "exercise.toml").write_text(text)
    hand_in(given.out / "handed-in", given.attacks, given.defences)
    secret = given.out / "secret"
    secret.write_text("a bench's secret that need not be one")
    common = [str(given.out / "handed-in"), "--exercise", str(given.out / "exercise.toml"), "--seed-file", str(secret)]
    workers = ["--workers", str(given.workers)]
    whole = given.out / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    seconds = play([*common, "--out", str(whole), *workers])
    games = len((whole / "cells.jsonl").read_text().splitlines())
    result = {"attacks": given.attacks, "defences": given.defences, "games": games, "seconds": round(seconds, 1)}
    result["seconds_a_game"] = round(seconds / games, 3)
    if given.kill:
        kill = given.kill if given.kill > 0 else random.SystemRandom().uniform(0.05, 0.95) * seconds
        cut = given.out / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        play([*common, "--out", str(cut), *workers], kill)
        result["killed_after"] = round(kill, 1)
        result["games_before_the_kill"] = len((cut / "cells.jsonl").read_text().splitlines())
        play(["--resume", str(cut), *workers])
        differ = same(whole, cut)
        result |= {"same_leaderboard": not differ, "differ": differ[:10]}
    print(json.dumps(result))
    if result.get("differ"):
        sys.exit(1)


if __name__ == "__main__":
    main()
