"""How a round's clients are cut into chunks that are trained together.

On a CPU by the clients and the model alone, never by who computes: that is what makes the bits the same everywhere. On GPUs by their
memory and their number, and the bits are those of one kind of machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedtrust.engine.world import World

#: Bytes of hidden values that the clients of a chunk may hold in a step. The steps of more clients leave the processor's cache, those of
#: fewer spend their time between operations, and every chunk costs its driver something. For a round of 400 clients of the 54k-parameter
#: CNN two and three times 16 MiB took 0.88 and 0.86 of the time; with `vmap`, 200 clients, two times took 0.82 and 0.88 in two runs; in
#: bfloat16 1.1.
STEP_BYTES = 32 << 20
FEWEST, MOST = 2, 50
#: Bytes that the updates of a chunk may have.
BLOCK_BYTES = 256 << 20
#: A round of few clients is not cut finer than this, if that many fit.
SMALL = 4
#: A round is cut into about this many chunks if it has the clients: enough to keep several workers busy.
PIECES = 8


#: The share of a GPU's free memory that a chunk is planned to take, and the most clients a chunk may have there.
GPU_SHARE, GPU_MOST = 0.5, 4096


class Cut(NamedTuple):
    """How to cut.

    Attributes:
        most: how many clients are best trained together.
        pieces: into how many chunks a round is cut at least, if it has the clients.
    """

    most: int
    pieces: int = PIECES


def cpu_cut(world: World) -> Cut:
    """Return how clients are cut for CPUs, whatever their number."""
    size = 4 * hidden_numbers(world) * world.batch_size
    return Cut(max(FEWEST, min(MOST, STEP_BYTES // max(1, size), BLOCK_BYTES // (4 * world.layout.size))))


def gpu_cut(world: World, free: int, workers: int) -> Cut:
    """Return how clients are cut for GPUs: as few chunks as there are workers, none larger than its share of memory.

    Args:
        world: the run.
        free: bytes that a worker may count on.
        workers: how many there are.
    """
    # Parameters, update, gradients, two moments of the optimiser and a temporary; hidden values, their gradients and a spare.
    client = 4 * (6 * world.layout.size + 3 * hidden_numbers(world) * world.batch_size)
    fit = max(1, min(GPU_MOST, int(GPU_SHARE * free) // client))
    return Cut(1 << (fit.bit_length() - 1), workers)  # a power of two: not every byte of free memory makes other chunks


def hidden_numbers(world: World) -> int:
    """Return how many numbers the layers of the model put out for one sample."""
    counted = [0]

    def count(layer: nn.Module, given: object, output: object) -> None:
        if isinstance(output, Tensor):
            counted[0] += output.numel()

    handles = [layer.register_forward_hook(count) for layer in world.module.modules() if not list(layer.children())]
    try:
        with torch.no_grad():  # on a real sample: meta tensors would cost three seconds of imports
            world.module(world.data.x[:1].to(next(world.module.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return counted[0]


def chunks_of(sizes: Iterable[int], count: int, cut: Cut) -> list[list[int]]:
    """Cut `count` clients into chunks, longest schedules first.

    Args:
        sizes: per client the number of local samples.
        count: how many clients there are.
        cut: how.

    Returns:
        Positions of the clients, chunk by chunk.
    """
    order = sorted(range(count), key=lambda i, s=list(sizes): (-s[i], i))  # type: ignore[misc]
    size = min(cut.most, max(SMALL, -(-count // cut.pieces)))
    return [order[i : i + size] for i in range(0, count, size)]
