"""Steps made of single samples' gradients: both paths, Opacus as the oracle, and what one record can do at most."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtrust.client import Behaviour, Poisoned, Predict, View
from fedtrust.engine import per_sample, seeds
from fedtrust.engine.cohort import Chunk, ClientTask, choose_path, train
from fedtrust.engine.world import World
from fedtrust.errors import InputError
from fedtrust.privacy.accountants import COARSE, epsilon_poisson
from fedtrust.privacy.accounts import Participation
from fedtrust.privacy.record import RecordMechanism
from fedtrust.registry import REGISTRY
from fedtrust.scenario import Scenario
from fedtrust.setup import build

Small = Callable[..., Scenario]


def private(**params: Any) -> Behaviour:
    made: Behaviour = REGISTRY.make("behaviour", "dp-sgd", {"noise_multiplier": 0.0, **params})
    return made


def updates(world: World, behaviour: Behaviour, path: Any = "auto", clients: int = 8, number: int = 1) -> tuple[Tensor, Tensor]:
    """Return the updates [k, d] and losses [k] of the first clients, in their order."""
    tasks = tuple(ClientTask(c, behaviour, behaviour.remember(world.layout.size)) for c in range(clients))
    result = train(dataclasses.replace(world, path=path), Chunk(number, world.layout.vector(world.module), {}, tasks))
    assert not result.faults
    order = torch.tensor(result.clients).argsort()
    return result.updates[order], result.losses[order]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd(Behaviour):
    """Everything at once: data and marks of its own, a memory, a loss that reads them, a projection."""

    role = "honest"

    def remember(self, size: int) -> dict[str, Tensor]:
        return {"scale": torch.tensor(1.0)}

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        assert view.client is not None
        view.memory["scale"] = torch.tensor(0.5 + view.client)
        return x[1:], y[1:], 0.1 * torch.arange(len(y) - 1).float()

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        assert view.marks is not None
        return view.memory["scale"] * (view.marks * F.cross_entropy(predict(x), y, reduction="none")).mean()

    def per_sample(self, samples: int, batch_size: int) -> RecordMechanism:
        return RecordMechanism(samples, min(samples, batch_size), 0.3, 0.2)

    def project(self, update: Tensor, view: View) -> Tensor:
        return update.clamp(-0.02, 0.02)


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn"])
@pytest.mark.parametrize("behaviour", [private(clip=0.5), private(clip=0.5, noise_multiplier=1.0), Odd()])
def test_paths_agree(small: Small, model: str, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients with different numbers of samples and steps, batches of different sizes, a momentum; also some samples at a time."""
    data = {"source": {"limit": 120}}
    world = build(small(model=model, data=data, clients={"count": 5, "train": {"momentum": 0.9, "batch_size": 6}})).world
    assert len({len(part) for part in world.data.parts}) > 2
    reference, lost = updates(world, behaviour, "loop", 5)
    assert float(reference.norm(dim=1).min()) > 0.01
    for path in ("vmap", "fused", "auto"):
        found, losses = updates(world, behaviour, path, 5)
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(losses, lost, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(per_sample, "MOST_BYTES", 4 * world.layout.size * 5 * 2)
    torch.testing.assert_close(updates(world, behaviour, "vmap", 5)[0], reference, atol=1e-5, rtol=1e-4)


def test_gradients_of_a_chunk_stay_within_their_bound(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    world = build(small(model="mlp", clients={"train": {"batch_size": 16}})).world
    seen: list[tuple[int, ...]] = []
    bounded = RecordMechanism.bounded

    def spy(self: RecordMechanism, gradients: Tensor, taken: Tensor) -> Tensor:
        seen.append(tuple(gradients.shape))
        return bounded(self, gradients, taken)

    monkeypatch.setattr(RecordMechanism, "bounded", spy)
    monkeypatch.setattr(per_sample, "MOST_BYTES", 1 << 20)
    updates(world, private(), "vmap")
    assert {size for *_, size in seen} == {world.layout.size}
    assert 1 < max(samples for _, samples, _ in seen) < 16
    assert all(4 * k * s * d <= 1 << 20 for k, s, d in seen)


def test_there_is_no_fused_form(small: Small) -> None:
    world = build(small(model="cnn")).world
    assert choose_path(world, Behaviour()) == "fused"
    assert choose_path(world, private()) == "vmap"
    assert choose_path(dataclasses.replace(world, path="fused"), Poisoned(attack=Behaviour(), honest=private())) == "vmap"


def by_opacus(world: World, client: int, clip: float, sigma: float, number: int, seed: int = 0) -> Tensor:
    """Return the update [d] of one client on the same batches, trained with Opacus."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    x, y = world.data.client(client)
    mechanism = RecordMechanism(len(x), min(world.batch_size, len(x)), clip, sigma)
    module = GradSampleModule(copy.deepcopy(world.module))
    plain = torch.optim.SGD(module.parameters(), lr=world.lr, momentum=world.optimiser.momentum)
    generator = torch.Generator().manual_seed(seed)
    optimiser = DPOptimizer(plain, noise_multiplier=sigma, max_grad_norm=clip, expected_batch_size=mechanism.expected, generator=generator)
    steps = -(-world.epochs * len(x) // world.batch_size)
    for batch in mechanism.draw(steps, seeds.stream(world.seed, "batches", number, client)):
        rows = torch.from_numpy(batch[batch >= 0])
        assert len(rows)
        optimiser.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Opacus registers hooks in a way that PyTorch warns of
            F.cross_entropy(module(x[rows]), y[rows]).backward()
        optimiser.step()
    return world.layout.vector(module._module) - world.layout.vector(world.module)


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn"])
@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_opacus_gives_the_same_without_noise(small: Small, model: str, clip: float) -> None:
    world = build(small(model=model, clients={"train": {"momentum": 0.9}})).world
    found, _ = updates(world, private(clip=clip), clients=3)
    expected = torch.stack([by_opacus(world, c, clip, 0.0, 1) for c in range(3)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    other, _ = updates(world, private(clip=2 * clip), clients=3)
    assert torch.allclose(other, expected, atol=1e-4) == (clip == 1e6)  # the clip is felt


def test_opacus_gives_the_same_distribution_with_noise(small: Small) -> None:
    """Two-sample tests on what the noise adds, pooled over coordinates, and on its size, round by round; 10 % more noise is noticed."""
    world = build(small(model="logistic")).world
    plain, rounds = private(clip=0.5), range(1, 41)
    ours, theirs, more = [], [], []
    for number in rounds:
        quiet = updates(world, plain, clients=1, number=number)[0][0]
        ours.append(updates(world, private(clip=0.5, noise_multiplier=1.5), clients=1, number=number)[0][0] - quiet)
        more.append(updates(world, private(clip=0.5, noise_multiplier=1.65), clients=1, number=1000 + number)[0][0])
        more[-1] -= updates(world, plain, clients=1, number=1000 + number)[0][0]
        theirs.append(by_opacus(world, 0, 0.5, 1.5, number, seed=number) - by_opacus(world, 0, 0.5, 0.0, number))
    a, b, c = (torch.stack(part).numpy() for part in (ours, theirs, more))
    assert scipy.stats.ks_2samp(a.ravel(), b.ravel()).pvalue > 0.01
    assert scipy.stats.ks_2samp(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)).pvalue > 0.01
    assert abs(a.std() / b.std() - 1) < 0.03
    assert scipy.stats.ks_2samp(c.ravel(), b.ravel()).pvalue < 1e-4
    assert scipy.stats.ks_2samp(np.linalg.norm(c, axis=1), np.linalg.norm(b, axis=1)).pvalue < 1e-4


def test_every_step_round_and_client_has_noise_of_its_own(small: Small) -> None:
    """Without samples of any weight the steps are noise and nothing else: no two of them are alike."""
    world = build(small(clients={"train": {"lr": 1.0}})).world
    quiet = dataclasses.replace(world, criterion=lambda output, y: 0.0 * output.sum())
    found = [updates(quiet, private(noise_multiplier=1.0), number=n)[0] for n in (1, 2)]
    rows = torch.cat([part / part.norm(dim=1, keepdim=True) for part in found])
    likeness = (rows @ rows.T - torch.eye(len(rows))).abs().max()
    assert float(likeness) < 6 / world.layout.size**0.5
    assert torch.equal(found[0], updates(quiet, private(noise_multiplier=1.0))[0])  # and a run can be repeated
    for client, row in enumerate(found[0]):
        n = world.examples(client)
        steps, batch = -(-n // world.batch_size), min(world.batch_size, n)
        assert float(row.std()) == pytest.approx(steps**0.5 / batch, rel=0.1)


def test_an_empty_batch_is_noise_only(small: Small) -> None:
    world = build(small(clients={"train": {"lr": 1.0, "batch_size": 1, "momentum": 0.0}})).world
    mechanism = RecordMechanism(world.examples(0), 1, 1.0, 1.0)
    steps = world.examples(0)
    number, batches = next(
        (n, drawn) for n in range(1, 99) if (drawn := mechanism.draw(steps, seeds.stream(world.seed, "batches", n, 0)))[0, 0] < 0
    )
    assert 0.2 < float((batches < 0).all(axis=1).mean()) < 0.55  # about 1/e
    noise = mechanism.noise(world.layout.size, per_sample.noise_stream(world.seed, number, 0))
    first = ClientTask(0, private(noise_multiplier=1.0), {}, steps=1)
    for path in ("loop", "vmap"):
        result = train(dataclasses.replace(world, path=path), Chunk(number, world.layout.vector(world.module), {}, (first,)))  # type: ignore[arg-type]
        torch.testing.assert_close(result.updates[0], -noise, atol=1e-6, rtol=1e-5)
        assert float(result.losses[0]) == 0.0


def test_batches_are_poisson() -> None:
    rng = seeds.stream(0, "test")
    mechanism = RecordMechanism(50, 10, 1.0, 1.0)
    assert (mechanism.probability, mechanism.expected) == (0.2, 10.0)
    batches = mechanism.draw(4000, rng)
    inside = np.zeros((4000, 50))
    for row, batch in zip(inside, batches, strict=True):
        assert len(set(batch[batch >= 0])) == (batch >= 0).sum()
        row[batch[batch >= 0]] = 1
    assert np.abs(inside.mean(axis=0) - 0.2).max() < 4.5 * (0.16 / 4000) ** 0.5
    sizes = inside.sum(axis=1)
    assert sizes.var() == pytest.approx(50 * 0.2 * 0.8, rel=0.1)
    assert abs(np.corrcoef(inside[:, 0], inside[:, 1])[0, 1]) < 0.06  # a batch of fixed size: -0.02 in the mean
    assert (RecordMechanism(7, 7, 1.0, 1.0).draw(3, rng) == np.arange(7)).all()  # q = 1: everybody, always


def test_one_record_moves_the_sum_by_the_clip_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    mechanism = RecordMechanism(6, 3, 0.7, 0.0)
    gradients = torch.randn(4, 6, 30, generator=generator) * torch.tensor([1e-3, 1.0, 1e6, 1e15, 1e38, 0.0]).reshape(6, 1)
    everybody = torch.ones(4, 6, dtype=torch.bool)
    whole = mechanism.bounded(gradients, everybody)
    for record, bound in enumerate([6e-3, 0.7, 0.7, 0.7, 0.7, 0.0]):
        without = everybody.clone()
        without[:, record] = False
        moved = (whole - mechanism.bounded(gradients, without)).norm(dim=1)
        assert float(moved.max()) <= bound * (1 + 1e-5) + 1e-7
        assert float(moved.min()) >= 0.5 * bound or record == 4  # 1e38: the norm of some may overflow, and they count as zero
    gradients[:, 2, 0], gradients[:, 3, 5] = float("nan"), float("inf")
    broken = mechanism.bounded(gradients, everybody)
    assert torch.equal(broken, mechanism.bounded(gradients.nan_to_num(), everybody & (torch.arange(6) != 2) & (torch.arange(6) != 3)))


def test_a_record_that_breaks_the_loss_is_left_out(small: Small) -> None:
    """A NaN in an update would tell the server that the record is there."""
    world = build(small()).world
    x = world.data.x.clone()
    x[world.data.parts[0][0]] = float("inf")
    broken = dataclasses.replace(world, data=dataclasses.replace(world.data, x=x))
    for path in ("loop", "vmap"):
        found, losses = updates(broken, private(clip=0.5), path, 2)
        assert bool(torch.isfinite(losses).all())
        expected, _ = updates(world, private(clip=0.5), path, 2)
        torch.testing.assert_close(found[1], expected[1])
        assert 0 < float((found[0] - expected[0]).norm()) < 0.2  # the others of its batch are there


def test_who_poisons_data_only_is_clipped_like_everybody(small: Small) -> None:
    attackers = [{"behaviour": "label-flip", "count": 2}]
    behaviour = {"name": "dp-sgd", "clip": 0.1, "noise_multiplier": 0.0}
    setup = build(small(clients={"behaviour": behaviour, "train": {"batch_size": 300, "lr": 1.0}}, attackers=attackers))
    (plays,) = setup.roster.plays
    assert isinstance(plays, Poisoned)
    assert plays.honest == setup.roster.honest
    poisoned, _ = updates(setup.world, plays)
    honest, _ = updates(setup.world, setup.roster.honest)
    free, _ = updates(setup.world, plays.attack)
    assert float(poisoned.norm(dim=1).max()) <= 0.1 + 1e-6  # one step of everybody's samples, each at most the clip
    assert float(free.norm(dim=1).min()) > 0.1
    assert not torch.allclose(poisoned, honest, atol=1e-3)


def test_noise_is_calibrated_to_the_target_of_the_worst_client() -> None:
    target = REGISTRY.make("behaviour", "dp-sgd", {"epsilon": 4.0, "delta": 1e-4})
    parts = [
        Participation(0, 10, 200, 20, 10),
        Participation(1, 10, 60, 20, 3),
        Participation(2, 10, 30, 20, 2),
        Participation(3, 2, 15, 15, 1),
    ]
    fixed = target.calibrated(parts)
    assert fixed.epsilon is None
    spent = [fixed.account(part) for part in parts]
    assert 3.9 < max(s.epsilon for s in spent) <= 4.0
    assert all(s.epsilon <= s.epsilon_rdp for s in spent)
    assert spent[0].releases == 100
    assert spent[0].epsilon == pytest.approx(epsilon_poisson(0.1, fixed.noise_multiplier, 100, 1e-4, grid=COARSE), abs=0.01)
    assert spent[3].epsilon == pytest.approx(epsilon_poisson(1.0, fixed.noise_multiplier, 2, 1e-4), abs=1e-6)
    with pytest.raises(ValueError, match="not calibrated"):
        target.per_sample(10, 5)
    assert private(noise_multiplier=1.3).calibrated(parts) == private(noise_multiplier=1.3)  # type: ignore[attr-defined]


@pytest.mark.parametrize("params", [{}, {"noise_multiplier": 1.0, "epsilon": 2.0}])
def test_noise_is_given_in_one_way(params: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="either a noise_multiplier or a target epsilon"):
        REGISTRY.make("behaviour", "dp-sgd", params)
