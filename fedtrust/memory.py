"""How much memory there is, and what a run asks for."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fedtrust.engine.world import World
from fedtrust.setup import Setup
from fedtrust.strategy import FedTrustStrategy

#: Copies of the round's updates [n, d] that one run's server holds: the updates, their stack, and a rule's own work.
COPIES_SERVER = 4
#: Vectors [d] that it holds in any case: the model before and after, the change, the checkpoint, partial sums.
VECTORS_SERVER = 12
#: Where the kernel says what a container may use, and what it uses (control groups, version 2).
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def free() -> int | None:
    """Return the bytes of memory that are free for a new process, or `None` where the system does not say."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # `max`: no limit
        found.append(max(0, int(_LIMIT.read_text()) - int(_USED.read_text())))
    return min(found) if found else None


def samples(world: World) -> int:
    """Return the bytes of a run's training and test samples."""
    return sum(t.numel() * t.element_size() for t in (world.data.x, world.data.y, world.data.x_test, world.data.y_test))


def server(setup: Setup, cohort: int) -> int:
    """Return about how many bytes the server of one run holds while it aggregates the updates of `cohort` clients."""
    added_up = isinstance(setup.strategy, FedTrustStrategy) and setup.strategy.sums is not None
    rows = VECTORS_SERVER + (0 if added_up else COPIES_SERVER * cohort)
    return rows * setup.world.layout.size * 4
