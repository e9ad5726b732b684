"""Crash the interpreter."""

import ctypes


def perturb(x, y, query):
    print("tried")
    return ctypes.string_at(0)
