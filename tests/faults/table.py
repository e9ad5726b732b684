"""The faults: what, how it is provoked, what must happen. What did happen is found out by the tests and stands in docs/faults.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"


#: Stands in the document where no test has noted anything yet; an ordinary test fails then.
NOT_RUN = "not run"


class Fault(NamedTuple):
    """A row of the table."""

    group: str
    fault: str
    how: str
    must: str


class Happened(NamedTuple):
    """A row of the document."""

    how: str
    must: str
    happened: str


_MOMENTS = ("before writing", "half written", "after writing", "after fsync")
_FILES = {"checkpoint.safetensors": "the checkpoint", "rounds.jsonl": "the record of rounds", "clients.jsonl": "the record of clients"}

#: While the third commit is written: fault → file and moment.
COMMITS = {f"killed: {said}, {moment}": (file, moment) for file, said in _FILES.items() for moment in _MOMENTS}
COMMITS |= {f"killed: the checkpoint, {m}": ("checkpoint.safetensors", m) for m in ("before renaming", "after renaming")}

#: Files that are written once.
EDGES = {
    "killed: the first status, half written": ("status.json", "half written"),
    "killed: the environment, half written": ("environment.json", "half written"),
    "killed: the final model, half written": ("model.safetensors", "half written"),
    "killed: the final model, after renaming": ("model.safetensors", "after renaming"),
    "killed: the summary, half written": ("summary.json", "half written"),
    "killed: the summary, after renaming": ("summary.json", "after renaming"),
    "killed: the report, half written": ("report.html", "half written"),
}

#: Files on which the disk fills up.
FULL = {
    f"the disk fills up: {said}": file
    for file, said in {
        **_FILES, "status.json": "the status", "environment.json": "the environment", "model.safetensors": "the final model",
        "summary.json": "the summary",
    }.items()
}  # fmt: skip

#: What is done to a run that was killed in its fourth round, each with the way it is done.
DAMAGE = {
    "the checkpoint is empty": "cut to 0 bytes",
    "the checkpoint is cut in its head": "cut to 100 bytes",
    "the checkpoint lacks its last byte": "cut by 1 byte",
    "a bit of the checkpoint's weights is flipped": "the last byte; the same for every single byte in another test",
    "the checkpoint is gone": "the file is removed, the records are there",
    "the record of rounds is empty": "cut to 0 bytes",
    "the record of clients is gone": "the file is removed",
    "a bit of the record of rounds is flipped": "one byte in its first line",
    "the status is not JSON": "cut to 10 bytes",
    "the status is another JSON": "`[]`",
    "the status says nothing": "`{}`",
    "the environment is not JSON": "cut to 10 bytes",
    "the scenario is cut": "cut to 200 bytes",
}

#: The behaviour `malformed`'s faults.
MALFORMED = {
    "nan": "a reply holds a NaN",
    "inf": "a reply holds an infinity",
    "wrong-shape": "a parameter has another shape",
    "scalar": "a parameter has one element, which would broadcast",
    "missing-key": "a parameter is missing",
    "extra-key": "there is a parameter too many",
    "permuted-keys": "the parameters come in another order",
    "float64": "a parameter is float64",
    "huge-weight": "a client claims 1e12 samples",
    "negative-weight": "a client claims -1 samples",
    "no-reply": "a client returns None",
    "error": "a client raises where its reply is made",
}

#: How a behaviour's code goes wrong, in each of its hooks.
MISBEHAVES = {
    "raise": "a client's hook raises",
    "sys.exit": "a client's hook calls sys.exit(0)",
    "os._exit": "a client's hook calls os._exit(0), local",
    "memory": "a client's hook asks for more memory than there is",
    "recursion": "a client's hook recurses without end",
}

#: What happens to a Ray worker, and how.
WORKERS = {
    "a Ray worker is killed once": "a client sends SIGKILL to its process the first time it is trained",
    "a Ray worker is killed whenever it trains a client": "a client sends SIGKILL to its process",
    "a Ray worker hangs past its deadline": "a client sleeps for an hour; deadline 15 s",
    "a Ray worker dies of SIGSEGV": "a client reads address 0",
    "a Ray worker leaves with os._exit(0)": "a client calls it",
    "a Ray worker has not enough memory": "a client asks for 2^50 numbers",
}

PARTS = {
    part: f"the student's {part} raises, leaves, wants too much memory, recurses" for part in ("aggregator", "filter", "step", "probe")
}
HANGS = {part: f"a student's {part} hangs" for part in ("craft", "reply", "aggregator", "probe")}

_SAME = "a resume ends with exit 0 and the very bits of an undisturbed run"
_KILL = "SIGKILL to itself at this moment of the third round's commit"
_WRITING, _DISK, _DAMAGE = "The driver is killed while it writes", "The disk is full", "Damaged, finished, busy"
_SIGNALS, _CLIENTS, _SERVER, _STREAMS = "Signals", "Clients", "Rules and probes", "Standard output"
_ROOM = "exit 1 with the reason; with room again " + _SAME
_REFUSED = "a resume says what is wrong in one line and exits 2"
_LEFT = "out within five seconds with exit 130, checkpoint and status written, no process left"
_OUT = _LEFT + "; " + _SAME
_DROPPED = "the client is dropped by name, the others' round counts"
_WORKERS = "Ray workers"
_WORKER = "the guilty client costs its current round at most, by name; everybody and both workers are back in the next"
_FAILED = "exit 1, status failed, one line that names it"
_ON = "the run goes on and is not blamed"

FAULTS: tuple[Fault, ...] = (
    *(Fault(_WRITING, fault, _KILL, _SAME) for fault in COMMITS),
    *(Fault(_WRITING, fault, "SIGKILL to itself at this moment", _SAME + "; a finished run is left alone") for fault in EDGES),
    Fault(_WRITING, "killed before its scenario is written", "SIGKILL to itself at this moment", _REFUSED),
    Fault(_WRITING, "killed: the plugin, half written", "SIGKILL to itself at this moment", _REFUSED),
    Fault(_WRITING, "killed: the scenario that wants a plugin, after renaming", "SIGKILL to itself at this moment", _SAME),
    Fault(_WRITING, "killed while a resume cuts the records", "SIGKILL before and after the cut", _SAME),
    Fault(_WRITING, "killed at every single moment of everything a run writes", "one run a moment; the resume is killed as well", _SAME),
    Fault(_WRITING, "killed at sixty random moments", "SIGKILL from outside, moments drawn from a fixed seed", _SAME),
    Fault(_WRITING, "a matrix killed at any moment", "SIGKILL at every fifth moment of everything a matrix of two cells writes", _SAME),
    *(Fault(_DISK, fault, "ENOSPC from then on: at opening, in the middle of a write, at fsync", _ROOM) for fault in FULL),
    Fault(_DISK, "the disk is full when a run says why it failed", "a rule raises, ENOSPC at the status", "exit 1 with the first reason"),
    Fault(_DISK, "the disk is full when a run is interrupted", "SIGTERM, then ENOSPC at the status", "exit 130; " + _SAME),
    Fault(_DISK, "a file may not grow any more", "RLIMIT_FSIZE of 2500 bytes: the kernel refuses the checkpoint", _ROOM),
    Fault(_DISK, "the disk is full at every single moment", "ENOSPC from then on, one run a moment", _ROOM),
    *(Fault(_DAMAGE, fault, how, _REFUSED) for fault, how in DAMAGE.items()),
    Fault(_DAMAGE, "a finished run is played again into its folder", "`fedtrust run --out` the same folder", "refused, nothing is touched"),
    Fault(_DAMAGE, "a finished run is resumed", "`fedtrust run --resume`", "refused, nothing is touched"),
    Fault(_DAMAGE, "a run is resumed while it is played", "another process holds the folder's lock", "refused, nothing is touched"),
    Fault(_DAMAGE, "a killed run is reported on", "half a line stands at the end of a record", "a report of what is whole, or one line"),
    Fault(_SIGNALS, "Ctrl-C", "SIGINT to the process group of `python -m fedtrust`", _OUT),
    Fault(_SIGNALS, "SIGTERM", "to the process", _OUT),
    Fault(_SIGNALS, "SIGHUP", "to the process", _OUT),
    Fault(_SIGNALS, "SIGTERM while the summary is written", "to itself, the file half written", _OUT),
    Fault(_SIGNALS, "SIGHUP under nohup", "SIGHUP is ignored from the start", "it plays on"),
    Fault(_SIGNALS, "the terminal is closed", "the other end of a pseudo-terminal is closed: SIGHUP, and writes fail", _OUT),
    Fault(_SIGNALS, "Ctrl-C five times in a row", "SIGINT every 20 ms", _OUT),
    Fault(_SIGNALS, "Ctrl-C while a client hangs in `poison`", "it sleeps for an hour", _LEFT),
    Fault(_SIGNALS, "Ctrl-C while a client spins in `loss`", "it loops for ever", _LEFT),
    Fault(_SIGNALS, "Ctrl-C in a matrix", "SIGINT while cells are played", _OUT),
    *(Fault(_CLIENTS, fault, f'`malformed` with fault = "{key}"', _DROPPED) for key, fault in MALFORMED.items()),
    *(Fault(_CLIENTS, fault, "in `poison`, `loss`, `craft` and `reply`, a client each", _DROPPED) for fault in MISBEHAVES.values()),
    Fault(_CLIENTS, "`remember` raises, calls sys.exit(0) or os._exit(0)", "one run each", _FAILED),
    Fault(_CLIENTS, "a client hangs in `poison`, local", "it sleeps for an hour; deadline 5 s", _DROPPED),
    Fault(_CLIENTS, "a client spins in `loss`, local", "it loops for ever; deadline 5 s", _DROPPED),
    Fault(_CLIENTS, HANGS["craft"], "a coalition of two sleeps for an hour; deadline 4 s", _DROPPED),
    Fault(_CLIENTS, HANGS["reply"], "it sleeps for an hour; deadline 4 s", _DROPPED),
    Fault(_CLIENTS, "a client crashes the process, local", "it reads address 0", "no exit 0; the checkpoint stands"),
    *(Fault(_WORKERS, fault, how, _WORKER) for fault, how in WORKERS.items()),
    Fault(_WORKERS, "Ray's memory monitor kills a worker", "a client eats 3 GiB more than Ray's threshold allows", _WORKER),
    Fault(_WORKERS, "Ctrl-C with Ray", "SIGINT to the process group while a round is trained", _LEFT),
    Fault(_WORKERS, "the driver is killed with Ray", "SIGKILL while a round is trained", "no process left; a resume ends with exit 0"),
    *(Fault(_SERVER, fault, "ValueError, sys.exit(0), os._exit(0), 2^50 numbers, no end; a run each", _FAILED) for fault in PARTS.values()),
    *(Fault(_SERVER, HANGS[part], "it sleeps for an hour; deadline 4 s", _FAILED) for part in ("aggregator", "probe")),
    Fault(_STREAMS, "stdout is closed by its reader (`| head -1`)", "a pipe whose reader leaves; also with --quiet", _ON),
    Fault(_STREAMS, "stdout is full (`> /dev/full`)", "every write fails with ENOSPC; also with --quiet", _ON),
    Fault(_STREAMS, "there is no stdout (`>&-`)", "it is closed from the start; also with --quiet", _ON),
    Fault(_STREAMS, "stdout of `fedtrust list` is full", "every write fails with ENOSPC", "exit 1 with the reason"),
)

_HEAD = """# What a run survives

Every row is a test in `tests/faults/`, which provokes the fault in a real process and notes what happened. This page is written by
`make faults`; an ordinary test fails where page and table, or page and what happens, do not agree. RUN stands for the run directory.
"""


def _row(*cells: str) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |\n"


def text(happened: Mapping[str, str]) -> str:
    """Return the document."""
    parts = [_HEAD]
    for group in dict.fromkeys(row.group for row in FAULTS):
        parts.append(f"\n## {group}\n\n" + _row("fault", "how it is provoked", "what must happen", "what happened") + "|---|---|---|---|\n")
        parts += [_row(row.fault, row.how, row.must, happened.get(row.fault, NOT_RUN)) for row in FAULTS if row.group == group]
    return "".join(parts)


def documented(document: str | None = None) -> dict[str, Happened]:
    """Read the document back: fault → the rest of its row."""
    found = {}
    for line in (DOCUMENT.read_text(encoding="utf-8") if document is None else document).splitlines():
        cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[0] not in ("fault", "---"):
            found[cells[0]] = Happened(*cells[1:])
    return found
