"""Compute for ever."""


def perturb(x, y, query):
    print("tried")
    while True:
        x = x + 1
