"""Work on the updates [n, d] a block of coordinates at a time, side by side on the threads that torch was given.

Each block is computed by one thread, whose tensor operations use no others, and the blocks do not depend on the number of threads:
so neither does a bit of the result. A block is small enough for a core's cache, and what a rule needs beside the updates stays small.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from fedtrust.engine import threads

T = TypeVar("T")

#: Values in a block: what sorts well inside a core's cache, and what keeps a matrix product busy.
SORTED, MULTIPLIED = 1 << 18, 3 << 20
#: Values in a block that is read once: so much of a row that the memory keeps up.
READ = 1 << 20
#: The fewest columns of a block: shorter pieces of rows are slow to read.
NARROWEST = 256


class Room(threading.local):
    """Buffers of each thread, for one block after the other: paging in new ones would cost as much as the work on them."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """Return a place for values [rows, columns], with whatever was left in it."""
        held = self._held.get(name)
        if held is None or held.numel() < rows * columns:
            held = self._held[name] = torch.empty(rows * columns)
        return held[: rows * columns].view(rows, columns)


def cut(n: int, d: int, values: int) -> list[slice]:
    """Return blocks of coordinates that cover 0 … d − 1, each of about `values` values in n rows."""
    columns = max(NARROWEST, values // n)
    return [slice(start, min(start + columns, d)) for start in range(0, d, columns)]


def each(blocks: list[slice], work: Callable[[slice], T], take: Callable[[T], object] = lambda result: None) -> None:
    """Compute `work(block)` for every block, and hand what it returns to `take`, in the order of the blocks.

    Args:
        blocks: the coordinates, a slice a block.
        work: called on several threads at once; must not write to what another block reads or writes.
        take: called on this thread.
    """
    count = min(torch.get_num_threads(), len(blocks))
    if count <= 1:
        with threads.using(1):
            for block in blocks:
                take(work(block))
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=threads.fix, initargs=(1,)) as pool:
            for result in pool.map(work, blocks):
                take(result)
    finally:
        torch.set_num_threads(before)  # the pool's threads also set it for threads that are yet to start


def combine(shares: Tensor, updates: Tensor) -> Tensor:
    """Return the combinations of rows `shares @ updates`, float32 [m, d] or [d].

    Args:
        shares: [m, n] or [n], of the type in which products are added up.
        updates: float32 [n, d].
    """
    result = torch.empty(*shares.shape[:-1], updates.shape[1])

    def work(where: slice) -> None:
        result[..., where] = (shares @ updates[:, where].to(shares.dtype)).float()

    single = READ if shares.dtype == updates.dtype else SORTED  # others are converted block by block
    each(cut(len(updates), updates.shape[1], single if shares.dim() == 1 else MULTIPLIED), work)
    return result
