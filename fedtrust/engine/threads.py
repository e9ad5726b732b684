"""How many threads a tensor operation uses: asked for, not guessed.

One thread and two threads add up in another order and so give other bits. Training uses one thread a chunk, always; everything the
server computes uses `SERVER` threads, whatever engine trains.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


#: Threads for the server's rules and probes.
SERVER = cores()


@contextlib.contextmanager
def using(count: int) -> Iterator[None]:
    """Run tensor operations of this thread on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
