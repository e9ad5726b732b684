"""Take memory without end, in eight processes."""

import os
import time


def perturb(x, y, query):
    for _ in range(8):
        if os.fork() == 0:
            held = [bytearray(b"x") * (8 << 20) for _ in range(12)]
            time.sleep(len(held))
            os._exit(0)
    return x
