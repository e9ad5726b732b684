"""Data sets that torchvision reads: from files under `root`, fetched only where the scenario says `download = true`."""

from __future__ import annotations

import contextlib
import http.client
import os
import pickle
import socket
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedtrust.data.base import RawData, Task
from fedtrust.data.embedded import DIGITS, cache_folder
from fedtrust.data.split import limited_rows
from fedtrust.engine.seeds import stream
from fedtrust.errors import InputError
from fedtrust.registry import source

Limit = Annotated[int, Field(ge=1)]
EmnistSplit = Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"]

#: Whatever torchvision's readers and downloads were seen to raise on absent, damaged or unreachable files.
_FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    AssertionError,
    NotImplementedError,
    pickle.UnpicklingError,
    tarfile.TarError,
    zipfile.BadZipFile,
    http.client.HTTPException,
)
_STALL_SECONDS = 60.0


@dataclass(frozen=True)
class _Files:
    """Where a data set lies and how it is read.

    Attributes:
        name: its name in a scenario.
        folder: folder below `root`, "" for `root` itself.
        files: the unpacked files that have to be there.
        read: (root, train, download) → torchvision data set.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    read: Callable[[str, bool, bool], Any]


_IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


@source("mnist", paper="LeCun et al., Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 1998, section III")
def mnist(*, root: str | None = None, download: bool = False, limit: Limit | None = None) -> RawData:
    """MNIST: 60,000 + 10,000 handwritten digits of 28×28 pixels.

    Args:
        root: folder that holds `MNIST/raw/`; by default fedtrust's folder in the user's cache.
        download: whether to fetch the files where they are absent.
        limit: use at most so many training samples, stratified by class.

    Returns:
        x float32 [n, 1, 28, 28] in [0, 1], y int64 [n] in 0 … 9.

    Raises:
        InputError: the files are absent or damaged, or cannot be fetched.
    """
    return _idx_images("mnist", "MNIST", DIGITS, root, download, limit)


@source("fashion-mnist", paper="Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv:1708.07747, 2017")
def fashion_mnist(*, root: str | None = None, download: bool = False, limit: Limit | None = None) -> RawData:
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing of 28×28 pixels.

    Args:
        root: folder that holds `FashionMNIST/raw/`; by default fedtrust's folder in the user's cache.
        download: whether to fetch the files where they are absent.
        limit: use at most so many training samples, stratified by class.

    Returns:
        x float32 [n, 1, 28, 28] in [0, 1], y int64 [n] in 0 … 9.

    Raises:
        InputError: the files are absent or damaged, or cannot be fetched.
    """
    names = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    return _idx_images("fashion-mnist", "FashionMNIST", names, root, download, limit)


@source("emnist", paper="Cohen et al., EMNIST: Extending MNIST to Handwritten Letters, IJCNN 2017, section III")
def emnist(*, split: EmnistSplit = "balanced", root: str | None = None, download: bool = False, limit: Limit | None = None) -> RawData:
    """EMNIST: handwritten digits and letters of 28×28 pixels, upright (the files hold them transposed).

    Args:
        split: which of the six sets; `letters` are labelled 0 … 25 here (1 … 26 in the files).
        root: folder that holds `EMNIST/raw/`; by default fedtrust's folder in the user's cache.
        download: whether to fetch the files where they are absent (one archive of 0.5 GB for all six).
        limit: use at most so many training samples, stratified by class.

    Returns:
        x float32 [n, 1, 28, 28] in [0, 1], y int64 [n].

    Raises:
        InputError: the files are absent or damaged, or cannot be fetched.
    """

    def read(place: str, train: bool, fetch: bool) -> Any:
        from torchvision.datasets import EMNIST

        return EMNIST(place, split=split, train=train, download=fetch)

    names = tuple(f"emnist-{split}-{part}-{kind}-ubyte" for part in ("train", "test") for kind in ("images-idx3", "labels-idx1"))
    train, test = _read(_Files("emnist", "EMNIST/raw", names, read), root, download)
    shift = 1 if split == "letters" else 0
    classes = tuple(train.classes)[shift:]
    pixels = [_grey(part.data).transpose(-1, -2) for part in (train, test)]
    return _raw("emnist", classes, pixels, [part.targets - shift for part in (train, test)], limit)


@source("cifar10", paper="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009, section 3.1")
def cifar10(*, root: str | None = None, download: bool = False, limit: Limit | None = None) -> RawData:
    """CIFAR-10: 50,000 + 10,000 colour photographs of 32×32 pixels in 10 classes.

    Args:
        root: folder that holds `cifar-10-batches-py/`; by default fedtrust's folder in the user's cache.
        download: whether to fetch the files where they are absent (0.2 GB).
        limit: use at most so many training samples, stratified by class.

    Returns:
        x float32 [n, 3, 32, 32] in [0, 1], y int64 [n] in 0 … 9.

    Raises:
        InputError: the files are absent or damaged, or cannot be fetched.
    """
    batches = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    return _cifar("cifar10", "CIFAR10", "cifar-10-batches-py", batches, root, download, limit)


@source("cifar100", paper="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009, section 3.1")
def cifar100(*, root: str | None = None, download: bool = False, limit: Limit | None = None) -> RawData:
    """CIFAR-100: 50,000 + 10,000 colour photographs of 32×32 pixels in 100 (fine) classes.

    Args:
        root: folder that holds `cifar-100-python/`; by default fedtrust's folder in the user's cache.
        download: whether to fetch the files where they are absent (0.2 GB).
        limit: use at most so many training samples, stratified by class.

    Returns:
        x float32 [n, 3, 32, 32] in [0, 1], y int64 [n] in 0 … 99.

    Raises:
        InputError: the files are absent or damaged, or cannot be fetched.
    """
    return _cifar("cifar100", "CIFAR100", "cifar-100-python", ("train", "test", "meta"), root, download, limit)


@source("svhn", paper="Netzer et al., Reading Digits in Natural Images, NIPS workshop 2011, section 3")
def svhn(*, root: str | None = None, download: bool = False, limit: Limit | None = None) -> RawData:
    """SVHN: 73,257 + 26,032 house-number digits, colour, 32×32 pixels (the `extra` part is not used).

    Args:
        root: folder that holds the two `.mat` files; by default fedtrust's folder in the user's cache.
        download: whether to fetch the files where they are absent (0.25 GB).
        limit: use at most so many training samples, stratified by class.

    Returns:
        x float32 [n, 3, 32, 32] in [0, 1], y int64 [n] in 0 … 9 (the files call the digit 0 class 10).

    Raises:
        InputError: the files are absent or damaged, or cannot be fetched.
    """

    def read(place: str, train: bool, fetch: bool) -> Any:
        from torchvision.datasets import SVHN

        return SVHN(place, split="train" if train else "test", download=fetch)

    train, test = _read(_Files("svhn", "", ("train_32x32.mat", "test_32x32.mat"), read), root, download)
    pixels = [torch.from_numpy(part.data) for part in (train, test)]
    return _raw("svhn", DIGITS, pixels, [torch.from_numpy(np.atleast_1d(part.labels)) for part in (train, test)], limit)


def _idx_images(name: str, cls: str, classes: Sequence[str], root: str | None, download: bool, limit: int | None) -> RawData:
    def read(place: str, train: bool, fetch: bool) -> Any:
        from torchvision import datasets

        return getattr(datasets, cls)(place, train=train, download=fetch)

    train, test = _read(_Files(name, f"{cls}/raw", _IDX, read), root, download)
    return _raw(name, classes, [_grey(train.data), _grey(test.data)], [train.targets, test.targets], limit)


def _cifar(name: str, cls: str, folder: str, files: tuple[str, ...], root: str | None, download: bool, limit: int | None) -> RawData:
    def read(place: str, train: bool, fetch: bool) -> Any:
        from torchvision import datasets

        return getattr(datasets, cls)(place, train=train, download=fetch)

    train, test = _read(_Files(name, folder, files, read), root, download)
    pixels = [torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))) for part in (train, test)]
    return _raw(name, tuple(train.classes), pixels, [torch.tensor(part.targets) for part in (train, test)], limit)


def _grey(data: Tensor) -> Tensor:
    """Return grey images [n, h, w] with their channel, [n, 1, h, w]."""
    return data.unsqueeze(1)


def _read(files: _Files, root: str | None, download: bool) -> tuple[Any, Any]:
    """Return torchvision's (train, test) data sets.

    Raises:
        InputError: they are absent, damaged or cannot be fetched; says where they belong.
    """
    place = Path(os.path.expanduser(root)) if root is not None else _default_root(files.name)
    try:
        with _stalls_end(download), warnings.catch_warnings():
            # NumPy 2.4.0 to 2.4.4 take offence at the official CIFAR pickles of 2009, which is nothing the user could mend
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            return files.read(str(place), True, download), files.read(str(place), False, download)
    except _FAILURES as error:
        raise _refusal(files, place, download, error) from error


def _default_root(name: str) -> Path:
    folder = cache_folder()
    if folder is None:
        raise InputError(f"'{name}' needs data.root: there is no home folder to look in")
    return folder / "datasets"


def _refusal(files: _Files, place: Path, download: bool, error: Exception) -> InputError:
    folder = place / files.folder
    missing = [name for name in files.files if not (folder / name).is_file()]
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    layout = f"put the unpacked files {', '.join(files.files)} into '{folder}'"
    if not missing:
        return InputError(f"the files of '{files.name}' in '{folder}' are damaged or not the official ones ({reason})")
    if download:
        return InputError(f"'{files.name}' could not be downloaded ({reason}); {layout}")
    if len(missing) == len(files.files):
        return InputError(f"'{files.name}' is not in '{place}'; {layout}, or set data.download = true")
    return InputError(f"'{files.name}' is not complete in '{folder}' (no {', '.join(missing)}); {layout}, or set data.download = true")


@contextlib.contextmanager
def _stalls_end(download: bool) -> Iterator[None]:
    """Let a download that stands still fail: torchvision sets no time limit of its own."""
    before = socket.getdefaulttimeout()
    if download:
        socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _raw(name: str, classes: Sequence[str], pixels: list[Tensor], targets: list[Tensor], limit: int | None) -> RawData:
    """Return uint8 images [n, c, h, w] and labels [n], train then test, as `RawData`; floats are made after the limit."""
    for x, y in zip(pixels, targets, strict=True):
        if len(x) != len(y) or not len(x):
            raise InputError(f"the files of '{name}' are damaged ({len(x)} images, {len(y)} labels)")
        if int(y.min()) < 0 or int(y.max()) >= len(classes):
            raise InputError(f"the files of '{name}' are damaged (label {int(y.max())} of {len(classes)} classes)")
    rows = torch.from_numpy(limited_rows(targets[0].numpy(), limit, stream(0, f"limit/{name}")))
    # in place, on a fresh copy: the whole of EMNIST is 2 GB as floats
    train, test = [x.contiguous().to(torch.float32).div_(255) for x in (pixels[0][rows], pixels[1])]
    channels, height, width = train.shape[1:]
    task = Task("classification", (channels, height, width), len(classes), low=0.0, high=1.0, labels=tuple(classes))
    return RawData(task, train, targets[0][rows].to(torch.int64), test, targets[1].to(torch.int64))
