"""Local training: the three paths agree, schedules are what they say, one client's fault is nobody else's."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtrust.client import Behaviour, ClientMemory, Predict, View
from fedtrust.engine import cohort, seeds
from fedtrust.engine.cohort import Chunk, ClientTask, Trained, choose_path, train
from fedtrust.engine.partial import Sums
from fedtrust.engine.prepare import local_steps, schedule
from fedtrust.engine.world import World
from fedtrust.registry import REGISTRY
from fedtrust.scenario import Scenario
from fedtrust.setup import build


def chunk_of(world: World, behaviour: Behaviour, clients: int = 5) -> Chunk:
    params = world.layout.vector(world.module)
    tasks = tuple(ClientTask(c, behaviour, behaviour.remember(world.layout.size), c, clients) for c in range(clients))
    return Chunk(1, params, {}, tasks)


def on_path(world: World, path: Any, chunk: Chunk) -> Trained:
    return train(dataclasses.replace(world, path=path), chunk)


def by_client(result: Trained) -> Tensor:
    assert not result.faults
    order = np.argsort(result.clients)
    return result.updates[torch.from_numpy(order)]


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn", "cnn-large", "resnet18"])
def test_paths_agree_for_every_model(small: Callable[..., Scenario], model: str) -> None:
    slow = model in ("cnn-large", "resnet18")
    data = {"source": {"name": "mnist5k" if model == "cnn-large" else "digits", "limit": 60 if slow else 200}}
    world = build(small(model=model, data=data, clients={"count": 5, "train": {"momentum": 0.9, "lr": 0.05}})).world
    chunk = chunk_of(world, REGISTRY.make("behaviour", "honest"), 2 if slow else 5)
    reference = by_client(on_path(world, "loop", chunk))
    assert reference.norm(dim=1).min() > 1e-3
    for path in ("vmap", "fused"):
        torch.testing.assert_close(by_client(on_path(world, path, chunk)), reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_paths_agree_in_bfloat16_and_differ_from_float32(small: Callable[..., Scenario], model: str) -> None:
    world = build(small(model=model, engine={"precision": "bfloat16"})).world
    assert world.dtype == torch.bfloat16
    chunk = chunk_of(world, REGISTRY.make("behaviour", "honest"))
    exact = by_client(on_path(dataclasses.replace(world, precision="float32"), "loop", chunk))
    size = float(exact.norm(dim=1).mean())
    for path in ("loop", "vmap", "fused"):
        coarse = by_client(on_path(world, path, chunk))
        assert coarse.dtype == torch.float32
        error = float((coarse - exact).norm(dim=1).max()) / size
        assert 1e-4 < error < 0.1, path  # bfloat16 keeps 8 binary digits


def test_a_chunk_that_is_too_large_for_memory_is_halved(small: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch) -> None:
    world = build(small(model="mlp")).world
    chunk = chunk_of(world, REGISTRY.make("behaviour", "honest"), 7)
    expected, seen, plain = by_client(train(world, chunk)), [], cohort._train_blocks

    def tight(world: World, chunk: Chunk, ready: list[Any], block: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen.append(len(ready))
        if len(ready) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(world, chunk, ready, block)

    monkeypatch.setattr(cohort, "_train_blocks", tight)
    torch.testing.assert_close(by_client(train(world, chunk)), expected, atol=1e-6, rtol=1e-5)
    assert seen == [7, 3, 1, 2, 4, 2, 2]
    added = train(world, chunk._replace(sums=Sums(), rows=False)).total  # rows that nobody wants are all made in one place
    assert added is not None
    torch.testing.assert_close(added, expected.sum(0), atol=1e-6, rtol=1e-5)


def test_updates_that_are_sent_back_outlive_the_next_chunk(small: Callable[..., Scenario]) -> None:
    world = build(small(model="cnn")).world
    chunk = chunk_of(world, REGISTRY.make("behaviour", "honest"))
    sent = train(world, chunk).updates
    kept = sent.clone()
    added = train(world, chunk._replace(round=2, sums=Sums(), rows=False)).total
    again = train(world, chunk._replace(round=2, sums=Sums())).total
    assert torch.equal(sent, kept)
    assert added is not None
    assert again is not None
    assert torch.equal(added, again)
    assert not torch.allclose(added, kept.sum(0))


def test_the_loop_is_plain_pytorch(small: Callable[..., Scenario]) -> None:
    """The reference itself against ten lines of PyTorch on the same batches."""
    world = build(small(model="mlp", clients={"train": {"momentum": 0.9, "epochs": 2}})).world
    result = on_path(world, "loop", chunk_of(world, REGISTRY.make("behaviour", "honest"), 3))
    for client in range(3):
        x, y = world.data.client(client)
        module = copy.deepcopy(world.module)
        start = world.layout.vector(module)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for batch in torch.from_numpy(schedule(len(x), 16, 2, seeds.stream(world.seed, "batches", 1, client))):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(module(x[batch]), y[batch])
            loss.backward()
            losses.append(loss.item())
            optimiser.step()
        row = result.clients.index(client)
        torch.testing.assert_close(result.updates[row], world.layout.vector(module) - start, atol=1e-6, rtol=1e-5)
        assert float(result.losses[row]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    for path in ("vmap", "fused"):
        other = on_path(world, path, chunk_of(world, REGISTRY.make("behaviour", "honest"), 3))
        torch.testing.assert_close(other.losses, result.losses[[result.clients.index(c) for c in other.clients]], atol=1e-5, rtol=1e-4)


def test_batched_training_is_the_same_in_any_chunk(small: Callable[..., Scenario]) -> None:
    world = build(small(model="cnn")).world
    honest = REGISTRY.make("behaviour", "honest")
    together = by_client(on_path(world, "vmap", chunk_of(world, honest, 4)))
    alone = by_client(on_path(world, "vmap", chunk_of(world, honest, 1)))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("n", "batch", "epochs"), [(10, 5, 1), (11, 5, 1), (3, 8, 1), (7, 4, 3), (1, 4, 2), (10, 5, 3)])
def test_schedule(n: int, batch: int, epochs: int) -> None:
    rows = schedule(n, batch, epochs, seeds.stream(0, "batches", 1, 1))
    assert rows.shape == (max(epochs, math.ceil(epochs * n / batch)), batch)
    counts = np.bincount(rows.ravel(), minlength=n)
    assert counts.min() >= epochs  # every sample is seen in every pass …
    assert counts.max() - counts.min() <= 1  # … and filling up is even
    assert np.array_equal(rows, schedule(n, batch, epochs, seeds.stream(0, "batches", 1, 1)))
    if batch % n == 0 or n % batch == 0:
        passes = rows.reshape(-1, n)
        assert all(sorted(p) == list(range(n)) for p in passes)  # whole passes, laid end to end …
        assert n < 5 or epochs < 2 or len({tuple(p) for p in passes}) > 1  # … each in an order of its own
    if n > 3:
        assert not np.array_equal(rows, schedule(n, batch, epochs, seeds.stream(0, "batches", 2, 1)))


@pytest.mark.parametrize("behaviour", ["honest", "fedprox"])
def test_partial_work_is_the_start_of_the_whole(small: Callable[..., Scenario], behaviour: str) -> None:
    """Stragglers stop after their first steps: the same on every path, and as if the client's schedule were no longer."""
    world = build(small(model="cnn", clients={"train": {"momentum": 0.9, "epochs": 2}})).world
    whole = chunk_of(world, REGISTRY.make("behaviour", behaviour), 5)
    limits = [1, 3, None, 2, 10_000]
    cut = whole._replace(tasks=tuple(t._replace(steps=n) for t, n in zip(whole.tasks, limits, strict=True)))
    steps = [local_steps(world.examples(c), world.batch_size, world.epochs) for c in range(5)]
    assert min(steps) > 3  # or nothing is cut
    full, reference = on_path(world, "loop", whole), on_path(world, "loop", cut)
    updates, losses = by_client(reference), reference.losses[np.argsort(reference.clients)]
    for client in (2, 4):  # who has time for everything does everything, to the bit
        assert torch.equal(updates[client], by_client(full)[client])
    assert (updates - by_client(full)).norm(dim=1)[[0, 1, 3]].min() > 1e-3
    for path in ("vmap", "fused"):
        other = on_path(world, path, cut)
        torch.testing.assert_close(by_client(other), updates, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other.losses[np.argsort(other.clients)], losses, atol=1e-5, rtol=1e-4)
    # one step: the gradient on the first batch of the whole schedule, and the loss there
    x, y = world.data.client(0)
    module = copy.deepcopy(world.module)
    batch = torch.from_numpy(schedule(len(x), 16, 2, seeds.stream(world.seed, "batches", 1, 0))[0])
    loss = torch.nn.functional.cross_entropy(module(x[batch]), y[batch])
    loss.backward()
    torch.testing.assert_close(updates[0], -0.1 * torch.cat([p.grad.flatten() for p in module.parameters()]), atol=1e-6, rtol=1e-4)
    assert float(losses[0]) == pytest.approx(loss.item(), rel=1e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fails(Behaviour):
    """Raise for some clients only: in its data hook, or in a loss that not even its own chunk survives."""

    hook: str = "poison"

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        if self.hook == "poison" and view.client == 1:
            raise ValueError("no data for you")
        if self.hook == "memory":
            view.memory["made up"] = torch.zeros(1)
        wrong = {"lengths": (x, y[:-1]), "dtype": (x, y.float() * 0.9), "labels": (x, y + 10)}.get(self.hook)
        return wrong if wrong is not None and view.client == 1 else (x, y)

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        if self.hook == "loss":
            raise ValueError("lost")
        return super().loss(predict, x, y, view)


@pytest.mark.parametrize("path", ["loop", "vmap"])
def test_a_raising_client_costs_only_itself(small: Callable[..., Scenario], path: str) -> None:
    world = build(small()).world
    good = on_path(world, path, chunk_of(world, Fails(hook="none"), 3))
    assert set(on_path(world, path, chunk_of(world, Fails(hook="memory"), 3)).faults) == {0, 1, 2}
    for hook, error in (("poison", "ValueError"), ("lengths", "ValueError"), ("dtype", "TypeError"), ("labels", "ValueError")):
        bad = on_path(world, path, chunk_of(world, Fails(hook=hook), 3))
        assert set(bad.faults) == {1}
        assert f"poison: {error}" in bad.faults[1]
        assert set(bad.clients) == {0, 2}
        kept = [good.clients.index(c) for c in bad.clients]
        torch.testing.assert_close(bad.updates, good.updates[kept], atol=1e-5, rtol=1e-4)
    lost = on_path(world, path, chunk_of(world, Fails(hook="loss"), 3))
    assert set(lost.faults) == {0, 1, 2}
    assert lost.updates.shape == (0, world.layout.size)
    assert "training: ValueError: lost" in lost.faults[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anchored(Behaviour):
    """Pull towards a vector that each client keeps: per-client memory inside a batched loss."""

    def remember(self, size: int) -> ClientMemory:
        return {"anchor": torch.zeros(size)}

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        view.memory["anchor"] = view.memory["anchor"] + float(view.client or 0)
        return x, y

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        return view.criterion(predict(x), y) + 0.01 * (predict.params - view.memory["anchor"]).square().sum()


def test_memory_reaches_the_loss_and_comes_back(small: Callable[..., Scenario]) -> None:
    world = build(small()).world
    chunk = chunk_of(world, Anchored(), 4)
    loop, batched = on_path(world, "loop", chunk), on_path(world, "vmap", chunk)
    torch.testing.assert_close(by_client(batched), by_client(loop), atol=1e-5, rtol=1e-4)
    for client, memory in zip(batched.clients, batched.memories, strict=True):
        assert bool((memory["anchor"] == client).all())
    assert not any(bool(t.memory["anchor"].any()) for t in chunk.tasks)  # the caller's copy is untouched


def test_paths_are_chosen_by_model_and_loss(small: Callable[..., Scenario]) -> None:
    honest, prox = REGISTRY.make("behaviour", "honest"), REGISTRY.make("behaviour", "fedprox")
    plain = build(small(model="cnn")).world
    assert choose_path(plain, honest) == "fused"
    assert choose_path(plain, prox) == "vmap"
    assert choose_path(dataclasses.replace(plain, path="fused"), prox) == "vmap"
    assert choose_path(dataclasses.replace(plain, path="loop"), honest) == "loop"
