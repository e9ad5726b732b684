"""The cryptography of secure aggregation, in one place.

Key agreement, encryption and secret sharing are Flower's own (`flwr.common.secure_aggregation.crypto`, `flwr.supercore.primitives`):
elliptic-curve Diffie-Hellman over P-384 with HKDF-SHA256, Fernet, and Shamir's scheme over GF(2¹²⁸) from PyCryptodome. Three of Flower's
helpers beside them do not serve, and are replaced:

- its mask generator folds a 256-bit seed to 32 bits by exclusive or, which can be searched through, and never draws the largest element
  of the group, so that masked numbers are not uniform; here masks are the key stream of AES-256 in counter mode, as in Bonawitz et al.;
- its quantiser draws from NumPy's global generator (here `fedtrust.privacy.secure_sum.Quantiser`);
- it shares a private key as 306 bytes of PEM; here as the 48 bytes of its scalar, a sixth of the work.

Keys, seeds and shares come from the operating system's source of randomness, never from the scenario's seed. No result depends on them:
masks cancel.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, generate_key_pairs, public_key_to_bytes

from fedtrust.privacy.secure_sum import word

#: Length of a seed in bytes (the key of AES-256), and of a private scalar on P-384.
SEED, SCALAR = 32, 48


class KeyPair:
    """A key pair on P-384."""

    def __init__(self, private: ec.EllipticCurvePrivateKey) -> None:
        self._private = private
        self.public = public_key_to_bytes(private.public_key())  # what others are told

    @classmethod
    def fresh(cls) -> KeyPair:
        """Return a new key pair."""
        return cls(generate_key_pairs()[0])

    @classmethod
    def of(cls, secret: bytes) -> KeyPair:
        """Return the key pair of a private scalar, `secret`."""
        return cls(ec.derive_private_key(int.from_bytes(secret, "big"), ec.SECP384R1()))

    @property
    def secret(self) -> bytes:
        """The private scalar, `SCALAR` bytes."""
        return self._private.private_numbers().private_value.to_bytes(SCALAR, "big")

    def agree(self, public: bytes) -> bytes:
        """Return the key that this pair and the other's public key have in common: the same from either side."""
        return generate_shared_key(self._private, bytes_to_public_key(public))


def fresh_seed() -> bytes:
    """Return a new seed of `SEED` bytes."""
    return os.urandom(SEED)


def seal(key: bytes, message: bytes) -> bytes:
    """Return the message encrypted and authenticated with an agreed key."""
    return encrypt(key, message)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Return the message in a sealed one.

    Raises:
        ValueError: it was sealed with another key, or altered.
    """
    try:
        return decrypt(key, sealed)
    except (InvalidToken, InvalidTag):
        raise ValueError("a sealed message does not open: it was sealed with another key, or altered") from None


def share(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Return `count` shares of a secret, any `threshold` of which give it back and fewer of which say nothing about it.

    A threshold of one, of which Shamir's scheme knows nothing, would be no secret.
    """
    if not 2 <= threshold <= count:
        raise ValueError(f"a threshold lies between 2 and the number of shares, got {threshold} of {count}")
    return create_shares(secret, threshold, count)


def recover(shares: Sequence[bytes]) -> bytes:
    """Return the secret of so many shares as its threshold asks for.

    Raises:
        ValueError: the shares do not fit together (fewer than the threshold usually do not).
    """
    return combine_shares(list(shares))


def expand(seed: bytes, bits: int, size: int) -> npt.NDArray[np.unsignedinteger]:
    """Return `size` numbers uniform in 0 … 2^bits − 1 (uint32 up to 32 bits, else uint64): AES-256's key stream in counter mode.

    Args:
        seed: `SEED` bytes, or an agreed key, which is the same in base64.
        bits: at most 64.
        size: how many.
    """
    key = seed if len(seed) == SEED else base64.urlsafe_b64decode(seed)
    kind = word(bits)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size * kind.itemsize))
    numbers: npt.NDArray[np.unsignedinteger] = np.frombuffer(stream, dtype=kind.newbyteorder("<")).astype(kind)
    numbers &= kind.type(2**bits - 1)
    return numbers
