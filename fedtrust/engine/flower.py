"""The one file that touches Flower's private parts.

Flower builds messages only inside one of its own runs and keeps model arrays as serialised bytes. Here are the two things that let an
own grid drive any Flower strategy without paying for that: an identity for this process, and records whose arrays are made when asked for.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flwr.serverapp.strategy as stock
import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedtrust.errors import InputError, RunError, allowed_list, nearest
from fedtrust.layout import Layout

#: Flower's record names, used by every stock strategy.
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
EXAMPLES, LOSS = "num-examples", "train_loss"
SERVER_NODE = 1 << 40  # any id that is no client's

_NPY = "numpy.ndarray"
_CLIENT_FAILED = 1

#: Strategies that need what a simulation of gradient-trained networks does not have, and why.
_REFUSED = {
    "FedXgbBagging": "it aggregates boosted trees, not networks",
    "FedXgbCyclic": "it aggregates boosted trees, not networks",
    "Strategy": "it is abstract",
    "Result": "it is not a strategy",
}
_REFUSED |= {
    name: "it wraps another strategy; use the filters and steps of a fedtrust pipeline"
    for name in stock.__all__
    if name.startswith("DifferentialPrivacy")
}
#: Stock strategies that carry nothing from one round to the next, so that a run can be resumed.
_STATELESS = {"Bulyan", "FedAvg", "FedMedian", "FedProx", "FedTrimmedAvg", "Krum", "MultiKrum", "QFedAvg"}
#: Parameters of stock strategies that the simulation itself sets.
_OURS = {
    "self", "fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes", "weighted_by_key",
    "arrayrecord_key", "configrecord_key", "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn", "selection_rule", "train_loss_key",
}  # fmt: skip


def enter() -> None:
    """Give this process the identity that Flower's messages ask for, and keep Flower's log to errors."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SERVER_NODE
    logging.getLogger("flwr").setLevel(logging.ERROR)


class LazyArray(Array):
    """An `Array` whose values, and whose bytes, are made only if somebody reads them.

    Args:
        make: returns the values [*shape], in memory that is nobody else's: some stock strategies compute in place.
        shape: its shape.
        dtype: what Flower calls the type of its values.
    """

    def __init__(self, make: Callable[[], npt.NDArray[Any]], shape: tuple[int, ...], dtype: str = "float32") -> None:
        # Not by assignment: `Array` looks at every one.
        self.__dict__.update(_make=make, dtype=dtype, shape=shape, stype=_NPY)

    @property
    def data(self) -> bytes:
        """The array in NumPy's file format."""
        cached = self.__dict__.get("_data_bytes")
        if cached is None:
            cached = self.__dict__["_data_bytes"] = Array(self.numpy()).data
        return cached

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["_data_bytes"] = value

    def numpy(self) -> npt.NDArray[Any]:
        """Return the array; every call makes another."""
        made: npt.NDArray[Any] = self.__dict__["_make"]()
        return made


class _Sum:
    """The vector `base` [d], or `base + delta`, in named arrays that belong to whoever asks for them.

    It is added up once, when the first array is asked for, and each part of it is given away once; who asks again gets another.
    """

    def __init__(self, base: Tensor, delta: Tensor | None, layout: Layout) -> None:
        self._terms, self._layout = (base, delta), layout
        self._parts: dict[str, npt.NDArray[Any]] | None = None

    def part(self, name: str) -> npt.NDArray[Any]:
        if self._parts is None:
            self._parts = self._made()
        found = self._parts.pop(name, None)
        return self._made()[name] if found is None else found

    def _made(self) -> dict[str, npt.NDArray[Any]]:
        base, delta = (None if term is None else term.detach().cpu().numpy() for term in self._terms)
        assert base is not None
        whole = base.copy() if delta is None else base + delta
        slices = self._layout.slices
        return {name: whole[slices[name]].reshape(shape) for name, shape in zip(self._layout.names, self._layout.shapes, strict=True)}


class FlatRecord(ArrayRecord):
    """A model as one vector; `fill` gives it the named arrays that stock strategies read.

    Attributes:
        layout: how the parameters lie in the vector.
        delta: for a client's reply, its parameters minus the global model [d]: differences keep the digits that sums would lose.
    """

    def __init__(self, base: Tensor, layout: Layout, delta: Tensor | None = None) -> None:
        """Make a record of the parameters `base` [d], or of `base + delta`."""
        super().__init__()
        self.__dict__.update(_base=base, layout=layout, delta=delta)

    layout: Layout
    delta: Tensor | None

    @property
    def flat(self) -> Tensor:
        """The parameters as one vector [d], float32."""
        base: Tensor = self.__dict__["_base"]
        return base if self.delta is None else base + self.delta

    def fill(self) -> FlatRecord:
        """Add the named arrays, lazily; return self."""
        # Not by `self[name] = …`: the checks of names and types cost more than the arrays.
        layout, values = self.layout, _Sum(self.__dict__["_base"], self.delta, self.layout)
        arrays = {
            name: LazyArray(functools.partial(values.part, name), shape) for name, shape in zip(layout.names, layout.shapes, strict=True)
        }
        self.__dict__["_data"].update(arrays)
        return self


def to_flat(record: ArrayRecord, layout: Layout) -> Tensor:
    """Return a record's arrays as a float32 vector [d]; some stock strategies return float64.

    Raises:
        RunError: names or shapes differ from the model's.
    """
    if isinstance(record, FlatRecord) and not len(record):
        return record.flat
    try:
        parts = {n: torch.from_numpy(np.array(record[n].numpy(), dtype=np.float32)) for n in layout.names}
    except KeyError as error:
        raise RunError(f"the strategy returned a model without parameter {error}") from None
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if parts[name].shape != shape:
            raise RunError(f"the strategy returned parameter '{name}' with shape {list(parts[name].shape)}, expected {list(shape)}")
    return layout.flatten(parts)


def instruction(record: RecordDict, client: int, number: int) -> Message:
    """Return the message that asks a client to train."""
    return stamped(Message(content=record, message_type="train", dst_node_id=client), number)


def stamped(message: Message, number: int) -> Message:
    """Give a message the id that Flower's own link would."""
    if isinstance(message, Instruction):
        message.number = number
        return message
    message.metadata.__dict__["_message_id"] = str(number)
    return message


class Added(NamedTuple):
    """What the clients sent whose updates were added up where they were made; see `fedtrust.engine.partial`.

    Attributes:
        total: the weighted sum of their filtered updates [d].
        clients: who they are.
        trust: client → how far the filters trust its row, or `None`.
        bound: the largest L2 norm a row can have, if the last filter guarantees one.
    """

    total: Tensor
    clients: frozenset[int]
    trust: Mapping[int, float] | None
    bound: float | None


class Instruction(Message):
    """A server's instruction to train, whose metadata are made only if somebody reads them; see `CohortReply`.

    Attributes:
        client: whom it addresses.
        number: its id.
    """

    def __init__(self, content: RecordDict, client: int) -> None:
        self.client, self.number = client, 0
        self.__dict__.update(_said=content, _full=None)

    def has_error(self) -> bool:
        """There is none."""
        return False

    def has_content(self) -> bool:
        """There is always content."""
        return True

    @property
    def metadata(self) -> Metadata:
        """Flower's metadata of the instruction."""
        if self.__dict__["_full"] is None:
            full = Message(content=self.__dict__["_said"], message_type="train", dst_node_id=self.client)
            self.__dict__["_full"] = stamped(full, self.number)
        made: Metadata = self.__dict__["_full"].metadata
        return made

    @property  # type: ignore[misc]  # nobody writes into an instruction
    def content(self) -> RecordDict:
        """What it says."""
        said: RecordDict = self.__dict__["_said"]
        return said


class CohortReply(Message):
    """A client's reply whose Flower records are made only if somebody reads them: a thousand clients a round cost nothing before that.

    Attributes:
        client: who replies.
        delta: its update [d], or `None` where that was only added up.
        examples: the number of samples it says it trained on.
        norm: the L2 norm of its update, taken where the update was made and found sound; `None` if it was changed after that.
        added: the sum that its update is in, or `None`.
    """

    def __init__(
        self, order: Message, base: Tensor, layout: Layout, delta: Tensor | None, examples: float, loss: float, norm: float | None,
        added: Added | None, named: bool = False,
    ) -> None:  # fmt: skip
        """Reply to `order`, which carried the model `base` [d]; `named`: with an array for each parameter, as stock strategies read it."""
        self.client, self.delta, self.examples, self.norm, self.added = addressee(order), delta, examples, norm, added
        self.__dict__.update(_order=order, _base=base, _layout=layout, _loss=loss, _named=named, _said=None, _full=None)

    def has_error(self) -> bool:
        """There is none: what fails is answered by `failure`."""
        return False

    def has_content(self) -> bool:
        """There is always content."""
        return True

    @property
    def metadata(self) -> Metadata:
        """Flower's metadata of the reply."""
        if self.__dict__["_full"] is None:
            self.__dict__["_full"] = Message(self.content, reply_to=self.__dict__["_order"])
        made: Metadata = self.__dict__["_full"].metadata
        return made

    @property  # type: ignore[misc]  # nobody writes into a reply
    def content(self) -> RecordDict:
        """Flower's records of the reply."""
        said: RecordDict | None = self.__dict__["_said"]
        if said is None:
            if self.delta is None:
                raise RunError(f"client {self.client}'s update was only added up; nobody can read it")
            record = FlatRecord(self.__dict__["_base"], self.__dict__["_layout"], self.delta)
            arrays = record.fill() if self.__dict__["_named"] else record
            said = self.__dict__["_said"] = content(arrays, self.examples, self.__dict__["_loss"])
        return said


def addressee(message: Message) -> int:
    """Return the client that an instruction is for."""
    return message.client if isinstance(message, Instruction) else int(message.metadata.dst_node_id)


def sender(message: Message) -> int:
    """Return the client that sent a reply."""
    return message.client if isinstance(message, CohortReply) else int(message.metadata.src_node_id)


def update(message: Message, params: Tensor, layout: Layout) -> Tensor:
    """Return the update [d] in a valid reply: the local model minus `params`."""
    if isinstance(message, CohortReply) and message.delta is not None:
        return message.delta
    record = next(iter(message.content.array_records.values()))
    if isinstance(record, FlatRecord) and record.delta is not None:
        return record.delta
    return to_flat(record, layout) - params


def answer(message: Message, arrays: ArrayRecord, examples: float, loss: float) -> Message:
    """Return a client's reply."""
    return Message(content(arrays, examples, loss), reply_to=message)


def content(arrays: ArrayRecord, examples: float, loss: float) -> RecordDict:
    """Return the records of a client's reply."""
    return RecordDict({ARRAYS: arrays, METRICS: MetricRecord({EXAMPLES: examples, LOSS: loss})})


def failure(message: Message, reason: str) -> Message:
    """Return the reply of a client that could not answer."""
    return Message(Error(_CLIENT_FAILED, reason), reply_to=message)


def config(record: RecordDict) -> Mapping[str, Any]:
    """Return the configuration in an instruction."""
    found = record.config_records.get(CONFIG)
    return found if found is not None else ConfigRecord()


def stock_check(name: str, params: Mapping[str, Any]) -> type[Strategy]:
    """Return the stock strategy class `flwr:NAME`.

    Raises:
        InputError: there is none of that name, it cannot run here, or a parameter is not one of its own.
    """
    if name not in stock.__all__:
        known = [n for n in stock.__all__ if n not in _REFUSED]
        raise InputError(f"Flower has no strategy '{name}' (known: {allowed_list(known, 20)}){nearest(name, known)}")
    if name in _REFUSED:
        raise InputError(f"flwr:{name} cannot run here: {_REFUSED[name]}")
    strategy: type[Strategy] = getattr(stock, name)
    signature = {p.name: p for p in stock_parameters(strategy)}
    known = list(signature)
    for given in params:
        if given not in known:
            allowed = ", ".join(known) or "none"
            raise InputError(f"flwr:{name} has no parameter '{given}' (parameters: {allowed}){nearest(given, known)}", given)
    missing = [p for p in known if signature[p].default is inspect.Parameter.empty and p not in params]
    if missing:
        raise InputError(f"flwr:{name} needs parameter '{missing[0]}'", missing[0])
    return strategy


def stock_parameters(strategy: type[Strategy]) -> list[inspect.Parameter]:
    """Return the parameters of a stock strategy that a scenario may set."""
    found = inspect.signature(strategy.__init__).parameters.values()
    return [p for p in found if p.name not in _OURS and p.kind is not inspect.Parameter.VAR_KEYWORD]


def stock_strategy(name: str, params: Mapping[str, Any], assumed_malicious: int) -> Strategy:
    """Return the stock strategy `flwr:NAME`, set up to take the whole cohort that the grid shows it.

    `num_malicious_nodes` defaults to what the scenario's defender assumes.
    """
    strategy = stock_check(name, params)
    settings: dict[str, Any] = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0, **params}
    if "num_malicious_nodes" in inspect.signature(strategy.__init__).parameters:
        settings.setdefault("num_malicious_nodes", assumed_malicious)
    enter()
    try:
        return strategy(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"flwr:{name}: {error}") from None


_collecting = threading.Lock()
_frozen = 0  # how many blocks of `cheap_collection` are open, in all threads


@contextlib.contextmanager
def cheap_collection() -> Iterator[None]:
    """Keep what is alive now out of garbage collection while the block runs: some stock strategies collect after every client.

    The collector is the process's: of several threads the first freezes, and the last one thaws.
    """
    global _frozen
    with _collecting:
        _frozen += 1
        if _frozen == 1:
            gc.freeze()
    try:
        yield
    finally:
        with _collecting:
            _frozen -= 1
            if not _frozen:
                gc.unfreeze()


def resumable(name: str) -> bool:
    """Return whether a stock strategy starts every round from nothing but the global model."""
    return name in _STATELESS
