"""Limits on all processes of a sandbox together, where the host delegates a control group (version 2) to us.

Most laptops do to a user's session (systemd), few containers do. What cannot be had is passed over; `found` says which.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fedtrust.classroom.sandbox.limits import MIB, Limits

#: What Python and torch themselves take, which counts in a group and not in a submission's limit.
BASE = 1024 * MIB


def found() -> str:
    """Return how control groups can be used here, or why they cannot."""
    return "systemd" if _runtime() else "none: no user session of systemd that delegates memory and pids"


def prefix(limits: Limits) -> list[str]:
    """Return what to put before a command so that it runs in a group with limits; nothing where none is to be had."""
    program = _runtime()
    if program is None:
        return []
    memory = limits.memory + limits.scratch + BASE
    given = [f"MemoryMax={memory}", "MemorySwapMax=0", f"TasksMax={limits.processes + 8}"]
    return [program, "--user", "--scope", "--quiet", "--collect", *(part for each in given for part in ("-p", each)), "--"]


def _runtime() -> str | None:
    """Return systemd-run if the user's session is managed by systemd and delegates both controllers."""
    program = shutil.which("systemd-run")
    folder = f"/sys/fs/cgroup/user.slice/user-{os.getuid()}.slice/user@{os.getuid()}.service"
    try:
        controllers = set(Path(folder, "cgroup.controllers").read_text().split())
    except OSError:
        return None
    bus = Path(f"/run/user/{os.getuid()}/systemd/private")
    return program if program and {"memory", "pids"} <= controllers and bus.exists() else None
