"""The teacher's secret file: the hidden seeds follow from it, and a commitment that is published beforehand shows that they did.

A seed is the first eight bytes of HMAC-SHA256(secret, "fedtrust|exercise|phase|day|number"), less the sign bit. Without the secret nobody
can tell the hidden seeds, whatever was played before; with it, once it is published, everybody can work them out again. The commitment
is the SHA-256 of the file's bytes: it hides them as long as they cannot be guessed, which is why a short file is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from fedtrust.errors import InputError

#: Fewer bytes than this could be found by trying.
LEAST_BYTES = 16
_MOST_BYTES = 1_000_000


def read(path: Path) -> bytes:
    """Return the secret.

    Raises:
        InputError: there is none, or it is too short to be one.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", str(path)) from None
    if not LEAST_BYTES <= len(content) <= _MOST_BYTES:
        raise InputError(
            f"should hold at least {LEAST_BYTES} bytes that nobody can guess (it has {len(content)}); "
            "`fedtrust tournament commit FILE --new` writes one",
            str(path),
        )
    return content


def create(path: Path) -> bytes:
    """Write a new secret that only its owner can read, and return it.

    Raises:
        InputError: there is a file already, or it cannot be written.
    """
    content = (secrets.token_hex(32) + "\n").encode()
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    except FileExistsError:
        raise InputError("is there already; a secret is never overwritten", str(path)) from None
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", str(path)) from None
    return content


def commitment(secret: bytes) -> str:
    """Return the SHA-256 of the secret, in hex."""
    return hashlib.sha256(secret).hexdigest()


def seeds(secret: bytes, exercise: str, phase: str, day: str, count: int) -> list[int]:
    """Return the hidden seeds of a phase.

    Args:
        secret: the file's bytes.
        exercise: its name.
        phase: `hidden` or `final`.
        day: of the hidden phase; "" for the final.
        count: how many.
    """
    found = []
    for number in range(count):
        name = f"fedtrust|{exercise}|{phase}|{day}|{number}".encode()
        found.append(int.from_bytes(hmac.digest(secret, name, "sha256")[:8], "big") >> 1)
    return found
