"""Waiting for what comes over a sandbox's pipes: every wait has an end, and nothing is read blindly."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Mapping
from typing import Any

from fedtrust.classroom.sandbox.channel import Assembler

_EVENT_BYTES = 1 << 16
_CHUNK = 1 << 16


class Wait:
    """What comes over a sandbox's pipes while the host waits; every wait has an end."""

    def __init__(self, pipes: Mapping[str, int], until: float, keep: int) -> None:
        self.pipes, self.until, self._keep = pipes, until, keep
        self.output = bytearray()
        self.printed = 0
        self._events = Assembler(_EVENT_BYTES)
        self.died: dict[str, Any] | None = None
        self.closed = False

    def for_event(self, name: str) -> dict[str, Any] | None:
        """Return the next event of that name from the trusted process inside; `None` if it is gone or the time is up."""
        while not self.closed and time.monotonic() < self.until:
            for name_ready in self.ready({"events": selectors.EVENT_READ, "printed": selectors.EVENT_READ}):
                if name_ready == "printed":
                    self.take_output()
                elif (event := self.event()) and event["event"] == name:
                    return event
        return None

    def ready(self, wanted: Mapping[str, int]) -> list[str]:
        """Return which of the pipes are ready for what is wanted of them, within the time that is left."""
        with selectors.DefaultSelector() as selector:
            for name, mask in wanted.items():
                selector.register(self.pipes[name], mask, name)
            return [key.data for key, _ in selector.select(max(0.0, min(self.until - time.monotonic(), 3600.0)))]

    def take_output(self) -> None:
        """Take in what was printed; the beginning is kept, all of it is counted."""
        chunk = read(self.pipes["printed"])
        if not chunk:
            self.closed = self.closed or chunk == b""
            return
        self.printed += len(chunk)
        self.output += chunk[: max(0, self._keep - len(self.output))]

    def event(self) -> dict[str, Any] | None:
        """Return the next event of the trusted process inside, if there is one."""
        # One frame at a time: the trusted process writes each in one piece, smaller than a pipe guarantees to keep whole.
        head = read(self.pipes["events"], 16)
        if not head:
            self.closed = self.closed or head == b""
            return None
        frame = self._events.feed(head)
        while frame is None:
            chunk = read(self.pipes["events"], 16 if len(head) < 16 else _missing(head))
            if chunk is None:
                time.sleep(0.001)
                continue
            if not chunk:
                self.closed = True
                return None
            frame = self._events.feed(chunk)
        if frame.data["event"] == "died":
            self.died = frame.data
        return frame.data


def _missing(head: bytes) -> int:
    return int.from_bytes(head[4:8], "big") + int.from_bytes(head[8:16], "big")


def read(fd: int, most: int = _CHUNK) -> bytes | None:
    """Return what lies in a pipe: `None` if nothing does, `b""` at its end."""
    try:
        return os.read(fd, most)
    except BlockingIOError:
        return None
    except OSError:
        return b""
