"""The first thing that runs inside a sandbox: trusted, small, and done before anything of a submission is there.

`python -I launcher.py '{"paths": […], …}'`: sets the limits that hold for all, confines itself where no namespace does (Landlock), and only
then imports Python's and torch's weight and hands over to the worker. Imports nothing but the standard library at the top.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def beside(name: str) -> ModuleType:
    """Return the module in a file beside this one, without importing the package around it."""
    spec = importlib.util.spec_from_file_location(f"_launcher_{name}", Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def confine(config: dict[str, Any]) -> dict[str, Any]:
    """Give up what no submission needs, for good; return what holds from now on."""
    seccomp = beside("seccomp")
    limits = config["limits"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"], limits["file_size"]))
    seccomp.reaper()
    seccomp.undumpable()
    facts: dict[str, Any] = {"statm": os.open("/proc/self/statm", os.O_RDONLY)}  # read by the worker, when this may no longer be opened
    if config["landlock"]:
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        seccomp.no_new_privileges()
        facts["landlock"] = beside("landlock").restrict(config["readable"], config["usable"])
        seccomp.undumpable()  # a change of user makes it dumpable or not, as the system is set
        seccomp.die_with_parent()
    else:
        # Only in a user namespace of its own are a user's processes counted there; elsewhere they are all that he runs.
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"], limits["processes"]))
    return facts | status()


def status() -> dict[str, Any]:
    """Return who this process is, from the kernel where it can be read."""
    known: dict[str, Any] = {"uid": os.getuid(), "gid": os.getgid()}
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return known
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return known | {
        name: fields[key].strip() for name, key in (("capabilities", "CapBnd"), ("effective", "CapEff"), ("no_new", "NoNewPrivs"))
    }


def main() -> None:
    """Confine this process and become the worker, or (with `probe`) say how it went and end."""
    config = json.loads(sys.argv[1])
    facts = confine(config)
    sys.path[:] = config["paths"]
    if config.get("probe"):
        missing = [name for name in ("statistics", "torch", "fedtrust") if importlib.util.find_spec(name) is None]
        if missing:
            raise SystemExit(f"inside, the module {missing[0]} cannot be read: it lies where only its owner may look")
        listener = beside("seccomp").install()
        os.close(listener)
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    from fedtrust.classroom.sandbox import worker

    worker.serve(config, facts)


if __name__ == "__main__":
    main()
