from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedtrust.client import Poisoned
from fedtrust.engine.cohort import Chunk, ClientTask, train
from fedtrust.errors import InputError
from fedtrust.models.ensemble import member_of
from fedtrust.runner import run
from fedtrust.scenario import Scenario
from fedtrust.setup import build
from tests.clients.behaviour_kit import NUMBERS, make, view

Small = Callable[..., Scenario]
VOTING: dict[str, Any] = {
    "model": {"name": "ensemble", "of": "logistic", "members": 3},
    "clients": {"behaviour": "dpa"},
    "strategy": {"aggregator": "dpa"},
}


@pytest.mark.parametrize("attack", [None, "label-flip"])
def test_a_client_trains_its_own_member_and_so_does_one_with_poisoned_data(small: Small, attack: str | None) -> None:
    world = build(small(**VOTING)).world
    behaviour = make("dpa") if attack is None else Poisoned(attack=make(attack), honest=make("dpa"))
    tasks = tuple(ClientTask(c, behaviour, behaviour.remember(world.layout.size)) for c in range(6))
    result = train(world, Chunk(1, world.layout.vector(world.module), {}, tasks))
    assert not result.faults
    moved = set()
    for client, update in zip(result.clients, result.updates, strict=True):
        touched = [i for i, where in enumerate(world.layout.members) if bool((update[where] != 0).any())]
        assert touched == [member_of(client, 3)]
        moved.update(touched)
    assert moved == {0, 1, 2}


def test_its_training_is_that_of_the_member_alone(small: Small) -> None:
    """The same samples and batches with the one member as the whole model give the same update."""
    world = build(small(**VOTING)).world
    dpa = make("dpa")
    start = world.layout.vector(world.module)
    both = train(world, Chunk(1, start, {}, (ClientTask(4, dpa, dpa.remember(world.layout.size)),)))
    alone = build(small()).world
    where = world.layout.members[member_of(4, 3)]
    single = train(alone, Chunk(1, start[where], {}, (ClientTask(4, make("honest"), {}),)))
    torch.testing.assert_close(both.updates[0, where], single.updates[0], atol=1e-5, rtol=1e-4)


def members_after(small: Small, out: Path, **changes: Any) -> list[Tensor]:
    result = run(small(**VOTING, rounds=3, **changes), out, engine="local", workers=2)
    assert result.status == "finished", result.why
    model = load_file(out / "model.safetensors")
    return [torch.cat([v.flatten() for k, v in sorted(model.items()) if k.startswith(f"members.{i}.")]) for i in range(3)]


def test_in_a_whole_run_an_attacker_changes_no_bit_of_the_other_members(small: Small, tmp_path: Path) -> None:
    clean = members_after(small, tmp_path / "clean")
    for client in (1, 6):
        for attack in ("gaussian", "label-flip"):
            attacked = members_after(small, tmp_path / f"{attack}-{client}", attackers=[{"behaviour": attack, "ids": [client]}])
            same = [torch.equal(a, b) for a, b in zip(clean, attacked, strict=True)]
            assert same == [i != member_of(client, 3) for i in range(3)], attack


def test_the_certificate_of_a_run(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    even = {"partition": {"kind": "dirichlet", "alpha": 100.0}}
    run(small(**VOTING, rounds=6, data=even, probes=["accuracy", "dpa-certificate"]), out, engine="local")
    metrics = json.loads((out / "rounds.jsonl").read_text().splitlines()[-1])["metrics"]
    assert metrics["dpa-certificate/0"] == metrics["accuracy"]
    assert 0 < metrics["dpa-certificate/1"] < metrics["dpa-certificate/0"]  # all three vote alike
    assert metrics["dpa-certificate/2"] == 0.0


def test_a_model_that_is_no_ensemble_is_refused(small: Small) -> None:
    with pytest.raises(InputError, match="needs the model 'ensemble' with at least two members"):
        build(small(**{**VOTING, "model": "logistic"}))
    assert "regression" in str(make("dpa").check(NUMBERS))
    assert make("dpa").check(view().task) is None
