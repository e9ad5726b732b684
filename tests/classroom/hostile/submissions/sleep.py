"""Wait for ever."""

import time


def perturb(x, y, query):
    print("tried")
    time.sleep(3600)
    return x
