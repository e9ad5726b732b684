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
#: Where control groups, and what belongs to users who are logged in, are found.
GROUPS, USERS = Path("/sys/fs/cgroup"), Path("/run/user")


def found() -> str:
    """Return how control groups can be used here, or why they cannot."""
    if _runtime():
        return "used: the user's session (systemd) delegates memory and pids; the whole sandbox has one limit"
    return "none: no user session of systemd that delegates memory and pids; each process has limits of its own"


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
    folder = GROUPS / "user.slice" / f"user-{os.getuid()}.slice" / f"user@{os.getuid()}.service"
    try:
        controllers = set((folder / "cgroup.controllers").read_text().split())
    except OSError:
        return None
    bus = USERS / f"{os.getuid()}" / "systemd" / "private"
    return program if program and {"memory", "pids"} <= controllers and bus.exists() else None
