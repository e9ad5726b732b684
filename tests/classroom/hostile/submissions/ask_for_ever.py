"""Go on and on asking the system for what it refuses."""

import os


def perturb(x, y, query):
    print("tried")
    while True:
        try:
            os.kill(1, 0)
        except OSError:
            pass
