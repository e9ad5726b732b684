"""Faults to plant in the mechanisms, and what is audited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtrust.engine import per_sample, seeds
from fedtrust.privacy import clipping, local
from fedtrust.privacy.audit_trials import LAYERS
from fedtrust.privacy.local import LocalMechanism
from fedtrust.privacy.mechanisms import Mechanism
from fedtrust.privacy.record import RecordMechanism
from fedtrust.privacy.samplers import Poisson
from fedtrust.scenario import parse
from fedtrust.server import Verdict
from fedtrust.setup import Setup, build
from tests.conftest import SMALL, merged

Plant = Callable[[pytest.MonkeyPatch], None]

RECORD = {"clients": {"behaviour": {"name": "dp-sgd", "clip": 0.5, "noise_multiplier": 0.8}}, "rounds": 4}
SERVER = {"clients": {"per_round": 4}, "privacy": {"clip": 0.5, "noise_multiplier": 0.8}, "rounds": 4}
LOCAL = {"clients": {"behaviour": {"name": "local-dp", "clip": 0.5, "noise_multiplier": 0.8}}, "rounds": 4}


def setup_of(changes: dict[str, Any]) -> Setup:
    return build(parse(merged(SMALL, changes)))


# Records

_BOUNDED, _DRAW, _NOISE = RecordMechanism.bounded, RecordMechanism.draw, RecordMechanism.noise


def record_per_layer(patch: pytest.MonkeyPatch) -> None:
    def bounded(self: RecordMechanism, gradients: Tensor, taken: Tensor) -> Tensor:
        return torch.cat([_BOUNDED(self, part, taken) for part in gradients.chunk(LAYERS, dim=-1)], dim=-1)

    patch.setattr(RecordMechanism, "bounded", bounded)


def record_loose(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RecordMechanism, "bounded", lambda self, g, t: _BOUNDED(dataclasses.replace(self, clip=1.5 * self.clip), g, t))


def record_variance(patch: pytest.MonkeyPatch) -> None:
    def noise(self: RecordMechanism, size: int, rng: np.random.Generator) -> Tensor:
        return _NOISE(dataclasses.replace(self, noise_multiplier=self.noise_multiplier**2), size, rng)

    patch.setattr(RecordMechanism, "noise", noise)


def record_root(patch: pytest.MonkeyPatch) -> None:
    def noise(self: RecordMechanism, size: int, rng: np.random.Generator) -> Tensor:
        return _NOISE(dataclasses.replace(self, noise_multiplier=self.noise_multiplier**0.5), size, rng)

    patch.setattr(RecordMechanism, "noise", noise)


def record_over_root_steps(patch: pytest.MonkeyPatch) -> None:
    steps = [1]

    def draw(self: RecordMechanism, many: int, rng: np.random.Generator) -> Any:
        steps[0] = many
        return _DRAW(self, many, rng)

    patch.setattr(RecordMechanism, "draw", draw)
    patch.setattr(RecordMechanism, "noise", lambda self, size, rng: _NOISE(self, size, rng) / steps[0] ** 0.5)


def record_weighted(patch: pytest.MonkeyPatch) -> None:
    """A weight of each sample that is applied to its clipped gradient; the weights have a mean of one."""

    def bounded(self: RecordMechanism, gradients: Tensor, taken: Tensor) -> Tensor:
        weights = torch.linspace(0.2, 1.8, gradients.shape[-2])
        return _BOUNDED(self, gradients, taken) + torch.einsum(
            "...s,...sd->...d",
            (weights - 1) * taken * (self.clip / torch.linalg.vector_norm(gradients, dim=-1).clamp(min=self.clip)),
            gradients,
        )

    patch.setattr(RecordMechanism, "bounded", bounded)


def record_known_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(per_sample, "noise_stream", lambda seed, number, client: seeds.stream(0, "dp-sgd/noise"))


def record_one_noise_a_round(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(per_sample, "noise_stream", lambda seed, number, client: seeds.stream(seed, "dp-sgd/noise", client))


def record_fixed_batches(patch: pytest.MonkeyPatch) -> None:
    def draw(self: RecordMechanism, steps: int, rng: np.random.Generator) -> Any:
        return np.stack([rng.permutation(self.samples)[: self.batch_size] for _ in range(steps)])

    patch.setattr(RecordMechanism, "draw", draw)


# The server

_CLIP, _STD = clipping.clip, Mechanism.std


def server_per_layer(patch: pytest.MonkeyPatch) -> None:
    def clip(rows: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        parts = [_CLIP(part, bound) for part in rows.chunk(LAYERS, dim=1)]
        return torch.cat([part for part, _ in parts], dim=1), parts[0][1]

    patch.setattr(clipping, "clip", clip)


def server_loose(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clipping, "clip", lambda rows, bound: _CLIP(rows, 1.5 * bound))


def server_loose_by_two(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clipping, "clip", lambda rows, bound: _CLIP(rows, 2 * bound))


def server_variance(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mechanism, "std", lambda self, bound: self.update_noise**2 * self.sensitivity(bound))


def server_root(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mechanism, "std", lambda self, bound: self.update_noise**0.5 * self.sensitivity(bound))


def server_over_root_rounds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mechanism, "std", lambda self, bound: _STD(self, bound) / self.rounds**0.5)


def server_weighted(patch: pytest.MonkeyPatch) -> None:
    def call(self: clipping.ClipRule, updates: Tensor, ctx: Any) -> Verdict:
        rows, factor = clipping.clip(updates, self.bound)
        return Verdict((ctx.weights / ctx.weights.mean())[:, None] * rows, trust=factor, bound=self.bound)

    patch.setattr(clipping.ClipRule, "__call__", call)


def server_known_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mechanism, "noise", lambda self, number, size: seeds.stream(0, "privacy/noise", number).standard_normal(size))


def server_one_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mechanism, "noise", lambda self, number, size: seeds.stream(self.seed, "privacy/noise").standard_normal(size))


def server_fixed_cohorts(patch: pytest.MonkeyPatch) -> None:
    def draw(self: Poisson, number: int) -> list[int]:
        return sorted(int(c) for c in seeds.stream(self.seed, "privacy/cohort", number).permutation(self.count)[: self.per_round])

    patch.setattr(Poisson, "draw", draw)


# Clients that noise their own update


def local_loose(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(local, "clip", lambda rows, bound: _CLIP(rows, 1.5 * bound))


def local_clip_for_sensitivity(patch: pytest.MonkeyPatch) -> None:
    """The noise of add-or-remove-one, where a replacement is claimed."""
    patch.setattr(LocalMechanism, "std", property(lambda self: self.sigma * self.clip))


def local_known_noise(patch: pytest.MonkeyPatch) -> None:
    release = LocalMechanism.release
    patch.setattr(LocalMechanism, "release", lambda self, updates, rng: release(self, updates, seeds.stream(0, "known")))


RECORD_FAULTS: list[Plant] = [
    record_per_layer,
    record_loose,
    record_variance,
    record_root,
    record_over_root_steps,
    record_weighted,
    record_known_noise,
    record_one_noise_a_round,
    record_fixed_batches,
]
SERVER_FAULTS: list[Plant] = [
    server_per_layer,
    server_loose,
    server_variance,
    server_root,
    server_over_root_rounds,
    server_weighted,
    server_known_noise,
    server_one_noise,
    server_fixed_cohorts,
]
LOCAL_FAULTS: list[Plant] = [local_loose, local_clip_for_sensitivity, local_known_noise]
ALL: list[tuple[dict[str, Any], list[Plant]]] = [(RECORD, RECORD_FAULTS), (SERVER, SERVER_FAULTS), (LOCAL, LOCAL_FAULTS)]
