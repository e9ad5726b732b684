"""This process' threads: who shares them, and what becomes of clients that are late, fail or hang."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fedtrust.client import Behaviour, View
from fedtrust.engine import pool, threads, workers
from fedtrust.engine.cohort import Chunk, ClientTask, Trained
from fedtrust.engine.partial import Sums
from fedtrust.engine.pool import Done, Failed, LostError, Piece, Pool, Ran, Round
from fedtrust.engine.workers import LocalExecutor
from fedtrust.errors import RunError
from fedtrust.interrupt import Stopped
from fedtrust.scenario import Scenario
from fedtrust.setup import Setup, build

Small = Callable[..., Scenario]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waits(Behaviour):
    """Hold the thread until the test is over."""

    over: ClassVar[threading.Event] = threading.Event()

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        Waits.over.wait(60)
        return x, y


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meets(Behaviour):
    """Train only while somebody else does."""

    barrier: ClassVar[threading.Barrier] = threading.Barrier(2)

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        Meets.barrier.wait(20)
        return x, y


@pytest.fixture(autouse=True)
def _over() -> Iterator[None]:
    """Let nobody wait longer than the test."""
    Waits.over.clear()
    yield
    Waits.over.set()


def cut(setup: Setup, groups: Sequence[Sequence[int]], special: dict[int, Behaviour] | None = None, sums: bool = False) -> list[Chunk]:
    """Return chunks of honest clients, but for a few."""
    tasks = [tuple(ClientTask(c, (special or {}).get(c, setup.roster.honest), {}) for c in group) for group in groups]
    return [Chunk(1, setup.params, {}, t, Sums((), True) if sums else None, not sums) for t in tasks]


def same(a: Ran, b: Ran) -> bool:
    """Whether two results have the same bits."""
    totals = (a.total is None and b.total is None) or bool((a.total == b.total).all())
    return totals and all(
        x.clients == y.clients and bool((x.updates == y.updates).all()) for x, y in zip(a.results, b.results, strict=True)
    )


GROUPS = [(0, 1, 2), (3, 4), (5,), (6, 7)]


def test_results_come_in_order_with_the_same_bits_for_any_number_of_threads(small: Small) -> None:
    setup = build(small())
    found = []
    for count in (1, 2, 5):
        with closing(LocalExecutor(count)) as executor:
            job = executor.open(setup.world)
            found.append((job.run(cut(setup, GROUPS)), job.run(cut(setup, GROUPS, sums=True))))
    rows, sums = found[0]
    assert [r.clients for r in rows.results] == GROUPS
    assert all(same(rows, r) and same(sums, s) for r, s in found[1:])
    assert rows.total is None
    weights = torch.tensor([float(setup.world.examples(c)) for c in range(8)])
    torch.testing.assert_close(sums.total, weights @ torch.cat([r.updates for r in rows.results]), rtol=1e-5, atol=1e-5)
    assert [len(r.updates) for r in sums.results] == [0] * 4
    assert [r.total for r in sums.results] == [None] * 4  # what is in the sum is not held twice


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@pytest.mark.skipif(len(CORES) < 2, reason="one core, or a system that does not say")
def test_threads_stay_on_cores_of_their_own_where_they_fill_the_machine_and_nowhere_else() -> None:
    def after(index: int, count: int) -> tuple[bool, set[int]]:
        return threads.within(10.0, lambda: (threads.stay(index, count), os.sched_getaffinity(0)))

    many = len(CORES)
    assert [after(i, many) for i in range(many)] == [(True, {core}) for core in CORES]
    assert after(many, 2 * many) == (True, {CORES[0]})
    assert after(0, 1) == after(0, many + 1) == (False, set(CORES))
    for count, wanted in ((many, [{core} for core in CORES]), (1, [set(CORES)])):
        with closing(LocalExecutor(count)) as executor:
            time.sleep(0.2)
            assert [os.sched_getaffinity(hand.thread.native_id or 0) for hand in executor._hands] == wanted
    assert os.sched_getaffinity(0) == set(CORES)  # who drives them goes where there is room


def test_nothing_to_do_is_done_at_once(small: Small) -> None:
    setup = build(small())
    with closing(LocalExecutor(1)) as executor:
        assert executor.open(setup.world).run([]) == Ran([], None)


def test_only_the_client_that_hangs_is_dropped_and_the_others_go_on(small: Small) -> None:
    setup = build(small())
    with closing(LocalExecutor(2, deadline=1.0)) as executor:
        job = executor.open(setup.world)
        ran = job.run(cut(setup, GROUPS, {1: Waits()}))
        assert [r.faults for r in ran.results] == [{1: "no answer within 1 s"}, {}, {}, {}]
        assert [set(r.clients) for r in ran.results] == [{0, 2}, {3, 4}, {5}, {6, 7}]
        whole = job.run(cut(setup, GROUPS))  # two threads hang, and two are there
        assert {t.name for t in threading.enumerate() if t.name.startswith("fedtrust-") and t.is_alive()} == {"fedtrust-0", "fedtrust-1"}
        alone = {c: r.updates[i] for r in ran.results for i, c in enumerate(r.clients)}
        for result in whole.results:
            for i, client in enumerate(result.clients):
                if client in alone:
                    torch.testing.assert_close(alone[client], result.updates[i], atol=1e-5, rtol=1e-4)


def test_a_sum_leaves_out_only_the_client_that_hangs(small: Small) -> None:
    setup = build(small())
    with closing(LocalExecutor(1, deadline=1.0)) as executor:
        job = executor.open(setup.world)
        ran = job.run(cut(setup, [(0, 1, 2)], {1: Waits()}, sums=True))
        expected = job.run(cut(setup, [(0, 2)], sums=True))
    assert ran.results[0].clients == (0, 2)
    assert ran.results[0].norms is not None
    assert ran.results[0].norms.shape == (2,)
    assert ran.results[0].partial == expected.results[0].partial
    torch.testing.assert_close(ran.total, expected.total, atol=1e-4, rtol=1e-4)


def test_a_deadline_counts_from_the_start_and_not_from_the_queue(small: Small) -> None:
    """One thread, and a client that takes longer than what is left to those behind it: nobody behind it is late."""
    setup = build(small())

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Dawdles(Behaviour):
        def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
            time.sleep(1.2)
            return x, y

    with closing(LocalExecutor(1, deadline=2.0)) as executor:
        ran = executor.open(setup.world).run(cut(setup, [(0,), (1,), (2,)], dict.fromkeys(range(3), Dawdles())))
    assert [r.faults for r in ran.results] == [{}] * 3


def test_jobs_from_several_threads_share_the_workers_and_get_their_own_bits(small: Small) -> None:
    setups = [build(small(seed=seed)) for seed in (3, 4, 5)]
    found: dict[int, Ran] = {}

    def play(place: int, executor: LocalExecutor) -> None:
        with closing(executor.open(setups[place].world)) as job:
            for _ in range(3):
                found[place] = job.run(cut(setups[place], GROUPS, sums=place == 2))

    for executor in (LocalExecutor(1), LocalExecutor(2)):
        before = dict(found)
        players = [threading.Thread(target=play, args=(i, executor)) for i in range(3)]
        for player in players:
            player.start()
        for player in players:
            player.join(60)
        executor.close()
        assert set(found) == {0, 1, 2}
        assert all(same(found[i], before[i]) for i in before)
    assert not same(found[0], found[1])


def test_two_jobs_are_at_work_at_the_same_time(small: Small) -> None:
    setup = build(small())
    Meets.barrier.reset()
    ran: list[Ran] = []
    with closing(LocalExecutor(2)) as executor:

        def play() -> None:
            ran.append(executor.open(setup.world).run(cut(setup, [(0,)], {0: Meets()})))

        players = [threading.Thread(target=play) for _ in range(2)]
        for player in players:
            player.start()
        for player in players:
            player.join(30)
    assert [r.results[0].faults for r in ran] == [{}, {}]


def test_a_job_or_an_executor_that_closes_lets_go_of_whoever_waits(small: Small) -> None:
    setup = build(small())
    for what in ("job", "executor"):
        Waits.over.clear()
        executor = LocalExecutor(1)
        job = executor.open(setup.world)
        ends: list[str] = []

        def play(job: workers.Job = job, ends: list[str] = ends) -> None:
            try:
                job.run(cut(setup, [(0, 1)], {0: Waits()}))
            except Stopped:
                ends.append("stopped")

        player = threading.Thread(target=play)
        player.start()
        while not executor._at_work:
            time.sleep(0.01)
        (job if what == "job" else executor).close()
        player.join(10)
        assert ends == ["stopped"]
        Waits.over.set()
        executor.close()
        with pytest.raises(Stopped):
            job.run(cut(setup, [(0,)]))


def test_a_failure_of_the_engine_itself_is_a_fault_by_name(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = build(small())
    real = workers.train

    def sometimes(world: object, chunk: Chunk) -> Trained:
        if any(task.client == 3 for task in chunk.tasks):
            raise MemoryError("no room")
        return real(world, chunk)  # type: ignore[arg-type]

    monkeypatch.setattr(workers, "train", sometimes)
    with closing(LocalExecutor(1)) as executor:
        ran = executor.open(setup.world).run(cut(setup, GROUPS))
    assert [r.faults for r in ran.results] == [{}, {3: "training: MemoryError: no room"}, {}, {}]
    assert ran.results[1].clients == (4,)


def test_jobs_with_the_same_samples_share_their_copy_on_a_device() -> None:
    with closing(LocalExecutor(1)) as executor:
        x, other = torch.zeros(3), torch.zeros(3)
        first = executor._copy(x, "meta")
        assert executor._copy(x, "meta") is first
        assert executor._copy(other, "meta") is not first
        gone = weakref.ref(first)
        del first
        assert gone() is None  # nobody uses it any more
        assert executor._copy(x, "meta").device.type == "meta"


def test_results_do_not_outlive_their_round(small: Small) -> None:
    setup = build(small())
    with closing(LocalExecutor(2)) as executor:
        job = executor.open(setup.world)
        job.run(cut(setup, GROUPS))
        gc.collect()
        before = sum(type(o) is pool.Round for o in gc.get_objects())
    assert before == 0


# What a round does when workers die; the workers are played by the test.


def play(turn: Round[str], act: Callable[[Piece], Done[str] | Failed]) -> Ran:
    """See a round through with one worker that does what `act` says."""
    market, stop = Pool(), threading.Event()

    def work() -> None:
        while (taken := market.take(Round.take)) is not None and not stop.is_set():
            taken[0].done.put((taken[1], act(taken[1])))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        return market.run(turn, lambda: 5.0)
    finally:
        market.close()
        worker.join(5)


def tasks(*clients: int) -> Chunk:
    return Chunk(1, torch.zeros(2), {}, tuple(ClientTask(c, Behaviour(), {}) for c in clients))


def gave(chunk: Chunk) -> Trained:
    ids = tuple(t.client for t in chunk.tasks)
    return Trained(ids, torch.zeros(len(ids), 2), torch.zeros(len(ids)), ({},) * len(ids), {})


def whole(part: str) -> Tensor:
    return torch.tensor([float(part.count("+") + 1)])


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_chunk_is_tried_again_and_then_split(retries: int) -> None:
    seen: list[tuple[int, ...]] = []

    def act(piece: Piece) -> Done[str] | Failed:
        ids = tuple(t.client for t in piece.chunk.tasks)
        seen.append(ids)
        return Failed("dead", again=True) if 1 in ids else Done(gave(piece.chunk), str(piece.number))

    ran = play(Round([tasks(0, 1, 2), tasks(3)], retries, lambda a, b: f"{a}+{b}", whole), act)
    assert seen.count((0, 1, 2)) == 1 + retries
    assert seen.count((1,)) == 1
    assert seen.count((0,)) == seen.count((2,)) == seen.count((3,)) == 1
    assert ran.results[0].faults == {1: "dead"}
    assert ran.results[0].clients == (0, 2)
    assert float(ran.total[0]) == 3  # 0, 2 and the second chunk


def test_a_late_chunk_is_split_at_once() -> None:
    seen: list[int] = []

    def act(piece: Piece) -> Done[str] | Failed:
        seen.append(len(piece.chunk.tasks))
        return Failed("late", again=False) if len(piece.chunk.tasks) > 1 else Done(gave(piece.chunk), None)

    ran = play(Round([tasks(0, 1)], 5, lambda a, b: f"{a}+{b}", whole), act)
    assert seen == [2, 1, 1]
    assert (ran.results[0].clients, ran.results[0].faults, ran.total) == ((0, 1), {}, None)


def test_a_single_client_is_tried_as_often_as_any_chunk() -> None:
    seen: list[int] = []

    def act(piece: Piece) -> Done[str] | Failed:
        seen.append(piece.number)
        return Failed("dead", again=True)

    ran = play(Round([tasks(7)], 2, lambda a, b: f"{a}+{b}", whole), act)
    assert (seen, ran.results[0].faults) == ([0, 0, 0], {7: "dead"})


def test_sums_that_are_lost_are_made_again() -> None:
    lose = ["(1)+(2)", "((0)+(1))+(2)"]
    seen: list[int] = []

    def add(left: str, right: str) -> str:
        made = f"({left})+({right})"
        if left == "0" and lose[0] != "gone":
            lose[0] = "gone"
            raise LostError(left)
        return made

    def fetch(part: str) -> Tensor:
        if lose[1] != "gone":
            lose[1] = "gone"
            raise LostError(part)
        return whole(part)

    def act(piece: Piece) -> Done[str] | Failed:
        seen.append(piece.number)
        return Done(gave(piece.chunk), str(piece.number))

    ran = play(Round([tasks(0), tasks(1), tasks(2)], 0, add, fetch), act)
    assert float(ran.total[0]) == 3
    assert sorted(seen) == [0, 0, 0, 1, 1, 2, 2]  # 0 alone, then all of it


def test_sums_that_are_always_lost_end_the_run() -> None:
    def fetch(part: str) -> Tensor:
        raise LostError(part)

    with pytest.raises(RunError, match="lost again and again"):
        play(Round([tasks(0)], 0, lambda a, b: a + b, fetch), lambda piece: Done(gave(piece.chunk), "0"))


def numbers(turn: Round[str], workers: int, most: int, fits: Callable[[int, int], bool] = lambda number, first: True) -> list[list[int]]:
    """Take everything, in blocks."""
    turn.most, found = most, []
    while block := turn.block(workers, fits):
        found.append([piece.number for piece in block])
    return found


def test_pieces_go_in_blocks_that_grow_smaller_towards_the_end() -> None:
    def fresh(count: int) -> Round[str]:
        return Round([tasks(c) for c in range(count)], 0, lambda a, b: a + b, whole)

    assert [len(block) for block in numbers(fresh(18), 2, 100)] == [4, 4, 4, 2, 2, 1, 1]
    assert [len(block) for block in numbers(fresh(18), 2, 3)] == [2] * 8 + [1, 1]
    assert [len(block) for block in numbers(fresh(18), 2, 1)] == [1] * 18
    assert [len(block) for block in numbers(fresh(6), 8, 100)] == [1] * 6
    assert numbers(fresh(12), 1, 100, lambda number, first: number not in (5, 8)) == [[0, 1, 2, 3], [4], [6, 7], [9], [10, 11], [5], [8]]
    turn = fresh(8)
    first = turn.take()
    assert first is not None
    turn.settle(first, Failed("its worker was gone", again=True, counts=False))
    first.single = True
    assert numbers(turn, 2, 100) == [[0], [1], [2, 3], [4, 5], [6], [7]]


def test_the_sum_of_a_block_is_everybodys() -> None:
    turn: Round[str] = Round([tasks(c) for c in range(5)], 0, lambda a, b: f"({a}+{b})", lambda part: torch.tensor([float(len(part))]))
    pieces = [turn.take() for _ in range(5)]
    totals = [("(0+1)", 1), (None, None), ("2", 0), ("3", 0), ("4", 0)]
    for piece, (total, level) in reversed(list(zip(pieces, totals, strict=True))):
        assert piece is not None
        turn.settle(piece, Done(gave(piece.chunk), total, level))
    assert turn.complete()
    assert turn.total is not None
    assert turn.total.item() == len("(((0+1)+(2+3))+4)")


def test_a_round_whose_last_piece_is_given_up_ends_then() -> None:
    """And not when the next deadline would be: nobody is left who could report."""
    market, ran = Pool(), []
    turn: Round[str] = Round([tasks(0)], 0, lambda a, b: a + b, whole)

    def tend() -> float:
        piece = turn.take()
        if piece is not None:
            turn.settle(piece, Failed("late", again=False))
        return 1e6

    player = threading.Thread(target=lambda: ran.append(market.run(turn, tend)), daemon=True)
    player.start()
    player.join(20)
    market.close()
    assert [r.results[0].faults for r in ran] == [{0: "late"}]
