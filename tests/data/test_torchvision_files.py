"""The torchvision readers, on small files in the real on-disk formats."""

from __future__ import annotations

import hashlib
import pickle
import socket
import struct
import urllib.error
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from fedtrust.data.torchvision_files import cifar10, cifar100, emnist, fashion_mnist, mnist, svhn
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY

RNG = np.random.Generator(np.random.PCG64(5))
ALL = ["mnist", "fashion-mnist", "emnist", "cifar10", "cifar100", "svhn"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reaches for the network fails the test, unless the test says otherwise."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("reached for the network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def write_idx(path: Path, array: np.ndarray) -> None:
    """IDX: two zero bytes, type 8 (unsigned byte), number of dimensions, big-endian sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_mnist_like(folder: Path, train: str, test: str, classes: np.ndarray) -> dict[str, np.ndarray]:
    """Write both parts with the prefixes given; 40 training and 20 test images."""
    written = {}
    for prefix, n in ((train, 40), (test, 20)):
        written[prefix + "x"] = RNG.integers(0, 256, (n, 28, 28))
        written[prefix + "y"] = np.resize(classes, n)
        write_idx(folder / f"{prefix}-images-idx3-ubyte", written[prefix + "x"])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", written[prefix + "y"])
    return written


def as_in_2009(data: bytes) -> bytes:
    """Turn a protocol-2 pickle into what Python 2 and its NumPy wrote: the old module name, and 0 and 1 for dtype's flags."""
    old = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n").replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
    assert old != data
    return old


def write_cifar(root: Path, cls: Any, key: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Write every batch of a CIFAR class in the official layout, 10 images each, and teach the class their checksums."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    written: dict[str, dict[str, Any]] = {}

    def put(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content, protocol=2)
        data = as_in_2009(data) if "data" in content else data
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for attribute in ("train_list", "test_list"):
        listed = []
        for name, _ in getattr(cls, attribute):
            written[name] = {"data": RNG.integers(0, 256, (10, 3072)).astype(np.uint8), key: [i % len(names) for i in range(10)]}
            listed.append([name, put(name, written[name])])
        monkeypatch.setattr(cls, attribute, listed)
    md5 = put(cls.meta["filename"], {cls.meta["key"]: names})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5})
    return written


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    written = {}
    split_list = dict(datasets.SVHN.split_list)
    for part, n in (("train", 30), ("test", 10)):
        written[part] = RNG.integers(0, 256, (32, 32, 3, n)).astype(np.uint8)
        labels = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]  # 1 … 10, where 10 is the digit 0
        name = f"{part}_32x32.mat"
        scipy.io.savemat(root / name, {"X": written[part], "y": labels})
        split_list[part] = ["http://nowhere.invalid", name, hashlib.md5((root / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return written


@pytest.mark.parametrize(("source", "folder"), [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST")])
def test_mnist_and_its_sister_are_read_from_idx_files(tmp_path: Path, source: Any, folder: str) -> None:
    written = write_mnist_like(tmp_path / folder / "raw", "train", "t10k", np.arange(10))
    raw = source(root=str(tmp_path))
    assert raw.task.shape == (1, 28, 28)
    assert (raw.task.classes, raw.task.low, raw.task.high, len(raw.task.labels)) == (10, 0.0, 1.0, 10)
    assert raw.x_train.dtype == torch.float32
    assert np.array_equal((raw.x_train * 255).round().int().squeeze(1).numpy(), written["trainx"])
    assert np.array_equal((raw.x_test * 255).round().int().squeeze(1).numpy(), written["t10kx"])
    assert raw.x_train.max() <= 1
    assert raw.y_train.tolist() == written["trainy"].tolist()
    assert raw.y_test.dtype == torch.int64
    # present files are read, not fetched, even where fetching is allowed
    assert torch.equal(source(root=str(tmp_path), download=True).x_train, raw.x_train)


def test_a_limit_is_stratified_and_leaves_the_test_part(tmp_path: Path) -> None:
    write_mnist_like(tmp_path / "MNIST" / "raw", "train", "t10k", np.arange(10))
    raw = mnist(root=str(tmp_path), limit=20)
    assert raw.y_train.bincount().tolist() == [2] * 10
    assert raw.x_train.shape == (20, 1, 28, 28)
    assert len(raw.y_test) == 20
    whole = mnist(root=str(tmp_path))
    assert {x.numpy().tobytes() for x in raw.x_train} <= {x.numpy().tobytes() for x in whole.x_train}


@pytest.mark.parametrize(
    ("split", "classes", "first", "last"),
    [("balanced", 47, "0", "t"), ("letters", 26, "a", "z"), ("byclass", 62, "0", "z"), ("digits", 10, "0", "9"), ("mnist", 10, "0", "9")],
)
def test_emnist_is_upright_and_labelled_from_zero(tmp_path: Path, split: Any, classes: int, first: str, last: str) -> None:
    shift = 1 if split == "letters" else 0
    labels = np.array([shift, classes - 1 + shift])
    written = write_mnist_like(tmp_path / "EMNIST" / "raw", f"emnist-{split}-train", f"emnist-{split}-test", labels)
    raw = emnist(split=split, root=str(tmp_path))
    assert raw.task.classes == classes == len(raw.task.labels)
    assert (raw.task.labels[0], raw.task.labels[-1]) == (first, last)
    upright = written[f"emnist-{split}-trainx"].transpose(0, 2, 1)
    assert np.array_equal((raw.x_train * 255).round().int().squeeze(1).numpy(), upright)
    assert raw.x_train.is_contiguous()
    assert raw.y_train.unique().tolist() == [0, classes - 1]


def test_emnist_is_balanced_unless_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="emnist-balanced-train-images-idx3-ubyte"):
        emnist(root=str(tmp_path))
    with pytest.raises(InputError, match="'byclass', 'bymerge'"):
        REGISTRY.make("source", "emnist", {"split": "letter"})


@pytest.mark.parametrize(
    ("source", "cls", "key", "count"), [(cifar10, datasets.CIFAR10, "labels", 10), (cifar100, datasets.CIFAR100, "fine_labels", 100)]
)
def test_cifar_is_read_from_its_pickled_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, cls: Any, key: str, count: int
) -> None:
    names = [f"class {i}" for i in range(count)]
    written = write_cifar(tmp_path, cls, key, names, monkeypatch)
    raw = source(root=str(tmp_path))
    train = [name for name, _ in cls.train_list]
    assert raw.task.shape == (3, 32, 32)
    assert raw.task.labels == tuple(names)
    assert raw.x_train.shape == (10 * len(train), 3, 32, 32)
    pixels = np.concatenate([written[name]["data"] for name in train]).reshape(-1, 3, 32, 32)
    assert np.array_equal((raw.x_train * 255).round().int().numpy(), pixels)
    assert raw.y_train.tolist() == [label for name in train for label in written[name][key]]
    assert len(raw.y_test) == 10


def test_numpys_complaint_about_old_pickles_does_not_reach_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy 2.4.0 to 2.4.4 warn on the official files (numpy issue 30786); any other warning still comes through."""
    write_cifar(tmp_path, datasets.CIFAR10, "labels", [str(i) for i in range(10)], monkeypatch)
    load = pickle.load
    text = ["dtype(): align should be passed as Python or NumPy boolean but got `align=0`."]

    def complaining(*args: Any, **options: Any) -> Any:
        warnings.warn(text[0], np.exceptions.VisibleDeprecationWarning, stacklevel=2)
        return load(*args, **options)

    monkeypatch.setattr(pickle, "load", complaining)
    assert len(cifar10(root=str(tmp_path)).y_train) == 50
    text[0] = "something else"
    with pytest.raises(np.exceptions.VisibleDeprecationWarning, match="something else"):
        cifar10(root=str(tmp_path))


def test_svhn_is_read_from_mat_files_and_its_ten_is_a_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_svhn(tmp_path, monkeypatch)
    raw = svhn(root=str(tmp_path))
    assert raw.x_train.shape == (30, 3, 32, 32)
    assert np.array_equal((raw.x_train * 255).round().int().numpy(), written["train"].transpose(3, 2, 0, 1))
    assert raw.y_train[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert raw.y_test.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


@pytest.mark.parametrize("name", ALL)
def test_absent_files_give_one_line_that_says_where_they_belong(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        REGISTRY.make("source", name, {"root": str(tmp_path / "nowhere")})()
    message = str(caught.value)
    assert "\n" not in message
    assert f"'{name}' is not in '{tmp_path}/nowhere'" in message
    assert "data.download = true" in message
    layout = {
        "mnist": ("MNIST/raw", "t10k-labels-idx1-ubyte"),
        "fashion-mnist": ("FashionMNIST/raw", "train-images-idx3-ubyte"),
        "emnist": ("EMNIST/raw", "emnist-balanced-test-labels-idx1-ubyte"),
        "cifar10": ("cifar-10-batches-py", "data_batch_5"),
        "cifar100": ("cifar-100-python", "meta"),
        "svhn": ("", "test_32x32.mat"),
    }[name]
    assert f"into '{tmp_path / 'nowhere' / layout[0]}'" in message
    assert layout[1] in message
    assert not (tmp_path / "nowhere").exists()  # nothing is made where nothing was asked for


@pytest.mark.parametrize("name", ALL)
def test_a_download_without_a_network_says_why(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float | None] = []

    def unreachable(*_: object, **__: object) -> None:
        seen.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(
        InputError, match=r"could not be downloaded .*Temporary failure in name resolution.*; put the unpacked files"
    ) as caught:
        REGISTRY.make("source", name, {"root": str(tmp_path), "download": True})()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900
    assert set(seen) == {60.0}  # a server that stands still does not hang the run …
    assert socket.getdefaulttimeout() is None  # … and nobody else's sockets are touched


def test_an_incomplete_folder_names_what_is_missing(tmp_path: Path) -> None:
    write_mnist_like(tmp_path / "MNIST" / "raw", "train", "t10k", np.arange(10))
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"'mnist' is not complete in '.*' \(no t10k-labels-idx1-ubyte\)"):
        mnist(root=str(tmp_path))


@pytest.mark.parametrize(
    "damage", [b"", b"\x00\x00", b"\x00\x00\x08\x03" + b"\x00\x00\x00\x28" * 3, b"\x00\x00\x0a\x03" + bytes(20), b"GIF89a" * 9]
)
def test_damaged_idx_files_are_named_as_such(tmp_path: Path, damage: bytes) -> None:
    write_mnist_like(tmp_path / "MNIST" / "raw", "train", "t10k", np.arange(10))
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(damage)
    with pytest.raises(InputError, match=r"the files of 'mnist' in '.*MNIST/raw' are damaged or not the official ones"):
        mnist(root=str(tmp_path))


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_mnist_like(folder, "train", "t10k", np.arange(10))
    write_idx(folder / "train-labels-idx1-ubyte", np.zeros(39))
    with pytest.raises(InputError, match="40 images, 39 labels"):
        mnist(root=str(tmp_path))
    write_idx(folder / "train-labels-idx1-ubyte", np.full(40, 10))
    with pytest.raises(InputError, match="label 10 of 10 classes"):
        mnist(root=str(tmp_path))


def test_a_pickle_that_is_not_the_official_one_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, datasets.CIFAR10, "labels", [str(i) for i in range(10)], monkeypatch)
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match=r"the files of 'cifar10' in '.*' are damaged or not the official ones"):
        cifar10(root=str(tmp_path))
    assert not trap.exists()


def test_a_broken_mat_file_with_the_right_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    (tmp_path / "train_32x32.mat").write_bytes(b"no matlab here" * 20)
    with pytest.raises(InputError, match=r"the files of 'svhn' in '.*' are damaged"):
        svhn(root=str(tmp_path))
    listed = {**datasets.SVHN.split_list}
    listed["train"] = [*listed["train"][:2], hashlib.md5(b"no matlab here" * 20).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)
    with pytest.raises(InputError, match=r"the files of 'svhn' in '.*' are damaged"):
        svhn(root=str(tmp_path))


def test_without_a_root_the_users_cache_is_looked_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"'mnist' is not in '{tmp_path}/fedtrust/datasets'"):
        mnist()
    write_mnist_like(tmp_path / "fedtrust" / "datasets" / "MNIST" / "raw", "train", "t10k", np.arange(10))
    assert len(mnist().y_train) == 40
    monkeypatch.setattr("fedtrust.data.torchvision_files.cache_folder", lambda: None)
    with pytest.raises(InputError, match=r"'mnist' needs data\.root"):
        mnist()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("params", "message"), [({"downlaod": True}, "did you mean 'download'"), ({"download": 1}, "valid boolean"), ({"root": 3}, "string")]
)
def test_wrong_parameters_are_refused(name: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        REGISTRY.make("source", name, params)
