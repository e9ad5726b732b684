"""Nothing broken reaches a rule; who sent it is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedtrust.engine import flower
from fedtrust.engine.validate import validate
from fedtrust.layout import Layout

LAYOUT = Layout(("a", "b"), ((2, 3), (4,)))


def asked(client: int) -> Message:
    flower.enter()
    record = RecordDict({"arrays": flower.FlatRecord(torch.zeros(10), LAYOUT), "config": ConfigRecord()})
    return flower.instruction(record, client, client + 1)


def arrays(**changes: Any) -> ArrayRecord:
    values: dict[str, Any] = {"a": torch.zeros(2, 3), "b": torch.ones(4)} | changes
    record = ArrayRecord()
    for name, value in values.items():
        if value is not None:
            record[name] = value if isinstance(value, Array) else Array(value.numpy())
    return record


def good(client: int) -> Message:
    delta = torch.full((10,), 0.5)
    return flower.answer(asked(client), flower.FlatRecord(torch.zeros(10), LAYOUT, delta), 7, 0.1)


def bad_record(record: ArrayRecord, examples: Any = 7) -> Callable[[int], Message]:
    return lambda client: flower.answer(asked(client), record, examples, 0.1)


def without_metrics(client: int) -> Message:
    return Message(RecordDict({"arrays": arrays()}), reply_to=asked(client))


def flat(value: float) -> ArrayRecord:
    delta = torch.zeros(10)
    delta[9] = value
    return flower.FlatRecord(torch.zeros(10), LAYOUT, delta)


def lying_array() -> Array:
    return Array("float32", (4,), "numpy.ndarray", Array(torch.ones(5).numpy()).data)


BAD: dict[str, tuple[Callable[[int], Message], str]] = {
    "nan": (bad_record(arrays(b=torch.tensor([1.0, float("nan"), 0, 0]))), "NaN in the update"),
    "inf": (bad_record(arrays(b=torch.tensor([1.0, float("inf"), 0, 0]))), "infinite value"),
    "nan in a vector": (bad_record(flat(float("nan"))), "NaN in the update"),
    "inf in a vector": (bad_record(flat(float("-inf"))), "infinite value"),
    "broadcasting scalar": (bad_record(arrays(b=torch.zeros(1))), "'b' has shape [1], expected [4]"),
    "transposed": (bad_record(arrays(a=torch.zeros(3, 2))), "'a' has shape [3, 2], expected [2, 3]"),
    "missing": (bad_record(arrays(a=None)), "'a' is missing"),
    "extra": (bad_record(arrays(c=torch.zeros(1))), "unknown parameter 'c'"),
    "permuted": (bad_record(ArrayRecord(dict(reversed(arrays().items())))), "another order"),
    "float64": (bad_record(arrays(b=torch.ones(4, dtype=torch.float64))), "is float64, expected float32"),
    "lying header": (bad_record(arrays(b=lying_array())), "not the [4] float32 array"),
    "garbage bytes": (bad_record(arrays(b=Array("float32", (4,), "numpy.ndarray", b"junk"))), "unreadable array"),
    "huge claim": (bad_record(arrays(), 1e12), "claims 1e+12 examples, registered 7"),
    "negative claim": (bad_record(arrays(), -7), "claims -7 examples"),
    "list claim": (bad_record(arrays(), [7, 7]), "number of examples is [7, 7]"),
    "no metrics": (without_metrics, "0 metric records"),
    "error": (lambda c: flower.failure(asked(c), "fell over"), "fell over"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_dropped_by_name(kind: str) -> None:
    make, reason = BAD[kind]
    valid = validate([good(0), make(1), good(2)], {0: 7, 1: 7, 2: 7}, LAYOUT)
    assert valid.clients == (0, 2)
    assert list(valid.faults) == [1]
    assert reason in valid.faults[1]


def test_good_replies_come_back_sorted_by_client() -> None:
    valid = validate([good(5), good(1), good(3)], {1: 7, 3: 7, 5: 7}, LAYOUT)
    assert valid.clients == (1, 3, 5)
    assert [m.metadata.src_node_id for m in valid.messages] == [1, 3, 5]
    assert valid.faults == {}


def test_a_full_record_of_the_right_kind_passes() -> None:
    assert validate([bad_record(arrays())(0)], {0: 7}, LAYOUT).clients == (0,)


def test_missing_repeated_and_uninvited_replies() -> None:
    valid = validate([good(0), None, good(2), good(2), good(9)], {0: 7, 1: 7, 2: 7}, LAYOUT)
    assert valid.clients == (0,)
    assert valid.faults == {1: "no reply", 2: "replied twice", 9: "replied without being asked"}
