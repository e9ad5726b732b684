"""Correlated noise: a banded factorisation of the prefix sums, and its sensitivity when clients come again.

What is learnt is the sum of all updates so far, A x with A the lower triangle of ones. DP-FTRL (Kairouz, McMahan, Song, Thakkar, Thakurta
and Xu, ICML 2021) releases such sums with noise that is correlated over the rounds, by a binary tree; the matrix mechanism (Denisov,
McMahan, Rush, Smith and Thakurta, NeurIPS 2022) writes it as A = B C, releases C x + z with independent z, and takes B (C x + z) =
A (x + C⁻¹ z): in round t the noise (C⁻¹ z)_t is added to the update. C is lower triangular, so it may be used adaptively.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def square_root(bands: int) -> Floats:
    """Return the first column [bands] of the banded square root C of A, a Toeplitz matrix: 1, 1/2, 3/8, 5/16, … and then zeros.

    C · C = A without the cut (Fichtenberger, Henzinger and Upadhyay, ICML 2023, section 3); cut to bands after Kalinin and Lampert,
    NeurIPS 2024, definition 1. With one band C is the identity: independent noise in every round.
    """
    made = np.ones(bands)
    for k in range(1, bands):
        made[k] = made[k - 1] * (2 * k - 1) / (2 * k)
    return made


def inverse(column: Floats, size: int) -> Floats:
    """Return the first column [size] of C⁻¹ for the lower triangular Toeplitz matrix C with this first column."""
    made = np.zeros(size)
    made[0] = 1 / column[0]
    for t in range(1, size):
        reach = min(t, len(column) - 1)
        made[t] = -np.dot(column[1 : reach + 1], made[t - 1 :: -1][:reach]) / column[0]
    return made


def sensitivity(column: Floats, participations: Sequence[Sequence[int]], rounds: int) -> float:
    """Return how far one client moves C x in `rounds` rounds, in the L2 norm of all of it, if its update has norm at most 1 each time.

    A client that takes part in the rounds P (counted from 0) moves it by the sum over t in P of column t of C, each times its update. No
    entry of C is negative, so that is longest when all its updates are the same (Choquette-Choo, McMahan, Rush and Thakurta, ICML 2023,
    section 2): ‖Σ_{t in P} C[:, t]‖, exactly, and the largest over the sets P that occur.
    """
    worst = 0.0
    for part in participations:
        moved = np.zeros(rounds)
        for t in part:
            if t < rounds:
                end = min(rounds, t + len(column))
                moved[t:end] += column[: end - t]
        worst = max(worst, float(np.linalg.norm(moved)))
    return worst
