"""The protocol, step by step: what cancels, what can be recovered, and what the server cannot see."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedtrust.engine import seeds
from fedtrust.errors import TooFewError
from fedtrust.privacy import keys, masking, secure_sum
from fedtrust.privacy.secure_sum import Quantiser

BITS = 24


def vectors(clients: list[int], d: int = 50, bits: int = BITS) -> dict[int, np.ndarray]:
    return {c: seeds.stream(5, "vectors", c).integers(0, 2**bits, d).astype(secure_sum.word(bits)) for c in clients}


def plain(found: dict[int, np.ndarray], bits: int = BITS) -> np.ndarray:
    total = sum(int(2**bits) + v.astype(object) for v in found.values())
    return np.array([int(x) % 2**bits for x in total], dtype=np.int64)


@pytest.mark.parametrize("bits", [5, 24, 32, 33, 62])
def test_the_masks_cancel_to_the_last_bit(bits: int) -> None:
    given = vectors([0, 3, 4, 9], bits=bits)
    found = masking.play(given, 3, bits)
    assert np.array_equal(found.total.astype(np.int64), plain(given, bits))
    assert found.gone == ()


@pytest.mark.parametrize(("gone", "silent"), [((7,), ()), ((), (3,)), ((1, 7), (3,)), ((1, 2, 7), ())])
def test_who_is_lost_on_the_way_spoils_nothing(gone: tuple[int, ...], silent: tuple[int, ...]) -> None:
    """`gone` leave before they send anything, `silent` after it: the sum is that of all who sent."""
    given = vectors([0, 3, 4, 8, 9])
    found = masking.play(given, 4, BITS, gone=gone, silent=silent)
    assert np.array_equal(found.total.astype(np.int64), plain(given))
    assert found.gone == gone


def test_with_too_few_left_nothing_can_be_unmasked() -> None:
    given = vectors([0, 3, 4])
    with pytest.raises(TooFewError, match="3 clients of 5 are left, and 4 must be"):
        masking.play(given, 4, BITS, gone=(1, 2))
    with pytest.raises(TooFewError, match="2 clients of 3 are left, and 3 must be"):
        masking.play(given, 3, BITS, silent=(4,))
    with pytest.raises(TooFewError, match="3 clients are fewer than the threshold of 4"):
        masking.play(given, 4, BITS)


def test_shares_below_the_threshold_say_nothing_usable() -> None:
    secret = keys.fresh_seed()
    shares = keys.share(secret, 3, 5)
    assert keys.recover(shares[1:4]) == secret
    assert keys.recover([shares[0], shares[4], shares[2]]) == secret
    for few in (shares[:2], shares[3:]):
        try:
            assert keys.recover(few) != secret
        except ValueError:  # most wrong results are no padded message either
            continue
    with pytest.raises(ValueError, match="between 2 and"):
        keys.share(secret, 1, 5)


def test_the_fast_sum_is_the_protocols() -> None:
    """With real updates, weights, and clients that are lost: the same bits."""
    grid = Quantiser(1.0, 18)
    rows = [seeds.stream(2, "rows", i).normal(0, 0.2, 300) for i in range(6)]
    weights = [1, 20, 3, 5, 5, 8]
    bits = secure_sum.group_bits(sum(weights) * grid.top)
    encoded = list(secure_sum.weighted(rows, weights, grid, seeds.stream(2, "rounding")))
    fast = secure_sum.add(encoded, bits, count=6, asked=8)
    slow = secure_sum.add(encoded, bits, masks="played", count=6, asked=8)
    assert np.array_equal(fast, slow)
    assert fast.any()


def test_two_plays_have_other_masks_and_the_same_sum() -> None:
    given = vectors([0, 1, 2])
    first, second = masking.play(given, 2, BITS), masking.play(given, 2, BITS)
    assert np.array_equal(first.total, second.total)
    for client in given:
        assert (first.masked[client] != second.masked[client]).mean() > 0.99


def uniform(values: np.ndarray, bits: int, cells: int = 256) -> float:
    """The p-value of a chi² test of uniformity over equal cells of the group."""
    counts = np.bincount((values.astype(np.int64) * cells) >> bits, minlength=cells)
    return float(stats.chisquare(counts).pvalue)


def test_a_masked_row_looks_uniform_whatever_is_under_it() -> None:
    """An update as it comes (nearly all of it close to the middle of the grid) is told from uniform at once; masked, it is not.

    Keys are drawn anew each time, so that p-values are uniform: below 1e-6 once in a million runs.
    """
    grid, d = Quantiser(1.0, BITS), 60_000
    rows = [seeds.stream(3, "rows", i).normal(0, 0.02, d) for i in range(3)]
    encoded = {i: grid.encode(row, seeds.stream(3, "r", i)).astype(np.uint32) for i, row in enumerate(rows)}
    found = masking.play(encoded, 2, BITS)
    for client, bare in encoded.items():
        assert uniform(bare, BITS) < 1e-100
        assert uniform(found.masked[client], BITS) > 1e-6
        assert abs(np.corrcoef(bare, found.masked[client])[0, 1]) < 5 / np.sqrt(d)  # five standard errors
    partial = (found.masked[0].astype(np.int64) + found.masked[1].astype(np.int64)) % 2**BITS
    assert uniform(partial, BITS) > 1e-6  # the sum of some is as dark as each


def test_the_mask_of_zeros_is_no_constant() -> None:
    """The extreme case: a row of zeros behind its masks."""
    found = masking.play({0: np.zeros(20_000, np.uint32), 1: np.zeros(20_000, np.uint32)}, 2, BITS)
    assert not found.total.any()
    for row in found.masked.values():
        assert uniform(row, BITS) > 1e-6
    low = keys.expand(b"k" * 32, 3, 80_000)
    assert set(low.tolist()) == set(range(8))  # Flower's generator never draws the largest
    assert uniform(low, 3, cells=8) > 1e-6


def test_nobody_gives_both_shares_of_one_client_nor_answers_for_too_few() -> None:
    members = {c: masking.Member(c, BITS) for c in range(3)}
    book = {c: m.advertise() for c, m in members.items()}
    dealt = {c: m.share(book, 2) for c, m in members.items()}
    for c, member in members.items():
        member.mask(np.zeros(4, np.uint32), {o: shares[c] for o, shares in dealt.items() if o != c})
    with pytest.raises(ValueError, match="client 1 cannot be both left and gone"):
        members[0].unmask([0, 1], [1, 2])
    with pytest.raises(ValueError, match="only 1 clients are left"):
        members[0].unmask([0], [1, 2])
    assert members[0].unmask([0, 1], [2]).keys() == {0, 1, 2}


def test_shares_are_for_their_reader_only() -> None:
    members = {c: masking.Member(c, BITS) for c in range(3)}
    book = {c: m.advertise() for c, m in members.items()}
    dealt = {c: m.share(book, 2) for c, m in members.items()}
    with pytest.raises(ValueError, match="does not open"):
        members[1].mask(np.zeros(4, np.uint32), {0: dealt[0][2]})
    pair, other = keys.KeyPair.fresh(), keys.KeyPair.fresh()
    assert pair.agree(other.public) == other.agree(pair.public)
    assert keys.KeyPair.of(pair.secret).public == pair.public
    sealed = bytearray(keys.seal(pair.agree(other.public), b"words"))
    sealed[20] ^= 1
    with pytest.raises(ValueError, match="altered"):
        keys.unseal(other.agree(pair.public), bytes(sealed))
