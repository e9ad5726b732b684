"""How the host and a sandbox talk: frames of capped JSON and capped safetensors, over pipes. No pickle, no `torch.load`.

A frame is `FTS1`, the length of the JSON (4 bytes, big-endian), the length of the payload (8 bytes), the JSON, the payload. The payload
is a safetensors file. What comes out of a sandbox is a stranger's word: lengths are looked at before anything is set aside, the
safetensors header is read by a strict reader of our own, and only the tensors that were asked for, in the types and shapes that were asked
for, become tensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtrust.classroom.sandbox.faults import SubmissionFault

MAGIC = b"FTS1"
_HEAD = struct.Struct(">4sIQ")
#: Bytes of a frame's JSON, and of a safetensors header.
MOST_JSON = 256 * 1024
MOST_HEADER = 64 * 1024
_TYPES: dict[str, torch.dtype] = {"F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_Tensors = Mapping[str, Tensor]


class Expect(NamedTuple):
    """What a tensor from a sandbox must be.

    Attributes:
        shape: its shape; `None` stands for any length, then `most` caps the number of values. An expectation whose name ends in `*` is
            for all tensors whose names begin so, of any type and shape (`shape` is empty then), `most` values together.
        dtype: its type: float32, int64 or bool.
        most: the most values, where a length is free.
        required: whether it must be there.
        called: what a student knows it by.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32
    most: int = 0
    required: bool = True
    called: str = ""

    @property
    def bytes(self) -> int:
        """The most bytes that it can have."""
        values = self.most if self.most else math.prod(n for n in self.shape if n is not None)
        return values * self.dtype.itemsize


Expected = Mapping[str, Expect]


def most_payload(expected: Expected) -> int:
    """Return the most bytes that a payload with these tensors can have."""
    return sum(e.bytes for e in expected.values()) + MOST_HEADER + 8


def pack(data: Mapping[str, Any], tensors: _Tensors | None = None) -> bytes:
    """Return a frame; float32, int64 and bool tensors only.

    Raises:
        ValueError: a tensor of another type, or too much JSON.
    """
    said = json.dumps(data, allow_nan=False, separators=(",", ":")).encode()
    if len(said) > MOST_JSON:
        raise ValueError(f"{len(said)} bytes of plain data, the most is {MOST_JSON}")
    payload = _payload(tensors) if tensors else b""
    return b"".join((_HEAD.pack(MAGIC, len(said), len(payload)), said, payload))


def _payload(tensors: _Tensors) -> bytes:
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    start = 0
    for name, value in tensors.items():
        if value.dtype not in _NAMES:
            raise ValueError(f"tensor '{name}' is {value.dtype}; float32, int64 and bool can be sent")
        raw = value.detach().cpu().contiguous().numpy().tobytes()
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, start + len(raw)]}
        parts.append(raw)
        start += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors lie at multiples of eight
    return b"".join((struct.pack("<Q", len(text)), text, *parts))


class Frame(NamedTuple):
    """What came: plain data, and the payload as bytes that nobody has looked at."""

    data: dict[str, Any]
    payload: bytes


class Assembler:
    """Puts a stranger's bytes together to frames, and holds no more of them than a frame may have.

    Args:
        most: the most bytes of a payload.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._held = bytearray()

    def feed(self, chunk: bytes) -> Frame | None:
        """Take in bytes; return the frame that they complete.

        Raises:
            SubmissionFault: `flood` for one that says it is too long, `reply` for what is no frame, or no plain JSON object.
        """
        self._held += chunk
        if len(self._held) < _HEAD.size:
            if not MAGIC.startswith(bytes(self._held[:4])):
                raise SubmissionFault("reply", "what came out of its process is no answer")
            return None
        magic, data, payload = _HEAD.unpack_from(self._held)
        if magic != MAGIC:
            raise SubmissionFault("reply", "what came out of its process is no answer")
        if data > MOST_JSON or payload > self.most:
            raise SubmissionFault("flood", f"its answer has {data + payload} bytes, the most is {self.most}")
        whole = _HEAD.size + data + payload
        if len(self._held) < whole:
            return None
        if len(self._held) > whole:
            raise SubmissionFault("reply", "it answered more than it was asked")
        frame = Frame(_plain(bytes(self._held[_HEAD.size : _HEAD.size + data])), bytes(self._held[_HEAD.size + data :]))
        self._held.clear()
        return frame


def _plain(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise SubmissionFault("reply", "its answer is not plain data (JSON)") from None
    if not isinstance(found, dict):
        raise SubmissionFault("reply", "its answer is not plain data (a JSON object)")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def unpack(payload: bytes, expected: Expected) -> dict[str, Tensor]:
    """Return the tensors of a payload, which must be those expected and nothing else.

    Strict: the header's length is checked before it is read; names, types, shapes and offsets must be plain; the tensors lie one after
    another from the first byte to the last. Nothing is set aside that the payload does not already hold.

    Raises:
        SubmissionFault: `reply` if it is anything else, `not-finite` for NaN or infinity.
    """
    header, body = _header(payload)
    expected = _spelt_out(expected, header)
    unknown = [name for name in header if name not in expected]
    if unknown:
        raise SubmissionFault("reply", f"its answer holds a tensor '{unknown[0][:40]}' that nobody asked for")
    spans, found = [], {}
    for name, wanted in expected.items():
        called = wanted.called or f"'{name}'"
        if name not in header:
            if wanted.required:
                raise SubmissionFault("reply", f"{called} is missing in its answer")
            continue
        shape, start, stop = _entry(header[name], wanted, called)
        spans.append((start, stop))
        if stop > len(body):
            raise SubmissionFault("reply", f"{called} says that it lies where its answer has ended")
        if start == stop:
            found[name] = torch.zeros(shape, dtype=wanted.dtype)
            continue
        raw = bytearray(body[start:stop])
        if wanted.dtype == torch.bool and raw.translate(None, b"\x00\x01"):
            raise SubmissionFault("reply", f"{called} holds truth values that are neither true nor false")
        found[name] = torch.frombuffer(raw, dtype=wanted.dtype).reshape(shape)
        if wanted.dtype == torch.float32 and not bool(torch.isfinite(found[name]).all()):
            raise SubmissionFault("not-finite", f"{called} holds NaN or infinity")
    spans.sort()
    edges = [0, *(edge for span in spans for edge in span), len(body)]
    if edges[0::2] != edges[1::2]:
        raise SubmissionFault("reply", "the tensors in its answer overlap, or leave gaps")
    return found


def _spelt_out(expected: Expected, header: Mapping[str, Any]) -> Expected:
    """Return the expectations with each `name.*` replaced by the names that are there, as what they say they are."""
    plain = {name: wanted for name, wanted in expected.items() if not name.endswith("*")}
    for name, wanted in expected.items():
        if not name.endswith("*"):
            continue
        left = wanted.bytes
        for given, entry in header.items():
            if not given.startswith(name[:-1]) or given in plain or not isinstance(entry, dict):
                continue
            dtype, shape = entry.get("dtype"), entry.get("shape")
            if not isinstance(dtype, str) or dtype not in _TYPES or not isinstance(shape, list) or not _whole(shape):
                continue  # said of it below, as of any tensor that nobody asked for
            left -= math.prod(shape) * _TYPES[dtype].itemsize
            if left < 0:
                raise SubmissionFault("reply", f"its {wanted.called or name[:-2]} has more than {wanted.most} values")
            plain[given] = Expect(tuple(shape), _TYPES[dtype])
    return plain


def _header(payload: bytes) -> tuple[dict[str, Any], memoryview]:
    if not payload:
        return {}, memoryview(b"")
    if len(payload) < 8:
        raise SubmissionFault("reply", "its answer holds no safetensors")
    (length,) = struct.unpack_from("<Q", payload)
    if length > min(MOST_HEADER, len(payload) - 8):
        raise SubmissionFault("reply", f"its answer's safetensors header says that it has {length} bytes")
    header = _plain(payload[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, memoryview(payload)[8 + length :]


def _entry(entry: object, wanted: Expect, called: str) -> tuple[tuple[int, ...], int, int]:
    """Return the shape and the place of a tensor whose entry in the header is what was asked for."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise SubmissionFault("reply", f"{called} has no readable entry in its answer's header")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_whole(shape) and _whole(offsets) and len(offsets) == 2 and len(shape) <= 8):
        raise SubmissionFault("reply", f"{called} has no readable shape or place in its answer's header")
    dtype = _TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype != wanted.dtype:
        said = entry["dtype"][:12] if isinstance(entry["dtype"], str) else "of no type"
        raise SubmissionFault("reply", f"{called} is {said}, expected {_NAMES[wanted.dtype]} ({wanted.dtype})")
    fits = len(shape) == len(wanted.shape) and all(w is None or n == w for n, w in zip(shape, wanted.shape, strict=True))
    if not fits:
        hoped = ", ".join("any" if n is None else str(n) for n in wanted.shape)
        raise SubmissionFault("reply", f"{called} has shape {shape}, expected [{hoped}]")
    values = math.prod(shape)
    if values * dtype.itemsize > wanted.bytes:
        raise SubmissionFault("reply", f"{called} has {values} values, the most is {wanted.bytes // dtype.itemsize}")
    start, stop = offsets
    if stop - start != values * dtype.itemsize:
        raise SubmissionFault("reply", f"{called} says that it has {stop - start} bytes, its shape needs {values * dtype.itemsize}")
    return tuple(shape), start, stop


def _whole(numbers: object) -> bool:
    return isinstance(numbers, list) and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**53 for n in numbers)


# ------------------------------------------------------------------------------------------ inside the sandbox, where the host is trusted


def read(fd: int) -> Frame | None:
    """Return the host's next frame from a blocking pipe, or `None` at its end."""
    head = _exactly(fd, _HEAD.size)
    if head is None:
        return None
    magic, data, payload = _HEAD.unpack(head)
    if magic != MAGIC:
        raise ValueError("not a frame")
    said, rest = _exactly(fd, data), _exactly(fd, payload)
    if said is None or rest is None:
        return None
    return Frame(json.loads(said), rest)


def _exactly(fd: int, count: int) -> bytes | None:
    held = bytearray()
    while len(held) < count:
        chunk = os.read(fd, min(count - len(held), 1 << 20))
        if not chunk:
            return None
        held += chunk
    return bytes(held)


def load(payload: bytes) -> dict[str, Tensor]:
    """Return the tensors that the host sent."""
    header, body = _header_of_host(payload)
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        dtype = _TYPES[entry["dtype"]]
        raw = bytearray(body[start:stop])
        found[name] = torch.frombuffer(raw, dtype=dtype).reshape(entry["shape"]) if raw else torch.zeros(entry["shape"], dtype=dtype)
    return found


def _header_of_host(payload: bytes) -> tuple[dict[str, Any], memoryview]:
    if not payload:
        return {}, memoryview(b"")
    (length,) = struct.unpack_from("<Q", payload)
    return json.loads(payload[8 : 8 + length]), memoryview(payload)[8 + length :]


def write(fd: int, frame: bytes) -> None:
    """Write a whole frame to a blocking pipe."""
    view = memoryview(frame)
    while view:
        view = view[os.write(fd, view) :]
