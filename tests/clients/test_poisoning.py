from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrust.errors import InputError
from tests.clients.behaviour_kit import IMAGES, NUMBERS, TABLE, make, samples, view


def flipped(y: Tensor, *, seed: int = 0, **params: Any) -> Tensor:
    x, _ = samples(IMAGES, len(y))
    before = (x.clone(), y.clone())
    new_x, new_y = make("label-flip", **params).poison(x, y, view(IMAGES, seed=seed))
    assert torch.equal(new_x, before[0])  # the samples themselves are right
    assert torch.equal(y, before[1])  # and its own labels are left as they are
    return new_y


def test_mirror_turns_y_into_classes_minus_1_minus_y() -> None:
    assert flipped(torch.tensor([0, 1, 4, 5, 9, 9])).tolist() == [9, 8, 5, 4, 0, 0]
    tabular = make("label-flip").poison(*samples(TABLE, 4), view(TABLE))[1]
    assert tabular.tolist() == [1, 0, 1, 0]


def test_targeted_turns_one_class_only() -> None:
    assert flipped(torch.tensor([5, 3, 5, 0, 9]), mode="targeted", source=5, target=3).tolist() == [3, 3, 3, 0, 9]
    assert flipped(torch.tensor([0, 1, 2]), mode="targeted", source=0, target=2).tolist() == [2, 1, 2]
    assert flipped(torch.tensor([7, 1, 0]), mode="targeted", source=7, target=0).tolist() == [0, 1, 0]


def test_random_draws_each_other_class_equally_often_and_never_the_true_one() -> None:
    n = 18_000
    wrong = flipped(torch.full((n,), 4), mode="random")
    counts = torch.bincount(wrong, minlength=10)
    assert counts[4] == 0
    assert int(counts.sum()) == n
    assert len(counts) == 10
    assert bool(((counts - n / 9).abs() < 6 * (n / 9 * 8 / 9) ** 0.5)[torch.arange(10) != 4].all())


def test_random_is_drawn_from_the_view_alone() -> None:
    y = torch.arange(10).repeat(20)
    state = torch.get_rng_state()
    assert torch.equal(flipped(y, mode="random", seed=1), flipped(y, mode="random", seed=1))
    assert not torch.equal(flipped(y, mode="random", seed=1), flipped(y, mode="random", seed=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [{"mode": "mirror"}, {"mode": "random"}])
def test_a_fraction_is_turned_and_the_rest_is_left(mode: dict[str, Any]) -> None:
    y = torch.arange(10).repeat(1000)
    new = flipped(y, fraction=0.3, **mode)
    changed = new != y
    assert float(changed.double().mean()) == pytest.approx(0.3, abs=0.03)  # more than six standard errors
    assert all(0.2 < float(changed[y == c].double().mean()) < 0.4 for c in range(10))
    if mode["mode"] == "mirror":
        assert torch.equal(new[changed], (9 - y)[changed])


def test_goals_are_what_the_labels_were_turned_into() -> None:
    x, y = samples(IMAGES, 20)
    mirror = make("label-flip").goal(x, y, IMAGES)
    assert mirror is not None
    assert mirror[0] is x
    assert torch.equal(mirror[1], 9 - y)
    targeted = make("label-flip", mode="targeted", source=2, target=6).goal(x, y, IMAGES)
    assert targeted is not None
    wanted = y.clone()
    wanted[y == 2] = 6
    assert torch.equal(targeted[1], wanted)
    assert make("label-flip", mode="random").goal(x, y, IMAGES) is None


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"mode": "targeted"}, "source: mode 'targeted' needs two different classes"),
        ({"mode": "targeted", "source": 1}, "needs two different classes"),
        ({"mode": "targeted", "target": 0}, "needs two different classes"),
        ({"mode": "targeted", "source": 3, "target": 3}, "needs two different classes"),
        ({"source": 1, "target": 2}, "source and target belong to mode 'targeted', not 'mirror'"),
        ({"mode": "random", "target": 0}, "belong to mode 'targeted', not 'random'"),
        ({"mode": "upside-down"}, "^mode: .*'mirror'"),
        ({"fraction": 0.0}, "^fraction: "),
        ({"fraction": 1.1}, "^fraction: "),
        ({"source": -1}, "^source: "),
        ({"mode": "targeted", "source": 1.0, "target": 2}, "^source: "),
        ({"fractoin": 0.5}, "has no parameter 'fractoin' .*did you mean 'fraction'"),
    ],
)
def test_parameters_that_cannot_be_meant(params: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        make("label-flip", **params)


def test_tasks_it_cannot_work_on() -> None:
    assert "regression" in str(make("label-flip").check(NUMBERS))
    assert make("label-flip").check(TABLE) is None
    last = make("label-flip", mode="targeted", source=0, target=9)
    assert last.check(IMAGES) is None
    assert "classes 0 to 8 only" in str(last.check(replace(IMAGES, classes=9)))
    assert "classes 0 to 1 only" in str(make("label-flip", mode="targeted", source=2, target=0).check(TABLE))
