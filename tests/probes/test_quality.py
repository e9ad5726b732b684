from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedtrust.data.base import SkewFn, Task
from fedtrust.probes.base import Artefact, Goal, need, share
from fedtrust.probes.quality import png
from tests.probes.probe_kit import TASK, context, federated, measure, numbers, truth

# The model says 0 0 1 1 2 2; the truth is 0 1 1 1 2 0: right are 4 of 6; class 0: 1/2, class 1: 2/3, class 2: 1/1.
TEST = (numbers(0.0, 0.1, 1.0, 1.2, 2.0, 1.9), torch.tensor([0, 1, 1, 1, 2, 0]))


def test_accuracy_by_hand() -> None:
    assert measure("accuracy", context(test=TEST)) == {"accuracy": pytest.approx(4 / 6)}


def test_loss_by_hand() -> None:
    x, y = numbers(0.0, 2.0), [0, 1]
    rows = [[0.0, -1.0, -2.0], [-2.0, -1.0, 0.0]]
    wanted = sum(math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in zip(rows, y, strict=True)) / 2
    assert measure("loss", context(test=(x, torch.tensor(y)))) == {"loss": pytest.approx(wanted, rel=1e-5)}


def test_loss_of_a_regression_is_its_own_criterion() -> None:
    ctx = context(
        task=Task("regression", (1,), 1),
        query=lambda x: 2 * x,
        criterion=lambda output, y: (output.squeeze(1) - y).abs().mean(),
        test=(numbers(1.0, 3.0), torch.tensor([2.0, 7.0])),
    )
    assert measure("loss", ctx) == {"loss": 0.5}


def test_recall_by_hand_with_and_without_names() -> None:
    wanted = [pytest.approx(1 / 2), pytest.approx(2 / 3), 1.0]
    assert measure("recall", context(test=TEST)) == dict(zip(["recall/0", "recall/1", "recall/2"], wanted, strict=True))
    named = replace(TASK, labels=("cat", "dog", "cow"))
    assert measure("recall", context(task=named, test=TEST)) == dict(zip(["recall/cat", "recall/dog", "recall/cow"], wanted, strict=True))


def test_recall_of_a_class_without_test_samples_is_left_out() -> None:
    ctx = context(test=(numbers(0.0, 2.0), torch.tensor([0, 1])))
    assert measure("recall", ctx) == {"recall/0": 1.0, "recall/1": 0.0}


def test_client_accuracy_by_hand() -> None:
    """Recalls 1/2, 2/3, 1. Client 0 has class 0 only: 1/2; client 1 half 1, half 2: 5/6; client 2 three of 0, one of 2: 5/8."""
    data = federated(*TEST[:1], TEST[1].tolist(), [[0, 0], [1, 2], [0, 0, 2, 0]])
    found = measure("client-accuracy", context(test=TEST, data=data))
    each = [1 / 2, 5 / 6, 5 / 8]
    assert found["client-accuracy/mean"] == pytest.approx(sum(each) / 3)
    assert found["client-accuracy/worst"] == pytest.approx(1 / 2)
    assert found["client-accuracy/worst-share"] == pytest.approx(1 / 2)  # a tenth of three clients is one
    two = measure("client-accuracy", context(test=TEST, data=data), share_worst=0.7)
    assert two["client-accuracy/worst-share"] == pytest.approx((1 / 2 + 5 / 8) / 2)


@dataclass(frozen=True)
class Shift(SkewFn):
    by: float

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.by


def test_client_accuracy_through_the_clients_own_eyes() -> None:
    """Client 0 sees the samples as they are, client 1 one higher: to it the model says 1 1 2 2 2 2, recalls 0, 1/3, 1."""
    data = federated(TEST[0], TEST[1].tolist(), [[0, 1, 2], [1, 2, 2, 2]], skews=[Shift(0.0), Shift(1.0)])
    found = measure("client-accuracy", context(test=TEST, data=data), share_worst=0.5)
    first, second = (1 / 2 + 2 / 3 + 1) / 3, (1 / 3 + 3 * 1) / 4
    assert found["client-accuracy/mean"] == pytest.approx((first + second) / 2)
    assert found["client-accuracy/worst"] == pytest.approx(min(first, second))


def test_classes_without_test_samples_do_not_count_against_a_client() -> None:
    """The model is always right on the test samples, of classes 0 and 1: client 0 has all classes, client 1 only the untested one."""
    test = (numbers(0.0, 1.0), torch.tensor([0, 1]))
    data = federated(test[0], [0, 1], [[0, 1, 2, 2], [2, 2], [1]])
    found = measure("client-accuracy", context(test=test, data=data))
    assert found == {"client-accuracy/mean": 1.0, "client-accuracy/worst": 1.0, "client-accuracy/worst-share": 1.0}
    alone = federated(test[0], [0, 1], [[2, 2], [2]])
    assert measure("client-accuracy", context(test=test, data=alone)) == {}
    skewed = federated(test[0], [0, 1], [[2, 2], [1, 2]], skews=[Shift(5.0), Shift(0.0)])
    assert measure("client-accuracy", context(test=test, data=skewed))["client-accuracy/mean"] == 1.0
    half = (numbers(0.0, 0.0), torch.tensor([0, 1]))
    assert measure("client-accuracy", context(test=half, data=data))["client-accuracy/mean"] == pytest.approx((1 / 2 + 0) / 2)


def goal(name: str, x: Tensor, wanted: list[int]) -> Goal:
    return Goal(name, x, torch.tensor(wanted), x - 0.5)


def test_attack_success_by_hand() -> None:
    one = goal("badnets", numbers(0.0, 1.0, 2.0, 2.0), [0, 2, 2, 2])
    assert measure("attack-success", context(truth=truth(3, goals=(one,)))) == {"attack-success": 0.75}


def test_with_several_attacks_the_strongest_counts_and_each_is_told() -> None:
    goals = (
        goal("badnets", numbers(0.0, 1.0), [0, 2]),
        goal("label-flip", numbers(0.0, 1.0, 2.0, 2.0), [0, 1, 2, 0]),
        goal("other", numbers(0.0), [1]),
    )
    assert measure("attack-success", context(truth=truth(goals=goals))) == {
        "attack-success": 0.75,
        "attack-success/badnets": 0.5,
        "attack-success/label-flip": 0.75,
        "attack-success/other": 0.0,
    }


def test_two_groups_with_the_same_behaviour_do_not_hide_each_other() -> None:
    goals = (goal("badnets", numbers(0.0, 1.0), [0, 1]), goal("badnets", numbers(0.0, 1.0), [2, 2]))
    assert measure("attack-success", context(truth=truth(goals=goals))) == {
        "attack-success": 1.0,
        "attack-success/badnets": 1.0,
        "attack-success/badnets-2": 0.0,
    }


def test_without_a_goal_there_is_no_attack_success() -> None:
    assert measure("attack-success", context(truth=truth(1, 2))) == {}


PICTURES = Task("classification", (1, 4, 5), 3, 0.0, 1.0, ("cat", "dog", "cow"))


def pixels(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_a_png_holds_the_pixels() -> None:
    grey = torch.linspace(0, 1, 20).reshape(1, 4, 5)
    assert np.array_equal(pixels(png(grey)), (grey[0] * 255).round().numpy().astype(np.uint8))
    colour = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0))
    decoded = pixels(png(colour))
    assert decoded.shape == (6, 7, 3)
    assert np.array_equal(decoded, (colour * 255).round().permute(1, 2, 0).numpy().astype(np.uint8))
    outside = torch.tensor([[[-1.0, 0.5, 2.0]]])
    assert pixels(png(outside)).tolist() == [[0, 128, 255]]


def triggered(n: int) -> Goal:
    clean = torch.rand(n, 1, 4, 5, generator=torch.Generator().manual_seed(0)) * 0.4
    x = clean.clone()
    x[:, :, :2, :2] = 1.0
    return Goal("badnets", x, torch.full((n,), 2), clean)


def judge(x: Tensor) -> Tensor:
    """Take what has a bright corner for class 2, everything else for class 0."""
    bright = (x[:, 0, 0, 0] > 0.9).float()
    return torch.stack([1 - bright, torch.zeros_like(bright), bright], 1)


@pytest.mark.parametrize(("n", "count", "shown"), [(30, 8, 8), (30, 1, 1), (3, 8, 3)])
def test_trigger_examples_are_the_clean_and_the_triggered_image_side_by_side(n: int, count: int, shown: int) -> None:
    one = triggered(n)
    found = measure("trigger-examples", context(task=PICTURES, query=judge, truth=truth(goals=(one,))), count=count)
    assert list(found) == ["badnets"]
    artefact = found["badnets"]
    assert isinstance(artefact, Artefact)
    assert artefact.kind == "images"
    images = artefact.data["images"]
    assert len(images) == 2 * shown
    matched = []
    for before, after in zip(images[::2], images[1::2], strict=True):
        assert (before["label"], after["label"]) == ("clean → cat", "badnets → cow")
        rows = [i for i in range(n) if np.array_equal(pixels(before["png"]), (one.clean[i, 0] * 255).round().numpy().astype(np.uint8))]
        assert len(rows) == 1
        assert np.array_equal(pixels(after["png"]), (one.x[rows[0], 0] * 255).round().numpy().astype(np.uint8))
        matched += rows
    assert len(set(matched)) == shown
    if shown > 1:
        assert (matched[0], matched[-1]) == (0, n - 1)  # spread over all of them


def test_classes_without_names_are_numbered() -> None:
    task = replace(PICTURES, labels=())
    found = measure("trigger-examples", context(task=task, query=judge, truth=truth(goals=(triggered(2),))))
    assert [image["label"] for image in found["badnets"].data["images"]] == ["clean → 0", "badnets → 2"] * 2


def test_two_triggers_of_the_same_behaviour_are_both_shown() -> None:
    found = measure("trigger-examples", context(task=PICTURES, query=judge, truth=truth(goals=(triggered(2), triggered(3)))))
    assert {name: len(a.data["images"]) for name, a in found.items()} == {"badnets": 4, "badnets-2": 6}


def test_where_there_is_nothing_to_see_nothing_is_shown() -> None:
    plain = triggered(4).clean
    unseen = Goal("label-flip", plain, torch.zeros(4, dtype=torch.int64), plain)
    assert measure("trigger-examples", context(task=PICTURES, query=judge, truth=truth(goals=(unseen,)))) == {}
    assert measure("trigger-examples", context(truth=truth(goals=(goal("x", numbers(0.0), [1]),)))) == {}
    assert measure("trigger-examples", context(task=PICTURES, query=judge, truth=truth())) == {}


@pytest.mark.parametrize("name", ["accuracy", "loss", "recall", "client-accuracy", "attack-success", "detection"])
def test_a_probe_of_the_teachers_cannot_measure_without_what_he_sees(name: str) -> None:
    with pytest.raises(PermissionError, match="this probe does not see"):
        measure(name, context(trust=torch.ones(1), clients=(0,)))


def test_the_small_tools_of_the_probes() -> None:
    assert share(torch.tensor([True, False, True, True])) == 0.75
    assert share(torch.tensor([], dtype=torch.bool)) == 0.0
    assert need(0, "it") == 0
