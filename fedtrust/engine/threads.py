"""How many threads a tensor operation uses, and where its memory comes from: asked for, not guessed.

One thread and two threads add up in another order and so give other bits. Training uses one thread a chunk, always; everything the
server computes uses `SERVER` threads, whatever engine trains.
"""

from __future__ import annotations

import contextlib
import ctypes
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


#: glibc's mallopt options (malloc.h): keep freed memory, take large blocks from the heap too, and use one heap.
_KEEP = ((-1, 2**31 - 1), (-3, 32 << 20), (-4, 0), (-8, 1))


def keep_memory() -> bool:
    """Tell glibc to keep freed memory for the next step in place of giving it back to the kernel; return whether it agreed.

    A training step frees and takes the same large activations again; paging them in anew cost up to 43 % of a step of 25 clients. The
    process keeps its peak memory in return. Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in _KEEP)
