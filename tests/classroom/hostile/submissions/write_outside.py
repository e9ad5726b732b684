"""Write where others would see it."""

import os

import torch


def perturb(x, y, query):
    places = (
        "/tmp/canary/planted.txt",
        "/etc/planted",
        "/usr/planted",
        "/planted",
        "/dev/shm/planted",
        HOME + "/planted",
        os.path.dirname(torch.__file__) + "/planted.py",
    )
    for path in places:
        try:
            with open(path, "w") as out:
                out.write("x")
            print("wrote", path)
        except OSError as error:
            print("tried", path, type(error).__name__)
    for call in (
        lambda: os.truncate("/tmp/canary/labels.txt", 0),
        lambda: os.unlink("/tmp/canary/labels.txt"),
        lambda: os.rename("/tmp/canary/labels.txt", "/tmp/canary/moved"),
    ):
        try:
            call()
            print("changed")
        except OSError as error:
            print("tried", type(error).__name__)
    return x
