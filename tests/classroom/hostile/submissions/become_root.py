"""Become root again, and take capabilities."""

import ctypes
import os


def perturb(x, y, query):
    for call in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0), lambda: os.setgroups([0])):
        try:
            call()
            print("became", os.getuid())
        except OSError as error:
            print("tried", type(error).__name__)
    ctypes.CDLL(None).prctl(8, 1, 0, 0, 0)
    print("uid", os.getuid(), os.geteuid(), os.getresuid())
    return x
