"""A filter on system calls for a submission's process, whose refusals are counted outside that process.

What no tensor computation needs is answered with EPERM: new processes, threads and programs, sockets, signals, mounts, namespaces,
tracing, shared memory, changes of other people's files' modes, and whatever is newer than this list. The kernel passes each refused call
on to the sandbox's own supervisor (SECCOMP_RET_USER_NOTIF, seccomp_unotify(2)), so that what was tried is known whatever the submission
says. Only the standard library is imported here: this runs before anything else does.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Sequence

# name: (x86_64, aarch64); None where the architecture has no such call
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281),
    "socket": (41, 198), "socketpair": (53, 199),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "perf_event_open": (298, 241),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "open_tree_attr": (467, 467), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semctl": (66, 191), "msgget": (68, 186),
    "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None),
    "ioperm": (173, None), "personality": (135, 92), "vhangup": (153, 58), "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "setsid": (112, 157), "setpgid": (109, 154),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239), "seccomp": (317, 277),
}  # fmt: skip
#: Refused only with these values of one argument: call → (numbers, argument, values). The end of a process must go on killing what it
#: started, nobody's descriptors may send signals, and no terminal is typed into.
_SOME: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    "prctl": ((157, 167), 0, (1,)),  # PR_SET_PDEATHSIG
    "fcntl": ((72, 25), 1, (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    "ioctl": ((16, 29), 1, (0x5412, 0x8901, 0x8902)),  # TIOCSTI, FIOSETOWN, SIOCSPGRP
}
_PRLIMIT = (302, 261)  # allowed for oneself only (pid 0)
_NEWEST = 468
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_KILL, _ERRNO, _NOTIFY, _ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_PR_SET_NO_NEW_PRIVS = 38
_MODE_FILTER, _NEW_LISTENER = 1, 1 << 3
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_X32 = 0x40000000


def table() -> dict[int, str]:
    """Return number → name of the refused calls on this machine's architecture.

    Raises:
        OSError: the architecture is not known here.
    """
    place, _ = _architecture()
    named = {numbers[place]: name for name, numbers in _NUMBERS.items()}
    some = {numbers[place]: name for name, (numbers, _, _) in _SOME.items()} | {_PRLIMIT[place]: "prlimit64"}
    return {number: name for number, name in (named | some).items() if number is not None}


def _architecture() -> tuple[int, int]:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}; known: {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[machine]


def program() -> bytes:
    """Return the filter as classic BPF, eight bytes an instruction (struct sock_filter)."""
    place, arch = _architecture()
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),  # arch
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # nr
    ]
    if place == 0:
        code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    code += [(_AT_LEAST, 0, 1, _NEWEST), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for numbers in _NUMBERS.values():
        if numbers[place] is not None:
            code += [(_EQUAL, 0, 1, numbers[place] or 0), (_RETURN, 0, 0, _NOTIFY)]
    for numbers, argument, values in _SOME.values():
        checks = [step for value in values for step in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _NOTIFY))]
        code += [(_EQUAL, 0, len(checks) + 2, numbers[place]), (_LOAD, 0, 0, 16 + 8 * argument), *checks, (_RETURN, 0, 0, _ALLOW)]
    code += [(_EQUAL, 0, 3, _PRLIMIT[place]), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _NOTIFY)]
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in code)


def no_new_privileges() -> None:
    """Let no program that this process starts gain privileges; needed before a filter or Landlock may be set.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS) is refused")


def install() -> int:
    """Set the filter for this thread, for good; return the descriptor on which refused calls are told.

    Raises:
        OSError: the kernel refuses.
    """
    no_new_privileges()
    code = program()
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    given = Program(len(code) // 8, ctypes.addressof(buffer))
    place, _ = _architecture()
    listener = int(libc.syscall(_NUMBERS["seccomp"][place], _MODE_FILTER, _NEW_LISTENER, ctypes.byref(given)))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp filters with a listener are refused")
    return listener


def refuse(listener: int, names: dict[int, str]) -> str | None:
    """Answer one refused call with EPERM and return its name; `None` if whoever asked is gone."""
    asked = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, asked, True)
        (ident,) = struct.unpack_from("=Q", asked, 0)
        (number,) = struct.unpack_from("=i", asked, 16)
        fcntl.ioctl(listener, _SEND, struct.pack("=QqiI", ident, 0, -errno.EPERM, 0))
    except OSError:
        return None
    return names.get(number, str(number))


def undumpable() -> None:
    """Let nobody of the same user look into this process: not its memory, not its descriptors (PR_SET_DUMPABLE 0)."""
    ctypes.CDLL(None, use_errno=True).prctl(4, 0, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (PR_SET_PDEATHSIG)."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def reaper() -> None:
    """Make this process the parent of all its orphaned descendants (PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)


#: What a refused call was for, for the student.
_PURPOSES: tuple[tuple[str, Sequence[str]], ...] = (
    ("start processes or threads", ("fork", "vfork", "clone", "clone3")),
    ("start programs", ("execve", "execveat")),
    ("open network connections", ("socket", "socketpair")),
    ("send signals", ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "fcntl", "prctl")),
    ("look into other processes", ("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd", "perf_event_open")),
    ("mount file systems", ("mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsmount", "mount_setattr")),
    ("make namespaces", ("unshare", "setns")),
    ("share memory", ("shmget", "shmat", "memfd_create", "memfd_secret", "msgget", "semget", "mq_open")),
    ("change modes, owners or times of files", ("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "fchownat", "utimensat")),
)  # fmt: skip


def purpose(name: str) -> str:
    """Return what a refused call is for, in words."""
    return next((words for words, names in _PURPOSES if name in names), f"use the system call {name}")
