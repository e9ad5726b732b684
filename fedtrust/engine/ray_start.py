"""Bringing Ray up, or reaching a cluster: with explicit limits, and with one line when it cannot be."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedtrust.engine import threads
from fedtrust.errors import InputError

_MIB = 1024**2
#: What is no larger than this travels with a call, if Ray was started here; what is larger goes through the object store.
ALONG = 1 * _MIB
#: Ray refuses a smaller object store than this.
_LEAST = 80 * _MIB


class Room(NamedTuple):
    """Where the workers go: how many there are, what each asks Ray for, and the machines and GPUs they share."""

    workers: int
    options: dict[str, Any]
    nodes: int
    gpus: int


def import_ray() -> Any:
    """Return the module, without its noise."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that comes late must not start another Ray
    threads.one_heap()  # before Ray's own threads have theirs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.exceptions
    except ImportError as error:
        raise InputError(f"Ray cannot be imported: {error}", "--engine ray") from None
    return ray


def start(ray: Any, workers: int | None, address: str | None) -> None:
    """Start Ray on this machine, or join the cluster at an address.

    Raises:
        InputError: nothing answers there, or Ray does not start.
    """
    settings: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address:
        reachable(address)
        settings["address"] = address
    else:
        # As many CPUs as workers: Ray starts an idle process for each of them at once, and these become the workers.
        cpus = workers or torch.cuda.device_count() or threads.cores()
        settings |= {"address": "local", "include_dashboard": False, "num_cpus": cpus, "object_store_memory": store_size()}
        # By default Ray frees what nobody refers to once a second: a second's worth of updates would lie in the store. And what is
        # larger than 100 KB goes there, by way of another process, which costs more than to send up to a megabyte along.
        settings["_system_config"] = {"free_objects_batch_size": 1, "max_direct_call_object_size": ALONG}
    try:
        with warnings.catch_warnings(), _same_signals():
            warnings.simplefilter("ignore")  # Ray warns about its own dependencies
            ray.init(**settings)
            _hush(ray)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Ray did not start: {' '.join(str(error).split())[:200]}", "--ray-address" if address else "--engine ray"
        ) from None


@contextlib.contextmanager
def _same_signals() -> Iterator[None]:
    """Put back the handler of SIGTERM that Ray replaces, or it would end a run without a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _hush(ray: Any) -> None:
    """Keep Ray from printing what it thinks of dead workers into our output: who was dropped stands in the records."""
    with contextlib.suppress(AttributeError):  # it has no public switch; without this one it is only louder
        ray._private.worker._worker_logs_enabled = False


def reachable(address: str) -> None:
    """Refuse a cluster that nobody answers for: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and the like are Ray's to understand
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"nothing answers at {address}: {error}", "--ray-address") from None


def store_size(memory: Path = Path("/proc/meminfo"), shared: str = "/dev/shm") -> int:  # noqa: S108
    """Return the object store's size in bytes: a limit, of which only what is in use takes memory.

    A fifth of the memory that is free, for the samples (once) and what a round has under way; never more than nine tenths of what is
    free in shared memory, because Ray would go on in a much slower file beyond it.
    """
    size = 2048 * _MIB
    try:
        found = dict(line.split(":", 1) for line in memory.read_text().splitlines() if ":" in line)
        size = int(found["MemAvailable"].split()[0]) * 1024 // 5
    except (OSError, KeyError, ValueError):
        pass  # not Linux: Ray's own estimate would be larger than this
    try:
        room = os.statvfs(shared)
        size = min(size, room.f_bavail * room.f_frsize * 9 // 10)
    except OSError:
        pass
    return max(size, _LEAST)


def room(nodes: list[dict[str, Any]], workers: int | None) -> Room:
    """Find room for the workers on a cluster.

    One a GPU where there are any, else one a core; more workers than GPUs share them evenly. No worker's share reaches over two
    machines.

    Args:
        nodes: what `ray.nodes()` says.
        workers: how many are asked for.

    Raises:
        InputError: they do not fit.
    """
    alive = [node.get("Resources", {}) for node in nodes if node.get("Alive")]
    cores = [int(node.get("CPU", 0)) for node in alive]
    cards = [int(node.get("GPU", 0)) for node in alive]
    gpus = sum(cards)
    count = workers or (sum(min(pair) for pair in zip(cores, cards, strict=True)) if gpus else sum(cores)) or 1
    options: dict[str, Any] = {"num_cpus": 1.0, "scheduling_strategy": "SPREAD"}
    places = cores
    if gpus:
        sharers = -(-count // gpus)
        options["num_gpus"] = int(10_000 / sharers) / 10_000  # Ray counts in ten-thousandths
        places = [min(c, g * sharers) for c, g in zip(cores, cards, strict=True)]
    if sum(places) < count:
        has = f"{sum(cores)} CPUs" + (f" and {gpus} GPUs" if gpus else "") + (f" on {len(alive)} nodes" if len(alive) > 1 else "")
        raise InputError(f"the Ray cluster has {has}, room for {sum(places)} (got {count} workers)", "--workers")
    return Room(count, options, sum(p > 0 for p in places), gpus)
