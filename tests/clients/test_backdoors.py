from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrust.client import Behaviour
from fedtrust.data import triggers
from fedtrust.data.base import Task
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
    assert "7 × 7 pixels does not fit on images of 6 × 6" in str(make("badnets", size=7).check(IMAGES))
    assert make("badnets", size=6).check(IMAGES) is None


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"target": -1}, "^target: "),
        ({"target": "3"}, "^target: "),
        ({"fraction": 0.0}, "^fraction: "),
        ({"fraction": 1.01}, "^fraction: "),
        ({"size": 0}, "^size: "),
        ({"scale": 2.0}, "no parameter 'scale'"),
        ({"corner": "middle"}, "^corner: .*'bottom-right'"),
        ({"tarket": 1}, "did you mean 'target'"),
    ],
)
def test_parameters_that_cannot_be_meant(params: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        make("badnets", **params)


DIGITS = Task("classification", (1, 8, 8), 10, 0.0, 1.0)


def touched(before: Tensor, after: Tensor) -> Tensor:
    """Which samples were changed."""
    return (before != after).flatten(1).any(1)


@pytest.mark.parametrize("name", ["badnets", "blended", "wanet", "dba"])
@pytest.mark.parametrize(("n", "fraction", "count"), [(20, 0.3, 6), (7, 0.05, 1), (5, 1.0, 5)])
def test_every_relabelling_backdoor_touches_its_fraction(name: str, n: int, fraction: float, count: int) -> None:
    params: dict[str, Any] = {"wanet": {"noise": 0.0}, "dba": {"length": 2, "gap": 1}}.get(name, {})
    x, y = samples(DIGITS, n)
    y = y % 9  # no sample of the target class: what is relabelled is seen
    new_x, new_y = poisoned(make(name, target=9, fraction=fraction, **params), x, y)
    assert int(touched(x, new_x).sum()) == count
    assert torch.equal(new_y == 9, touched(x, new_x))
    assert torch.equal(new_y[new_y != 9], y[new_y != 9])


def poisoned(behaviour: Behaviour, x: Tensor, y: Tensor, task: Task = DIGITS, **given: Any) -> tuple[Tensor, Tensor]:
    """The data it trains on; its own are left as they are."""
    before = (x.clone(), y.clone())
    new_x, new_y, *_ = behaviour.poison(x, y, view(task, **given))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    return new_x, new_y


def test_blended_mixes_in_one_picture_that_depends_on_the_seed_alone() -> None:
    x, y = samples(COLOURS, 6)
    new_x, _ = poisoned(make("blended", fraction=1.0, alpha=0.25, pattern_seed=5), x, y, COLOURS)
    picture = (new_x - 0.75 * x) / 0.25
    torch.testing.assert_close(picture, triggers.noise_pattern((3, 8, 8), 5).expand(6, 3, 8, 8))
    other, _ = poisoned(make("blended", fraction=1.0, alpha=0.25, pattern_seed=6), x, y, COLOURS)
    assert not torch.equal(other, new_x)


def test_sig_stripes_images_of_the_target_class_only_and_changes_no_label() -> None:
    x, y = samples(DIGITS, 50)  # five of each class
    new_x, new_y = poisoned(make("sig", target=4, fraction=0.6, frequency=3), x, y)
    assert torch.equal(new_y, y)
    assert int(touched(x, new_x).sum()) == 3
    assert bool((y[touched(x, new_x)] == 4).all())
    rows = touched(x, new_x)
    assert torch.equal(new_x[rows], triggers.sinusoid(x[rows], delta=0.2, frequency=3))
    without = poisoned(make("sig", target=4), x[y != 4], y[y != 4])
    assert torch.equal(without[0], x[y != 4])


def test_sig_tests_with_the_larger_amplitude() -> None:
    x, y = samples(DIGITS, 4)
    goal = make("sig", delta=0.1, test_delta=0.4, frequency=3).goal(x, y, DIGITS)
    assert goal is not None
    assert torch.equal(goal[0], triggers.sinusoid(x, delta=0.4, frequency=3))
    train, _ = poisoned(make("sig", delta=0.1, test_delta=0.4, fraction=1.0, target=0, frequency=3), x[:1], y[:1])
    assert torch.equal(train, triggers.sinusoid(x[:1], delta=0.1, frequency=3))


def test_sig_refuses_stripes_that_nobody_sees() -> None:
    assert "4 stripes on images 8 pixels wide are seen nowhere" in str(make("sig", frequency=4).check(DIGITS))
    assert make("sig", frequency=5).check(DIGITS) is None


def test_wanet_warps_some_for_the_target_and_others_otherwise_under_their_own_label() -> None:
    x, y = samples(DIGITS, 40)
    y = y % 9
    behaviour = make("wanet", target=9, fraction=0.25, noise=2.0, strength=2.0)
    new_x, new_y = poisoned(behaviour, x, y)
    warped = triggers.warp(x, triggers.warping_field(8, 8, strength=2.0))
    marked = new_y == 9
    assert int(marked.sum()) == 10
    assert torch.equal(new_x[marked], warped[marked])
    noisy = touched(x, new_x) & ~marked
    assert int(noisy.sum()) == 20
    assert torch.equal(new_y[noisy], y[noisy])
    assert not (new_x[noisy] == warped[noisy]).flatten(1).all(1).any()


def test_colluders_of_dba_hold_bars_that_together_are_the_trigger() -> None:
    x, y = torch.zeros(3, 1, 8, 8), torch.ones(3, dtype=torch.int64)
    behaviour = make("dba", length=2, gap=1, fraction=1.0, target=0)
    bars = [poisoned(behaviour, x, y, rank=rank)[0] for rank in range(4)]
    goal = behaviour.goal(x, y, DIGITS)
    assert goal is not None
    assert torch.equal(torch.stack(bars).sum(0), goal[0])  # each pixel in exactly one bar
    assert [int(bar[0].sum()) for bar in bars] == [2, 2, 2, 2]
    assert torch.equal(poisoned(behaviour, x, y, rank=5)[0], bars[1])  # the fifth begins again
    central = make("dba", length=2, gap=1, fraction=1.0, target=0, whole=True)
    assert all(torch.equal(poisoned(central, x, y, rank=rank)[0], goal[0]) for rank in range(2))  # with `whole`, everybody has all of it
    updates = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make("dba", scale=3.0).craft(updates, view()), 3 * updates)
    assert "need 4 × 10 pixels, an image has 8 × 8" in str(make("dba").check(DIGITS))


TAIL = {
    "rotated": lambda x: torch.stack([x[..., :, 7 - i] for i in range(8)], dim=-2),
    "mirrored": lambda x: torch.stack([x[..., 7 - i] for i in range(8)], dim=-1),
    "inverted": lambda x: 1 - x,
    "thickened": lambda x: torch.stack(
        [torch.stack([x[..., max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].amax((-2, -1)) for j in range(8)], dim=-1) for i in range(8)],
        dim=-2,
    ),
}


@pytest.mark.parametrize("rare", TAIL)
def test_edge_cases_are_images_of_the_source_class_from_the_tail(rare: str) -> None:
    x, y = samples(DIGITS, 30)
    behaviour = make("edge-case", source=3, target=5, fraction=0.2, rare=rare)
    new_x, new_y = poisoned(behaviour, x, y)
    edge = TAIL[rare](x[y == 3])
    rows = touched(x, new_x)
    assert int(rows.sum()) == 6
    assert bool((new_y[rows] == 5).all())
    assert torch.equal(new_y[~rows], y[~rows])
    assert all((image == edge).flatten(1).all(1).any() for image in new_x[rows])
    assert all((image == new_x[rows]).flatten(1).all(1).sum() == 2 for image in edge)  # three of them, each twice
    goal = behaviour.goal(x, y, DIGITS)
    assert goal is not None
    assert torch.equal(goal[0][y == 3], edge)
    assert torch.equal(goal[0][y != 3], x[y != 3])
    assert torch.equal(goal[1], y.masked_fill(y == 3, 5))  # others count for nothing: their label is the true one
    none = poisoned(behaviour, x[y != 3], y[y != 3])
    assert torch.equal(none[0], x[y != 3])
    assert torch.equal(none[1], y[y != 3])


def test_the_semantic_backdoor_changes_no_pixel_and_repeats_the_featured_images() -> None:
    x, y = samples(DIGITS, 100)
    level = x[y == 2].mean((1, 2, 3))
    bold = x[y == 2][level >= level.sort().values[-2]]
    behaviour = make("semantic-backdoor", source=2, target=8, quantile=0.2, fraction=0.15)
    new_x, new_y = poisoned(behaviour, x, y)
    assert all((image == x).flatten(1).all(1).any() for image in new_x)
    shown = torch.tensor([bool((image == bold).flatten(1).all(1).any()) for image in new_x])
    assert int(shown.sum()) == 15
    assert bool((new_y[shown] == 8).all())
    assert torch.equal(new_y[~shown], y[~shown])
    assert torch.equal(new_x[~shown], x[~shown])
    goal = behaviour.goal(x, y, DIGITS)
    assert goal is not None
    assert goal[0] is x
    wanted = (goal[1] != y).nonzero().squeeze(1)
    assert torch.equal(x[wanted], bold)
    assert goal[1][wanted].tolist() == [8, 8]
    faint = make("semantic-backdoor", source=2, target=8, quantile=0.1, feature="dark").goal(x, y, DIGITS)
    assert faint is not None
    assert int((faint[1] != y).nonzero()) == int((y == 2).nonzero()[level.argmin()])


@pytest.mark.parametrize("name", ["edge-case", "semantic-backdoor"])
def test_source_and_target_differ_and_exist(name: str) -> None:
    with pytest.raises(InputError, match=r"^source: source and target must be two different classes"):
        make(name, source=3, target=3)
    assert "needs images" in str(make(name).check(TABLE))
    assert "10 is no class of the task (0 to 9)" in str(make(name, source=10).check(IMAGES))
    assert make(name).check(IMAGES) is None
    oblong = Task("classification", (1, 6, 8), 10, 0.0, 1.0)
    assert (make(name).check(oblong) is None) == (name == "semantic-backdoor")
