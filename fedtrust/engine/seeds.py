"""Every random draw of a run comes from here.

A stream is named by what it is for: (seed, purpose, counters…), for instance `stream(7, "batches", round, client)`. Two streams with
different names are independent, and a stream does not depend on which worker asks for it, in which order, or how often others were
asked. The name is hashed (BLAKE2b) into the 128-bit key of a Philox counter-based generator (Salmon et al., SC 2011).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch


class _Nothing(np.random.SeedSequence):
    """What a generator starts from whose state is set right away: NumPy would ask the system for entropy, half of what a stream costs."""

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint32) -> npt.NDArray[np.uint32 | np.uint64]:
        """Return zeros."""
        return np.zeros(n_words, dtype)


_NOTHING, _ZEROS = _Nothing(0), np.zeros(4, np.uint64)


def _digest(seed: int, purpose: str, counters: tuple[int, ...]) -> bytes:
    name = f"{int(seed)}|{purpose}|" + "|".join(str(int(c)) for c in counters)
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def key(seed: int, purpose: str, *counters: int) -> int:
    """Return the 128-bit key of the stream `(seed, purpose, counters…)`."""
    return int.from_bytes(_digest(seed, purpose, counters), "little")


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return a fresh NumPy generator for the stream `(seed, purpose, counters…)`."""
    philox = np.random.Philox(_NOTHING)
    words = np.frombuffer(_digest(seed, purpose, counters), "<u8")
    philox.state = {
        "bit_generator": "Philox",
        "state": {"counter": _ZEROS, "key": words},
        "buffer": _ZEROS,
        "buffer_pos": 4,  # used up
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.random.Generator(philox)


def torch_stream(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """Return a fresh CPU torch generator for the stream `(seed, purpose, counters…)`.

    torch's CPU generator keeps 32 bits of a seed, so this is for simulation (initial weights, an attacker's noise), never for the
    noise that a privacy guarantee rests on.
    """
    return torch.Generator().manual_seed(key(seed, purpose, *counters) & 0x7FFF_FFFF_FFFF_FFFF)
