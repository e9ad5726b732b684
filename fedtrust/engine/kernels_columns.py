"""The values under a convolution's windows, side by side: with them a convolution is one matrix product (see `fused_rows`)."""

from __future__ import annotations

from fedtrust.engine.jit import FLOATS, I64, Code, Kernel, once
from fedtrust.engine.kernels import Frame

#: Up to so many values under a window their copies are written out one by one; beyond, a row of it at a time.
_WRITTEN = 16


@once
def columns(frame: Frame, window: tuple[int, int], stride: tuple[int, int], size: tuple[int, int], back: bool) -> Kernel:
    """Return the copy of what lies under every window; `back`: what lies there is added to the images in its place.

    Args:
        frame: how the images lie; their margins are read, and written, like the rest.
        window: its rows and columns; the first one begins at the corner of the margin.
        stride: rows and pixels from one window to the next.
        size: how many windows there are in a column and in a row.
        back: the way back.

    Returns:
        A function of (images, columns, number of images); columns [images, *size, C, rows, columns of the window].
    """
    code = Code([FLOATS, FLOATS, I64])
    x, out, images = code.arguments
    (rows, wide), channels = window, frame.channels
    each = rows * wide
    with code.loop(0, images) as image, code.loop(0, size[0]) as y, code.loop(0, size[1]) as pixel:
        here = code.at(x, code.times(image, frame.image), code.times(y, stride[0] * frame.row), code.times(pixel, stride[1] * channels))
        number = code.do.add(code.times(code.do.add(code.times(image, size[0]), y), size[1]), pixel)
        to = code.at(out, code.times(number, channels * each))
        with code.loop(0, channels) as channel:
            value, place = code.at(here, channel), code.at(to, code.times(channel, each))
            if each <= _WRITTEN:
                for row in range(rows):
                    _row(code, code.at(value, row * frame.row), code.at(place, row * wide), wide, channels, back)
            else:
                with code.loop(0, rows) as row:
                    _row(code, code.at(value, code.times(row, frame.row)), code.at(place, code.times(row, wide)), wide, channels, back)
    return code.compiled()


def _row(code: Code, value: object, place: object, wide: int, channels: int, back: bool) -> None:
    """Write the copies of a window's row for one channel."""
    for column in range(wide):
        image, own = code.at(value, column * channels), code.at(place, column)
        if back:
            code.do.store(code.do.fadd(code.do.load(image), code.do.load(own)), image)
        else:
            code.do.store(code.do.load(image), own)
