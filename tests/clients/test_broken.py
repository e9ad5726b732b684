from __future__ import annotations

import typing

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedtrust.client import Reply
from fedtrust.clients.broken import Fault
from fedtrust.engine import flower
from fedtrust.engine.validate import validate
from tests.clients.behaviour_kit import LAYOUT, TABLE, make, view

REASONS = {
    "nan": "NaN in the update",
    "inf": "infinite value",
    "wrong-shape": "parameter 'weight' has shape [6, 4], expected [3, 4]",
    "scalar": "parameter 'weight' has shape [1], expected [3, 4]",
    "missing-key": "parameter 'weight' is missing",
    "extra-key": "unknown parameter 'backdoor'",
    "permuted-keys": "parameters in another order",
    "float64": "parameter 'weight' is float64, expected float32",
    "huge-weight": "claims 1e+12 examples, registered 5",
    "negative-weight": "claims -1 examples, registered 5",
}


def arrays() -> dict[str, Tensor]:
    return LAYOUT.unflatten(torch.arange(15.0))


def sent(fault: str | None) -> Reply | None:
    reply = Reply(arrays(), 5)
    return reply if fault is None else make("malformed", fault=fault).reply(reply, view(TABLE))


def verdict(reply: Reply) -> str | None:
    """Why validation drops the reply, if it does."""
    flower.enter()
    order = flower.instruction(RecordDict({flower.CONFIG: ConfigRecord()}), 3, 1)
    record = ArrayRecord()
    for name, value in reply.arrays.items():
        record[name] = Array(value.numpy())
    return validate([flower.answer(order, record, reply.examples, 0.1)], {3: 5}, LAYOUT).faults.get(3)


def test_the_reply_without_a_fault_is_good() -> None:
    reply = sent(None)
    assert reply is not None
    assert verdict(reply) is None


@pytest.mark.parametrize("fault", list(REASONS))
def test_each_fault_is_the_one_it_is_called(fault: str) -> None:
    reply = sent(fault)
    assert reply is not None
    assert REASONS[fault] in str(verdict(reply))


def test_the_other_faults_send_nothing() -> None:
    assert sent("no-reply") is None
    with pytest.raises(RuntimeError, match="fell over"):
        sent("error")
    assert {*REASONS, "no-reply", "error"} == set(typing.get_args(Fault))


def test_the_reply_it_was_given_is_left_as_it_is() -> None:
    reply = Reply(arrays(), 5)
    for fault in REASONS:
        make("malformed", fault=fault).reply(reply, view(TABLE))
    assert list(reply.arrays) == ["weight", "bias"]
    assert torch.equal(LAYOUT.flatten(reply.arrays), torch.arange(15.0))
    assert reply.examples == 5
