"""Print without end."""

import os


def perturb(x, y, query):
    print("tried")
    while True:
        os.write(1, b"x" * 65536)
