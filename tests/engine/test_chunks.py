"""How clients are cut into chunks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedtrust.engine.chunks import FEWEST, GPU_SHARE, MOST, STEP_BYTES, Cut, chunks_of, cpu_cut, gpu_cut, hidden_numbers
from fedtrust.scenario import Scenario
from fedtrust.setup import build

Small = Callable[..., Scenario]


def test_hidden_numbers_are_what_the_layers_put_out(small: Small) -> None:
    world = build(small(model={"name": "mlp", "hidden": [7, 5]})).world
    assert hidden_numbers(world) == 64 + 7 + 7 + 5 + 5 + 10  # flatten, linear, relu, linear, relu, linear
    assert not any(layer._forward_hooks for layer in world.module.modules())


@pytest.mark.parametrize(("model", "batch"), [("logistic", 8), ("cnn", 8), ("cnn", 100)])
def test_larger_steps_are_shared_by_fewer_clients(small: Small, model: str, batch: int) -> None:
    data = {"source": {"name": "digits", "limit": 1000}}
    world = build(small(model=model, data=data, clients={"train": {"batch_size": batch}})).world
    count, pieces = cpu_cut(world)
    assert pieces == 8
    assert FEWEST <= count <= MOST
    step = 4 * hidden_numbers(world) * world.batch_size
    assert count == MOST or count * step <= STEP_BYTES < (count + 1) * step


@pytest.mark.parametrize("count", [1, 3, 8, 40, 99, 400])
@pytest.mark.parametrize("most", [2, 10, 50])
def test_every_client_is_in_one_chunk_and_the_longest_come_first(count: int, most: int) -> None:
    sizes = [(7 * i) % 13 + 1 for i in range(count)]
    chunks = chunks_of(sizes, count, Cut(most))
    flat = [i for chunk in chunks for i in chunk]
    assert sorted(flat) == list(range(count))
    assert [sizes[i] for i in flat] == sorted(sizes, reverse=True)
    assert max(len(chunk) for chunk in chunks) <= most
    if count >= 40 and most == 50:
        assert len(chunks) == 8


def test_on_gpus_memory_and_their_number_decide(small: Small) -> None:
    world = build(small(model="cnn")).world
    client = 4 * (6 * world.layout.size + 3 * hidden_numbers(world) * world.batch_size)
    plenty = gpu_cut(world, 80 << 30, 2)
    assert plenty == Cut(4096, 2)
    assert [len(c) for c in chunks_of([1] * 1000, 1000, plenty)] == [500, 500]
    tight = gpu_cut(world, int(100 * client / GPU_SHARE), 1)
    assert tight.most == 64  # the largest power of two of the hundred that fit
    assert gpu_cut(world, 1, 1).most == 1
