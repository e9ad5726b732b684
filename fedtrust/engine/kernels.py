"""Convolutions and max pools of a fused cohort on a CPU, as machine code.

Images lie channels-last, a model after the other: [k, b, H, W, C], with a margin of zeros around each where the next convolution wants
one (`Frame`). For a convolution that order makes the values under one row of the window neighbours in memory, and the weights [kh, kw,
C_in, C_out] a matrix with as many rows; so a tile of pixels times a block of output channels is a small matrix product whose sums stay in
registers. That is how matrix libraries work inside (Goto and van de Geijn, ACM TOMS 2008); done in place it needs no copy of the image
for every weight and, unlike a library's grouped convolution, has no group too small to fill the vectors.

Every kernel runs on the thread that calls it and adds up in an order that depends on the shapes alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from fedtrust.engine.jit import BLOCK, BYTES, F32, FLOATS, I8, I64, Code, Host, Kernel, blocks, evenly, once

#: Floats of a gradient that the rows of pixels worked on together hold: they stay in a core's first cache.
ROWS_FLOATS = 4096


class Frame(NamedTuple):
    """How images of one kind lie in memory: [..., high, wide, channels] with a margin of `top` rows and `left` pixels on both sides."""

    height: int
    width: int
    channels: int
    top: int = 0
    left: int = 0

    @property
    def high(self) -> int:
        """Rows with the margins."""
        return self.height + 2 * self.top

    @property
    def wide(self) -> int:
        """Pixels of a row with the margins."""
        return self.width + 2 * self.left

    @property
    def row(self) -> int:
        """Numbers of a row."""
        return self.wide * self.channels

    @property
    def image(self) -> int:
        """Numbers of an image."""
        return self.high * self.row

    @property
    def start(self) -> int:
        """Where the first pixel within the margins stands."""
        return self.top * self.row + self.left * self.channels


class Window(NamedTuple):
    """A convolution's window: its rows and columns, and how far it reaches over the upper and the left edge."""

    rows: int
    columns: int
    up: int = 0
    before: int = 0


class _Place(NamedTuple):
    """Where the values under a window start, and where their result stands."""

    x: Any
    out: Any


def _corner(code: Code, x: Any, inside: Frame, window: Window) -> Any:
    """Return where the first value under the window of pixel (0, 0) stands, in the margin or not."""
    return code.at(x, inside.start - window.up * inside.row - window.before * inside.channels)


@once
def convolution(inside: Frame, outside: Frame, window: Window, bias: bool) -> Kernel:
    """Return out = x * w + c for a model's convolution of stride 1.

    Returns:
        A function of (x, w, c, out, images): x and out as the frames say, w [rows, columns, C_in, C_out], c [C_out].
    """
    return write_convolution(inside, outside, window, bias).compiled()


def write_convolution(inside: Frame, outside: Frame, window: Window, bias: bool, on: Host | None = None) -> Code:
    """Return the code of `convolution`, for the processor at hand or another."""
    code = Code([FLOATS, FLOATS, FLOATS, FLOATS, I64], on)
    x, w, c, out, images = code.arguments
    corner, first_pixel = _corner(code, x, inside, window), code.at(out, outside.start)
    for first, lanes in blocks(code, outside.channels):
        start = code.load(code.at(c, first), lanes) if bias else code.fill(0, lanes)
        with code.loop(0, images) as image, code.loop(0, outside.height) as y:
            row = code.at(corner, code.times(image, inside.image), code.times(y, inside.row))
            to = code.at(first_pixel, code.times(image, outside.image), code.times(y, outside.row), first)
            for at, tile, count in evenly(outside.width, code.host.tile):
                with code.loop(at, at + tile * count, tile) as pixel:
                    here = _Place(code.at(row, code.times(pixel, inside.channels)), code.at(to, code.times(pixel, outside.channels)))
                    _tile(code, here, code.at(w, first), start, (inside, outside, window), tile)
    return code


def _tile(code: Code, here: _Place, w: Any, start: Any, shapes: tuple[Frame, Frame, Window], tile: int) -> None:
    """Write the outputs of `tile` pixels of a row, for one block of channels."""
    inside, outside, window = shapes
    taps, lanes = window.columns * inside.channels, start.type.count
    together = max(u for u in range(1, 9) if taps % u == 0)
    sums = [code.slot(start.type) for _ in range(tile)]
    for total in sums:
        code.do.store(start, total)
    with code.loop(0, window.rows) as ky:
        row = code.at(here.x, code.times(ky, inside.row))
        weights = code.at(w, code.times(ky, taps * outside.channels))
        with code.loop(0, taps, together) as tap:
            for u in range(together):
                weight = code.load(code.at(weights, code.times(tap, outside.channels), u * outside.channels), lanes)
                for pixel, total in enumerate(sums):
                    code.add_to(total, code.spread(code.at(row, tap, pixel * inside.channels + u), lanes), weight)
    for pixel, total in enumerate(sums):
        code.store(code.do.load(total), code.at(here.out, pixel * outside.channels))


@once
def weight_gradient(inside: Frame, outside: Frame, window: Window, bias: bool) -> Kernel:
    """Return the gradients of a model's weights and biases.

    Returns:
        A function of (x, g, gw, gc, images): x and g as the frames say, gw [rows, columns, C_in, C_out], gc [C_out].
    """
    return write_weight_gradient(inside, outside, window, bias).compiled()


def write_weight_gradient(inside: Frame, outside: Frame, window: Window, bias: bool, on: Host | None = None) -> Code:
    """Return the code of `weight_gradient`, for the processor at hand or another."""
    code = Code([FLOATS, FLOATS, FLOATS, FLOATS, I64], on)
    x, g, gw, gc, images = code.arguments
    corner, first_pixel = _corner(code, x, inside, window), code.at(g, outside.start)
    rows = max(1, min(outside.height, ROWS_FLOATS // (outside.width * min(BLOCK, outside.channels))))
    for where, count in ((gw, window.rows * window.columns * inside.channels * outside.channels), (gc, outside.channels if bias else 0)):
        with code.loop(0, count) as i:
            code.do.store(ir.Constant(F32, 0.0), code.at(where, i))
    for first, lanes in blocks(code, outside.channels):
        with code.loop(0, images) as image:
            for at, band, count in evenly(outside.height, rows):
                with code.loop(at, at + band * count, band) as y:
                    here = _Place(
                        code.at(corner, code.times(image, inside.image), code.times(y, inside.row)),
                        code.at(first_pixel, code.times(image, outside.image), code.times(y, outside.row), first),
                    )
                    if bias:
                        _add_pixels(code, here.out, outside, code.at(gc, first), lanes, band)
                    _add_band(code, here, code.at(gw, first), (inside, outside, window), lanes, band)
    return code


def _add_pixels(code: Code, g: Any, outside: Frame, to: Any, lanes: int, band: int) -> None:
    """Add a band's pixels to the biases' gradient; four sums, so that none waits for the one before."""
    four = 4 if outside.width % 4 == 0 else 1
    sums = [code.slot(ir.VectorType(F32, lanes)) for _ in range(four)]
    for total in sums:
        code.do.store(code.fill(0, lanes), total)
    with code.loop(0, band) as y, code.loop(0, outside.width, four) as pixel:
        for u, total in enumerate(sums):
            value = code.load(code.at(g, code.times(y, outside.row), code.times(pixel, outside.channels), u * outside.channels), lanes)
            code.do.store(code.do.fadd(code.do.load(total), value), total)
    whole = code.load(to, lanes)
    for total in sums:
        whole = code.do.fadd(whole, code.do.load(total))
    code.store(whole, to)


def _add_band(code: Code, here: _Place, to: Any, shapes: tuple[Frame, Frame, Window], lanes: int, band: int) -> None:
    """Add a band's part to the weights' gradient, a tile of weights times a block of channels at a time."""
    inside, outside, window = shapes
    taps = window.columns * inside.channels
    for top, high, many in evenly(window.rows, max(1, code.host.tile // taps)):
        with code.loop(top, top + high * many, high) as ky:
            for at, wide, count in evenly(taps, code.host.tile // high):
                with code.loop(at, at + wide * count, wide) as tap:
                    moved = _Place(code.at(here.x, code.times(ky, inside.row), tap), here.out)
                    place = code.at(to, code.times(ky, taps * outside.channels), code.times(tap, outside.channels))
                    offsets = [(r * inside.row + t, (r * taps + t) * outside.channels) for r in range(high) for t in range(wide)]
                    _add_tile(code, moved, place, (inside, outside), offsets, (lanes, band))


def _add_tile(
    code: Code, here: _Place, to: Any, shapes: tuple[Frame, Frame], offsets: list[tuple[int, int]], size: tuple[int, int]
) -> None:
    """Add a band's part to a tile of weights; `offsets`: where each one's values and its gradient stand."""
    (inside, outside), (lanes, band) = shapes, size
    together = max(u for u in (1, 2, 4) if outside.width % u == 0)
    sums = [code.slot(ir.VectorType(F32, lanes)) for _ in offsets]
    for total, (_, place) in zip(sums, offsets, strict=True):
        code.do.store(code.load(code.at(to, place), lanes), total)
    with code.loop(0, band) as y:
        x, g = code.at(here.x, code.times(y, inside.row)), code.at(here.out, code.times(y, outside.row))
        with code.loop(0, outside.width, together) as pixel:
            for u in range(together):
                value = code.load(code.at(g, code.times(pixel, outside.channels), u * outside.channels), lanes)
                for total, (offset, _) in zip(sums, offsets, strict=True):
                    code.add_to(
                        total, code.spread(code.at(x, code.times(pixel, inside.channels), u * inside.channels + offset), lanes), value
                    )
    for total, (_, place) in zip(sums, offsets, strict=True):
        code.store(code.do.load(total), code.at(to, place))


#: In the places that `pool` notes: nobody, because the ReLU behind it is shut.
SHUT = 255


@once
def pool(inside: Frame, outside: Frame, side: int, relu: bool) -> Kernel:
    """Return the maximum over windows of side x side pixels that do not overlap, with a ReLU behind it if asked for.

    Of equal values the first counts, and a NaN counts as larger than anything, as in PyTorch.

    Returns:
        A function of (x, out, places, images): places uint8 [images, H, W, C], which value of its window each maximum was.
    """
    code = Code([FLOATS, FLOATS, BYTES, I64])
    x, out, places, images = code.arguments
    do = code.do
    for here, place in _windows(code, images, (x, inside), (out, outside), places, side):
        lanes = here[2]
        best, which = code.load(here[0], lanes), ir.Constant(ir.VectorType(I8, lanes), [0] * lanes)
        for number, offset in enumerate(_offsets(inside, side)[1:], start=1):
            value = code.load(code.at(here[0], offset), lanes)
            more = do.or_(do.fcmp_ordered(">", value, best), do.fcmp_unordered("uno", value, value))
            best = do.select(more, value, best)
            which = do.select(more, ir.Constant(which.type, [number] * lanes), which)
        if relu:
            zero = code.fill(0, lanes)
            shut = do.fcmp_ordered("<=", best, zero)
            best, which = do.select(shut, zero, best), do.select(shut, ir.Constant(which.type, [SHUT] * lanes), which)
        code.store(best, here[1])
        code.store(which, place)
    return code.compiled()


@once
def pool_gradient(inside: Frame, outside: Frame, side: int) -> Kernel:
    """Return the gradient of a pool's input: each maximum's gradient where it came from, zero elsewhere under the windows.

    Returns:
        A function of (g, places, gx, images); pixels of gx that no window covers are not written.
    """
    code = Code([FLOATS, BYTES, FLOATS, I64])
    g, places, gx, images = code.arguments
    for here, place in _windows(code, images, (gx, inside), (g, outside), places, side):
        lanes = here[2]
        value, which = code.load(here[1], lanes), code.load(place, lanes)
        for number, offset in enumerate(_offsets(inside, side)):
            chosen = code.do.icmp_signed("==", which, ir.Constant(which.type, [number] * lanes))
            code.store(code.do.select(chosen, value, code.fill(0, lanes)), code.at(here[0], offset))
    return code.compiled()


def _windows(code: Code, images: Any, large: tuple[Any, Frame], small: tuple[Any, Frame], places: Any, side: int) -> Any:
    """Write what follows for every window and block of channels: yields ((its first value, its result, how many channels), its place)."""
    (x, inside), (out, outside) = large, small
    size = outside.width * outside.channels
    with code.loop(0, images) as image, code.loop(0, outside.height) as y:
        row = code.at(x, code.times(image, inside.image), inside.start, code.times(y, side * inside.row))
        to = code.at(out, code.times(image, outside.image), outside.start, code.times(y, outside.row))
        note = code.at(places, code.times(image, outside.height * size), code.times(y, size))
        with code.loop(0, outside.width) as pixel:
            for first, lanes in blocks(code, outside.channels):
                value = code.at(row, code.times(pixel, side * inside.channels), first)
                result, place = (code.at(start, code.times(pixel, outside.channels), first) for start in (to, note))
                yield (value, result, lanes), place


def _offsets(inside: Frame, side: int) -> list[int]:
    """Return where the values under a window stand, from its first one."""
    return [r * inside.row + c * inside.channels for r in range(side) for c in range(side)]


@once
def rectify() -> Kernel:
    """Return the ReLU, in place; a NaN stays one, as in PyTorch.

    Returns:
        A function of (x, how many numbers).
    """
    code = Code([FLOATS, I64])
    x, count = code.arguments
    whole = code.do.and_(count, code.number(-BLOCK))
    for first, last, lanes in ((0, whole, BLOCK), (whole, count, 1)):
        with code.loop(first, last, lanes) as i:
            value, zero = code.load(code.at(x, i), lanes), code.fill(0, lanes)
            code.store(code.do.select(code.do.fcmp_ordered("<=", value, zero), zero, value), code.at(x, i))
    return code.compiled()


@once
def rectify_gradient(above: Frame, inside: Frame) -> Kernel:
    """Return the gradient of a ReLU's input, in place of that of its output: zero where the output is.

    Returns:
        A function of (g, out, images), which lie as the frames say.
    """
    code = Code([FLOATS, FLOATS, I64])
    g, out, images = code.arguments
    size = above.width * above.channels
    with code.loop(0, images) as image, code.loop(0, above.height) as y:
        to = code.at(g, code.times(image, above.image), above.start, code.times(y, above.row))
        row = code.at(out, code.times(image, inside.image), inside.start, code.times(y, inside.row))
        for first, lanes in blocks(code, size):
            shut = code.do.fcmp_ordered("<=", code.load(code.at(row, first), lanes), code.fill(0, lanes))
            code.store(code.do.select(shut, code.fill(0, lanes), code.load(code.at(to, first), lanes)), code.at(to, first))
    return code.compiled()


@once
def planes(frame: Frame, back: bool) -> Kernel:
    """Return a change of order: channels-last images to planes [C, H, W], or back.

    Returns:
        A function of (images as the frame says, planes, number of images); the first is written where `back`.
    """
    code = Code([FLOATS, FLOATS, I64])
    framed, flat, images = code.arguments
    pixels = frame.height * frame.width
    with code.loop(0, images) as image, code.loop(0, frame.height) as y:
        row = code.at(framed, code.times(image, frame.image), frame.start, code.times(y, frame.row))
        line = code.at(flat, code.times(image, pixels * frame.channels), code.times(y, frame.width))
        with code.loop(0, frame.channels) as channel, code.loop(0, frame.width) as x:
            pixel = code.at(row, code.times(x, frame.channels), channel)
            place = code.at(line, code.times(channel, pixels), x)
            source, to = (place, pixel) if back else (pixel, place)
            code.do.store(code.do.load(source), to)
    return code.compiled()


#: The orders of a convolution's weights: PyTorch's [C_out, C_in, rows, columns]; that of the kernels; and the kernels' for the way back,
#: with the window turned round and the channels exchanged, [rows, columns, C_out, C_in].
PACK, UNPACK, TURN = "pack", "unpack", "turn"


@once
def repack(outputs: int, inputs: int, window: Window, way: str) -> Kernel:
    """Return a change of order of convolutions' weights: `PACK` and `TURN` from PyTorch's order, `UNPACK` back to it.

    Returns:
        A function of (in PyTorch's order, in the kernels').
    """
    code = Code([FLOATS, FLOATS])
    usual, own = code.arguments
    places = window.rows * window.columns
    with code.loop(0, places) as place:
        here = code.at(usual, place)
        there = code.do.sub(code.number(places - 1), place) if way == TURN else place
        packed = code.at(own, code.times(there, inputs * outputs))
        with code.loop(0, outputs) as output, code.loop(0, inputs) as given:
            offset = (code.times(output, inputs), given) if way == TURN else (code.times(given, outputs), output)
            theirs = code.at(here, code.times(output, inputs * places), code.times(given, places))
            source, to = (code.at(packed, *offset), theirs) if way == UNPACK else (theirs, code.at(packed, *offset))
            code.do.store(code.do.load(source), to)
    return code.compiled()
