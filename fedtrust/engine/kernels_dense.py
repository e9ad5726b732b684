"""Linear layers of a fused cohort on a CPU, as machine code: small matrices, many of them, where a library spends its time on starting.

Every kernel works on one model; the weights and their gradients are read and written where they lie, in a row of the block [k, d].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from fedtrust.engine.jit import BLOCK, F32, FLOATS, I32, Code, Kernel, blocks, evenly, once


@once
def dense(samples: int, inputs: int, outputs: int, bias: bool) -> Kernel:
    """Return out = x w' + c.

    Returns:
        A function of (x, w, c, out): x [b, in], w [out, in], c [out], out [b, out].
    """
    code = Code([FLOATS, FLOATS, FLOATS, FLOATS])
    x, w, c, out = code.arguments
    lanes = code.host.lanes
    many = 2 if code.host.registers == 16 else 3  # outputs at once, beside as many samples as the registers hold
    for at, wide, count in evenly(outputs, many):
        with code.loop(at, at + wide * count, wide) as output:
            for n, tile, times in evenly(samples, max(1, (code.host.registers - wide - 1) // wide)):
                with code.loop(n, n + tile * times, tile) as sample:
                    rows = [code.at(x, code.times(sample, inputs), t * inputs) for t in range(tile)]
                    columns = [code.at(w, code.times(output, inputs), u * inputs) for u in range(wide)]
                    totals = _products(code, rows, columns, inputs, lanes)
                    for (t, u), total in totals.items():
                        if bias:
                            total = code.do.fadd(total, code.do.load(code.at(c, output, u)))
                        code.do.store(total, code.at(out, code.times(sample, outputs), output, t * outputs + u))
    return code.compiled()


def _products(code: Code, rows: list[Any], columns: list[Any], length: int, lanes: int) -> dict[tuple[int, int], Any]:
    """Return the inner products of every row with every column."""
    pairs = [(t, u) for t in range(len(rows)) for u in range(len(columns))]
    whole = length // lanes * lanes
    sums = {pair: code.slot(ir.VectorType(F32, lanes)) for pair in pairs}
    for slot in sums.values():
        code.do.store(code.fill(0, lanes), slot)
    with code.loop(0, whole, lanes) as i:
        right = [code.load(code.at(column, i), lanes) for column in columns]
        for t, row in enumerate(rows):
            left = code.load(code.at(row, i), lanes)
            for u, value in enumerate(right):
                code.add_to(sums[t, u], left, value)
    totals = {pair: code.slot(F32) for pair in pairs}
    for pair, total in totals.items():
        code.do.store(_added(code, code.do.load(sums[pair]), lanes), total)
    with code.loop(whole, length) as i:
        for (t, u), total in totals.items():
            code.add_to(total, code.do.load(code.at(rows[t], i)), code.do.load(code.at(columns[u], i)))
    return {pair: code.do.load(total) for pair, total in totals.items()}


def _added(code: Code, vector: Any, lanes: int) -> Any:
    """Return the sum of a vector's lanes, by halves."""
    while lanes > 1:
        lanes //= 2
        halves = [ir.Constant(ir.VectorType(I32, lanes), list(range(start, start + lanes))) for start in (0, lanes)]
        low, high = (code.do.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), half) for half in halves)
        vector = code.do.fadd(low, high)
    return code.do.extract_element(vector, ir.Constant(I32, 0))


@once
def dense_weight_gradient(samples: int, inputs: int, outputs: int, bias: bool) -> Kernel:
    """Return the gradients of a linear layer's weights and biases.

    Returns:
        A function of (x, g, gw, gc), shaped as in `dense`; g is the gradient of out.
    """
    code = Code([FLOATS, FLOATS, FLOATS, FLOATS])
    x, g, gw, gc = code.arguments
    if bias:
        for first, lanes in blocks(code, outputs):
            total = code.slot(ir.VectorType(F32, lanes))
            code.do.store(code.fill(0, lanes), total)
            with code.loop(0, samples) as n:
                value = code.load(code.at(g, code.times(n, outputs), first), lanes)
                code.do.store(code.do.fadd(code.do.load(total), value), total)
            code.store(code.do.load(total), code.at(gc, first))
    for output, tile in _tiles(code, outputs):
        for first, lanes in blocks(code, inputs):
            sums = _sums(code, tile, lanes)
            with code.loop(0, samples) as n:
                value = code.load(code.at(x, code.times(n, inputs), first), lanes)
                for t, total in enumerate(sums):
                    code.add_to(total, code.spread(code.at(g, code.times(n, outputs), output, t), lanes), value)
            for t, total in enumerate(sums):
                code.store(code.do.load(total), code.at(gw, code.times(output, inputs), first, t * inputs))
    return code.compiled()


@once
def dense_input_gradient(samples: int, inputs: int, outputs: int) -> Kernel:
    """Return gx = g w.

    Returns:
        A function of (g, w, gx), shaped as in `dense`; g and gx are the gradients of out and x.
    """
    code = Code([FLOATS, FLOATS, FLOATS])
    g, w, gx = code.arguments
    # Outside, so that the weights under a block are at hand for all samples; two cache lines of a row at once, if the registers hold them.
    for first, lanes in blocks(code, inputs, (2 * BLOCK, BLOCK) if code.host.lanes == BLOCK else (BLOCK,)):
        for sample, tile in _tiles(code, samples):
            sums = _sums(code, tile, lanes)
            with code.loop(0, outputs) as output:
                value = code.load(code.at(w, code.times(output, inputs), first), lanes)
                for t, total in enumerate(sums):
                    code.add_to(total, code.spread(code.at(g, code.times(sample, outputs), output, t * outputs), lanes), value)
            for t, total in enumerate(sums):
                code.store(code.do.load(total), code.at(gx, code.times(sample, inputs), first, t * inputs))
    return code.compiled()


def _tiles(code: Code, count: int) -> Iterator[tuple[Any, int]]:
    """Write what follows for every tile of rows: yields (the first row, how many)."""
    for at, tile, times in evenly(count, code.host.tile):
        with code.loop(at, at + tile * times, tile) as first:
            yield first, tile


def _sums(code: Code, count: int, lanes: int) -> list[Any]:
    """Return so many vectors of zeros to add to."""
    sums = [code.slot(ir.VectorType(F32, lanes)) for _ in range(count)]
    for total in sums:
        code.do.store(code.fill(0, lanes), total)
    return sums
