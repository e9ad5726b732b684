"""The sandbox without namespaces: Landlock for files, the system-call filter for the rest, where a host refuses user namespaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedtrust.classroom.sandbox import cgroups, landlock, places
from fedtrust.classroom.sandbox.limits import Limits
from fedtrust.errors import RunError


class Landlock:
    """Files are read-only and few, and every system call that reaches beyond its own process is refused; it runs as the user himself.

    Started by root, it becomes nobody first; then the interpreter must lie where nobody may read it.
    """

    name = "landlock"
    holds = (
        "Landlock: reads the interpreter and the system's libraries, writes nothing at all; system-call filter: no network, processes, "
        "signals or shared memory; limits on memory, files, time. No namespaces: names of files outside can be asked for"
    )

    def settings(self) -> dict[str, Any]:
        """Return what the launcher has to know."""
        readable = [*places.system(), *places.programs(), *places.etc(), "/dev/urandom", "/proc/cpuinfo", "/sys/devices/system/cpu"]
        return {"landlock": True, "scratch": None, "readable": readable, "usable": ["/dev/null", "/dev/zero"]}

    def command(self, inner: Sequence[str], limits: Limits) -> list[str]:
        """Return the command that runs `inner`; the launcher confines itself.

        Raises:
            RunError: the kernel's Landlock is missing or too old.
        """
        found = landlock.version()
        if found < landlock.LEAST:
            raise RunError(
                f"Landlock version {found} of the kernel, needed is {landlock.LEAST} (Linux 6.2)"
                if found
                else "this kernel has no Landlock"
            )
        return [*cgroups.prefix(limits), *inner]
