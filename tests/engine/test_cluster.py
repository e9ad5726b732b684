"""Several machines: two nodes simulated on this one, with a GPU each that only Ray believes in."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from fedtrust.engine import ray_seat, ray_start
from fedtrust.engine.cohort import Chunk, ClientTask
from fedtrust.engine.partial import Sums
from fedtrust.engine.ray_workers import RayExecutor
from fedtrust.engine.workers import LocalExecutor, Ran
from fedtrust.scenario import parse
from fedtrust.setup import Setup, build
from tests.conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own sockets and deprecations


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without room for workers, which is where this process is, and two nodes that come and go."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("CUDA_VISIBLE_DEVICES", "99")  # Ray is told of a GPU that torch cannot see
        ray_start.import_ray()
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": False})
        for _ in range(2):
            made.add_node(num_cpus=2, num_gpus=1, object_store_memory=100 * 2**20)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def executor(cluster: Cluster) -> Iterator[RayExecutor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = RayExecutor(None, cluster.address)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    wait_for(lambda: all(seat.hello for seat in found.seats))
    yield found
    found.close()


def wait_for(what: Callable[[], object], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return build(parse({**SMALL, "clients": {"count": 24, "train": {"lr": 0.1, "batch_size": 16}}, "model": "cnn"}))


def cut(setup: Setup, sums: bool, behaviour: Any = None, who: int = -1) -> list[Chunk]:
    """Return twelve chunks of two clients."""
    kinds = [behaviour if c == who else setup.roster.honest for c in range(24)]
    tasks = [tuple(ClientTask(c, kinds[c], {}) for c in (i, i + 1)) for i in range(0, 24, 2)]
    return [Chunk(1, setup.params, {}, t, Sums((), True) if sums else None, not sums) for t in tasks]


def local(setup: Setup, chunks: list[Chunk]) -> Ran:
    with closing(LocalExecutor(2)) as executor:
        return executor.open(setup.world).run(chunks)


def same(a: Ran, b: Ran) -> bool:
    totals = (a.total is None and b.total is None) or bool((a.total == b.total).all())
    return totals and all(
        x.clients == y.clients and bool((x.updates == y.updates).all()) for x, y in zip(a.results, b.results, strict=True)
    )


@pytest.mark.slow
def test_workers_are_spread_over_the_nodes_and_give_the_bits_of_this_process(executor: RayExecutor, setup: Setup) -> None:
    assert not torch.cuda.is_available()
    assert executor.describe() == "ray, 2 workers on 2 nodes, 2 GPUs"
    nodes = {seat.hello.node for seat in executor.seats if seat.hello}
    assert len(nodes) == 2
    assert executor.node not in nodes
    with closing(executor.open(setup.world)) as job:
        for sums in (False, True):
            assert same(job.run(cut(setup, sums)), local(setup, cut(setup, sums)))
        assert {h[0] == [job.number] for h in ray.get([seat.actor.holds.remote() for seat in executor.seats])} == {True}


@pytest.mark.slow
def test_partial_sums_are_added_where_they_lie(executor: RayExecutor, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve chunks only a few sums reach this process; none of them stays in the store."""
    fetched: list[str] = []
    real = ray_seat.fetch

    def counting(executor: RayExecutor, part: Any) -> Any:
        if isinstance(part, ray_seat.Part):
            fetched.append(part.node)
        return real(executor, part)

    monkeypatch.setattr(ray_seat, "fetch", counting)
    with closing(executor.open(setup.world)) as job:
        homes = executor._homes(12)
        assert len(set(homes)) == 2
        assert homes == sorted(homes)  # blocks of neighbours
        for _ in range(3):
            job.run(cut(setup, True))
    # Two blocks of six are cut by the tree into four and two each: 2 + 2 parts, and what one node trained for the other.
    assert 3 * 2 <= len(fetched) <= 3 * 10
    assert len(set(fetched)) == 2


@pytest.mark.slow
def test_jobs_side_by_side_on_two_nodes(executor: RayExecutor, setup: Setup) -> None:
    other = build(parse({**SMALL, "seed": 9, "clients": {"count": 24, "train": {"lr": 0.1, "batch_size": 16}}, "model": "cnn"}))
    expected = [local(s, cut(s, True)) for s in (setup, other)]
    found: dict[int, list[Ran]] = {0: [], 1: []}

    def play(place: int, source: Setup) -> None:
        with closing(executor.open(source.world)) as job:
            found[place] = [job.run(cut(source, True)) for _ in range(2)]

    players = [threading.Thread(target=play, args=pair) for pair in enumerate((setup, other))]
    for player in players:
        player.start()
    for player in players:
        player.join(100)
    assert [[same(r, expected[place]) for r in runs] for place, runs in found.items()] == [[True] * 2] * 2


@pytest.mark.slow
def test_a_node_that_leaves_in_the_middle_of_a_round(executor: RayExecutor, cluster: Cluster, setup: Setup, tmp_path: Path) -> None:
    """Its chunks are trained elsewhere, the sums it held are made again, and the bits are those of an undisturbed round."""
    from fedtrust.client import Behaviour

    flag = tmp_path / "reached"

    class Signals(Behaviour):
        """Say that the round is under way, and give the test time to act."""

        def poison(self, x: Any, y: Any, view: Any) -> Any:
            if not flag.exists():
                flag.touch()
                time.sleep(2)
            return x, y

    ran: list[Ran] = []
    with closing(executor.open(setup.world)) as job:
        job.run(cut(setup, True))
        chunks = cut(setup, True, Signals(), who=8)  # in the middle of the first node's block
        player = threading.Thread(target=lambda: ran.append(job.run(chunks)))
        player.start()
        wait_for(flag.exists)
        home = executor._homes(12)[4]
        leaving = next(n for n in cluster.list_all_nodes() if n.node_id == home)
        cluster.remove_node(leaving, allow_graceful=False)
        player.join(120)
        assert not player.is_alive()
        assert [r.faults for r in ran[0].results] == [{}] * 12
        assert same(ran[0], local(setup, chunks))
        assert sum(seat.hello is not None for seat in executor.seats) == 1  # there is no room for the other one
        assert same(job.run(cut(setup, False)), local(setup, cut(setup, False)))
        cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=100 * 2**20)
        wait_for(lambda: all(seat.hello for seat in executor.seats))  # full capacity is back with the node
        assert same(job.run(cut(setup, True)), local(setup, cut(setup, True)))
