"""Landlock: what part of the file system a process may still touch (landlock(7)); no privilege is needed.

Only the standard library is imported here: this runs before anything else does.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
#: The least version with every right that changes files (truncation came with the third, Linux 6.2).
LEAST = 3


def version() -> int:
    """Return the kernel's Landlock version; 0 where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)))


def restrict(readable: Sequence[str], usable: Sequence[str] = ()) -> int:
    """Leave this process, for good, with nothing but reading below `readable`, and reading and writing the devices `usable`.

    Network ports (version 4), and signals and abstract sockets to processes outside (version 6), are refused where the kernel knows how.
    Paths that do not exist are passed over. `no_new_privs` must be set.

    Returns:
        The version that was used.

    Raises:
        OSError: the kernel has no Landlock, one that is too old, or refuses.
    """
    abi = version()
    if abi < LEAST:
        raise OSError(f"Landlock version {abi}, needed is {LEAST} (Linux 6.2)" if abi else "this kernel has no Landlock")
    files = (1 << (16 if abi >= 5 else 15)) - 1
    net = 3 if abi >= 4 else 0
    scope = 3 if abi >= 6 else 0
    given = struct.pack("=QQQ", files, net, scope)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    libc = ctypes.CDLL(None, use_errno=True)
    ruleset = _called(libc.syscall(_CREATE, given, ctypes.c_size_t(len(given)), 0), "landlock_create_ruleset")
    try:
        for path in readable:
            # Rights that only a directory can have are refused for a file.
            _allow(libc, ruleset, path, _EXECUTE | _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0))
        for path in usable:
            _allow(libc, ruleset, path, _READ_FILE | _WRITE_FILE)
        _called(libc.syscall(_RESTRICT, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)
    return abi


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        _called(libc.syscall(_ADD, ruleset, 1, struct.pack("=Qi", rights, parent), 0), f"landlock_add_rule for {path}")
    finally:
        os.close(parent)


def _called(result: int, name: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name} is refused")
    return result
