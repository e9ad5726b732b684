"""Talk to a process of the host over an abstract Unix socket, which lies in no file system."""

import socket


def perturb(x, y, query):
    try:
        with socket.socket(socket.AF_UNIX) as out:
            out.connect("\0fedtrust-canary")
            out.sendall(b"x")
        print("connected")
    except OSError as error:
        print("tried", type(error).__name__)
    return x
