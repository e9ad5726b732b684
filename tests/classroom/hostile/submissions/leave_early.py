"""End the process in the middle of a call."""

import os


def perturb(x, y, query):
    print("tried")
    os._exit(0)
