"""A source for more clients than there are digits. Importing this registers it."""

from __future__ import annotations

from fedtrust.data.base import RawData
from fedtrust.data.build import load
from fedtrust.registry import source

DIGITS = 4000


@source("bench-tiles")
def tiles(*, copies: int) -> RawData:
    """The 4000 training digits of mnist5k so many times over."""
    raw = load("mnist5k", {})
    return RawData(raw.task, raw.x_train.repeat(copies, 1, 1, 1), raw.y_train.repeat(copies), raw.x_test, raw.y_test)
