"""Runs in the private place: sets out canaries, plays hostile submissions in a sandbox, and says what became of both, a JSON line a case.

What a sandbox must keep in or out is really there on this side: files, an environment, listening sockets, a process to be killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fedtrust.classroom.sandbox import backends
from fedtrust.classroom.sandbox.channel import Expect
from fedtrust.classroom.sandbox.faults import SubmissionFault
from fedtrust.classroom.sandbox.game import Answer
from fedtrust.classroom.sandbox.host import Sandbox
from fedtrust.classroom.sandbox.limits import MIB, Limits

HERE = Path(__file__).parent / "submissions"
CANARY = Path("/tmp/canary")
SECRET = "canary-of-the-"
LIMITS = Limits(memory=256 * MIB, processes=24, file_size=8 * MIB, scratch=16 * MIB, cpu_seconds=20, output=4096, refused=300)
#: Seconds of wall-clock time for those who would wait.
SHORT = {"sleep": 2.0}
#: Seconds of processor time for those who would go on; the others are to meet another limit, also where the first touch of memory is slow.
BRIEF = {"endless_loop": 1, "endless_import": 1}
BENIGN = "def perturb(x, y, query):\n    return query(x) + 1\n"


class Scorer:
    """What a walk through frames and garbage would be after."""

    def __init__(self) -> None:
        self.secret_labels = SECRET + "scorer"


class Canaries:
    """What is laid out for a submission to find, to reach or to kill."""

    def __init__(self) -> None:
        self.home = os.path.expanduser("~")
        for folder in (CANARY / "submissions/bob", Path(self.home)):
            folder.mkdir(parents=True, exist_ok=True)
        os.chmod(CANARY, 0o777)
        self._write(CANARY / "labels.txt", "labels")
        self._write(CANARY / "submissions/bob/attack.py", "submission")
        if os.access(self.home, os.W_OK):
            self._write(Path(self.home) / "secret.txt", "home")
        self.tcp, self.udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.unix = socket.socket(socket.AF_UNIX)
        self.tcp.bind(("0.0.0.0", 0))
        self.udp.bind(("0.0.0.0", 0))
        self.unix.bind("\0fedtrust-canary")
        self.tcp.listen()
        self.unix.listen()
        for one in (self.tcp, self.udp, self.unix):
            one.setblocking(False)
        self.signals = 0
        signal.signal(signal.SIGUSR1, self._signalled)
        self.victim = os.fork()
        if self.victim == 0:
            while True:
                time.sleep(60)
        self.before = self._tree()  # the last thing that is set up

    def _write(self, path: Path, what: str) -> None:
        path.write_text(SECRET + what)
        os.chmod(path, 0o666)

    def _signalled(self, *_: object) -> None:
        self.signals += 1

    def _tree(self) -> dict[str, tuple[int, int, int, int]]:
        found = {}
        # Of the home only what lies in it directly: an interpreter may be installed further down.
        for path in (CANARY, *CANARY.rglob("*"), *Path(self.home).iterdir(), *Path("/dev/shm").iterdir()):
            facts = path.lstat()
            found[str(path)] = (facts.st_mode, facts.st_size, int(facts.st_mtime), facts.st_uid)
        return found

    def substituted(self, source: str) -> str:
        """Return a submission that knows where everything is."""
        ports = {"TCP": self.tcp.getsockname()[1], "UDP": self.udp.getsockname()[1]}
        names: dict[str, Any] = {**ports, "HOME": self.home, "ADDRESS": "127.0.0.2", "PID": os.getpid(), "CANARY": self.victim}
        given = "; ".join(f"{name} = {value!r}" for name, value in names.items())
        return source.replace("\n\n", f"\n{given}\n", 1)  # the lines keep their numbers

    def touched(self) -> list[str]:
        """Return what somebody got hold of; an empty list if nothing."""
        found = []
        for name in ("tcp", "unix"):
            try:
                getattr(self, name).accept()[0].close()
                found.append(f"a connection over {name}")
            except BlockingIOError:
                pass
        try:
            self.udp.recv(100)
            found.append("a datagram")
        except BlockingIOError:
            pass
        if self.signals:
            found.append(f"{self.signals} signals")
        if os.waitpid(self.victim, os.WNOHANG) != (0, 0):
            found.append("the canary process is dead")
        now = self._tree()
        found += [f"changed: {path}" for path in sorted(now.keys() | self.before.keys()) if now.get(path) != self.before.get(path)]
        return found


def processes() -> dict[int, str]:
    """Return every process that can be seen, by number."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found[int(entry)] = Path(f"/proc/{entry}/comm").read_text().strip()
            except OSError:
                continue
    return found


def left_over(before: dict[int, str]) -> dict[int, str]:
    """Return what is still there that was not; what was killed may take a moment to be gone."""
    until = time.monotonic() + 10
    while left := {pid: comm for pid, comm in processes().items() if pid not in before}:
        if time.monotonic() > until:
            return left
        time.sleep(0.05)
    return {}


def reachable(canaries: Canaries) -> list[str]:
    """Return what a process outside a sandbox gets at: each canary can be touched, so that its silence means something."""
    port = canaries.tcp.getsockname()[1]
    socket.create_connection(("127.0.0.1", port), timeout=2).close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.sendto(b"x", ("127.0.0.1", canaries.udp.getsockname()[1]))
    with socket.socket(socket.AF_UNIX) as out:
        out.connect("\0fedtrust-canary")
    os.kill(os.getpid(), signal.SIGUSR1)
    (CANARY / "planted.txt").write_text("x")
    time.sleep(0.1)
    found = canaries.touched()
    (CANARY / "planted.txt").unlink()
    canaries.signals, canaries.before = 0, canaries._tree()
    return found


def play(sandbox: Sandbox, source: str, name: str) -> dict[str, Any]:
    """Play one submission for one call; return the fault and what was counted."""
    x = torch.linspace(0, 1, 32).reshape(4, 8)
    y = torch.zeros(4, dtype=torch.int64)
    answers = {
        "query": Answer(lambda t, d: {"output": t["x"]}, {"x": Expect((None, 8), most=800)}, 40, lambda t, d: len(t["x"]), "samples")
    }
    fault: SubmissionFault | None = None
    returned: list[float] = []
    game = None
    began = time.monotonic()
    try:
        game = sandbox.game(source, f"{name}.py", "evasion")
        told = game.call("perturb", {"eps": 0.1, "random": 1}, {"x": x, "y": y}, {"x": Expect((4, 8), called="its x")}, answers)[1]
        returned = told["x"].flatten().tolist()
    except SubmissionFault as error:
        fault = error
    report = sandbox.report if game is None else game.end()
    facts: dict[str, Any] = {"fault": fault.kind if fault else None, "sentence": fault.sentence if fault else "", "returned": returned}
    facts |= {
        "refused": report.refused,
        "output": report.output,
        "printed": report.printed,
        "cpu": report.cpu_seconds,
        "asked": report.asked,
    }
    return facts | {"seconds": round(time.monotonic() - began, 2)}


def main() -> None:
    asked = json.loads(sys.argv[1])
    finding = next(f for f in backends.available() if f.name == asked["backend"])
    if not finding.works:
        print(json.dumps({"case": "", "skipped": finding.why}))
        return
    canaries, scorer = Canaries(), Scorer()
    seen = reachable(canaries)
    sandbox = Sandbox(asked["backend"], LIMITS, filtered=asked["filtered"])
    sandbox.start()
    print(json.dumps({"case": "", "facts": sandbox.facts, "reachable": seen, "uid": os.getuid()}), flush=True)
    for name in asked["cases"]:
        sandbox.limits = dataclasses.replace(
            LIMITS, cpu_seconds=BRIEF.get(name, LIMITS.cpu_seconds), call_seconds=SHORT.get(name, 30.0), load_seconds=30.0
        )
        sandbox.start()
        before = processes()
        found = play(sandbox, canaries.substituted((HERE / f"{name}.py").read_text()), name)
        alive, restarted = sandbox.running, not sandbox.running
        left = left_over(before)
        again = play(
            sandbox, canaries.substituted((HERE / "remember_games.py").read_text()) if name == "remember_games" else BENIGN, "next"
        )
        said = json.dumps([found, again])
        found["leaked"] = [word for word in ("labels", "submission", "home", "environment", "scorer") if SECRET + word in said]
        found |= {"left": left, "touched": canaries.touched(), "next": again, "alive": alive, "restarted": restarted}
        print(json.dumps({"case": name, **found}), flush=True)
    sandbox.close()
    still = left_over(dict.fromkeys((1, os.getppid(), os.getpid(), canaries.victim), ""))
    print(json.dumps({"case": "closed", "still": still, "secret": len(scorer.secret_labels)}), flush=True)
    os.kill(canaries.victim, signal.SIGKILL)


if __name__ == "__main__":
    main()
