"""Every reply passes here before any rule sees it; a bad one costs that client that round, by name.

Stock FedAvg checks nothing: a (1,) array broadcasts, NaN wins, one client that claims 1e12 examples owns the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from flwr.app import ArrayRecord, Message

from fedtrust.engine.flower import EXAMPLES, CohortReply, FlatRecord, sender
from fedtrust.engine.partial import wrong
from fedtrust.layout import Layout


class Valid(NamedTuple):
    """The replies of a round that passed.

    Attributes:
        clients: their ids, sorted.
        messages: the replies in the same order.
        faults: client → why its reply was dropped, or that there was none.
    """

    clients: tuple[int, ...]
    messages: list[Message]
    faults: dict[int, str]


def validate(replies: Iterable[Message | None], registered: Mapping[int, int], layout: Layout) -> Valid:
    """Sort the replies of a round into good and bad.

    Args:
        replies: what came back, in any order.
        registered: client → the number of training samples it registered, for every client that was asked.
        layout: the model's parameters.
    """
    good: dict[int, Message] = {}
    faults: dict[int, str] = {}
    for message in replies:
        if message is None:
            continue
        client = sender(message)
        if client not in registered:
            faults[client] = "replied without being asked"
        elif client in good:
            faults[client] = "replied twice"
            del good[client]
        elif client not in faults:
            reason = _wrong(message, registered[client], layout)
            if reason is None:
                good[client] = message
            else:
                faults[client] = reason
    for client in registered:
        if client not in good and client not in faults:
            faults[client] = "no reply"
    clients = tuple(sorted(good))
    return Valid(clients, [good[c] for c in clients], dict(sorted(faults.items())))


def _wrong(message: Message, registered: int, layout: Layout) -> str | None:
    if isinstance(message, CohortReply):
        # A norm says that the update was looked at where it was made.
        unseen = message.delta if message.norm is None else None
        return _wrong_examples(message.examples, registered) or (None if unseen is None else wrong(unseen))
    if message.has_error():
        return str(message.error.reason)
    if not message.has_content():
        return "empty reply"
    content = message.content
    if len(content.array_records) != 1 or len(content.metric_records) != 1:
        return f"{len(content.array_records)} array records and {len(content.metric_records)} metric records, expected one of each"
    metrics = next(iter(content.metric_records.values()))
    return _wrong_examples(metrics.get(EXAMPLES), registered) or _wrong_arrays(next(iter(content.array_records.values())), layout)


def _wrong_examples(claimed: object, registered: int) -> str | None:
    if isinstance(claimed, bool) or not isinstance(claimed, int | float) or not math.isfinite(claimed):
        return f"number of examples is {claimed!r}"
    if claimed != registered:
        return f"claims {claimed:g} examples, registered {registered}"
    return None


def _wrong_arrays(record: ArrayRecord, layout: Layout) -> str | None:
    if isinstance(record, FlatRecord):
        return wrong(record.flat if record.delta is None else record.delta)
    names = tuple(record.keys())
    if names != layout.names:
        missing, extra = set(layout.names) - set(names), set(names) - set(layout.names)
        if missing:
            return f"parameter '{min(missing)}' is missing"
        return f"unknown parameter '{min(extra)}'" if extra else "parameters in another order"
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if tuple(record[name].shape) != shape:
            return f"parameter '{name}' has shape {list(record[name].shape)}, expected {list(shape)}"
        if record[name].dtype != "float32":
            return f"parameter '{name}' is {record[name].dtype}, expected float32"
    try:
        arrays = [torch.from_numpy(record[name].numpy()) for name in layout.names]
    except (TypeError, ValueError, OSError) as error:
        return f"unreadable array: {error}"
    for name, shape, array in zip(layout.names, layout.shapes, arrays, strict=True):
        if tuple(array.shape) != shape or array.dtype != torch.float32:
            return f"parameter '{name}' is not the {list(shape)} float32 array that it says it is"
        if (reason := wrong(array)) is not None:
            return reason
    return None
