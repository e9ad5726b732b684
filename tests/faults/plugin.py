"""A student's file with everything that can be wrong in it; the tests put it beside their scenarios as `faulty.py`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch

from fedtrust.client import Behaviour, behaviour
from fedtrust.probes.base import probe
from fedtrust.server import aggregator, server_filter, step


def go_wrong(how: str) -> None:
    """Do one of the things that code should not do."""
    match how:
        case "raise":
            raise ValueError("a student's bug")
        case "sys.exit":
            sys.exit(0)
        case "os._exit":
            os._exit(0)
        case "recursion":
            go_wrong(how)
        case "memory":
            torch.zeros(1 << 50)
        case "hang":
            time.sleep(3600)
        case "spin":
            while True:
                pass
        case "SIGKILL" | "SIGSEGV":
            os.kill(os.getpid(), getattr(signal, how))
        case "segfault":
            ctypes.string_at(0)
        case "eat":
            eaten = []
            while True:
                eaten.append(torch.ones(1 << 24))


@behaviour("faulty", role="malicious", broken=True)
class Faulty(Behaviour):
    """Go wrong in one hook, in one round or always, always or only the first time."""

    hook: str = "poison"
    how: str = "none"
    when: int = 0
    once: str = ""

    def _now(self, hook: str, round_number: int) -> None:
        if hook == self.hook and self.when in (0, round_number):
            if self.once:
                try:
                    Path(self.once).touch(exist_ok=False)
                except FileExistsError:
                    return
            go_wrong(self.how)

    def remember(self, size):
        self._now("remember", 0)
        return {}

    def poison(self, x, y, view):
        self._now("poison", view.round)
        return x, y

    def loss(self, predict, x, y, view):
        self._now("loss", view.round)
        return view.criterion(predict(x), y)

    def craft(self, updates, view):
        self._now("craft", view.round)
        return updates

    def reply(self, reply, view):
        self._now("reply", view.round)
        return reply


@behaviour("diary", role="honest")
class Diary(Behaviour):
    """Honest; leaves a note of which process trained in which round, takes its time, and waits for company of another process."""

    folder: str = ""
    seconds: float = 0.0
    company: float = 0.0

    def poison(self, x, y, view):
        Path(self.folder, f"{view.round}-{os.getpid()}").touch()
        time.sleep(self.seconds)
        end = time.monotonic() + self.company
        while time.monotonic() < end and len(list(Path(self.folder).glob(f"{view.round}-*"))) < 2:
            time.sleep(0.05)
        return x, y


@aggregator("faulty-rule")
def faulty_rule(updates, ctx, *, how: str = "none", when: int = 2):
    """The mean, until something goes wrong."""
    if ctx.round == when:
        go_wrong(how)
    return updates.mean(0)


@server_filter("faulty-filter")
def faulty_filter(updates, ctx, *, how: str = "none", when: int = 2):
    """Nothing, until something goes wrong."""
    if ctx.round == when:
        go_wrong(how)
    return updates


@step("faulty-step")
def faulty_step(delta, ctx, *, how: str = "none", when: int = 2):
    """Nothing, until something goes wrong."""
    if ctx.round == when:
        go_wrong(how)
    return delta


@probe("faulty-probe", role="teacher")
def faulty_probe(ctx, *, how: str = "none", when: int = 2):
    """Measure nothing, until something goes wrong."""
    if ctx.round == when:
        go_wrong(how)
    return {}
