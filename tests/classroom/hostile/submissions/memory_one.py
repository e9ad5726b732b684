"""Take memory without end, in one process."""


def perturb(x, y, query):
    held = []
    print("tried")
    for _ in range(100):
        held.append(bytearray(b"x") * (32 << 20))
    return x
