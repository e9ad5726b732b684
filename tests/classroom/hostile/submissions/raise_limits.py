"""Lift the limits, then take memory."""

import resource


def perturb(x, y, query):
    for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        try:
            resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print("lifted", which)
        except (OSError, ValueError) as error:
            print("tried", type(error).__name__)
    return x + len(bytearray(b"x") * (1 << 30))
