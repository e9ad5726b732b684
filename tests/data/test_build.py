from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedtrust.data import build as build_module
from fedtrust.data.base import FederatedData, RawData, SkewFn, Task
from fedtrust.data.build import build, load
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY, feature_skew, partition, source


def make(**changes: Any) -> FederatedData:
    usual: dict[str, Any] = {
        "source": "digits",
        "params": {},
        "partition": "dirichlet",
        "partition_params": {"alpha": 0.5},
        "skew": None,
        "clients": 10,
        "seed": 7,
        "root_samples": 0,
    }
    return build(**{**usual, **changes})


def keys(x: torch.Tensor, y: torch.Tensor) -> list[bytes]:
    return [a.numpy().tobytes() + bytes([int(b)]) for a, b in zip(x, y, strict=True)]


@pytest.fixture
def plugin() -> Iterator[None]:
    """Whatever a test registers is forgotten afterwards."""
    REGISTRY.load()
    before = dict(REGISTRY._entries)
    yield
    REGISTRY._entries.clear()
    REGISTRY._entries.update(before)
    build_module._remembered.cache_clear()


def test_every_training_sample_has_one_owner() -> None:
    data = make()
    raw = load("digits", {})
    rows = np.concatenate(data.parts)
    assert len(data.parts) == 10
    assert np.array_equal(np.sort(rows), np.arange(1438))
    assert all(part.dtype == np.int64 and np.array_equal(part, np.sort(part)) for part in data.parts)
    assert torch.equal(data.x, raw.x_train)
    assert torch.equal(data.y, raw.y_train)
    assert torch.equal(data.x_test, raw.x_test)
    assert data.task == raw.task
    assert data.root is None
    assert data.skews == []
    x, y = data.client(3)
    assert torch.equal(x, data.x[torch.from_numpy(data.parts[3])])
    assert data.label_counts()[3].tolist() == y.bincount(minlength=10).tolist()
    assert data.label_counts().sum() == 1438


def test_the_seed_moves_the_clients_but_not_the_test_set() -> None:
    one, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(one.parts, again.parts, strict=True))
    assert not np.array_equal(one.parts[0], other.parts[0])
    assert torch.equal(one.x_test, other.x_test)


def test_the_root_set_is_stratified_and_never_a_clients() -> None:
    data = make(root_samples=100)
    assert data.root is not None
    x, y = data.root
    assert (x.shape, len(y)) == ((100, 1, 8, 8), 100)
    assert set(y.bincount().tolist()) == {10}
    assert len(data.x) == 1338 == sum(map(len, data.parts))
    raw = load("digits", {})
    # digits holds a few identical images, so count copies instead of comparing sets
    assert sorted(keys(x, y) + keys(data.x, data.y)) == sorted(keys(raw.x_train, raw.y_train))
    same = make(root_samples=100).root
    assert same is not None
    assert torch.equal(same[0], x)
    moved = make(root_samples=100, seed=8).root
    assert moved is not None
    assert not torch.equal(moved[0], x)


def test_a_skew_is_put_on_each_clients_own_rows_and_handed_out() -> None:
    clean = make()
    data = make(skew=("rotation", {"max_degrees": 30.0}))
    assert all(np.array_equal(a, b) for a, b in zip(clean.parts, data.parts, strict=True))
    assert len(data.skews) == 10
    for index in range(10):
        assert torch.equal(data.client(index)[0], data.skews[index](clean.client(index)[0]))
    assert torch.equal(data.x_test, clean.x_test)
    assert torch.equal(data.y, clean.y)
    noisy = make(skew=("noise", {}))
    assert torch.equal(noisy.client(4)[0], noisy.skews[4](clean.client(4)[0]))


def test_nothing_a_caller_does_reaches_the_next() -> None:
    before = make(root_samples=20)
    kept = [t.clone() for t in (before.x, before.y, before.x_test, before.y_test, before.root[0], before.root[1])]  # type: ignore[index]
    make(root_samples=20, skew=("noise", {"max_std": 5.0}))
    for tensor in (before.x, before.y, before.x_test, before.y_test, *before.root):  # type: ignore[misc]
        tensor.zero_()
    before.parts[0][:] = 0
    after = make(root_samples=20)
    for old, new in zip(kept, (after.x, after.y, after.x_test, after.y_test, *after.root), strict=True):  # type: ignore[misc]
        assert torch.equal(old, new)
    assert len(np.unique(np.concatenate(after.parts))) == 1418


def test_a_sweep_reads_a_source_once(plugin: None) -> None:
    calls: list[int] = []

    @source("counted")
    def counted(*, limit: int = 100) -> RawData:
        calls.append(limit)
        return load("digits", {"limit": limit})

    for seed in range(3):
        make(source="counted", seed=seed)
    assert calls == [100]
    make(source="counted", params={"limit": 100})
    assert calls == [100]  # a default written out is the same data set
    make(source="counted", params={"limit": 200})
    assert calls == [100, 200]


def test_a_regression_is_spread_by_the_quantiles_of_its_target() -> None:
    data = make(source="diabetes", partition="pathological", partition_params={"classes_per_client": 1}, root_samples=40)
    assert data.task.kind == "regression"
    assert data.y.dtype == torch.float32
    assert len(data.x) == 314
    # ten clients, ten bins of the target: the clients' ranges do not overlap
    ranges = sorted((float(data.client(i)[1].min()), float(data.client(i)[1].max())) for i in range(10))
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ranges))
    assert data.label_counts().shape == (10, 1)
    assert data.label_counts().sum() == 314
    root = data.root
    assert root is not None
    assert root[1].mean().abs() < 0.2  # stratified: the server's little set is no biased one


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"source": "digit"}, "data.source", "did you mean 'digits'"),
        ({"params": {"limt": 3}}, "data.limt", "did you mean 'limit'"),
        ({"params": {"test_fraction": 1e-6}}, "data.test_fraction", "leaves no test sample"),
        ({"params": {"test_fraction": 2.0}}, "data.test_fraction", "less than 1"),
        ({"source": "mnist", "params": {"root": "/nowhere"}}, "data.source", "is not in '/nowhere'"),
        ({"partition": "dirichlett"}, "data.partition", "did you mean 'dirichlet'"),
        ({"partition_params": {"alfa": 1.0}}, "data.partition.alfa", "did you mean 'alpha'"),
        ({"partition_params": {"min_samples": 1000}}, "data.partition", "10 clients × at least 1000 samples = 10000, but there are 1438"),
        ({"clients": 0}, "clients.count", "at least one client"),
        ({"clients": 2000}, "clients.count", "2000 clients cannot share 1438 training samples"),
        ({"clients": 1000, "root_samples": 500}, "clients.count", "1000 clients cannot share 938"),
        ({"root_samples": -1}, "data.root_samples", "-1 root samples"),
        ({"root_samples": 1438}, "data.root_samples", "1438 root samples, but there are 1438 training samples"),
        ({"skew": ("rotatin", {})}, "data.skew", "did you mean 'rotation'"),
        ({"skew": ("rotation", {"degrees": 3.0})}, "data.skew.degrees", "did you mean 'max_degrees'"),
        ({"source": "breast-cancer", "skew": ("contrast", {})}, "data.skew", "needs images"),
    ],
)
def test_what_cannot_be_is_refused_at_its_key(changes: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        make(**changes)
    assert caught.value.where == where
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([np.arange(5)], "returned 1 parts instead of a list of 2"),
        ("rows", "returned a str"),
        ([np.arange(5), np.arange(4, 9)], "deals 1 of 1438 samples more than once"),
        ([np.array([1, 1]), np.arange(4, 9)], "deals 1 of 1438 samples more than once"),
        ([np.arange(5), np.array([], dtype=np.int64)], "leaves client 1 of 2 without samples"),
        ([np.arange(5), np.array([1438])], r"client 1 has row 1438 \(rows run from 0 to 1437\)"),
        ([np.arange(5), np.array([-1])], "client 1 has row -1"),
        ([np.arange(5), np.array([0.5])], "rows of client 1 are float64"),
    ],
)
def test_a_plugins_partition_is_checked(plugin: None, parts: Any, message: str) -> None:
    @partition("broken")
    def broken(labels: Any, clients: int, rng: Any) -> Any:
        return parts

    with pytest.raises(InputError, match=message):
        make(partition="broken", partition_params={}, clients=2)


def test_an_unsorted_partition_is_sorted(plugin: None) -> None:
    @partition("backwards")
    def backwards(labels: Any, clients: int, rng: Any) -> Any:
        return [np.arange(9, 4, -1, dtype=np.int32), [3, 2]]

    parts = make(partition="backwards", partition_params={}, clients=2).parts
    assert [part.tolist() for part in parts] == [[5, 6, 7, 8, 9], [2, 3]]
    assert parts[0].dtype == np.int64


@dataclasses.dataclass(frozen=True)
class Bad(SkewFn):
    how: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, 1:] if self.how == "shape" else x / 0 * 0


@pytest.mark.parametrize(
    ("how", "message"), [("shape", r"into \[\d+, 1, 7, 8\]"), ("nan", "NaN"), ("few", "returned 1 functions for 10 clients")]
)
def test_a_plugins_skew_is_checked(plugin: None, how: str, message: str) -> None:
    @feature_skew("broken")
    def broken(clients: int, task: Task, seed: int) -> list[SkewFn]:
        return [Bad(how)] * (1 if how == "few" else clients)

    with pytest.raises(InputError, match=message):
        make(skew=("broken", {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": torch.zeros(50, 1, 8, 8, dtype=torch.float64)}, "x torch.float64"),
        ({"x_test": torch.zeros(9, 1, 8, 8)}, r"test part is x torch.float32 \[9, 1, 8, 8\], y torch.int64 \[10\]"),
        ({"y_train": torch.full((50,), 10)}, "train labels run from 10 to 10, not 0 to 9"),
        ({"x_train": torch.full((50, 1, 8, 8), float("nan"))}, "NaN"),
        ({"x_train": torch.zeros(0, 1, 8, 8), "y_train": torch.zeros(0, dtype=torch.int64)}, r"\[0, 1, 8, 8\]"),
    ],
)
def test_a_plugins_source_is_checked(plugin: None, change: dict[str, torch.Tensor], message: str) -> None:
    good = RawData(
        load("digits", {}).task,
        torch.zeros(50, 1, 8, 8),
        torch.zeros(50, dtype=torch.int64),
        torch.zeros(10, 1, 8, 8),
        torch.zeros(10, dtype=torch.int64),
    )

    @source("broken")
    def broken() -> RawData:
        return dataclasses.replace(good, **change)

    with pytest.raises(InputError, match=message):
        make(source="broken")
