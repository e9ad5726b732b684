"""From names and parameters to a data set that is spread over clients."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtrust.data.base import FederatedData, IntArray, RawData, SkewFn
from fedtrust.data.split import strata, stratified_rows
from fedtrust.engine.seeds import stream
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY

#: How many raw data sets a process keeps; a sweep rarely mixes more.
_KEPT = 4


def build(
    source: str,
    params: Mapping[str, Any],
    partition: str,
    partition_params: Mapping[str, Any],
    skew: tuple[str, Mapping[str, Any]] | None,
    clients: int,
    seed: int,
    root_samples: int = 0,
) -> FederatedData:
    """Load a source, set the server's root samples aside, spread the rest over the clients and put on their feature skew.

    The same arguments give the same bits. The tensors are the caller's own: nothing done to them reaches another call.

    Args:
        source: registered name of the data set.
        params: its parameters.
        partition: registered name of the partition.
        partition_params: its parameters.
        skew: registered name and parameters of the feature skew, or `None`.
        clients: number of clients.
        seed: the scenario's seed; partition, root set and skew depend on it, the train/test split does not.
        root_samples: size of the server's own labelled set, stratified by class; training samples that no client gets.

    Returns:
        The data set; `x` holds the clients' samples only (and what the partition leaves unused), never the root set's.

    Raises:
        InputError: an unknown name or parameter, missing files, or numbers that do not go together; placed under `data.source`,
            `data.partition`, `data.skew`, `data.root_samples` or `clients.count`.
    """
    raw = load(source, params)
    if clients < 1:
        raise InputError(f"at least one client is needed (got {clients})", "clients.count")
    if skew is not None and raw.task.kind == "characters":
        raise InputError("a text has no features that could be skewed", "data.skew")
    labels = strata(raw.y_train.numpy(), raw.task.kind == "classification") if raw.groups is None else raw.groups.numpy()
    root_rows, rows = _set_aside(labels, root_samples, seed)
    if clients > len(rows):
        raise InputError(f"{clients} clients cannot share {len(rows)} training samples", "clients.count")
    with _placed("data.partition"):
        spread = REGISTRY.make("partition", partition, partition_params)
        parts = _checked(spread(labels[rows], clients, stream(seed, "partition")), clients, len(rows), partition)
    x, y = _take(raw, rows)
    skews: list[SkewFn] = []
    if skew is not None:
        with _placed("data.skew"):
            skews = REGISTRY.make("feature-skew", skew[0], skew[1])(clients, raw.task, seed)
            _put_on(x, parts, skews, skew[0])
    root = _take(raw, root_rows) if root_samples else None
    return FederatedData(raw.task, x, y, parts, raw.x_test.clone(), raw.y_test.clone(), root, skews, raw.secrets)


def load(source: str, params: Mapping[str, Any]) -> RawData:
    """Return a source's data, read once per process for the same name and parameters.

    The tensors are shared between callers and must not be changed in place.

    Raises:
        InputError: an unknown name or parameter, files that are not there, or a source that breaks its promises.
    """
    with _placed("data", "source"):
        entry = REGISTRY.get("source", source)
        checked = entry.check(params)
        try:
            text = json.dumps(checked, sort_keys=True)
        except TypeError:  # a plugin's parameter that has no JSON form: read without remembering
            return _sound(entry.target(**checked), source)
        return _remembered(entry.target, source, text)


@functools.lru_cache(maxsize=_KEPT)
def _remembered(target: Callable[..., RawData], name: str, params: str) -> RawData:
    return _sound(target(**json.loads(params)), name)


def _sound(raw: RawData, name: str) -> RawData:
    """Return `raw`, or raise `InputError` if it is not what `RawData` promises."""
    task = raw.task
    text = task.kind == "characters"
    given, wanted = torch.int64 if text else torch.float32, torch.float32 if task.kind == "regression" else torch.int64
    for part, x, y in (("train", raw.x_train, raw.y_train), ("test", raw.x_test, raw.y_test)):
        shape = (len(y), *task.shape)
        if not len(x) or x.shape != shape or y.shape != (shape if text else shape[:1]) or x.dtype != given or y.dtype != wanted:
            sizes = ", ".join(map(str, task.shape))
            raise InputError(
                f"source '{name}': the {part} part is x {x.dtype} {list(x.shape)}, y {y.dtype} {list(y.shape)}; promised are "
                f"x {given} [n, {sizes}] and y {wanted} [n{', ' + sizes if text else ''}]"
            )
        if not torch.isfinite(x).all() or not torch.isfinite(y).all():
            raise InputError(f"source '{name}': the {part} part has NaN or infinite values")
        for what, numbers in (("labels", y), ("characters", x)) if text else (("labels", y),):
            if wanted == torch.int64 and not 0 <= int(numbers.min()) <= int(numbers.max()) < task.classes:
                ends = f"{int(numbers.min())} to {int(numbers.max())}"
                raise InputError(f"source '{name}': {part} {what} run from {ends}, not 0 to {task.classes - 1}")
    if raw.groups is not None and (raw.groups.shape != (len(raw.x_train),) or raw.groups.dtype != torch.int64):
        raise InputError(f"source '{name}': groups are {raw.groups.dtype} {list(raw.groups.shape)}, promised are torch.int64 [n]")
    return raw


def _set_aside(labels: IntArray, root_samples: int, seed: int) -> tuple[IntArray, IntArray]:
    """Return (rows of the server's root set, rows that are left), both sorted."""
    total = len(labels)
    if not 0 <= root_samples < total:
        raise InputError(f"{root_samples} root samples, but there are {total} training samples to share", "data.root_samples")
    root = stratified_rows(labels, root_samples, stream(seed, "root"))
    left = np.ones(total, dtype=bool)
    left[root] = False
    return root, np.flatnonzero(left).astype(np.int64)


def _take(raw: RawData, rows: IntArray) -> tuple[Tensor, Tensor]:
    """Return copies of training samples: indexing by rows copies, so that the remembered source stays as it is."""
    index = torch.from_numpy(rows)
    return raw.x_train[index], raw.y_train[index]


def _checked(parts: Any, clients: int, total: int, name: str) -> list[IntArray]:
    """Return a partition's rows, sorted, after checking what every partition promises."""
    if not isinstance(parts, list) or len(parts) != clients:
        got = f"{len(parts)} parts" if isinstance(parts, list) else f"a {type(parts).__name__}"
        raise InputError(f"partition '{name}' returned {got} instead of a list of {clients}")
    arrays = [np.asarray(part) for part in parts]
    used = np.zeros(total, dtype=np.int64)
    for client, part in enumerate(arrays):
        if part.ndim != 1 or (len(part) and not np.issubdtype(part.dtype, np.integer)):
            raise InputError(f"partition '{name}': the rows of client {client} are {part.dtype} {list(part.shape)}, not int64 [n]")
        if not len(part):
            raise InputError(f"partition '{name}' leaves client {client} of {clients} without samples")
        if part.min() < 0 or part.max() >= total:
            odd = part.min() if part.min() < 0 else part.max()
            raise InputError(f"partition '{name}': client {client} has row {odd} (rows run from 0 to {total - 1})")
        np.add.at(used, part, 1)
    if used.max() > 1:
        raise InputError(f"partition '{name}' deals {int((used > 1).sum())} of {total} samples more than once")
    return [np.sort(part).astype(np.int64) for part in arrays]


def _put_on(x: Tensor, parts: list[IntArray], skews: list[SkewFn], name: str) -> None:
    """Put each client's feature skew on its own rows of `x`, in place."""
    if len(skews) != len(parts):
        raise InputError(f"feature skew '{name}' returned {len(skews)} functions for {len(parts)} clients")
    for part, fn in zip(parts, skews, strict=True):
        rows = torch.from_numpy(part)
        seen = fn(x[rows])
        if seen.shape != (len(rows), *x.shape[1:]) or not torch.isfinite(seen).all():
            raise InputError(f"feature skew '{name}' turned {list(x[rows].shape)} into {list(seen.shape)}, or into NaN or infinite values")
        x[rows] = seen.to(x.dtype)


@contextlib.contextmanager
def _placed(where: str, key: str = "") -> Iterator[None]:
    """Place errors under `where`; those that name no parameter of their own under `where.key`."""
    try:
        yield
    except InputError as error:
        if key and not error.where:
            error = error.at(key)
        raise error.at(where) from error.__cause__
