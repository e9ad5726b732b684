"""Fill the scratch file system."""

import os


def perturb(x, y, query):
    total = 0
    for number in range(64):
        try:
            with open(f"/tmp/{number}", "wb", buffering=0) as out:
                total += out.write(b"x" * (4 << 20))
        except OSError as error:
            print("tried", number, type(error).__name__, os.strerror(error.errno or 0))
            break
    print("took", total)
    raise OSError("full")
