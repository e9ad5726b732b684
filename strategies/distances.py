"""Distances between the updates, from products of their differences from a robust centre."""

from __future__ import annotations

import torch
from torch import Tensor

from fedtrust.strategies import blocks
from fedtrust.strategies.order import middle, sorted_columns

#: Up to so many products n² d everything is done in float64; above it float32 multiplies and float64 adds up.
EXACT = 1 << 31
#: A squared distance below this share of the two rows' squared norms has lost digits and is computed anew: in float32, in float64.
_NEAR, _NEAR_EXACT = 2.0**-4, 2.0**-20
#: About so many rows are enough for a centre: sorting them all would cost as much as the products.
_SOME = 32
#: Rows to a tile of a symmetric product: only tiles on and below the diagonal are computed.
_TILE = 100


def centred_gram(
    updates: Tensor, rows: Tensor | None = None, centre: int | None = None, *, exact: bool | None = None, every: int = 1
) -> Tensor:
    """Return the inner products of the rows' differences from a centre, float64 [k, k], exactly symmetric.

    The centre is each coordinate's median, which no minority of huge rows can move: products around another point would lose what
    distinguishes the honest rows to cancellation.

    Args:
        updates: float32 [n, d].
        rows: which rows, indices [k]; by default all.
        centre: take this row as the centre.
        exact: multiply in float64; by default if that is no more than `EXACT` products.
        every: take the medians over every so many-th row.
    """
    k, d = len(updates) if rows is None else len(rows), updates.shape[1]
    wide = k * k * d <= EXACT if exact is None else exact
    total = torch.zeros(k, k, dtype=torch.float64)

    def work(where: slice) -> Tensor:
        block = updates[:, where] if rows is None else updates[rows, where]
        if centre is None:
            some = block[::every]
            pieces = blocks.cut(len(some), block.shape[1], blocks.SORTED)
            middles = torch.cat([torch.from_numpy(middle(sorted_columns(some[:, piece]))) for piece in pieces])
        else:
            middles = updates[centre, where]
        if not wide:
            differences = block - middles
            gram = _symmetric_product(differences)
            if _in_range(gram.diagonal(), differences):
                return gram
        return _symmetric_product(block.double() - middles.double())

    blocks.each(blocks.cut(k, d, blocks.MULTIPLIED if not wide else blocks.MULTIPLIED // 2), work, total.add_)
    return total.tril_().add_(total.tril(-1).T)


def _symmetric_product(values: Tensor) -> Tensor:
    """Return the lower triangle of `values @ values.T` in float64; what stands above the diagonal means nothing."""
    k = len(values)
    product = torch.zeros(k, k, dtype=torch.float64)
    for top in range(0, k, _TILE):
        tile = slice(top, min(top + _TILE, k))
        product[tile, : tile.stop] = (values[tile] @ values[: tile.stop].T).double()
    return product


def _in_range(squares: Tensor, differences: Tensor) -> bool:
    """Return whether the squares of all rows' differences lie in float32's range."""
    small = squares <= 1e-30
    return bool(torch.isfinite(squares).all()) and not bool(differences[small].any())


def squared_distances(updates: Tensor) -> Tensor:
    """Return the squared Euclidean distances between the rows, float64 [n, n], exactly symmetric; copies of a row have equal distances.

    For each pair |a − b|² = |a|² + |b|² − 2 ab around medians of some of the rows. That loses digits where two rows are much closer to each
    other than to the centre, as in a coalition that sends nearly the same: such rows are taken again with one of them as the centre,
    until every distance has about six digits.
    """
    n, d = updates.shape
    exact, every = n * n * d <= EXACT, max(1, n // _SOME)  # should the sample mislead, the loop below makes up for it
    distances, doubtful = _from_gram(centred_gram(updates, exact=exact, every=every), exact)
    spent = 0
    while bool(doubtful.any()):
        seed = int(doubtful.sum(dim=1).argmax())
        rows = doubtful[seed].index_fill(0, torch.tensor([seed]), True).nonzero().flatten()
        spent += len(rows) ** 2
        if spent > 2 * n * n:  # rows arranged so that this would go on and on
            if exact:
                break
            exact, spent = True, 0
            distances, doubtful = _from_gram(centred_gram(updates, exact=True, every=every), exact)
            continue
        anew, still = _from_gram(centred_gram(updates, rows, seed, exact=exact), exact)
        where = (rows[:, None], rows[None, :])
        mend = doubtful[where]
        distances[where] = torch.where(mend, anew, distances[where])
        doubtful[where] = mend & still
    # The first copy of a row speaks for all: their own distances may differ in the last digits, and ties must be ties.
    first = (distances == 0).int().argmax(dim=1)
    return distances[first][:, first]


def _from_gram(gram: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Return the squared distances, and which of them have lost too many digits."""
    norms = gram.diagonal()
    both = norms[:, None] + norms[None, :]
    distances = (both - 2 * gram).clamp_(min=0).fill_diagonal_(0)
    return distances, (distances < (_NEAR_EXACT if exact else _NEAR) * both).fill_diagonal_(False)
