"""What runs inside a sandbox: a trusted process that has imported torch once, and one child a game that plays the submission.

Nothing leaks from game to game: a game is a fresh fork of a process that has never seen a submission; when it ends everything that it
started is killed and what it wrote is wiped. The submission's process cannot reach this one: it may send no signals, this one's memory
and descriptors are closed to it (PR_SET_DUMPABLE), and this one's pipes to the host are not among its own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from fedtrust.classroom.sandbox import channel, seccomp

_STOPPED = 5.0


def serve(config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Play one game after another, as the host asks, until it closes the pipe.

    Args:
        config: what the launcher was given; `fds` names the pipes.
        facts: what the launcher found out; told to the host.
    """
    _warm()
    fds = config["fds"]
    config["address_space"] = _address_space(facts.pop("statm"))
    for name in ("orders", "events", "inward", "outward"):
        os.set_inheritable(fds[name], False)
    channel.write(fds["events"], channel.pack({"event": "ready", **facts, "address_space": config["address_space"]}))
    while True:
        order = channel.read(fds["orders"])
        if order is None:
            os._exit(0)
        if order.data["order"] == "game":
            _game(config)


def _warm() -> None:
    """Import what submissions use, and make torch compute on one thread, which a fork survives."""
    import numpy  # noqa: F401
    import torch

    from fedtrust.classroom.sandbox import player  # noqa: F401
    from fedtrust.registry import REGISTRY

    torch.set_num_threads(1)
    REGISTRY.load()
    # What torch sets up when it first computes is set up here, once: a game is charged for its own work alone.
    start = torch.ones(4, 4, requires_grad=True)
    torch.isfinite(torch.autograd.grad((start @ start).softmax(0).sum(), start)[0]).all()
    gc.collect()
    gc.freeze()


def _address_space(statm: int) -> int:
    """Return how many bytes of address space this process has, from a descriptor that was opened while /proc could be."""
    pages = int(os.pread(statm, 100, 0).split()[0])
    os.close(statm)
    return pages * resource.getpagesize()


def _game(config: dict[str, Any]) -> None:
    fds = config["fds"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        here.close()
        _play(config, there)
    there.close()
    watch = _Watch(config, child, here)
    how = watch.until_dead()
    channel.write(fds["events"], channel.pack({"event": "died", **how}))
    while not watch.ended:  # the host always says when it is done with a game
        order = channel.read(fds["orders"])
        if order is None:
            os._exit(0)
        watch.ended = order.data["order"] == "end"
    _clear(config)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}
    channel.write(fds["events"], channel.pack({"event": "ended", **cost, "peak": how["peak"], "refused": watch.refused}))


def _play(config: dict[str, Any], there: socket.socket) -> None:
    """Become the submission's process: give up what is left, and load nothing before that is done."""
    code = 1
    try:
        fds, limits = config["fds"], config["limits"]
        seccomp.die_with_parent()
        os.close(fds["orders"])
        os.close(fds["events"])
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        for which, most in _rlimits(config):
            resource.setrlimit(which, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))
        from fedtrust.classroom.sandbox import player

        if config.get("filtered", True):
            listener = seccomp.install()
            socket.send_fds(there, [b"l"], [listener])
            os.close(listener)
        there.close()
        player.play(fds["inward"], fds["outward"])
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def _rlimits(config: dict[str, Any]) -> list[tuple[int, int]]:
    limits = config["limits"]
    return [
        (resource.RLIMIT_AS, config["address_space"] + limits["memory"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ]


class _Watch:
    """Minds a submission's process from outside: counts what it is refused, kills it when the host is done with it."""

    def __init__(self, config: dict[str, Any], child: int, here: socket.socket) -> None:
        self._limits, self._fds, self._child = config["limits"], config["fds"], child
        self._names = seccomp.table()
        self.refused: dict[str, int] = {}
        self.ended = False
        self._listener: int | None = None
        if config.get("filtered", True):
            here.settimeout(60)
            try:
                _, fds, _, _ = socket.recv_fds(here, 1, 1)
                self._listener = fds[0] if fds else None
            except OSError:
                self._listener = None
            if self._listener is None:  # it never got so far as to load anything
                os.kill(child, signal.SIGKILL)
        here.close()

    def until_dead(self) -> dict[str, Any]:
        """Wait for the process to end, or end it; return how it ended."""
        gone = os.pidfd_open(self._child)
        poll = select.poll()
        for fd in (gone, self._fds["orders"], *([] if self._listener is None else [self._listener])):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, what in poll.poll() if what & (select.POLLIN | select.POLLHUP)}
            if gone in ready:
                break
            if self._listener in ready and self._listener is not None:
                self._refuse(poll)
            if self._fds["orders"] in ready:
                order = channel.read(self._fds["orders"])
                if order is None:
                    os._exit(0)  # the host is gone; this process's end ends all
                self.ended = True
                poll.unregister(self._fds["orders"])
                os.kill(self._child, signal.SIGKILL)
        os.close(gone)
        if self._listener is not None:
            os.close(self._listener)
        _, status, used = os.wait4(self._child, 0)
        return {
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
            "peak": used.ru_maxrss * 1024,
            "forbidden": sum(self.refused.values()) > self._limits["refused"],
            "refused": self.refused,
        }

    def _refuse(self, poll: select.poll) -> None:
        listener = self._listener
        name = None if listener is None else seccomp.refuse(listener, self._names)
        if name is None:  # whoever asked is gone: its end is told next
            time.sleep(0.001)
            return
        self.refused[name] = self.refused.get(name, 0) + 1
        if sum(self.refused.values()) > self._limits["refused"]:
            os.kill(self._child, signal.SIGKILL)


def _clear(config: dict[str, Any]) -> None:
    """Kill whatever a game has left behind, empty the pipe it did not read, and wipe what it wrote; or end, so that nothing is kept."""
    if not config["landlock"]:  # in a process namespace of our own; elsewhere the filter let it start nothing
        _kill_all()
    inward = config["fds"]["inward"]
    os.set_blocking(inward, False)
    try:
        while os.read(inward, 1 << 16):
            pass
    except BlockingIOError:
        pass
    os.set_blocking(inward, True)
    if config["scratch"]:
        _wipe(Path(config["scratch"]))


def _kill_all() -> None:
    """Kill every process of the sandbox but this one; orphans are this one's children (PR_SET_CHILD_SUBREAPER)."""
    until = time.monotonic() + _STOPPED
    while time.monotonic() < until:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            while True:
                os.wait4(-1, 0)
        except ChildProcessError:
            return
    os._exit(1)


def _wipe(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            os.chmod(entry.path, 0o700)
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
