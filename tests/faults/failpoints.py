"""Failpoints without hooks in the product: what Python does to files below a folder is patched in the child, moment by moment.

A moment is a word and a file, such as ("half written", "checkpoint.safetensors"); a file that is written beside its place (`x.tmp`,
`.x.half`) counts as `x`, the folder itself as `.`. At the chosen moment the process dies as if the power went (SIGKILL: no handler, no
flush), is asked to leave (SIGTERM), or the disk is full from then on.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

#: Where a disk can be full: the other moments come after a step that went well.
CAN_FAIL = ("before opening", "before writing", "half written", "before fsync", "before renaming")


class _Points:
    """Counts the moments and strikes at the chosen one."""

    def __init__(self, root: str, act: str, at: int | None, moment: str | None, file: str | None, nth: int, log: str | None) -> None:
        self.root = os.path.realpath(root)
        self._act, self._at, self._wanted, self._nth = act, at, (moment, file), nth
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if log else None
        self._count, self._seen = 0, Counter[tuple[str, str]]()
        self._struck = False

    def name(self, path: Any) -> str | None:
        """Return how a path is called here, or nothing if it is none of the run's."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        full = os.path.realpath(os.fspath(path))
        if full != self.root and not full.startswith(self.root + os.sep):
            return None
        name = os.path.relpath(full, self.root).removesuffix(".tmp")
        return name.removesuffix(".half").removeprefix(".") if name.endswith(".half") else name

    def reach(self, moment: str, name: str) -> None:
        """Strike if this is the moment."""
        if self._log is not None:
            os.write(self._log, f"{moment}\t{name}\n".encode())
        number, self._count = self._count, self._count + 1
        self._seen[moment, name] += 1
        hit = number == self._at or ((moment, name) == self._wanted and self._seen[moment, name] == self._nth)
        if self._act == "kill" and hit:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        self._struck = self._struck or hit
        if "term" in self._act and hit:
            os.kill(os.getpid(), signal.SIGTERM)
        if "full" in self._act and self._struck and moment in CAN_FAIL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _File:
    """A file that passes every moment of a write."""

    def __init__(self, file: Any, name: str, points: _Points) -> None:
        self._file, self._name, self._points = file, name, points

    def __getattr__(self, key: str) -> Any:
        return getattr(self._file, key)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def write(self, data: Any) -> int:
        self._points.reach("before writing", self._name)
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._points.reach("half written", self._name)
        self._file.write(data[half:])
        self._file.flush()
        self._points.reach("after writing", self._name)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self._points.reach("before cutting", self._name)
        cut = int(self._file.truncate(size))
        self._points.reach("after cutting", self._name)
        return cut


def install(
    *, root: str, act: str, at: int | None = None, moment: str | None = None, file: str | None = None, nth: int = 1, log: str | None = None
) -> None:
    """Patch this process.

    Args:
        root: only what happens to files below this folder counts.
        act: `kill`, `term` (SIGTERM), `full` (ENOSPC from then on), `term, full` (both) or `log` (nothing).
        at: strike at the moment of this number, from 0.
        moment, file, nth: strike the n-th time that this moment of this file comes.
        log: write every moment as a line into this file.
    """
    points = _Points(root, act, at, moment, file, nth, log)
    plain_open, plain_fsync, plain_replace = io.open, os.fsync, os.replace

    def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        name = None if isinstance(path, int) or not set(mode) & set("wax+") else points.name(path)
        if name is None or Path(name).name == ".lock":
            return plain_open(path, mode, *rest, **options)
        points.reach("before opening", name)
        made = plain_open(path, mode, *rest, **options)
        points.reach("after opening", name)
        return _File(made, name, points)

    def fsync(descriptor: int) -> None:
        name = points.name(descriptor)
        if name is None:
            return plain_fsync(descriptor)
        points.reach("before fsync", name)
        plain_fsync(descriptor)
        points.reach("after fsync", name)
        return None

    def replace(source: Any, target: Any, **options: Any) -> None:
        name = points.name(target)
        if name is None:
            return plain_replace(source, target, **options)
        points.reach("before renaming", name)
        plain_replace(source, target, **options)
        points.reach("after renaming", name)
        return None

    builtins.open = io.open = opened  # type: ignore[assignment]
    os.fsync, os.replace = fsync, replace  # type: ignore[assignment]
