"""How many threads a tensor operation uses, and where its memory comes from: asked for, not guessed.

One thread and two threads add up in another order and so give other bits. Training uses one thread a chunk, always; everything the
server computes uses `SERVER` threads, whatever engine trains.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

import torch

T = TypeVar("T")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


#: Threads for the server's rules and probes.
SERVER = cores()


def fix(count: int) -> None:
    """Let this thread run tensor operations on `count` threads from now on.

    The number is a thread's own, but a new thread takes over what any thread set last when it first asks or computes, and that would
    undo the setting: so it asks first.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


def stay(index: int, count: int) -> bool:
    """Keep this thread on a core of its own: it is the `index`-th of `count` that train at the same time. Return whether it is kept.

    Only where they occupy all cores of the process evenly; fewer would be in the way of other programs. Left alone, threads that wake up
    together often share one core for the first 50 ms of a round while the next one idles: 5 to 15 % of a short round.
    """
    if not hasattr(os, "sched_setaffinity"):
        return False
    there = sorted(os.sched_getaffinity(0))
    if len(there) < 2 or count % len(there):
        return False
    try:
        os.sched_setaffinity(0, {there[index % len(there)]})
    except OSError:
        return False
    return True


@contextlib.contextmanager
def using(count: int) -> Iterator[None]:
    """Run tensor operations of this thread on `count` threads."""
    before = torch.get_num_threads()
    fix(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def within(seconds: float, call: Callable[[], T], aside: Callable[[], float] = lambda: 0.0) -> T:
    """Return what `call` returns, computed on a thread of its own with as many threads as this one uses.

    `aside` says how many seconds since the start do not count: it waited for others, who have deadlines of their own.

    Raises:
        TimeoutError: it gave no answer in so many seconds. Its thread is left to itself; it does not keep the process alive.
    """
    answer: Future[T] = Future()
    count = torch.get_num_threads()

    def work() -> None:
        fix(count)
        try:
            answer.set_result(call())
        except BaseException as error:  # handed to whoever waits
            answer.set_exception(error)

    threading.Thread(target=work, name="fedtrust-within", daemon=True).start()
    began = time.monotonic()
    while not wait([answer], timeout=max(0.0, began + seconds + aside() - time.monotonic())).done:
        if time.monotonic() >= began + seconds + aside():
            raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()


def _set_up_vector_maths() -> None:
    """Let MKL's vector mathematics (exp, tanh, erf, …) look at the processor now, on one thread.

    It does so at its first call, and of two threads that both make that call one may compute in another way than ever after: on one
    processor 80 of 2160 runs on two threads had other bits, in the sixth digit of the first chunk; after any one such call none of 2300.
    """
    torch.zeros(1).exp()


_set_up_vector_maths()

#: glibc's mallopt options (malloc.h): keep freed memory, take large blocks from the heap too, and use one heap.
_ONE_HEAP = ((-8, 1),)
_KEEP = ((-1, 2**31 - 1), (-3, 32 << 20), (-4, 0), *_ONE_HEAP)


def keep_memory() -> bool:
    """Tell glibc to keep freed memory for the next step in place of giving it back to the kernel; return whether it agreed.

    A training step frees and takes the same large activations again; paging them in anew cost up to 43 % of a step of 25 clients. The
    process keeps its peak memory in return. Other C libraries are left alone.
    """
    return _tell(_KEEP)


def one_heap() -> bool:
    """Tell glibc that all threads are to use one heap; return whether it agreed.

    It would give each new one its own, up to eight a core. What one frees then fits nobody else, and a process that does not train but
    takes in what others send, on many short-lived threads, grows for hundreds of rounds without holding on to anything.
    """
    return _tell(_ONE_HEAP)


#: After so many rounds memory that nobody holds is given back, which costs the next round some milliseconds.
TIDY = 4


def give_back() -> bool:
    """Give the memory that nobody holds back to the kernel; return whether there was any.

    What `keep_memory` keeps lies in pieces between what is held. Now and then a large block fits none of them although they would do
    together, and the heap grows; from whole pages given back it starts again.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False


def _tell(options: tuple[tuple[int, int], ...]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in options)
