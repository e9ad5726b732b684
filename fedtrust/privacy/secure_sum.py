"""What secure aggregation comes to: numbers on a grid, added up modulo a power of two, and nothing else seen of them.

The masks of the protocol (`fedtrust.privacy.masking`) cancel, so its result is the plain sum in the group, to the last bit: that is what
`add` works out without them. A test holds the two against each other. The cost for n clients and d numbers: `add` reads each row once;
the protocol makes n² masks of d numbers and 2n secrets of n shares (40 clients and 1.2 million numbers: seconds against most of a minute,
nearly all of it masks and Shamir's polynomials).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedtrust.errors import TooFewError

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.unsignedinteger]
Masks = Literal["cancelled", "played"]
Counts = Literal["equal", "examples"]


@dataclass(frozen=True)
class Quantiser:
    """A grid of 2^bits numbers from −clip to clip.

    Attributes:
        clip: the largest number that can be said; larger ones are cut off.
        bits: of one number, at most 32.
    """

    clip: float
    bits: int

    @property
    def step(self) -> float:
        """The distance between neighbours on the grid: how far a number may be moved."""
        return 2 * self.clip / self.top

    @property
    def top(self) -> int:
        """The largest number on the grid."""
        return int(2**self.bits - 1)

    def encode(self, values: Floats, rng: np.random.Generator) -> Integers:
        """Return numbers [d] as whole numbers from 0 to 2^bits − 1, rounded up or down at random so that none is moved on average."""
        scaled = (np.clip(values.astype(np.float64), -self.clip, self.clip) + self.clip) / self.step
        return rounded(np.minimum(scaled, self.top), rng)  # (clip + clip) / step may be a hair above

    def decode(self, total: Integers, weight: float) -> npt.NDArray[np.float64]:
        """Return the weighted mean [d] of what was encoded, from its weighted sum and the sum of the weights."""
        mean: npt.NDArray[np.float64] = total * np.float64(self.step / weight) - self.clip
        return mean


def rounded(values: npt.NDArray[np.float64], rng: np.random.Generator) -> Integers:
    """Return values [d] rounded to a neighbouring whole number: up with the probability that makes the mean right."""
    below = np.floor(values)
    return (below + (rng.random(values.shape) < values - below)).astype(np.int64)


def group_bits(largest: int) -> int:
    """Return the bits of the smallest group in which a sum up to `largest` does not wrap around.

    Raises:
        ValueError: none of 64 bits is large enough.
    """
    bits = max(1, largest.bit_length())
    if bits > 62:
        raise ValueError(f"a sum of up to {largest} needs {bits} bits; fewer bits a number, or fewer samples a client, would do")
    return bits


def word(bits: int) -> np.dtype[np.unsignedinteger]:
    """Return the type that elements of the group of 2^bits numbers are kept in; sums wrap around modulo a multiple of the group's size.

    Raises:
        ValueError: more than 64 bits.
    """
    if not 1 <= bits <= 64:
        raise ValueError(f"a group has 1 to 64 bits, got {bits}")
    return np.dtype(np.uint32 if bits <= 32 else np.uint64)


def enough(count: int, asked: int, threshold: float) -> int:
    """Return how many of the clients asked must be left, at least 2, if so many are.

    Args:
        count: how many have sent something.
        asked: how many were asked.
        threshold: the share of those asked that must be left.

    Raises:
        TooFewError: they are too few: the masks of the others cannot be taken off, or the sum would be one client's row.
    """
    needed = max(2, math.ceil(threshold * max(asked, count) - 1e-9))
    if count < needed:
        raise TooFewError(f"secure aggregation can be unmasked by {needed} of {max(asked, count)} clients, and {count} are left")
    return needed


def add(
    rows: Iterable[Integers], bits: int, *, masks: Masks = "cancelled", count: int = 0, asked: int = 0, threshold: float = 2 / 3
) -> Integers:
    """Return the sum of rows [d] modulo 2^bits, as secure aggregation gives it.

    Args:
        rows: one a client.
        bits: of the group.
        masks: `cancelled` adds the rows as they are; `played` plays the whole protocol, for the same result.
        count: the number of rows.
        asked: how many clients shared keys; those without a row are gone, and their masks are recovered.
        threshold: the share of them that must be left.

    Raises:
        TooFewError: fewer are left.
    """
    needed = enough(count, asked, threshold)
    kind = word(bits)
    if masks == "played":
        from fedtrust.privacy import masking  # the cryptography takes a while to import, and most runs leave it out

        vectors = {client: _in_group(row, kind, bits) for client, row in enumerate(rows)}
        total = masking.play(vectors, needed, bits, gone=range(len(vectors), max(asked, len(vectors)))).total
    else:
        total = functools.reduce(np.add, (_in_group(row, kind, bits) for row in rows))
        total = total & kind.type(2**bits - 1)
    return total.astype(np.int64)


def _in_group(row: Integers, kind: np.dtype[np.unsignedinteger], bits: int) -> Numbers:
    return (row & np.int64(2**bits - 1)).astype(kind)


def centred(total: Integers, bits: int) -> Integers:
    """Return numbers of the group [d] as whole numbers from −2^(bits−1) to 2^(bits−1) − 1."""
    half = np.int64(1) << np.int64(bits - 1)
    return ((total + half) & np.int64(2**bits - 1)) - half


def weighted(rows: Sequence[Floats], weights: Sequence[int], grid: Quantiser, rng: np.random.Generator) -> Iterable[Integers]:
    """Yield each row [d] as its client sends it, before it is masked: on the grid, as many times as it counts."""
    for row, weight in zip(rows, weights, strict=True):
        yield grid.encode(row, rng) * np.int64(weight)
