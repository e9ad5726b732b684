"""Secure aggregation, every step of it: the slow and clear form that `fedtrust.privacy.secure_sum` is measured against.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal and Seth, CCS 2017, figure 4, for a server that is curious but keeps to
the protocol (without the signatures and the consistency check that an active one asks for). Numbers live in the group of integers modulo
2^bits.

    0  advertise   each client tells the others two public keys, one to encrypt and one to mask with
    1  share       each draws a seed b, and deals Shamir shares of b and of its private masking key to all, encrypted
    2  mask        each sends its vector + PRG(b) + Σ over later clients PRG(common key) − Σ over earlier ones
    3  unmask      the server says who is left; each client left gives its share of b for those, and of the masking key for those gone

Whoever is gone after step 1 has left pairwise masks in the others' vectors: its masking key is put together from shares and they are taken
off. Nobody ever gives both shares of one client: then its vector would lie open.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat, share_keys_plaintext_separate

from fedtrust.errors import TooFewError
from fedtrust.privacy import keys
from fedtrust.privacy.secure_sum import Numbers, word


class Advert(NamedTuple):
    """What a client tells the others: two public keys."""

    sealing: bytes
    masking: bytes


class Member:
    """One client in the protocol."""

    def __init__(self, client: int, bits: int) -> None:
        self.client, self._bits = client, bits
        self._sealing, self._masking = keys.KeyPair.fresh(), keys.KeyPair.fresh()
        self._seed = keys.fresh_seed()
        self._book: Mapping[int, Advert] = {}
        self._threshold = 0
        self._held: dict[int, tuple[bytes, bytes]] = {}  # whose shares it holds: of the seed, of the masking key

    def advertise(self) -> Advert:
        """Step 0: return the public keys."""
        return Advert(self._sealing.public, self._masking.public)

    def share(self, book: Mapping[int, Advert], threshold: int) -> dict[int, bytes]:
        """Step 1: return for each of the others in `book` its shares, sealed so that only it can read them."""
        self._book, self._threshold = book, threshold
        others = sorted(book)
        seeds, secrets = (keys.share(secret, threshold, len(others)) for secret in (self._seed, self._masking.secret))
        sealed: dict[int, bytes] = {}
        for other, of_seed, of_secret in zip(others, seeds, secrets, strict=True):
            if other == self.client:
                self._held[other] = (of_seed, of_secret)
            else:
                plain = share_keys_plaintext_concat(self.client, other, of_seed, of_secret)
                sealed[other] = keys.seal(self._sealing.agree(book[other].sealing), plain)
        return sealed

    def mask(self, numbers: Numbers, sealed: Mapping[int, bytes]) -> Numbers:
        """Step 2: return the masked vector [d]; `sealed` are the shares that the others dealt to this client, by sender.

        Raises:
            ValueError: shares that are not for it, or do not open.
        """
        for other, message in sorted(sealed.items()):
            plain = keys.unseal(self._sealing.agree(self._book[other].sealing), message)
            source, target, of_seed, of_secret = share_keys_plaintext_separate(plain)
            if (source, target) != (other, self.client):
                raise ValueError(f"client {self.client} was given shares from {source} to {target} as those of client {other}")
            self._held[other] = (of_seed, of_secret)
        total = numbers + keys.expand(self._seed, self._bits, len(numbers))
        for other in sorted(sealed):
            total = total + _pairwise(self._masking, self.client, self._book, other, self._bits, len(numbers))
        return _reduced(total, self._bits)

    def unmask(self, left: Collection[int], gone: Collection[int]) -> dict[int, bytes]:
        """Step 3: return this client's share of the seed of each who is left, and of the masking key of each who is gone.

        Raises:
            ValueError: somebody would be both, or too few are left: answering would lay a vector open.
        """
        both = sorted(set(left) & set(gone))
        if both:
            raise ValueError(f"client {both[0]} cannot be both left and gone; its vector would lie open")
        if len(left) < self._threshold:
            raise ValueError(f"only {len(left)} clients are left, fewer than the {self._threshold} that were agreed")
        return {other: self._held[other][0] for other in left} | {other: self._held[other][1] for other in gone}


def _pairwise(own: keys.KeyPair, client: int, book: Mapping[int, Advert], other: int, bits: int, size: int) -> Numbers:
    """Return what `client` adds because of `other` [d]: the opposite, modulo the word, of what the other adds because of it."""
    mask = keys.expand(own.agree(book[other].masking), bits, size)
    return mask if client < other else (~mask + mask.dtype.type(1))


def _reduced(numbers: Numbers, bits: int) -> Numbers:
    return numbers & numbers.dtype.type(2**bits - 1)


class Transcript(NamedTuple):
    """What the server has seen and found.

    Attributes:
        total: the sum of the vectors of those who are left [d], modulo 2^bits.
        masked: client → the masked vector that it sent [d].
        gone: who shared keys and sent no vector.
    """

    total: Numbers
    masked: Mapping[int, Numbers]
    gone: tuple[int, ...]


def play(vectors: Mapping[int, Numbers], threshold: int, bits: int, gone: Collection[int] = (), silent: Collection[int] = ()) -> Transcript:
    """Play the protocol and return what the server gets.

    Args:
        vectors: client → its vector [d], numbers below 2^bits; all of one type (`secure_sum.word`).
        threshold: how many clients must be left at the end; at least 2.
        bits: of the group.
        gone: clients without a vector that take part in steps 0 and 1 and are then lost.
        silent: clients that send their vector and are lost before step 3: their vectors count.

    Raises:
        TooFewError: fewer clients than the threshold are left at some step.
    """
    members = {client: Member(client, bits) for client in sorted({*vectors, *gone})}
    if len(members) < threshold:
        raise TooFewError(f"{len(members)} clients are fewer than the threshold of {threshold}")
    book = {client: member.advertise() for client, member in members.items()}
    dealt = {client: member.share(book, threshold) for client, member in members.items()}
    masked = {
        client: members[client].mask(vector, {other: shares[client] for other, shares in dealt.items() if other != client})
        for client, vector in sorted(vectors.items())
    }
    lost = tuple(sorted(set(members) - set(vectors)))
    answering = sorted(set(vectors) - set(silent))
    if len(answering) < threshold:
        raise TooFewError(f"{len(answering)} clients of {len(members)} are left, and {threshold} must be to take the masks off")
    answers = [members[client].unmask(list(masked), lost) for client in answering[:threshold]]
    return Transcript(_unmasked(masked, lost, book, answers, bits), masked, lost)


def _unmasked(
    masked: Mapping[int, Numbers], lost: tuple[int, ...], book: Mapping[int, Advert], answers: list[dict[int, bytes]], bits: int
) -> Numbers:
    """Return the sum without masks: what the server works out from the shares."""
    size = len(next(iter(masked.values())))
    total: Numbers = np.zeros(size, word(bits))
    for client, vector in masked.items():
        seed = keys.recover([answer[client] for answer in answers])
        total = total + vector - keys.expand(seed, bits, size)
    for client in lost:
        pair = keys.KeyPair.of(keys.recover([answer[client] for answer in answers]))
        for other in masked:  # what `other` added because of the lost client is the opposite of what this one would have added
            total = total + _pairwise(pair, client, book, other, bits, size)
    return _reduced(total, bits)
