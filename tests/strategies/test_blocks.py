from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedtrust.registry import Kind
from fedtrust.strategies import blocks, distances
from tests.strategies.rules_kit import normal, verdict


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n", "d", "values"), [(3, 1, 1), (3, 256, 1), (3, 257, 1), (400, 10_000, 1 << 18), (5000, 3000, 1 << 18)])
def test_the_blocks_cover_each_coordinate_once(n: int, d: int, values: int) -> None:
    covered = [i for block in blocks.cut(n, d, values) for i in range(d)[block]]
    assert covered == list(range(d))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_the_order_of_the_blocks_on_this_thread(count: int) -> None:
    torch.set_num_threads(count)
    parts, workers, takers, inner = blocks.cut(1, 5000, 1), set(), set(), set()

    def work(where: slice) -> int:
        workers.add(threading.get_ident())
        inner.add(torch.get_num_threads())
        return where.start

    seen: list[int] = []

    def take(start: int) -> None:
        takers.add(threading.get_ident())
        seen.append(start)

    blocks.each(parts, work, take)
    assert seen == [block.start for block in parts]
    assert takers == {threading.get_ident()}
    assert (threading.get_ident() in workers) == (count == 1)
    assert inner == {1}
    assert torch.get_num_threads() == count
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [count]  # a thread that starts afterwards is not left with the pool's one


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_block_comes_out(count: int) -> None:
    torch.set_num_threads(count)

    def work(where: slice) -> None:
        raise ArithmeticError(f"at {where.start}")

    with pytest.raises(ArithmeticError, match="at 0"):
        blocks.each(blocks.cut(1, 5000, 1), work)
    assert torch.get_num_threads() == count


RULES: list[tuple[Kind, str, dict[str, Any]]] = [
    ("aggregator", "median", {}),
    ("aggregator", "trimmed-mean", {}),
    ("aggregator", "krum", {}),
    ("aggregator", "multi-krum", {}),
    ("aggregator", "bulyan", {}),
    ("aggregator", "geometric-median", {}),
    ("aggregator", "centered-clipping", {"tau": 5.0, "iterations": 3}),
    ("filter", "nnm", {}),
]


@pytest.mark.parametrize("exact", [0, 1 << 31])
@pytest.mark.parametrize(("kind", "name", "params"), RULES)
def test_the_number_of_threads_changes_no_bit(
    kind: Kind, name: str, params: dict[str, Any], exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "EXACT", exact)
    monkeypatch.setattr(blocks, "MULTIPLIED", 1 << 16)
    rows = normal(103, 5003, seed=1)
    rows[:9] = 3 * rows[0]
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(verdict(kind, name, rows, f=20, **params))
    for other in results[1:]:
        assert torch.equal(results[0].value, other.value)
        if results[0].trust is not None:
            assert other.trust is not None
            assert torch.equal(results[0].trust, other.trust)


@pytest.mark.parametrize("shape", [(17,), (5, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_combinations_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, shares = normal(17, 700, seed=2), torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = blocks.combine(shares, rows)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), shares.double() @ rows.double(), atol=1e-5)
