"""Every random draw of a run comes from here.

A stream is named by what it is for: (seed, purpose, counters…), for instance `stream(7, "batches", round, client)`. Two streams with
different names are independent, and a stream does not depend on which worker asks for it, in which order, or how often others were
asked. The name is hashed (BLAKE2b) into the 128-bit key of a Philox counter-based generator (Salmon et al., SC 2011).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(seed: int, purpose: str, *counters: int) -> int:
    """Return the 128-bit key of the stream `(seed, purpose, counters…)`."""
    name = f"{int(seed)}|{purpose}|" + "|".join(str(int(c)) for c in counters)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return a fresh NumPy generator for the stream `(seed, purpose, counters…)`."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *counters)))


def torch_stream(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """Return a fresh CPU torch generator for the stream `(seed, purpose, counters…)`.

    torch's CPU generator keeps 32 bits of a seed, so this is for simulation (initial weights, an attacker's noise), never for the
    noise that a privacy guarantee rests on.
    """
    return torch.Generator().manual_seed(key(seed, purpose, *counters) & 0x7FFF_FFFF_FFFF_FFFF)
