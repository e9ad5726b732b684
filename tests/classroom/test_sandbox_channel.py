"""The channel: what comes out of a sandbox is read strictly, and nothing is set aside that is not there."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtrust.classroom.sandbox import channel
from fedtrust.classroom.sandbox.channel import Assembler, Expect, pack, unpack
from fedtrust.classroom.sandbox.faults import SubmissionFault

WANTED = {"x": Expect((2, 3)), "n": Expect((None,), torch.int64, most=8, required=False), "b": Expect((2,), torch.bool, required=False)}


def payload(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def fed(raw: bytes, most: int = 1000) -> channel.Frame | None:
    return Assembler(most).feed(raw)


def test_frame_goes_there_and_back_in_any_pieces() -> None:
    tensors = {"x": torch.randn(2, 3), "n": torch.arange(5), "b": torch.tensor([True, False])}
    raw = pack({"op": "craft", "n": 3}, tensors)
    for size in (1, 7, len(raw)):
        inbox = Assembler(10_000)
        frames = [f for i in range(0, len(raw), size) if (f := inbox.feed(raw[i : i + size]))]
        assert len(frames) == 1
        assert frames[0].data == {"op": "craft", "n": 3}
        found = unpack(frames[0].payload, WANTED)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert all(torch.equal(value, tensors[name]) for name, value in channel.load(frames[0].payload).items())


def test_payload_is_safetensors_both_ways() -> None:
    tensors = {"x": torch.randn(2, 3), "n": torch.arange(5)}
    there = Assembler(10_000).feed(pack({}, tensors))
    assert there is not None
    assert all(torch.equal(v, tensors[k]) for k, v in safetensors.torch.load(there.payload).items())
    assert all(torch.equal(v, tensors[k]) for k, v in unpack(safetensors.torch.save(tensors), WANTED).items())


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"\x80\x04\x95", "reply"),
        (b"FTS1" + b"\xff" * 12, "flood"),
        (struct.pack(">4sIQ", b"FTS1", 2, 1 << 62) + b"{}", "flood"),
        (struct.pack(">4sIQ", b"FTS1", channel.MOST_JSON + 1, 0), "flood"),
        (struct.pack(">4sIQ", b"FTS1", 2, 0) + b"[]", "reply"),
        (struct.pack(">4sIQ", b"FTS1", 5, 0) + b'{"a":', "reply"),
        (struct.pack(">4sIQ", b"FTS1", 9, 0) + b'{"a":NaN}', "reply"),
        (struct.pack(">4sIQ", b"FTS1", 13, 0) + b'{"a":1,"a":2}', "reply"),
        (struct.pack(">4sIQ", b"FTS1", 200_000, 0) + b"[" * 200_000, "reply"),
        (struct.pack(">4sIQ", b"FTS1", 2, 0) + b"{}more", "reply"),
    ],
)
def test_what_is_no_frame_is_refused_by_kind(raw: bytes, kind: str) -> None:
    with pytest.raises(SubmissionFault) as caught:
        fed(raw)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (payload({}, b""), "'x' is missing"),
        (b"\x01", "no safetensors"),
        (payload({}, length=1 << 60), "1152921504606846976 bytes"),
        (payload({}, length=channel.MOST_HEADER + 1), "bytes"),
        (payload({"x": entry([2, 3], 0, 24)}, b""), "where its answer has ended"),
        (payload({"x": entry([2, 3], 1 << 40, (1 << 40) + 24)}, bytes(24)), "where its answer has ended"),
        (payload({"x": entry([2, 3], 0, 20)}, bytes(24)), "needs 24"),
        (payload({"x": entry([2, 3], 24, 0)}, bytes(24)), "needs 24"),
        (payload({"x": entry([2, 3], -24, 0)}, bytes(24)), "no readable"),
        (payload({"x": entry([2, 3], 4, 28)}, bytes(28)), "gaps"),
        (payload({"x": entry([2, 3], 0, 24)}, bytes(25)), "gaps"),
        (payload({"x": entry([3, 2], 0, 24)}, bytes(24)), "shape [3, 2], expected [2, 3]"),
        (payload({"x": entry([6], 0, 24)}, bytes(24)), "shape [6]"),
        (payload({"x": entry([2**31, 2**31, 2**31], 0, 24)}, bytes(24)), "expected [2, 3]"),
        (payload({"x": entry([2, 3], 0, 48, "F64")}, bytes(48)), "F64, expected F32"),
        (payload({"x": entry([2, 3], 0, 24, "I64")}, bytes(24)), "I64, expected F32"),
        (payload({"x": {**entry([2, 3], 0, 24), "more": 1}}, bytes(24)), "no readable entry"),
        (payload({"x": [1]}, bytes(24)), "no readable entry"),
        (payload({"x": entry([2, 3], 0, 24), "y": entry([1], 24, 28)}, bytes(28)), "'y' that nobody asked for"),
        (payload({"x": entry([2, 3], 0, 24), "n": entry([9], 24, 96, "I64")}, bytes(96)), "9 values, the most is 8"),
        (payload({"x": entry([2, 3], 0, 24), "n": entry([1], 16, 24, "I64")}, bytes(24)), "overlap"),
        (payload({"x": entry([2, 3], 0, 24), "b": entry([2], 24, 26, "BOOL")}, bytes(24) + b"\x02\x00"), "neither true nor false"),
        (payload({"x": {"dtype": "F32", "shape": [True, 3], "data_offsets": [0, 24]}}, bytes(24)), "no readable shape"),
        (payload({"x": {"dtype": "F32", "shape": [2, 3.0], "data_offsets": [0, 24]}}, bytes(24)), "no readable shape"),
        (payload(b"[" * 60_000), "not plain data"),
    ],
)
def test_lying_header_is_refused_in_a_sentence(raw: bytes, says: str) -> None:
    with pytest.raises(SubmissionFault) as caught:
        unpack(raw, WANTED)
    assert caught.value.kind == "reply"
    assert says in caught.value.sentence


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_a_kind_of_their_own(bad: float) -> None:
    x = torch.zeros(2, 3)
    x[1, 2] = bad
    frame = fed(pack({}, {"x": x}))
    assert frame is not None
    with pytest.raises(SubmissionFault) as caught:
        unpack(frame.payload, WANTED)
    assert caught.value.kind == "not-finite"


def test_a_header_that_promises_a_terabyte_costs_no_memory() -> None:
    wanted = {"x": Expect((None,), most=2**40)}
    tracemalloc.start()
    with pytest.raises(SubmissionFault):
        unpack(payload({"x": entry([2**38], 0, 2**40)}, bytes(8)), wanted)
    inbox = Assembler(2**41)
    assert inbox.feed(struct.pack(">4sIQ", b"FTS1", 2, 2**40) + b"{}") is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_wildcards_are_capped_together() -> None:
    wanted = {"state.*": Expect((), most=10, called="state")}
    frame = fed(pack({}, {"state.a": torch.zeros(2, 2), "state.b": torch.arange(3)}))
    assert frame is not None
    assert {name: value.shape for name, value in unpack(frame.payload, wanted).items()} == {"state.a": (2, 2), "state.b": (3,)}
    frame = fed(pack({}, {"state.a": torch.zeros(6), "state.b": torch.zeros(6)}))
    assert frame is not None
    with pytest.raises(SubmissionFault, match="its state has more than 10 values"):
        unpack(frame.payload, wanted)


def faults(read: Callable[[], object]) -> SubmissionFault | None:
    """Return the fault that reading ends with; any other error is the test's failure."""
    try:
        read()
    except SubmissionFault as fault:
        return fault
    return None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_fault(raw: bytes) -> None:
    assert faults(lambda: unpack(raw, WANTED)) is not None
    assert faults(lambda: unpack(payload(raw, raw), WANTED)) is not None
    for read in (lambda: fed(raw), lambda: fed(b"FTS1" + raw)):
        fault = faults(read)
        assert fault is None or fault.kind in ("reply", "flood")


PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
ENTRY = st.sampled_from(["dtype", "shape", "data_offsets"])
NESTED = st.recursive(PLAIN, lambda s: st.lists(s, max_size=3) | st.dictionaries(ENTRY, s, max_size=3), max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["x", "n", "b", "y"]), NESTED))
def test_no_header_raises_anything_but_a_fault(header: dict[str, object]) -> None:
    with pytest.raises(SubmissionFault):
        unpack(payload(header, bytes(24)), WANTED)
