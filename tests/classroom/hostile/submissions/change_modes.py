"""Change modes, owners and times of files that belong to the user it runs as."""

import os


def perturb(x, y, query):
    path = "/tmp/canary/labels.txt"
    for call in (
        lambda: os.chmod(path, 0),
        lambda: os.chown(path, 1, 1),
        lambda: os.utime(path, (1, 1)),
        lambda: os.setxattr(path, "user.x", b"x"),
    ):
        try:
            call()
            print("changed")
        except OSError as error:
            print("tried", type(error).__name__)
    return x
