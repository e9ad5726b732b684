"""Leave a daemon behind that goes on when the game is over."""

import os
import time


def perturb(x, y, query):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                time.sleep(0.2)
                try:
                    open("/tmp/canary/alive.txt", "a").write("x")
                except OSError:
                    pass
        os._exit(0)
    print("left one behind")
    return x
