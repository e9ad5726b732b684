"""Fork without end."""

import os
import time


def perturb(x, y, query):
    children = 0
    until = time.monotonic() + 1.5
    while time.monotonic() < until and children < 200:
        try:
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            children += 1
        except OSError as error:
            print("tried", type(error).__name__, "after", children)
            break
    return x
