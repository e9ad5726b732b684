"""Mount a file system, and change the root."""

import ctypes


def perturb(x, y, query):
    libc = ctypes.CDLL(None, use_errno=True)
    print("mount", libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), ctypes.get_errno())
    print("umount", libc.umount2(b"/proc", 2), ctypes.get_errno())
    print("chroot", libc.chroot(b"/tmp"), ctypes.get_errno())
    print("tried")
    return x
