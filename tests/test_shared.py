"""What cells side by side have in common: samples, memory, threads."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrust import matrix, memory
from fedtrust.client import Behaviour, View
from fedtrust.engine import threads
from fedtrust.engine.cohort import Chunk, ClientTask
from fedtrust.engine.workers import LocalExecutor
from fedtrust.errors import RunError
from fedtrust.listener import SilentListener
from fedtrust.runner import run
from fedtrust.scenario import Scenario
from fedtrust.setup import build
from fedtrust.shared import Library

Small = Callable[..., Scenario]


def test_equal_samples_are_held_once(small: Small) -> None:
    library = Library()

    def lend(**changes: Any) -> Any:
        return library.lend(build(small(**changes)))

    first, second = lend(seed=1), lend(seed=2, attackers=[{"behaviour": "sign-flip", "count": 2}])
    assert first.setup.world.data.x is second.setup.world.data.x
    assert first.setup.world.data.y_test is second.setup.world.data.y_test
    assert first.setup.world.module is not second.setup.world.module
    skewed = lend(data={"feature_skew": {"kind": "noise"}})
    assert skewed.setup.world.data.x is not first.setup.world.data.x
    assert skewed.setup.world.data.x_test is first.setup.world.data.x_test
    zero, minus = build(small()), build(small())
    for setup, value in ((zero, 0.0), (minus, -0.0)):
        setup.world.data.x[0, 0] = value
    assert library.lend(zero).setup.world.data.x is not library.lend(minus).setup.world.data.x  # equal, but not bit by bit
    first.check()
    second.setup.world.data.x_test[0].zero_()
    with pytest.raises(RunError, match="changed in place"):
        first.check()
    third = lend(seed=3)
    assert third.setup.world.data.x_test is not first.setup.world.data.x_test  # nobody borrows it any more
    assert third.setup.world.data.x is first.setup.world.data.x
    third.check()


def test_the_library_keeps_nothing_alive(small: Small) -> None:
    library = Library()
    loan = library.lend(build(small()))
    gone = weakref.ref(loan.setup.world.data.x)
    del loan
    assert gone() is None


def test_how_many_cells_at_once(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the workers, no more than fit into half of the memory that is free; a rule that adds up needs none for its rows."""
    rows = memory.COPIES_SERVER * 8 * 650 * 4  # of eight clients and the logistic model's 650 parameters
    vectors = memory.VECTORS_SERVER * 650 * 4

    def width(workers: int, local: bool, free: int | None, *strategies: str) -> int:
        monkeypatch.setattr(memory, "free", lambda: free)
        cells = small(sweep={"strategies": list(strategies), "seeds": list(range(100))}).cells()
        return matrix.at_once(cells, workers, local=local)

    assert width(8, True, None, "mean") == 8
    assert width(8, False, None, "mean") == 12
    assert width(500, True, None, "mean", "median") == matrix.MOST
    assert width(8, True, 2 * 5 * vectors, "mean") == 5
    assert width(8, True, 2 * 5 * vectors, "mean", "median") == 1
    assert width(8, True, 2 * 3 * (rows + vectors), "mean", "median") == 3
    assert width(8, True, 0, "median") == 1
    assert matrix.at_once(small(sweep={"seeds": [1, 2, 3]}).cells(), 8, local=True) == 1  # nothing is free
    monkeypatch.setattr(memory, "free", lambda: 2**40)
    assert matrix.at_once(small(sweep={"seeds": [1, 2, 3]}).cells(), 8, local=True) == 3


def test_free_memory_is_no_more_than_the_container_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.free()
    (tmp_path / "max").write_text("5000\n")
    (tmp_path / "current").write_text("2000\n")
    monkeypatch.setattr(memory, "_LIMIT", tmp_path / "max")
    monkeypatch.setattr(memory, "_USED", tmp_path / "current")
    assert memory.free() == 3000
    (tmp_path / "max").write_text("max\n")
    assert whole is not None
    assert (memory.free() or 0) > 3000


def test_a_thread_keeps_its_own_number_of_threads() -> None:
    """Even if another thread sets its own before this one's first operation; `torch.set_num_threads` alone does not."""
    seen: dict[str, int] = {}

    def work(name: str, settle: Callable[[int], None], ready: threading.Event, go: threading.Event) -> None:
        settle(3)
        ready.set()
        go.wait(60)
        torch.ones(10).sum()
        seen[name] = torch.get_num_threads()

    for name, settle in (("fixed", threads.fix), ("set", torch.set_num_threads)):
        ready, go = threading.Event(), threading.Event()
        thread = threading.Thread(target=work, args=(name, settle, ready, go))
        with threads.using(1):
            thread.start()
            ready.wait(60)
            torch.set_num_threads(2)
            go.set()
            thread.join()
    assert seen["fixed"] == 3
    assert seen["set"] != 3  # if this fails, `fix` is no longer needed


class Counting(SilentListener):
    """Note on how many threads the caller computes; before that, let another thread set another number."""

    def __init__(self) -> None:
        self.seen = set[int]()

    def matrix_started(self, cells: Any, rounds: int) -> None:
        other = threading.Thread(target=threads.fix, args=(1,))
        other.start()
        other.join()

    def round_done(self, name: str, record: Any) -> None:
        self.seen.add(torch.get_num_threads())


@pytest.mark.parametrize("sweep", [None, {"seeds": [1, 2, 3]}])
def test_servers_compute_on_their_own_number_of_threads(small: Small, out: Path, monkeypatch: pytest.MonkeyPatch, sweep: Any) -> None:
    monkeypatch.setattr(threads, "SERVER", 3)
    listener = Counting()
    changes = {} if sweep is None else {"sweep": sweep}
    run(small(**changes), out, engine="local", workers=2, cells=None if sweep is None else 2, listener=listener)
    assert listener.seen == {3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Looks(Behaviour):
    """Note on how many threads training computes."""

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        looked.add(torch.get_num_threads())
        return x, y


looked = set[int]()


def test_training_computes_on_one_thread_whatever_others_set(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = build(small())
    executor = LocalExecutor(2)
    try:
        monkeypatch.setattr(threads, "using", lambda count: contextlib.nullcontext())  # as if another cell's server had set its own since
        other = threading.Thread(target=threads.fix, args=(3,))
        other.start()
        other.join()
        ran = executor.open(setup.world).run([Chunk(1, setup.params, {}, (ClientTask(c, Looks(), {}),)) for c in range(4)])
        assert not any(result.faults for result in ran.results)
        assert looked == {1}
    finally:
        executor.close()
