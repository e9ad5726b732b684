"""`fedtrust doctor`: what this machine has, and what a scenario would need."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedtrust.errors import FedTrustError

_PACKAGES = ("fedtrust", "torch", "torchvision", "flwr", "ray", "numpy", "llvmlite", "scikit-learn", "mlxtend", "pydantic", "typer", "rich")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
#: Local copies of a model that training one client holds at a time: parameters, gradients, momentum, and what autograd keeps.
_COPIES_TRAINING = 6
_CHUNK = 25


def report(scenario: Path | None, allow_plugins: Sequence[str], data_root: str | None) -> str:
    """Return the findings, as lines."""
    rows = [("python", f"{platform.python_version()} on {platform.platform()}"), *_hardware()]
    rows += [(package, _version(package)) for package in _PACKAGES]
    rows += [(f"import {name}", _imports(name)) for name in ("ray", "torchvision")]
    browser = next((b for b in _BROWSERS if shutil.which(b)), None)
    rows.append(("browser", f"{browser} (for the tests that open a report)" if browser else "no Chromium found; needed by some tests only"))
    rows += _sandboxes()
    root = data_root or os.environ.get("FEDTRUST_DATA")
    rows.append(("data root", root or "not set (--data-root or FEDTRUST_DATA)"))
    if scenario is not None:
        rows += _scenario(scenario, allow_plugins, data_root)
    width = max(len(key) for key, _ in rows) + 2
    return "\n".join(f"{key:{width}}{value}" for key, value in rows)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "NOT INSTALLED"


def _imports(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # a mismatched build raises all sorts of things
        return f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return "works"


def _hardware() -> list[tuple[str, str]]:
    import torch

    from fedtrust import memory
    from fedtrust.engine import threads
    from fedtrust.engine.fused import describe_native

    room = memory.free()
    rows = [("cores", str(threads.cores())), ("memory", _size(room) + " free" if room else "unknown"), ("kernels", describe_native())]
    count = torch.cuda.device_count()
    for index in range(count):
        rows.append((f"gpu {index}", f"{torch.cuda.get_device_name(index)}, {_size(torch.cuda.get_device_properties(index).total_memory)}"))
    return rows if count else [*rows, ("gpu", "none; everything runs on the CPU")]


def _size(count: float | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _sandboxes() -> list[tuple[str, str]]:
    """Return a line for each way to keep untrusted code in; each is tried."""
    from fedtrust.classroom.sandbox import backends

    return backends.doctor()


def _scenario(path: Path, allow_plugins: Sequence[str], data_root: str | None) -> list[tuple[str, str]]:
    from fedtrust import memory, scenario

    asked = scenario.load(path, allow_plugins=allow_plugins, data_root=data_root)
    facts = scenario.check(asked)
    try:
        parts = estimate(asked)
    except FedTrustError as error:
        return [("scenario", str(error))]
    total, free = sum(parts.values()), memory.free()
    said = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    fits = "" if free is None else (" (fits)" if total < free else " (MORE THAN IS FREE)")
    return [("scenario", fact) for fact in facts] + [("estimate", f"about {_size(total)}{fits}: {said}")]


def estimate(asked: object) -> dict[str, int]:
    """Return a rough number of bytes by what they are for; activations are left out, they depend on the model's shape."""
    import torch

    from fedtrust import matrix, memory
    from fedtrust.engine import threads, workers
    from fedtrust.scenario import Scenario
    from fedtrust.setup import build

    if not isinstance(asked, Scenario):
        raise TypeError("not a scenario")
    cells = asked.cells()
    setup = build(cells[0].scenario)
    size, cohort = setup.world.layout.size, asked.clients.cohort
    # Cells side by side share their samples; each has a server of its own.
    local = workers.pick("auto", cohort, None)[0] == "local"
    width = matrix.at_once(cells, torch.cuda.device_count() or threads.cores(), local=local)
    servers = "the server" if width == 1 else f"{width} servers (so many cells at once)"
    first = {cell.labels["strategies"]: cell for cell in reversed(cells)}.values()
    return {
        "python and libraries": 600 * 2**20,
        "data": 3 * memory.samples(setup.world),
        f"updates on {servers}": width * max(memory.server(build(cell.scenario), cohort) for cell in first),
        "training": _COPIES_TRAINING * min(_CHUNK, cohort) * threads.cores() * size * 4,
    }
