"""Ray workers: the same bits as this process, whatever their number, and a dead worker costs nothing but time."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from fedtrust.client import Behaviour, View
from fedtrust.engine import ray_start, workers
from fedtrust.engine.cohort import Chunk, ClientTask
from fedtrust.engine.partial import Sums
from fedtrust.engine.pool import Piece
from fedtrust.engine.ray_actor import Worker, pack_model
from fedtrust.engine.ray_seat import Seat
from fedtrust.engine.ray_workers import RayExecutor, RayRound
from fedtrust.engine.workers import LocalExecutor, Ran
from fedtrust.errors import InputError, RunError
from fedtrust.models.losses import cross_entropy
from fedtrust.runner import run
from fedtrust.scenario import Scenario, load
from fedtrust.server import Stage, Verdict
from fedtrust.setup import Setup, build

Small = Callable[..., Scenario]
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own sockets and deprecations


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """One Ray for the module: starting it takes longer than the tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = signal.getsignal(signal.SIGTERM)
        ray_start.start(ray_start.import_ray(), 5, None)
        assert signal.getsignal(signal.SIGTERM) is before  # Ray's own handler would end a run without a checkpoint
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def shared() -> Iterator[RayExecutor]:
    """Two workers for the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executor = RayExecutor(2)
    yield executor
    executor.close()


@pytest.fixture
def pair(shared: RayExecutor) -> Iterator[RayExecutor]:
    """The two workers with their usual patience, both up."""
    shared.deadline, shared._retries = 600.0, 1
    wait_for(lambda: all(seat.hello for seat in shared.seats))
    return shared


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def setup() -> Setup:
    from fedtrust.scenario import parse
    from tests.conftest import SMALL

    return build(parse(SMALL))


GROUPS = [(0, 1, 2), (3, 4), (5,), (6, 7)]


def cut(setup: Setup, special: dict[int, Behaviour] | None = None, sums: bool = False) -> list[Chunk]:
    """Return four chunks of honest clients, but for a few."""
    tasks = [tuple(ClientTask(c, (special or {}).get(c, setup.roster.honest), {}) for c in group) for group in GROUPS]
    return [Chunk(1, setup.params, {}, t, Sums((), True) if sums else None, not sums) for t in tasks]


def local(setup: Setup, chunks: Sequence[Chunk]) -> Ran:
    with closing(LocalExecutor(2)) as executor:
        return executor.open(setup.world).run(chunks)


def same(a: Ran, b: Ran) -> bool:
    totals = (a.total is None and b.total is None) or bool((a.total == b.total).all())
    return totals and all(
        x.clients == y.clients and bool((x.updates == y.updates).all()) for x, y in zip(a.results, b.results, strict=True)
    )


def test_any_engine_and_any_number_of_workers_give_the_same_bits(small: Small, tmp_path: Path) -> None:
    scenario = small(
        model="cnn",
        clients={"count": 12, "per_round": 9, "train": {"momentum": 0.9}},
        attackers=[{"behaviour": "label-flip", "count": 2}, {"behaviour": "sign-flip", "count": 1, "knowledge": "coalition"}],
        strategy={"aggregator": "multi-krum", "assumed_malicious": 3, "steps": ["fedadam"]},
    )
    digests = {}
    for engine, count in (("local", 1), ("local", 2), ("local", 3), ("ray", 1), ("ray", 2)):
        result = run(scenario, tmp_path / f"{engine}{count}", engine=engine, workers=count)
        assert result.status == "finished"
        assert json.loads((tmp_path / f"{engine}{count}" / "environment.json").read_text())["engine"].startswith(f"{engine}, {count}")
        digests[engine, count] = result.summary["model_sha256"]
    assert len(set(digests.values())) == 1, digests


PLUGIN = '''
from __future__ import annotations
import torch
from fedtrust.client import Behaviour, behaviour
from fedtrust.server import Verdict, aggregator


@behaviour("my-ipm")
class InnerProduct(Behaviour):
    """Send -tau times the mean of the updates in view (Xie et al., UAI 2019, section 3)."""
    tau: float = 2.0

    def poison(self, x, y, view):
        return x.flip(-1), y

    def loss(self, predict, x, y, view):
        return view.criterion(predict(x), y) + 0.001 * predict.params.square().sum()

    def craft(self, updates, view):
        seen = updates if view.others is None else view.others
        return (-self.tau * seen.mean(0)).expand_as(updates)


@aggregator("norm-median")
def norm_median(updates, ctx, *, scale: float = 1.0):
    """Clip each update to `scale` times the median norm, then average."""
    norms = updates.norm(dim=1, keepdim=True).clamp(min=1e-12)
    factor = (scale * norms.median() / norms).clamp(max=1)
    return Verdict((factor * updates).mean(0), trust=factor.squeeze(1))
'''

SCENARIO = """
title = "a student's attack against a student's defence"
rounds = 2
[data]
source = { name = "digits", limit = 300 }
[model]
name = "logistic"
[clients]
count = 8
[[attackers]]
behaviour = "students:InnerProduct"
count = 2
knowledge = "omniscient"
params = { tau = 3.0 }
[strategy]
aggregator = { name = "students:norm-median", scale = 1.5 }
"""


@pytest.mark.slow
def test_code_from_a_loose_file_runs_on_both_engines(tmp_path: Path) -> None:
    """DESIGN's two student examples (the attack given a data and a loss hook as well, so that workers run its code)."""
    (tmp_path / "students.py").write_text(PLUGIN)
    (tmp_path / "scenario.toml").write_text(SCENARIO)
    scenario = load(tmp_path / "scenario.toml", allow_plugins=["students"])
    results = {e: run(scenario, tmp_path / e, engine=e, workers=2) for e in ("local", "ray")}
    assert [r.status for r in results.values()] == ["finished"] * 2
    assert results["local"].summary["model_sha256"] == results["ray"].summary["model_sha256"]
    assert not [f for r in (tmp_path / "ray" / "rounds.jsonl").read_text().splitlines() for f in json.loads(r).get("faults", {})]
    assert results["ray"].summary["threats"][0]["knowledge"] == "omniscient"
    assert (tmp_path / "ray" / "students.py").read_text() == PLUGIN  # the code is part of what was run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deadly(Behaviour):
    """Take the worker down, or never come back; with a flag only the first time."""

    how: str
    flag: str = ""

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        if self.flag:
            if os.path.exists(self.flag):
                return x, y
            open(self.flag, "w").close()
        if self.how == "exit":
            os._exit(1)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "segv":
            ctypes.string_at(0)
        time.sleep(600)
        return x, y


@pytest.mark.parametrize("how", ["kill", pytest.param("segv", marks=pytest.mark.slow)])
def test_a_dead_worker_is_replaced_and_its_chunk_tried_again_with_the_same_bits(
    pair: RayExecutor, setup: Setup, tmp_path: Path, how: str
) -> None:
    chunks = cut(setup, {1: Deadly(how=how, flag=str(tmp_path / "flag"))})
    pids = {seat.hello.pid for seat in pair.seats if seat.hello}
    with closing(pair.open(setup.world)) as job:
        ran = job.run(chunks)
    assert (tmp_path / "flag").exists()
    assert [r.faults for r in ran.results] == [{}] * 4
    assert same(ran, local(setup, chunks))  # the flag is there: nobody dies in this process
    wait_for(lambda: all(seat.hello for seat in pair.seats))  # full capacity is back
    assert len(pids & {seat.hello.pid for seat in pair.seats if seat.hello}) == 1


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of the chunks of every call to a worker."""
    seen: list[list[int]] = []
    begin = Seat._begin

    def noted(seat: Seat, turn: RayRound, pieces: list[Piece]) -> Any:
        seen.append([piece.number for piece in pieces])
        return begin(seat, turn, pieces)

    monkeypatch.setattr(Seat, "_begin", noted)
    return seen


@pytest.mark.parametrize("along", [0, ray_start.ALONG], ids=["by reference", "by value"])
def test_quick_chunks_are_handed_over_in_blocks_and_give_the_same_bits(
    pair: RayExecutor, setup: Setup, blocks: list[list[int]], monkeypatch: pytest.MonkeyPatch, along: int
) -> None:
    monkeypatch.setattr(pair, "_along", along)
    with closing(pair.open(setup.world)) as job:
        for sums in (False, True):
            blocks.clear()
            job.pace = 1.0
            assert same(job.run(cut(setup, sums=sums)), local(setup, cut(setup, sums=sums)))
            assert sorted(blocks) == [[0], [1], [2], [3]]
            assert 0 < job.pace < 1.0
            blocks.clear()
            job.pace = 0.001
            assert same(job.run(cut(setup, sums=sums)), local(setup, cut(setup, sums=sums)))
            assert sorted(blocks) == [[0, 1], [2], [3]]


def test_a_model_is_sent_once_a_round_and_again_when_it_is_another(pair: RayExecutor, setup: Setup, blocks: list[list[int]]) -> None:
    honest, other = cut(setup), setup.params + torch.linspace(-0.3, 0.3, len(setup.params))
    chunks = [chunk._replace(params=other) if number % 2 else chunk for number, chunk in enumerate(honest)]
    with closing(pair.open(setup.world)) as job:
        for _ in range(2):
            before = {seat: seat._sent.get(job.number, (-1, None))[0] for seat in pair.seats}
            job.pace = 1.0
            assert same(job.run(honest), local(setup, honest))
            after = {seat: seat._sent.get(job.number, (-1, None))[0] for seat in pair.seats}
            assert 1 <= len([seat for seat in pair.seats if after[seat] != before[seat]]) <= 2
            assert all(after[seat] - before[seat] <= 1 for seat in pair.seats if before[seat] >= 0)
        blocks.clear()
        job.pace = 0.001
        assert same(job.run(chunks), local(setup, chunks))
        assert [len(block) for block in blocks] == [1] * 4  # a block is of one model


def test_a_worker_without_the_model_that_it_is_thought_to_have_is_sent_it(
    pair: RayExecutor, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = cut(setup)
    parcel = pack_model(chunks[0])
    monkeypatch.setattr(pair, "_parcel", lambda chunk: parcel)
    with closing(pair.open(setup.world)) as job:
        job.run(chunks)
        for seat in pair.seats:
            seat._sent[job.number] = 10**6, parcel
        assert same(job.run(chunks), local(setup, chunks))


def refuse() -> None:
    raise ValueError("not here")


class Unreadable(Behaviour):
    """Gets onto the way to a worker, and not in there."""

    def __reduce__(self) -> Any:
        return refuse, ()


def test_a_call_that_fails_on_its_way_in_leaves_nobody_with_an_old_model(pair: RayExecutor, setup: Setup) -> None:
    later = setup.params + torch.linspace(-0.3, 0.3, len(setup.params))
    chunks = [chunk._replace(params=later) for chunk in cut(setup)]
    bad = [chunk._replace(params=later) for chunk in cut(setup, {c: Unreadable() for c in (0, 3)})]
    with closing(pair.open(setup.world)) as job:
        for pace in (1.0, 0.001):
            job.run(cut(setup))
            job.pace = pace
            ran = job.run(bad)
            assert [list(r.faults) for r in ran.results] == [[0], [3], [], []]
            assert "not here" in ran.results[0].faults[0]
            right = local(setup, chunks)
            kept = {c: u for r in right.results for c, u in zip(r.clients, r.updates, strict=True)}
            for r in ran.results:
                for c, u in zip(r.clients, r.updates, strict=True):
                    torch.testing.assert_close(u, kept[c], rtol=1e-4, atol=1e-5)


def test_who_kills_the_worker_of_a_block_costs_its_neighbours_only_time(
    pair: RayExecutor, setup: Setup, tmp_path: Path, blocks: list[list[int]]
) -> None:
    chunks = cut(setup, {3: Deadly(how="kill", flag=str(tmp_path / "flag"))}, sums=True)
    with closing(pair.open(setup.world)) as job:
        job.pace = 0.001
        ran = job.run(chunks)
    assert (tmp_path / "flag").exists()
    assert [r.faults for r in ran.results] == [{}] * 4
    assert same(ran, local(setup, chunks))
    assert sorted(blocks) == [[0], [0, 1], [1], [2], [3]]


@pytest.mark.slow
def test_who_kills_every_worker_of_a_block_is_dropped_by_name(pair: RayExecutor, setup: Setup, blocks: list[list[int]]) -> None:
    with closing(pair.open(setup.world)) as job:
        job.pace = 0.001
        ran = job.run(cut(setup, {3: Deadly(how="exit")}, sums=True))
    assert [list(r.faults) for r in ran.results] == [[], [3], [], []]
    assert [set(r.clients) for r in ran.results] == [{0, 1, 2}, {4}, {5}, {6, 7}]
    assert [block for block in blocks if len(block) > 1] == [[0, 1]]
    assert blocks.count([0]) == 1
    assert blocks.count([1]) >= 4  # by itself, again, then its clients


@pytest.mark.slow
def test_who_kills_every_worker_is_dropped_by_name_and_nobody_else(pair: RayExecutor, setup: Setup) -> None:
    with closing(pair.open(setup.world)) as job:
        ran = job.run(cut(setup, {1: Deadly(how="exit")}, sums=True))
        assert [list(r.faults) for r in ran.results] == [[1], [], [], []]
        assert "the worker failed" in ran.results[0].faults[1]
        assert [set(r.clients) for r in ran.results] == [{0, 2}, {3, 4}, {5}, {6, 7}]
        rows = local(setup, cut(setup))
        kept = torch.cat([r.updates for r in rows.results])[[0, 2, 3, 4, 5, 6, 7]]
        order = [c for r in rows.results for c in r.clients]
        weights = torch.tensor([float(setup.world.examples(c)) for c in order if c != 1])
        kept = torch.stack([u for r in rows.results for c, u in zip(r.clients, r.updates, strict=True) if c != 1])
        torch.testing.assert_close(ran.total, weights @ kept, rtol=1e-4, atol=1e-4)
        assert same(job.run(cut(setup)), rows)  # and the next round is whole


def fails(rows: Tensor, ctx: Any) -> Verdict:
    raise ValueError("no such luck")


def test_a_filter_that_fails_on_a_worker_ends_the_run_and_blames_no_client(pair: RayExecutor, setup: Setup) -> None:
    sums = Sums((Stage("filters[0]", "fails", fails, rowwise=True),))
    with closing(pair.open(setup.world)) as job:
        with pytest.raises(RunError, match=r"^filters\[0\] 'fails' failed in round 1: ValueError: no such luck$"):
            job.run([chunk._replace(sums=sums, rows=False) for chunk in cut(setup)])
        assert same(job.run(cut(setup)), local(setup, cut(setup)))


def test_who_hangs_is_dropped_by_name_and_nobody_else(pair: RayExecutor, setup: Setup) -> None:
    with closing(pair.open(setup.world)) as job:
        job.run(cut(setup))  # the workers have the world: the deadline is for training alone
        pair.deadline = 3.0
        ran = job.run(cut(setup, {4: Deadly(how="hang")}))
        pair.deadline = 600.0
        assert [r.faults for r in ran.results] == [{}, {4: "no answer within 3 s"}, {}, {}]
        assert ran.results[1].clients == (3,)
        assert same(job.run(cut(setup)), local(setup, cut(setup)))


@pytest.mark.slow
def test_idle_workers_that_are_shot_cost_only_time(pair: RayExecutor, setup: Setup) -> None:
    with closing(pair.open(setup.world)) as job:
        before = job.run(cut(setup))
        for seat in pair.seats:
            assert seat.hello is not None
            os.kill(seat.hello.pid, signal.SIGKILL)
        after = job.run(cut(setup))
    assert same(before, after)
    assert [r.faults for r in after.results] == [{}] * 4


@dataclasses.dataclass(frozen=True)
class DiesOnArrival:
    """A criterion whose arrival takes a worker down, the first `times` times."""

    folder: str
    times: int
    by_hand = staticmethod(cross_entropy.by_hand)  # or it would have other bits than the loss that it stands for

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(output, y)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        taken = len(os.listdir(self.folder))
        if taken < self.times:
            Path(self.folder, str(taken)).touch()
            os._exit(1)


def test_a_worker_that_dies_while_it_takes_over_a_run_costs_nobody_a_round(pair: RayExecutor, setup: Setup, tmp_path: Path) -> None:
    world = dataclasses.replace(setup.world, criterion=DiesOnArrival(str(tmp_path), 1))
    with closing(pair.open(world)) as job:
        ran = job.run(cut(setup))
    assert len(list(tmp_path.iterdir())) == 1
    assert [r.faults for r in ran.results] == [{}] * 4
    assert same(ran, local(setup, cut(setup)))


@pytest.mark.slow
def test_a_run_that_no_worker_can_take_over_ends(pair: RayExecutor, setup: Setup, tmp_path: Path) -> None:
    world = dataclasses.replace(setup.world, criterion=DiesOnArrival(str(tmp_path), 1000))
    with closing(pair.open(world)) as job, pytest.raises(RunError, match="cannot take over the run: ActorDiedError"):
        job.run(cut(setup))
    with closing(pair.open(setup.world)) as job:  # and is no other run's trouble
        assert same(job.run(cut(setup)), local(setup, cut(setup)))


def test_a_client_that_cannot_be_sent_is_dropped_by_name(pair: RayExecutor, setup: Setup) -> None:
    class Locked(Behaviour):
        def __reduce__(self) -> Any:
            raise TypeError("cannot pickle this")

    with closing(pair.open(setup.world)) as job:
        ran = job.run(cut(setup, {3: Locked()}))
    assert list(ran.results[1].faults) == [3]
    assert "cannot pickle this" in ran.results[1].faults[3]
    assert [len(r.clients) for r in ran.results] == [3, 1, 1, 2]


@pytest.mark.slow
def test_workers_that_find_no_room_end_the_run_by_name(pair: RayExecutor, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers die, and Ray cannot place others: the run says so in place of waiting for ever."""
    with closing(pair.open(setup.world)) as job:
        with monkeypatch.context() as patch:
            patch.setattr(pair, "patience", 2.0)
            patch.setattr(pair, "new_actor", lambda: ray.remote(Worker).options(num_cpus=50).remote())
            for seat in pair.seats:
                assert seat.hello is not None
                os.kill(seat.hello.pid, signal.SIGKILL)
            with pytest.raises(RunError, match=r"no Ray worker could be placed for 2 s \(each needs 1 CPU\); the last one: ActorDiedError"):
                job.run(cut(setup))
        for seat in pair.seats:  # what waits for room is taken back, and ordinary workers come
            ray.kill(seat.actor)
        assert same(job.run(cut(setup)), local(setup, cut(setup)))


def test_jobs_side_by_side_get_the_bits_they_get_alone_and_share_their_samples(pair: RayExecutor, setup: Setup, small: Small) -> None:
    others = [setup, build(small(clients={"train": {"lr": 0.05}})), build(small(seed=11))]
    alone = [(local(s, cut(s)), local(s, cut(s, sums=True))) for s in others]
    jobs = [pair.open(s.world) for s in others]
    assert len(pair.shelf._held) == 2  # x and y of all three are the same digits
    found: dict[int, list[Ran]] = {0: [], 1: [], 2: []}

    def play(place: int) -> None:
        for sums in (False, True, False):
            found[place].append(jobs[place].run(cut(others[place], sums=sums)))

    players = [threading.Thread(target=play, args=(i,)) for i in found]
    for player in players:
        player.start()
    for player in players:
        player.join(100)
    for place, (rows, sums) in enumerate(alone):
        assert [same(r, e) for r, e in zip(found[place], (rows, sums, rows), strict=True)] == [True] * 3
    held = [ray.get(seat.actor.holds.remote()) for seat in pair.seats]
    assert [len(samples) for _, samples in [(None, [None] * h[1]) for h in held]] == [2, 2]
    for job in jobs:
        job.close()
        job.close()  # twice is once
    assert [ray.get(seat.actor.holds.remote()) for seat in pair.seats] == [([], 0)] * 2
    assert pair.shelf._held == {}


def test_no_process_is_left(setup: Setup) -> None:
    executor = RayExecutor(1)
    executor.open(setup.world).run(cut(setup))
    assert executor.seats[0].hello is not None
    pid = executor.seats[0].hello.pid
    executor.close()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 10)
    assert not [t for t in threading.enumerate() if t is executor.seats[0].thread]


# Where workers go, on clusters that are only described.


def node(cpus: int, gpus: int = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}


@pytest.mark.parametrize(
    ("nodes", "asked", "workers_", "share"),
    [
        ([node(4)], None, 4, None),
        ([node(4), node(2), node(8, alive=False)], None, 6, None),
        ([node(16, 4)], None, 4, 1.0),
        ([node(16, 4)], 2, 2, 1.0),
        ([node(16, 2)], 3, 3, 0.5),  # 2/3 of a GPU each would leave one without room
        ([node(16, 3)], 7, 7, 0.3333),
        ([node(2, 4), node(8, 1), node(8)], None, 3, 1.0),
        ([node(8, 1), node(8, 1)], 4, 4, 0.5),
    ],
)
def test_workers_have_room(nodes: list[dict[str, Any]], asked: int | None, workers_: int, share: float | None) -> None:
    found = ray_start.room(nodes, asked)
    assert (found.workers, found.options.get("num_gpus")) == (workers_, share)


@pytest.mark.parametrize(
    ("nodes", "asked", "message"),
    [
        ([node(4)], 5, r"--workers: the Ray cluster has 4 CPUs, room for 4 \(got 5 workers\)"),
        ([node(2, 8)], 3, r"2 CPUs and 8 GPUs, room for 2 \(got 3"),
        ([node(0), node(0)], None, r"0 CPUs on 2 nodes, room for 0 \(got 1"),
    ],
)
def test_workers_without_room_are_refused(nodes: list[dict[str, Any]], asked: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ray_start.room(nodes, asked)


def test_the_object_store_fits_the_machine(tmp_path: Path) -> None:
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:  9999999 kB\nMemAvailable:   5242880 kB\n")
    assert ray_start.store_size(memory, "/nowhere") == 1024**3
    memory.write_text("MemAvailable:   1024 kB\n")
    assert ray_start.store_size(memory, "/nowhere") == 80 * 1024**2  # Ray refuses less
    room = os.statvfs(tmp_path)
    memory.write_text(f"MemAvailable:   {2**50} kB\n")
    assert ray_start.store_size(memory, str(tmp_path)) <= room.f_blocks * room.f_frsize * 9 // 10


@pytest.mark.parametrize(("engine", "count", "message"), [("spark", 1, "unknown engine"), ("local", 0, "at least one worker")])
def test_engines_that_do_not_exist(engine: str, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        workers.make(engine, count, None, 1.0, 0)


def test_a_cluster_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="nothing answers at 127"):
        ray_start.reachable("127.0.0.1:1")
    ray_start.reachable("auto")
    with pytest.raises(InputError, match="goes with --engine ray"):
        workers.make("local", 1, "127.0.0.1:1", 1.0, 0)


def test_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def pick(**changes: Any) -> tuple[str, str]:
        return workers.pick("auto", changes.get("clients", 10), changes.get("address"))

    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(workers.threads, "cores", lambda: 2)
    assert pick()[0] == "local"
    assert pick(address="auto")[0] == "ray"
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 4)
    assert pick() == ("ray", "4 GPUs: one worker each")
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(workers.threads, "cores", lambda: 64)
    assert pick(clients=1000)[0] == "ray"
    assert pick(clients=10)[0] == "local"


MEMORY = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import ray, numpy as np, psutil
from fedtrust.client import Behaviour
from fedtrust.engine import ray_start
from fedtrust.engine.cohort import Chunk, ClientTask
from fedtrust.engine.ray_workers import RayExecutor
from fedtrust.scenario import parse
from fedtrust.setup import build
from tests.conftest import SMALL

class Eats(Behaviour):
    def poison(self, x, y, view):
        held = [np.ones(2**24) for _ in range(32)]  # 4 GiB
        import time
        time.sleep(60)
        return x, y

def main():
    memory = psutil.virtual_memory()
    os.environ["RAY_memory_usage_threshold"] = str(min(0.95, (memory.total - memory.available + 2 * 2**30) / memory.total))
    os.environ["RAY_memory_monitor_refresh_ms"] = "100"
    executor = RayExecutor(1)
    setup = build(parse(SMALL))
    honest = setup.roster.honest
    chunk = Chunk(1, setup.params, {}, tuple(ClientTask(c, b, {}) for c, b in ((0, honest), (1, Eats()), (2, honest))))
    job = executor.open(setup.world)
    first = job.run([chunk]).results[0]
    after = job.run([chunk._replace(tasks=chunk.tasks[:1])]).results[0]
    executor.close()
    print(json.dumps([first.clients, list(first.faults.items()), after.clients]))

main()
"""


@pytest.mark.slow
def test_rays_memory_monitor_costs_only_the_client_that_eats_the_memory(tmp_path: Path) -> None:
    """A Ray of its own, told that 2 GiB more than is in use now is too much; a client takes 4."""
    (tmp_path / "eats.py").write_text(MEMORY)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "eats.py")], capture_output=True, text=True, timeout=250, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    trained, faults, after = json.loads(done.stdout.splitlines()[-1])
    assert (sorted(trained), [client for client, _ in faults], after) == ([0, 2], [1], [0])
    assert "OutOfMemoryError" in faults[0][1]
