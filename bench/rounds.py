"""Seconds a round of the same client work: fedtrust against Flower's own engine, a loop written by hand, and pfl where it is at hand.

    python -m bench [--clients 40 100 400 1000] [--model cnn|cnn-large|resnet18|resnet18-large-stem] [--rounds 5] [--no-flower]
        [--pfl PYTHON] [--json FILE]

Every contender runs in a process of its own. Flower's engine and pfl, which cannot be stepped, run first; the others play round by round
in turn. The first round is left out, the figures are medians, and after the timed rounds comes one more in which the memory is read.
Every contender trains on the same batches, and the table shows how far its model is in the end from that of the loop written by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import machine
from bench.contender import Contender, ContenderError, closing
from bench.options import Options, natural
from bench.work import Work, export

MODELS = {"cnn": (40, 100, 400, 1000), "cnn-large": (40,), "resnet18": (40,), "resnet18-large-stem": (40,)}
#: Samples a client; `None`: 4000 shared by all.
SAMPLES = {"cnn": None, "cnn-large": 20, "resnet18": 20, "resnet18-large-stem": 20}
TRAINING_SAMPLES = 4000
FLOWER, PURE, PFL = "Flower's engine", "pure loop, 1 thread", "pfl, 2 processes"


class Entry(NamedTuple):
    """A contender of fedtrust: how the table calls it, the path of training, the engine, its workers, the server's rule."""

    label: str
    path: str
    engine: str
    workers: int
    aggregator: str = "weighted-mean"
    overhead: bool = False
    precision: str = "float32"


def entries(workers: int, precision: str) -> list[Entry]:
    """Return fedtrust's contenders; `{}` in a label is the path that the engine chose."""
    threads = f"{workers} thread{'s' if workers > 1 else ''}"
    found = [
        Entry(f"fedtrust {{}}, {threads}", "auto", "local", workers, overhead=True),
        Entry("fedtrust {}, 2 Ray workers", "auto", "ray", 2, overhead=True),
        Entry(f"flwr:FedAvg, {{}}, {threads}", "auto", "local", workers, "flwr:FedAvg"),
        Entry(f"fedtrust vmap, {threads}", "vmap", "local", workers),
        Entry(f"fedtrust loop, {threads}", "loop", "local", workers),
    ]
    return [entry._replace(precision=precision) for entry in found]


class Row:
    """A contender's figures."""

    def __init__(self, contender: str, clients: int, workers: int, saved: Path) -> None:
        self.contender, self.clients, self.workers, self.saved = contender, clients, workers, saved
        self.times: list[float] = []
        self.alone: list[float] = []
        self.peak_mib = 0.0
        self.path = ""

    @property
    def seconds(self) -> float:
        """Median seconds of a round."""
        return statistics.median(self.times)

    @property
    def overhead(self) -> float | None:
        """How much longer a round takes than its training alone, as a share of that; the median over the rounds."""
        return statistics.median(t / a for t, a in zip(self.times, self.alone, strict=True)) - 1 if self.alone else None

    def facts(self, flower: Row | None, pure: Row | None, floor: float | None) -> dict[str, Any]:
        """Return what goes into the JSON file; `floor` is how long the round's arithmetic takes at the matrix rate."""
        same = None if pure is None else float(np.abs(np.load(self.saved) - np.load(pure.saved)).max())
        return {
            "contender": self.contender,
            "clients": self.clients,
            "workers": self.workers,
            "path": self.path,
            "seconds": self.seconds,
            "times": self.times,
            "against_flower": None if flower is None else flower.seconds / self.seconds,
            "against_pure": None if pure is None else pure.seconds / self.seconds,
            "peak_mib": round(self.peak_mib, 1),
            "difference": same,
            "training_alone": self.alone,
            "overhead": self.overhead,
            "share_of_matrix_rate": None if floor is None else floor / self.seconds,
        }


class Section:
    """The contenders at one number of clients."""

    def __init__(self, work: Work, rounds: int, folder: Path) -> None:
        self.work, self.rounds, self._folder = work, rounds, folder
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self.flops = self._numbered = 0
        self.interleaved = True

    def _arguments(self) -> list[str]:
        work = self.work
        samples = [] if work.samples is None else ["--samples", str(work.samples)]
        return ["--model", work.model, "--clients", str(work.clients), *samples]

    def _row(self, name: str, workers: int = 0) -> Row:
        self._numbered += 1
        return Row(name, self.work.clients, workers, self._folder / f"{self.work.clients}-{self._numbered}.npy")

    def flower(self) -> None:
        """Run Flower's own engine."""
        self._free_running(FLOWER, [sys.executable, "-m", "bench.flower_app", *self._arguments(), "--rounds", str(self.rounds + 2)])

    def pfl(self, python: str) -> None:
        """Run pfl with the interpreter of its own virtualenv."""
        export(self.work, self.rounds + 2, str(self._folder / "work.pt"))
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "bench.pfl_app"]
        self._free_running(PFL, [python, *run, str(self._folder / "work.pt")])

    def _free_running(self, name: str, command: list[str]) -> None:
        """Run a contender that plays at its own pace: a cold round, the timed ones, one for the memory."""
        row = self._row(name, 2)
        _progress(f"{self.work.clients} clients: {name}")
        contender = Contender(name, [*command, "--save", str(row.saved)])
        try:
            with closing(contender):
                contender.read()
                row.times = [contender.read()["seconds"] for _ in range(self.rounds)]
                with machine.watching(contender.pid, every=0.05) as peak:
                    contender.read()
                row.peak_mib = peak.mib
                contender.finish()
            self.rows.append(row)
        except ContenderError as error:
            self.failed.append(str(error))

    def stepped(self, workers: int, precision: str) -> None:
        """Have the loop and fedtrust's contenders play in turn, or one after the other where they would not fit into memory together."""
        planned = [Entry(PURE, "pure", "local", 1), *entries(workers, precision)]
        first, row = self._start(planned[0])
        size = first.ready["params"] * self.work.clients * 4
        self.flops = first.ready["flops"]
        self.interleaved = 3 * size * len(planned) < 0.6 * machine.available_memory()
        if self.interleaved:
            self._play([(first, row, planned[0]), *((*self._start(entry), entry) for entry in planned[1:])])
            return
        self._play([(first, row, planned[0])])
        for entry in planned[1:]:
            self._play([(*self._start(entry), entry)])

    def _start(self, entry: Entry) -> tuple[Contender, Row]:
        options = ["--engine", entry.engine, "--workers", str(entry.workers), "--aggregator", entry.aggregator]
        options += ["--precision", entry.precision]
        command = [sys.executable, "-m", "bench.contender", entry.path, *self._arguments(), *options]
        return Contender(entry.label.format(entry.path), command), self._row(entry.label, entry.workers)

    def _play(self, seats: list[tuple[Contender, Row, Entry]]) -> None:
        """Play the rounds; a contender that fails leaves, and the others go on."""
        with closing(*(contender for contender, _, _ in seats)):
            playing = self._new(self._each(seats, "getting ready", self._ready))
            for number in range(self.rounds + 1):
                playing = self._each(playing, f"round {number}" if number else "cold round", lambda *seat, n=number: self._round(n, *seat))
            playing = self._each(playing, "memory", self._memory)
            self.rows += [row for _, row, _ in playing]

    def _new(self, seats: list[tuple[Contender, Row, Entry]]) -> list[tuple[Contender, Row, Entry]]:
        """Leave out whoever does the same as another one: for some models the engine chooses `loop` or `vmap` by itself."""
        seen = {row.contender for row in self.rows}
        left = []
        for seat in seats:
            if seat[1].contender not in seen:
                seen.add(seat[1].contender)
                left.append(seat)
        return left

    def _each(self, seats: list[Any], what: str, turn: Any) -> list[Any]:
        left = []
        _progress(f"{self.work.clients} clients: {what}")
        for seat in seats:
            try:
                turn(*seat)
                left.append(seat)
            except ContenderError as error:
                self.failed.append(str(error))
        return left

    def _ready(self, contender: Contender, row: Row, entry: Entry) -> None:
        row.path = str(contender.ready["path"])
        row.contender = entry.label.format(row.path)

    def _round(self, number: int, contender: Contender, row: Row, entry: Entry) -> None:
        seconds = contender.ask("round")["seconds"]
        alone = contender.ask("pure")["seconds"] if entry.overhead else 0.0
        if number:  # the first one is cold
            row.times.append(seconds)
            row.alone += [alone] if entry.overhead else []

    def _memory(self, contender: Contender, row: Row, entry: Entry) -> None:
        with machine.watching(contender.pid) as peak:
            contender.ask("round")
        row.peak_mib = peak.mib
        contender.ask(f"save {row.saved}")

    def finish(self, rate: float) -> dict[str, Any]:
        """Return the section for the JSON file: the rows with their ratios and differences."""
        flower = next((row for row in self.rows if row.contender == FLOWER), None)
        pure = next((row for row in self.rows if row.contender == PURE), None)
        rows = [row.facts(flower, pure, self.flops / rate if self.flops else None) for row in self.rows]
        return {
            "clients": self.work.clients,
            "samples": self.work.samples or TRAINING_SAMPLES // self.work.clients,
            "flops": self.flops,
            "interleaved": self.interleaved,
            "rows": rows,
            "failed": self.failed,
        }


def _progress(text: str) -> None:
    """Say on a terminal's last line what is being done; nothing where standard error is a file."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text} …", end="", file=sys.stderr, flush=True)


def _line(row: dict[str, Any]) -> str:
    def ratio(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    cells = [f"{row['contender']:34}", f"{row['clients']:7d}", f"{row['seconds']:9.3f}", f"{ratio(row['against_flower']):>9}"]
    difference = "–" if row["difference"] is None else f"{row['difference']:.0e}"
    return " ".join([*cells, f"{ratio(row['against_pure']):>7}", f"{row['peak_mib']:9.0f}", f"{difference:>10}"])


def _remarks(section: dict[str, Any]) -> list[str]:
    """Return what the table has no column for: the share of the matrix rate and the engine's overhead."""
    lines = [f"  {section['flops'] / 1e9:.2f} GFLOP a round ({section['clients']} clients × {section['samples']} samples)"]
    for row in section["rows"]:
        if row["overhead"] is not None and row["share_of_matrix_rate"] is not None:
            lines.append(
                f"  {row['contender']}: {row['share_of_matrix_rate']:.0%} of the matrix rate on all threads; the round takes "
                f"{row['overhead']:+.1%} on top of its training alone ({statistics.median(row['training_alone']):.3f} s on as many threads)"
            )
    lines += [] if section["interleaved"] else ["  one after the other, not interleaved: together they would not fit into memory"]
    return lines + [f"  FAILED {why}" for why in section["failed"]]


def show(document: dict[str, Any]) -> None:
    """Print the table."""
    rates, host = document["matrix_rate"], document["machine"]
    print(
        f"{document['model']}, {document['precision']}; {host['processor']}, {host['cores']} cores; medians of {document['rounds']} rounds"
    )
    print(f"matrix rate, float32: {rates['one'] / 1e9:.0f} GFLOP/s on one thread, {rates['all'] / 1e9:.0f} on all {document['threads']}")
    print(f"{'contender':34} {'clients':>7} {'s/round':>9} {'× Flower':>9} {'× pure':>7} {'peak MiB':>9} {'difference':>10}")
    for section in document["sections"]:
        for row in section["rows"]:
            print(_line(row))
        print("\n".join(_remarks(section)))


def main() -> None:
    """Measure and print one table; exit 1 if a contender failed."""
    asked = _arguments()
    samples = SAMPLES[asked.model]
    rates = {"one": machine.matrix_rate(threads=1), "all": machine.matrix_rate()}
    facts = machine.facts()
    sections = []
    with tempfile.TemporaryDirectory() as folder:
        for clients in asked.clients:
            section = Section(Work(asked.model, clients, samples), asked.rounds, Path(folder))
            if not asked.no_flower:
                section.flower()
            if asked.pfl:
                section.pfl(asked.pfl)
            section.stepped(asked.workers, asked.precision)
            rates["all"] = max(rates["all"], machine.matrix_rate())
            sections.append(section)
        found = [section.finish(rates["all"]) for section in sections]
    _progress("")
    document = {
        "model": asked.model,
        "precision": asked.precision,
        "rounds": asked.rounds,
        "threads": machine.cores(),
        "machine": facts,
        "matrix_rate": rates,
    }
    document["sections"] = found
    show(document)
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(1 if any(section["failed"] for section in found) else 0)


def _arguments() -> argparse.Namespace:
    parser = Options("bench", __doc__)
    parser.add_argument("--clients", type=natural, nargs="+", help="clients a round (default: 40 100 400 1000; 40 for the large models)")
    parser.add_argument("--model", choices=list(MODELS), default="cnn")
    parser.add_argument("--rounds", type=natural, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--workers", type=natural, default=machine.cores(), help="threads of the local engine (default: one a core)")
    parser.add_argument("--no-flower", action="store_true", help="leave out Flower's own engine")
    parser.add_argument("--pfl", metavar="PYTHON", help="the interpreter of a virtualenv that has pfl[pytorch] 0.6.0")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="what fedtrust's clients multiply in")
    asked = parser.read()
    asked.clients = asked.clients or list(MODELS[asked.model])
    most = TRAINING_SAMPLES // (SAMPLES[asked.model] or 1)
    if max(asked.clients) > most:
        parser.error(f"--clients: at most {most} with {asked.model}, whose clients share {TRAINING_SAMPLES} samples")
    if asked.pfl and (any(n % 2 for n in asked.clients) or not Path(asked.pfl).is_file()):
        parser.error("--pfl: an interpreter's path; the clients are dealt to two processes, so their number must be even")
    return asked


if __name__ == "__main__":
    main()
