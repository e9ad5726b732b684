"""A private place around every hostile test: a mount, process, IPC and network namespace of its own in which nothing of the machine can be
written to, so that a sandbox that fails harms nobody."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedtrust.classroom.sandbox import places
from fedtrust.classroom.sandbox.backends_bubblewrap import program

INSIDE = Path(__file__).with_name("inside.py")
SECONDS = 560


def command(inner: list[str], uid: int | None = None) -> list[str]:
    """Return the command that runs `inner` there; as root, `uid` makes it somebody else's."""
    bwrap = program()
    if bwrap is None:
        raise RuntimeError("bubblewrap is not installed, and no hostile submission is played without a namespace around it")
    home = os.path.expanduser("~")
    hidden = [path for path in ("/tmp", "/var/tmp", "/run", "/dev/shm", home) if os.path.isdir(path)]
    given = ["--ro-bind", "/", "/", "--dev", "/dev"]
    for path in hidden:
        given += ["--perms", "1777" if path.endswith(("tmp", "shm")) else "0755", "--tmpfs", path]
    kept = [
        path for path in (*places.programs(), str(Path(__file__).parents[3] / "tests")) if any(path.startswith(h + "/") for h in hidden)
    ]
    for folder in places.ancestors(kept):
        given += ["--perms", "0755", "--dir", folder] if any(folder.startswith(h + "/") for h in hidden) else []
    for path in kept:
        given += ["--ro-bind", path, path]
    if os.getuid() != 0:
        return [bwrap, "--die-with-parent", *given, "--unshare-pid", "--unshare-ipc", "--unshare-net", "--proc", "/proc", "--", *inner]
    # Root's bubblewrap covers parts of /proc, after which the kernel lets nobody mount a fresh one: unshare makes it.
    given += ["--bind", "/proc", "/proc", "--die-with-parent"]
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"] if uid else []
    lo = ["sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh"] if shutil.which("ip") else []
    return [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--net",
        "--ipc",
        *lo,
        bwrap,
        *given,
        "--",
        *become,
        *inner,
    ]


@functools.cache
def played(backend: str, filtered: bool, uid: int | None, cases: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Play the cases one after another in one sandbox, in a private place; return what was observed, by case.

    The key `""` holds what was seen of the sandbox itself; `skipped` there says why nothing could be played, `failed` what went wrong.
    """
    given = json.dumps({"backend": backend, "filtered": filtered, "cases": cases})
    around = {**places.environment(), "FEDTRUST_CANARY": "canary-of-the-environment", "HOME": os.path.expanduser("~")}
    inner = command([sys.executable, "-I", str(INSIDE), given], uid)
    try:
        done = subprocess.run(inner, capture_output=True, text=True, timeout=SECONDS, check=False, cwd="/", env=around)
    except subprocess.TimeoutExpired:  # once is enough
        return {"": {"failed": f"not done in {SECONDS} s"}}
    found: dict[str, dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            one = json.loads(line)
            found[one["case"]] = one
    if "" not in found:
        return {"": {"failed": f"nothing was played ({done.returncode}): {done.stderr[-2000:]}"}}
    found[""]["stderr"] = done.stderr[-2000:]
    return found
