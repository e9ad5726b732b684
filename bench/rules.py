"""Server rules on one matrix of updates [n, d]: fedtrust's against those of others, seconds and memory side by side.

    python -m bench.rules [--n 400] [--d 1000000] [--repeats 3] [--rules median krum …] [--byzfl PYTHON] [--json FILE]

Each contender runs in a process of its own on the same matrix and as many threads, in turn with fedtrust's rule; the figures are medians.
A contender that would take minutes gets the first columns only, and so does fedtrust beside it: the table says how many. The extra memory
is the process's peak during the call beyond what it held before, as a share of the updates' own size. ByzFL 0.0.11 runs if this Python has
it, or under the interpreter of a virtualenv that does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import machine
from bench.contender import Contender, ContenderError
from bench.options import Options, natural
from fedtrust.engine import seeds


class Match(NamedTuple):
    """fedtrust's rule against another's.

    Attributes:
        rule: its name in fedtrust.
        library: whose, as `bench.rules_app` knows it.
        label: what it is called in the table.
        share: divides d for this match; what the other would take minutes for is done on less.
        iterations: of rules that iterate.
    """

    rule: str
    library: str
    label: str
    share: int = 1
    iterations: int = 10


MATCHES = (
    Match("median", "plain", "torch.sort"),
    Match("median", "byzfl", "ByzFL"),
    Match("median", "flower", "Flower's FedMedian", 10),
    Match("trimmed-mean", "plain", "torch.sort"),
    Match("trimmed-mean", "byzfl", "ByzFL"),
    Match("trimmed-mean", "flower", "Flower's FedTrimmedAvg", 10),
    Match("krum", "byzfl", "ByzFL"),
    Match("krum", "flower", "Flower's Krum"),
    Match("multi-krum", "byzfl", "ByzFL"),
    Match("multi-krum", "flower", "Flower's MultiKrum"),
    Match("bulyan", "flower", "Flower's Bulyan", 10),
    Match("geometric-median", "plain", "plain Weiszfeld, 10 iterations"),
    Match("geometric-median", "byzfl", "ByzFL, 3 iterations", 1, 3),
    Match("centered-clipping", "byzfl", "ByzFL"),
    Match("nnm", "byzfl", "ByzFL", 500),
)
RULES = tuple(dict.fromkeys(match.rule for match in MATCHES))


def matrix(path: Path, n: int, d: int) -> None:
    """Write the updates: normal around a common direction, a row at a time."""
    stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
    common = seeds.stream(0, "bench-rules", n).standard_normal(d, dtype=np.float32)
    for row in range(n):
        stored[row] = 0.5 * common + seeds.stream(0, "bench-rules", row).standard_normal(d, dtype=np.float32)
    stored.flush()


class Ring:
    """Where matches are held: the matrix, and how its contenders are started."""

    def __init__(self, path: Path, asked: argparse.Namespace) -> None:
        self._path, self._asked = path, asked

    def _start(self, library: str, match: Match) -> Contender:
        asked = self._asked
        python = asked.byzfl if library == "byzfl" else sys.executable
        options = {"columns": max(1, asked.d // match.share), "f": asked.f, "threads": asked.threads, "iterations": match.iterations}
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return Contender(f"{match.rule}, {library}", [python, "-m", "bench.rules_app", library, str(self._path), *flags])

    def hold(self, match: Match) -> dict[str, Any]:
        """Return the match's figures.

        Raises:
            ContenderError: one of the two could not be run.
        """
        pair = [self._start("fedtrust", match), self._start(match.library, match)]
        try:
            size = [contender.ready["bytes"] for contender in pair]
            turns = [[contender.ask(match.rule) for contender in pair] for _ in range(self._asked.repeats)]
        finally:
            for contender in pair:
                contender.close()
        row: dict[str, Any] = {"rule": match.rule, "contender": match.label, "columns": max(1, self._asked.d // match.share)}
        for side, bytes_, answers in zip(("ours", "theirs"), size, zip(*turns, strict=True), strict=True):
            row[side] = {
                "times": [a["seconds"] for a in answers],
                "seconds": statistics.median(a["seconds"] for a in answers),
                "processor": statistics.median(a["processor"] for a in answers),
                "extra": max(a["extra"] for a in answers) / bytes_,
            }
        row |= {f"ratio_{key}": row["theirs"][key] / row["ours"][key] for key in ("seconds", "processor")}
        return row


def heading(document: dict[str, Any]) -> None:
    """Print what stands above the rows."""
    host = document["machine"]
    print(f"n = {document['n']}, f = {document['f']}, float32; {host['processor']}; medians of {document['repeats']}")
    print(f"{document['threads']} threads; ratio: of seconds, and of the processor's seconds; memory: fedtrust's and theirs")
    heads = f"{'fedtrust s':>11} {'theirs s':>10} {'ratio':>7} {'CPU':>7} {'memory':>8} {'theirs':>8}"
    print(f"{'rule':18} {'contender':32} {'d':>9} {heads}", flush=True)


def show(row: dict[str, Any]) -> None:
    """Print a match as soon as it is over: the whole table takes a while."""
    ours, theirs = row["ours"], row["theirs"]
    cells = f"{row['rule']:18} {row['contender']:32} {row['columns']:9d} {ours['seconds']:11.3f} {theirs['seconds']:10.3f}"
    ratios = f"{row['ratio_seconds']:6.1f}× {row['ratio_processor']:6.1f}×"
    print(f"{cells} {ratios} {ours['extra']:8.1%} {theirs['extra']:8.0%}", flush=True)


def main() -> None:
    """Measure and print one table; exit 1 if a contender failed."""
    asked = _arguments()
    chosen = [m for m in MATCHES if m.rule in asked.rules and (asked.byzfl or m.library != "byzfl")]
    document: dict[str, Any] = {"machine": machine.facts(), "n": asked.n, "d": asked.d, "f": asked.f}
    document |= {"threads": asked.threads, "repeats": asked.repeats, "rows": [], "failed": [], "left_out": not asked.byzfl}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "updates.npy"
        matrix(path, asked.n, asked.d)
        ring = Ring(path, asked)
        heading(document)
        for match in chosen:
            try:
                document["rows"].append(ring.hold(match))
                show(document["rows"][-1])
            except ContenderError as error:
                document["failed"].append(str(error))
                print(f"FAILED {error}", flush=True)
    if document["left_out"]:
        print("ByzFL is not at hand (see --byzfl): left out")
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(1 if document["failed"] else 0)


def _arguments() -> argparse.Namespace:
    parser = Options("bench.rules", __doc__)
    parser.add_argument("--n", type=natural, default=400, help="updates (default: 400); a fifth of them is assumed malicious")
    parser.add_argument("--d", type=natural, default=1_000_000, help="parameters (default: 1000000)")
    parser.add_argument("--repeats", type=natural, default=3, help="calls of each contender (default: 3)")
    parser.add_argument("--threads", type=natural, default=machine.cores(), help="(default: one a core)")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help=f"of {', '.join(RULES)}")
    here = sys.executable if importlib.util.find_spec("byzfl") else None
    parser.add_argument("--byzfl", metavar="PYTHON", default=here, help="the interpreter of a virtualenv that has byzfl 0.0.11")
    asked = parser.read()
    if asked.n < 7:
        parser.error("--n: at least 7")
    if asked.byzfl and not Path(asked.byzfl).is_file():
        parser.error(f"--byzfl: there is no file {asked.byzfl}")
    asked.f = asked.n // 5
    return asked


if __name__ == "__main__":
    main()
