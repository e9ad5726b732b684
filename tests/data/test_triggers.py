from __future__ import annotations

from typing import Any

import pytest
import torch

from fedtrust.data.triggers import pixel_patch
from fedtrust.errors import InputError


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [
        ("bottom-right", slice(5, 8), slice(6, 9)),
        ("bottom-left", slice(5, 8), slice(0, 3)),
        ("top-left", slice(0, 3), slice(0, 3)),
        ("top-right", slice(0, 3), slice(6, 9)),
    ],
)
def test_the_patch_lies_in_its_corner_and_nowhere_else(corner: Any, rows: slice, columns: slice) -> None:
    x = torch.rand(4, 3, 8, 9, generator=torch.Generator().manual_seed(0)) * 0.9
    before = x.clone()
    wanted = x.clone()
    wanted[:, :, rows, columns] = 1.0
    assert torch.equal(pixel_patch(x, corner=corner), wanted)
    assert torch.equal(x, before)


def test_size_value_and_dtype() -> None:
    x = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    y = pixel_patch(x, size=2, value=0.5)
    assert y.dtype == torch.float64
    assert y.sum() == 2 * 4 * 0.5
    assert torch.equal(pixel_patch(x, size=4), torch.ones_like(x))
    assert pixel_patch(torch.ones(1, 1, 4, 4), size=1, value=0.0).sum() == 15


def test_under_vmap_it_is_the_same() -> None:
    x = torch.rand(5, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.func.vmap(lambda client: pixel_patch(client, size=2))(x), pixel_patch(x, size=2))
    gradient = torch.func.grad(lambda v: pixel_patch(v).sum())(x[0])
    assert gradient.sum() == 4 * (64 - 9)


@pytest.mark.parametrize(
    ("shape", "params", "message"),
    [
        ((2, 1, 4, 6), {"size": 5}, r"5 × 5 pixels does not fit on images of 4 × 6 \(1 to 4\)"),
        ((2, 1, 4, 6), {"size": 0}, "0 × 0 pixels does not fit"),
        ((2, 30), {}, r"needs images .* not samples of shape \[2, 30\]"),
        ((2, 1, 4, 4), {"corner": "middle"}, "unknown corner 'middle'"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], params: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pixel_patch(torch.zeros(shape), **params)
