"""How reconstructions are scored: PSNR, SSIM against its formula written out, the best match, label counts, prototypes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtrust.data.base import FederatedData, Task
from fedtrust.probes.base import Artefact, ProbeContext
from fedtrust.probes.guesses import LabelCounts, Prototype, Reconstruction, Reconstructions, score
from fedtrust.probes.scores_images import MOST, assigned, mse, psnr, ssim
from tests.probes.probe_kit import context, federated

IMAGES = Task("classification", (1, 8, 8), 3, 0.0, 1.0)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def teacher(x: Tensor, y: list[int], parts: list[list[int]], task: Task = IMAGES) -> ProbeContext:
    rows = [np.array(part, dtype=np.int64) for part in parts]
    data = FederatedData(task, x, torch.tensor(y), rows, x[:0], torch.tensor(y)[:0])
    return context(task=task, data=data, query=lambda given: torch.eye(task.classes)[torch.zeros(len(given), dtype=torch.int64)])


def test_psnr_is_the_range_over_the_error_in_decibels() -> None:
    assert psnr(torch.tensor([0.01, 1e-4]), 1.0).tolist() == pytest.approx([20.0, 40.0], abs=1e-5)
    assert float(psnr(torch.tensor(0.01), 10.0)) == pytest.approx(40.0, abs=1e-5)  # ten times the range: 20 dB more
    assert float(psnr(torch.tensor(0.0), 1.0)) == MOST
    a, b = torch.zeros(1, 1, 2, 2), torch.full((2, 1, 2, 2), 0.5)
    assert mse(a, b).tolist() == [[0.25, 0.25]]


def brute_ssim(a: np.ndarray, b: np.ndarray, side: int, span: float) -> float:
    """The structural similarity as scikit-image defines it by default, window by window."""
    values = []
    for top, left in itertools.product(range(a.shape[0] - side + 1), range(a.shape[1] - side + 1)):
        p, q = (image[top : top + side, left : left + side].ravel() for image in (a, b))
        covariance = np.cov(p, q)  # sample covariances
        c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
        up = (2 * p.mean() * q.mean() + c1) * (2 * covariance[0, 1] + c2)
        values.append(up / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("size", "side"), [(8, 7), (12, 7), (6, 5), (5, 5)])
def test_ssim_agrees_with_its_formula(size: int, side: int) -> None:
    generator = torch.Generator().manual_seed(size)
    a = torch.rand(1, size, size, generator=generator, dtype=torch.float64)
    b = (a + 0.3 * torch.randn(1, size, size, generator=generator, dtype=torch.float64)) * 2
    assert ssim(a, b, 2.0) == pytest.approx(brute_ssim(a[0].numpy(), b[0].numpy(), side, 2.0), abs=1e-12)
    assert ssim(a, a, 2.0) == pytest.approx(1.0)


def test_ssim_of_several_channels_is_their_mean() -> None:
    a, b = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    each = [ssim(a[c : c + 1], b[c : c + 1], 1.0) for c in range(3)]
    assert ssim(a, b, 1.0) == pytest.approx(sum(each) / 3)


def test_the_best_match_is_that_of_all_permutations() -> None:
    guess, truth = images(4, 1), images(4, 2)
    _, columns, each = assigned(guess, truth, 1.0)
    table = psnr(mse(guess, truth), 1.0)
    best = max(sum(float(table[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(4)))
    assert float(each.sum()) == pytest.approx(best)
    assert sorted(columns.tolist()) == [0, 1, 2, 3]


def test_a_batch_in_another_order_is_recovered_exactly() -> None:
    x = images(6)
    full = teacher(x, [0, 1, 2, 0, 1, 2], [[0, 1, 2], [3, 4, 5]])
    guess = Reconstructions((Reconstruction(1, x[[5, 3, 4]], torch.tensor([2, 0, 0])),))
    found = score("dlg", guess, full, full)
    assert found["dlg/psnr"] == MOST
    assert found["dlg/ssim"] == pytest.approx(1.0)
    assert found["dlg/mse"] == 0.0
    assert found["dlg/exact"] == 1.0
    assert found["dlg/labels"] == pytest.approx(2 / 3)
    pictures = found["dlg"]
    assert isinstance(pictures, Artefact)
    assert "dlg" in pictures.title
    labels = [image["label"] for image in pictures.data["images"]]
    assert len(labels) == 6
    assert all(label.startswith("client 1: ") for label in labels[::2])
    assert labels[1].startswith("120.0 dB")


def test_what_was_not_found_counts_against_the_exact_share() -> None:
    x = images(8)
    full = teacher(x, [0] * 8, [[0, 1, 2, 3], [4, 5, 6, 7]])
    half = Reconstructions((Reconstruction(0, torch.cat([x[:2], x[:1] * 0])), Reconstruction(1, x[:0])))
    found = score("rtf", half, full, full)
    assert found["rtf/exact"] == pytest.approx(2 / 8)  # two of eight: client 1 was attacked too, and nothing came of it
    assert "rtf/labels" not in found
    assert score("rtf", Reconstructions(()), full, full) == {"rtf/exact": 0.0, "rtf/recovered": 0.0}


def test_another_clients_sample_is_no_success() -> None:
    x = images(2)
    full = teacher(x, [0, 1], [[0], [1]])
    found = score("dlg", Reconstructions((Reconstruction(0, x[1:]),)), full, full)
    assert found["dlg/exact"] == 0.0
    assert float(found["dlg/psnr"]) < 15
    nobodys = score("dlg", Reconstructions((Reconstruction(None, x[1:]),)), full, full)
    assert nobodys["dlg/exact"] == 0.5
    assert nobodys["dlg/psnr"] == MOST


def test_a_guess_outside_the_range_is_cut_off_first() -> None:
    x = torch.ones(1, 1, 8, 8)
    full = teacher(x, [0], [[0]])
    assert score("a", Reconstructions((Reconstruction(0, x * 5),)), full, full)["a/psnr"] == MOST


def test_a_table_is_scored_against_its_own_range_and_has_no_pictures() -> None:
    task = Task("classification", (3,), 2)
    x = torch.tensor([[0.0, 4.0, 0.0], [-6.0, 0.0, 0.0]])  # ten from end to end
    full = teacher(x, [0, 1], [[0, 1]], task)
    found = score("a", Reconstructions((Reconstruction(0, x + 1.0),)), full, full)
    assert found["a/psnr"] == pytest.approx(20.0, abs=1e-4)
    assert set(found) == {"a/psnr", "a/psnr-best", "a/mse", "a/exact", "a/recovered"}


def test_label_counts_are_compared_class_by_class() -> None:
    full = context(task=IMAGES, data=federated(images(0), [], [[0, 0, 0, 1], [2, 2]], IMAGES))
    found = score("labels", LabelCounts({0: torch.tensor([2, 2, 0]), 1: torch.tensor([1, 0, 1])}), full, full)
    assert found["labels/samples"] == pytest.approx((2 + 1 + 1) / 6)
    assert found["labels/classes"] == 1.0
    assert found["labels/error"] == pytest.approx((1 + 1 + 1 + 1) / 6)
    table = found["labels"]
    assert isinstance(table, Artefact)
    assert table.data["rows"][0] == ["client 0", "has", "3", "1", "0"]
    assert table.data["rows"][1] == ["", "guessed", "2", "2", "0"]


def test_a_prototype_is_compared_with_the_mean_and_the_nearest_sample() -> None:
    x = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.full((1, 8, 8), 0.5)])
    full = teacher(x, [0, 0, 1], [[0, 1, 2]])
    found = score("gan", Prototype(0, torch.full((1, 1, 8, 8), 0.9)), full, full)
    assert found["gan/psnr-mean"] == pytest.approx(10 * math.log10(1 / 0.16), abs=1e-4)
    assert found["gan/psnr-nearest"] == pytest.approx(20.0, abs=1e-4)
    assert found["gan/taken-for-it"] == 1.0  # this model takes everything for class 0
    assert score("gan", Prototype(2, x[:1]), full, full) == {}  # a class that nobody has


def test_who_claims_more_labels_than_there_are_samples_has_not_found_them_all() -> None:
    full = teacher(images(4), [0, 0, 1, 2], [[0, 1, 2, 3]])
    found = score("labels", LabelCounts({0: torch.tensor([100, 100, 100])}), full, full)
    assert found["labels/samples"] == pytest.approx(4 / 300)


@pytest.mark.parametrize("client", [0, None])
def test_a_sample_that_is_guessed_twice_is_found_once(client: int | None) -> None:
    x = images(4)
    full = teacher(x, [0, 0, 1, 2], [[0, 1, 2, 3]])
    one = Reconstruction(client, x[:1], torch.tensor([0]))
    found = score("r", Reconstructions((one, one, Reconstruction(client, x[:0]))), full, full)
    assert found["r/exact"] == 1 / 4
    assert found["r/labels"] == 1 / 2  # the second one is left with somebody else's picture, or the other sample of its class
    assert score("r", Reconstructions((one,) * 8), full, full)["r/exact"] == 1 / 4


def test_a_guess_that_is_not_finite_is_none_and_a_client_that_does_not_exist_is_refused() -> None:
    x = images(4)
    full = teacher(x, [0, 0, 1, 2], [[0, 1], [2, 3]])
    broken = torch.full_like(x[:1], float("nan"))
    found = score("r", Reconstructions((Reconstruction(1, torch.cat([broken, x[2:3]]), torch.tensor([0, 1])),)), full, full)
    assert found["r/exact"] == 1 / 2
    assert found["r/labels"] == 1
    assert score("r", Reconstructions((Reconstruction(1, broken),)), full, full) == {"r/exact": 0.0, "r/recovered": 0.0}
    for client in (-1, 2):
        with pytest.raises(ValueError, match=f"samples of client {client} were guessed, but the clients are 0 to 1"):
            score("r", Reconstructions((Reconstruction(client, x[:1]),)), full, full)
