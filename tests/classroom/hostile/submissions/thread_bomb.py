"""Start threads without end."""

import threading
import time


def perturb(x, y, query):
    threads = 0
    try:
        while threads < 500:
            threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
            threads += 1
    except RuntimeError as error:
        print("tried", error, "after", threads)
    return x
