"""What glibc is told about memory; each in a process of its own, because it cannot be told to forget."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

KEPT = """
import os
from fedtrust.engine import threads

def held():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

assert threads.keep_memory()
blocks = [bytearray(2**20) for _ in range(96)]
end = bytearray(2**20)  # what is freed does not lie at the end of the heap
full = held()
del blocks
kept = held()
assert threads.give_back()
print(full - kept, full - held())
"""

HEAPS = """
import ctypes, os, tempfile, threading
from fedtrust.engine import threads

if {told}:
    assert threads.one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
there = threading.Barrier(5)

def work():
    libc.malloc(100_000)
    there.wait(30)

others = [threading.Thread(target=work) for _ in range(4)]
for other in others:
    other.start()
there.wait(30)
with tempfile.NamedTemporaryFile() as file:
    libc.fopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(open(file.name).read().count("<heap "))
"""


def said(script: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    kept, given = said(KEPT)
    assert kept < 8
    assert given > 80


def test_all_threads_use_one_heap_if_told_so() -> None:
    assert said(HEAPS.format(told=True)) < said(HEAPS.format(told=False))
