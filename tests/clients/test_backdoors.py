from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrust.errors import InputError
from tests.clients.behaviour_kit import COLOURS, IMAGES, NUMBERS, TABLE, make, samples, view

CORNERS = {
    "bottom-right": (slice(-3, None), slice(-3, None)),
    "bottom-left": (slice(-3, None), slice(0, 3)),
    "top-left": (slice(0, 3), slice(0, 3)),
    "top-right": (slice(0, 3), slice(-3, None)),
}


def marked(x: Tensor, rows: slice, columns: slice) -> Tensor:
    result = x.clone()
    result[..., rows, columns] = 1.0
    return result


@pytest.mark.parametrize("task", [IMAGES, COLOURS], ids=["grey", "colour"])
@pytest.mark.parametrize("corner", list(CORNERS))
def test_the_chosen_images_get_the_mark_and_the_label_and_nothing_else(corner: str, task: Any) -> None:
    x, y = samples(task, 20)
    before = (x.clone(), y.clone())
    new_x, new_y = make("badnets", target=3, fraction=0.4, corner=corner).poison(x, y, view(task))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    touched = (new_x != x).flatten(1).any(1)
    assert int(touched.sum()) == 8
    assert torch.equal(new_x[touched], marked(x[touched], *CORNERS[corner]))
    assert bool((new_y[touched] == 3).all())
    assert torch.equal(new_x[~touched], x[~touched])
    assert torch.equal(new_y[~touched], y[~touched])


@pytest.mark.parametrize(("n", "fraction", "count"), [(10, 0.5, 5), (11, 0.3, 3), (7, 1.0, 7), (10, 0.01, 1), (1, 0.5, 1), (30, 0.29, 9)])
def test_exactly_the_fraction_is_triggered(n: int, fraction: float, count: int) -> None:
    x, y = samples(IMAGES, n)
    for seed in range(5):
        new_x, _ = make("badnets", fraction=fraction).poison(x, y, view(seed=seed))
        assert int((new_x != x).flatten(1).any(1).sum()) == count


def test_which_images_is_drawn_from_the_view_alone_and_every_one_can_be() -> None:
    x, y = samples(IMAGES, 12)
    behaviour, state = make("badnets", fraction=0.25), torch.get_rng_state()

    def chosen(seed: int) -> Tensor:
        return (behaviour.poison(x, y, view(seed=seed))[0] != x).flatten(1).any(1)

    assert torch.equal(chosen(1), chosen(1))
    often = torch.stack([chosen(seed) for seed in range(200)]).double().mean(0)
    assert bool(((often - 0.25).abs() < 0.16).all())  # more than five standard errors
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_size_of_the_mark(size: int) -> None:
    x, y = samples(IMAGES, 4)
    new_x, _ = make("badnets", fraction=1.0, size=size).poison(x, y, view())
    assert int((new_x == 1).sum()) == 4 * size * size


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.5])
def test_the_update_is_scaled(scale: float) -> None:
    updates = torch.randn(3, 15, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make("badnets", scale=scale).craft(updates.clone(), view()), scale * updates)


def test_its_goal_is_every_triggered_test_image_taken_for_the_target() -> None:
    x, y = samples(IMAGES, 20)
    before = x.clone()
    goal = make("badnets", target=7, corner="top-left").goal(x, y, IMAGES)
    assert goal is not None
    assert torch.equal(goal[0], marked(x, *CORNERS["top-left"]))
    assert goal[1].tolist() == [7] * 20
    assert torch.equal(x, before)


def test_the_goal_shows_the_very_trigger_that_it_trained_on() -> None:
    x, y = samples(IMAGES, 6)
    behaviour = make("badnets", fraction=1.0, size=2, corner="top-right")
    goal = behaviour.goal(x, y, IMAGES)
    assert goal is not None
    assert torch.equal(goal[0], behaviour.poison(x, y, view())[0])


def test_tasks_it_cannot_work_on() -> None:
    assert "needs images" in str(make("badnets").check(TABLE))
    assert "needs images" in str(make("badnets").check(NUMBERS))
    assert "0 to 9" in str(make("badnets", target=10).check(IMAGES))
    assert make("badnets", target=9).check(IMAGES) is None
    assert "does not fit an image of 6 × 6" in str(make("badnets", size=7).check(IMAGES))
    assert make("badnets", size=6).check(IMAGES) is None


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"target": -1}, "^target: "),
        ({"target": "3"}, "^target: "),
        ({"fraction": 0.0}, "^fraction: "),
        ({"fraction": 1.01}, "^fraction: "),
        ({"size": 0}, "^size: "),
        ({"scale": 0.0}, "^scale: "),
        ({"corner": "middle"}, "^corner: .*'bottom-right'"),
        ({"tarket": 1}, "did you mean 'target'"),
    ],
)
def test_parameters_that_cannot_be_meant(params: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        make("badnets", **params)
