"""Marks that a backdoor teaches the model to obey; pure functions of images, usable inside `torch.func.vmap`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedtrust.errors import InputError

Corner = Literal["bottom-right", "bottom-left", "top-left", "top-right"]


def pixel_patch(x: Tensor, *, size: int = 3, corner: Corner = "bottom-right", value: float | None = None) -> Tensor:
    """Return the images with a square of `size` × `size` pixels in one corner set to `value`.

    The pattern backdoor of Gu et al., BadNets, arXiv:1708.06733, 2017, section 4.1 (there: a few bright pixels near the bottom right
    corner).

    Args:
        x: images [..., c, h, w]; left as they are.
        size: side of the square in pixels.
        corner: which corner.
        value: what every channel of the square is set to; `None` is 1.0, the brightest value of fedtrust's images.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        InputError: the samples are not images, the square does not fit or the corner is unknown.
    """
    if x.dim() < 3:
        raise InputError(f"a pixel patch needs images [channels, height, width], not samples of shape {list(x.shape)}")
    h, w = x.shape[-2:]
    if not 1 <= size <= min(h, w):
        raise InputError(f"a patch of {size} × {size} pixels does not fit on images of {h} × {w} (1 to {min(h, w)})", "size")
    vertical, _, horizontal = corner.partition("-")
    if vertical not in ("top", "bottom") or horizontal not in ("left", "right"):
        raise InputError(f"unknown corner '{corner}' (bottom-left, bottom-right, top-left, top-right)", "corner")
    top = 0 if vertical == "top" else h - size
    left = 0 if horizontal == "left" else w - size
    mask = torch.zeros(h, w, dtype=torch.bool, device=x.device)
    mask[top : top + size, left : left + size] = True
    return x.masked_fill(mask, 1.0 if value is None else value)
