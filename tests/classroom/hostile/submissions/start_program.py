"""Become a shell."""

import os


def perturb(x, y, query):
    try:
        os.execv("/bin/sh", ["sh", "-c", "id; touch /tmp/canary/shell"])
    except OSError as error:
        print("tried", type(error).__name__)
    print("system", os.system("touch /tmp/canary/shell"))
    return x
