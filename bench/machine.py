"""What this machine is and can do: versions, memory of a process tree, measured matrix rate, arithmetic of a model."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

PACKAGES = ("fedtrust", "torch", "numpy", "flwr", "ray", "torchvision")
MIB = 1024**2


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, Any]:
    """Return versions, machine, threads, git state and command, for the JSON file."""
    return {
        "command": " ".join(["python", "-m", *_module_and_arguments()]),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain").splitlines()),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "memory_mib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB),
        "load_before": list(os.getloadavg()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _module_and_arguments() -> list[str]:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = Path(sys.argv[0]).stem if spec is None else spec.name.removesuffix(".__main__")
    return [name, *sys.argv[1:]]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def matrix_rate(device: str = "cpu", threads: int | None = None, dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """Return the best rate of a square matrix product, in FLOP/s.

    The best of many repetitions over a second: this is the limit that a share is taken of, so what disturbs it must not lower it.

    Args:
        device: `cpu` or `cuda`.
        threads: intra-op threads on the CPU; all of them if `None`.
        dtype: of the matrices; on a GPU, float32 is measured without TF32.
        size: rows and columns.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or cores())
    try:
        rng = torch.Generator().manual_seed(0)
        a, b = (torch.randn(size, size, generator=rng).to(device, dtype) for _ in range(2))
        out = torch.empty_like(a)
        end = time.perf_counter() + 1.0
        times = [seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(3)]
        while time.perf_counter() < end:
            times.append(seconds(lambda: torch.mm(a, b, out=out), device))
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / min(times)


def seconds(call: Callable[[], Any], device: str = "cpu") -> float:
    """Return how long a call takes, its work on a GPU included."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def step_flops(module: nn.Module, x: Tensor) -> int:
    """Return the floating-point operations of a forward and backward pass over `x` [b, *shape], without the gradient of `x` itself.

    Products and convolutions only (a multiplication and an addition are two), as torch counts them; activations, pooling, norms and the
    optimiser's arithmetic are left out, so a share of the matrix rate is on the low side.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        module(x).sum().backward()
    module.zero_grad()
    return int(counter.get_total_flops())


class Memory(NamedTuple):
    """A process's memory in bytes, read from /proc/PID/smaps_rollup.

    Attributes:
        all: its proportional set size: pages that several processes map (libraries, Ray's object store) are shared out between them, so
            that a sum over processes counts them once. Processes that are not summed take their part of a library's pages too.
        own: of that, anonymous memory: what the process has allocated itself.
        shared: of that, its part of shared memory, such as Ray's object store.
    """

    all: int = 0
    own: int = 0
    shared: int = 0


def memory_of(pid: int) -> Memory:
    """Return the memory of a process, nothing if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return Memory()
    found = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines) if key.startswith("Pss")}
    return Memory(found.get("Pss", 0), found.get("Pss_Anon", 0), found.get("Pss_Shmem", 0))


def tree_memory(root: int) -> dict[int, Memory]:
    """Return the memory of a process and of all its descendants, by process."""
    return {pid: memory_of(pid) for pid in _tree(root)}


def total_memory(root: int) -> int:
    """Return the memory of a process and all its descendants together, in bytes."""
    return sum(memory.all for memory in tree_memory(root).values())


def _tree(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            children.setdefault(_parent(entry), []).append(int(entry.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):  # it has just ended
        return -1


def command(pid: int) -> str:
    """Return a process's command line, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def available_memory() -> int:
    """Return how much memory can be taken without swapping, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


class Peak:
    """The largest memory of a process tree that was seen while it was watched, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    @property
    def mib(self) -> float:
        """The same in MiB."""
        return self.bytes / MIB


@contextmanager
def watching(root: int, every: float = 0.01) -> Iterator[Peak]:
    """Read the memory of a process tree every so many seconds while the block runs."""
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak.bytes = max(peak.bytes, total_memory(root))
            stop.wait(every)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.bytes = max(peak.bytes, total_memory(root))
