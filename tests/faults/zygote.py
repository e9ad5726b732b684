"""A process that has imported fedtrust and forks a child for every command, so that hundreds of kills cost seconds.

A child is `python -m fedtrust ARGS` in all but its imports: a session of its own, standard streams of its own, `__main__` run by runpy, the
interpreter's own way out. Nothing is computed before the fork: a pool of threads would not survive it.

Requests and answers are lines of JSON. `{"poll": pid}` answers a child's exit code (negative: the signal), or null while it runs; anything
else starts a child, see `Starter.start`, and answers its process id.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import resource
import runpy
import signal
import sys
import threading
from typing import Any

import failpoints


def _preload() -> None:
    """Import what a run imports sooner or later."""
    import jinja2  # noqa: F401
    import sklearn.datasets
    import sklearn.datasets.data
    import sklearn.datasets.descr  # noqa: F401
    import torch.fx.experimental.symbolic_shapes  # noqa: F401 -- torch.func's vmap wants it

    from fedtrust import cli_run, console, report, runner, scenario, scenario_checks, scenario_data, scenario_toml  # noqa: F401
    from fedtrust.registry import REGISTRY
    from fedtrust.report import heat, load, matrix_page, render, run_page, verdict  # noqa: F401

    REGISTRY.load()


def _serve() -> dict[str, Any]:
    """Answer requests for ever; returns only in a child, with what it is to do."""
    answers = os.dup(1)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                os.close(answers)
                return dict(request)
        os.write(answers, (json.dumps(answer) + "\n").encode())
    os._exit(0)


def _become(request: dict[str, Any]) -> None:
    """Put on the streams, environment, signals and limits that were asked for."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: if the tests are killed, nobody is left behind
    for descriptor, (path, flags) in enumerate(
        ((os.devnull, os.O_RDONLY), (request["out"], os.O_WRONLY | os.O_CREAT), (request["err"], os.O_WRONLY | os.O_CREAT))
    ):
        if path is None:
            os.close(descriptor)
            continue
        # A terminal becomes the session's own only if it can be read as well.
        opened = os.open(path, os.O_RDWR if path.startswith("/dev/pts/") else flags, 0o644)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
    if request["out"] is None:
        sys.stdout = None  # as Python itself says that there is none
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for name in request["ignore"]:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))
    if request["fail"] is not None:
        failpoints.install(**request["fail"])


def _end(code: int) -> None:
    """End as Python does: join threads, run exit functions, flush (120 if that fails); only the modules are not taken apart.

    That would touch every page that is shared with the zygote, and cost more than the run.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120
    os._exit(code)


if __name__ == "__main__":
    _preload()
    gc.freeze()
    wanted = _serve()
    _become(wanted)
    sys.argv = ["fedtrust", *wanted["argv"]]
    code = 1
    try:
        runpy.run_module("fedtrust", run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = int(left.code or 0)
    _end(code)
