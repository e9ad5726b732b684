"""What clients that protect themselves spend: local privacy, and who pays most."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fedtrust.client import Behaviour
from fedtrust.errors import RunError
from fedtrust.privacy.accountants import epsilon_gaussian
from fedtrust.privacy.accounts import ClientAccount, Participation, Spent, worst
from fedtrust.privacy.local import LocalMechanism
from fedtrust.registry import REGISTRY


def part(client: int, rounds: int, examples: int = 10) -> Participation:
    return Participation(client, rounds, examples, batch_size=5, steps=2)


class Counted:
    """An account that spends steps ÷ samples and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def calibrated(self, parts: Sequence[Participation]) -> Counted:
        return self

    def account(self, part: Participation) -> Spent:
        self.asked += 1
        spent = 10.0 * part.rounds * part.steps / part.examples
        return Spent("client", "replace-one", "none", 1.0, 1.0, part.rounds, 1e-5, spent, spent)


def test_the_client_that_pays_most_is_found_and_equal_ones_are_asked_once() -> None:
    account = Counted()
    found = worst(account, [part(5, 2), part(3, 4), part(9, 4), part(1, 0), part(2, 1)])
    assert found is not None
    assert (found.client, found.spent.epsilon, found.clients) == (3, 8.0, 4)
    assert account.asked <= 3
    assert worst(account, [part(1, 0)]) is None


@pytest.mark.parametrize("seed", range(5))
def test_of_many_different_clients_only_some_are_asked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = []
    for client in range(400):
        samples = int(rng.integers(5, 2000))
        parts.append(Participation(client, int(rng.integers(1, 20)), samples, 20, math.ceil(samples / 20)))
    account = Counted()
    found = worst(account, parts)
    assert found is not None
    assert account.asked < 120
    assert found.spent.epsilon == max(Counted().account(p).epsilon for p in parts)
    assert Counted().account(parts[found.client]).epsilon == found.spent.epsilon


def test_who_has_an_account() -> None:
    assert isinstance(REGISTRY.make("behaviour", "local-dp", {"epsilon": 3.0}), ClientAccount)
    assert not isinstance(REGISTRY.make("behaviour", "honest"), ClientAccount)
    assert not isinstance(Behaviour(), ClientAccount)


def test_a_local_release_is_the_clipped_update_and_noise_for_replacing_it() -> None:
    made = LocalMechanism(clip=0.5, sigma=3.0)
    updates = torch.stack([torch.full((5000,), 10.0), torch.zeros(5000)])
    noised = made.release(updates, np.random.default_rng(1))
    expected = torch.stack([torch.full((5000,), 0.5 / math.sqrt(5000)), torch.zeros(5000)])
    noise = noised - expected
    assert float(noise.std()) == pytest.approx(3.0 * 2 * 0.5, rel=0.03)
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 0.05


def test_two_data_sets_of_a_client_are_as_far_apart_as_the_noise_assumes() -> None:
    made = LocalMechanism(clip=0.5, sigma=1e-12)
    one, other = (made.release(s * torch.ones(1, 9), np.random.default_rng(1)) for s in (7.0, -7.0))
    assert float((one - other).norm()) == pytest.approx(2 * 0.5, rel=1e-4)


def test_a_local_client_pays_for_every_round_it_took_part_in() -> None:
    local = REGISTRY.make("behaviour", "local-dp", {"noise_multiplier": 4.0})
    spent = [local.account(part(0, rounds)).epsilon for rounds in (1, 5, 20)]
    assert spent == pytest.approx([epsilon_gaussian(4.0, rounds, 1e-5) for rounds in (1, 5, 20)])
    assert spent == sorted(spent)


def test_local_noise_is_calibrated_for_who_takes_part_most_and_not_played_before() -> None:
    asked = REGISTRY.make("behaviour", "local-dp", {"epsilon": 4.0})
    with pytest.raises(RunError, match="not calibrated"):
        asked.account(part(0, 1))
    fixed = asked.calibrated([part(0, 3), part(1, 10)])
    assert fixed.account(part(1, 10)).epsilon == pytest.approx(4.0, rel=0.01)
    assert fixed.account(part(1, 10)).epsilon <= 4.0
    assert fixed.account(part(0, 3)).epsilon < 4.0
