"""Adding up what chunks gave, in an order that does not depend on who finished first.

Floating-point addition is not associative: a sum kept in order of arrival would have other bits in every run. Here the additions are
those of a fixed binary tree over the numbers of the chunks, whatever the order in which they come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Tree(Generic[T]):
    """A sum over the numbers 0 … count - 1: two neighbours are added as soon as both are there.

    At any time at most about log2(count) partial sums are alive when the items come in order, and one more for every item that has
    overtaken another.
    """

    def __init__(self, count: int, add: Callable[[T, T], T]) -> None:
        """Start an empty sum.

        Args:
            count: how many items will come.
            add: (left, right) → sum; may reuse the memory of either. If it raises, both stay in the tree as they were.
        """
        self._count, self._add = count, add
        self._alive: dict[tuple[int, int], T | None] = {}  # (level, index): the sum over [index, index + 1) * 2^level
        self._top = max(0, (count - 1).bit_length())

    def put(self, number: int, item: T | None, level: int = 0) -> None:
        """Add the item of a number, each once; `None` stands for an item that adds nothing.

        Args:
            number: which; with a level, the first of 2^level, a multiple of that.
            item: it, or the sum over all 2^level of them in the same order.
            level: see above.

        Raises:
            ValueError: a number is not in the sum, or is there already.
            Exception: whatever `add` raises; the item is in the tree then, not yet added to its neighbour.
        """
        end = number + (1 << level)
        if number < 0 or end > self._count or number % (1 << level):
            raise ValueError(f"numbers {number} to {end - 1} of a sum over {self._count}")
        if any(index << up < end and number < (index + 1) << up for up, index in self._alive):
            raise ValueError(f"one of the numbers {number} to {end - 1} is in the sum already")
        self._alive[level, number >> level] = item
        self._climb(level, number >> level)

    def _climb(self, level: int, index: int) -> None:
        """Add an item to its neighbour, their sum to its neighbour, and so on, as far as there are any."""
        while level < self._top:
            item, beside = self._alive[level, index], (level, index ^ 1)
            if beside[1] << level < self._count:
                if beside not in self._alive:
                    return
                other = self._alive[beside]
                left, right = (other, item) if index & 1 else (item, other)
                item = right if left is None else left if right is None else self._add(left, right)
                del self._alive[beside]
            del self._alive[level, index]
            level, index = level + 1, index >> 1
            self._alive[level, index] = item

    def discard(self, lost: Callable[[T], bool]) -> list[int]:
        """Take out the partial sums that `lost` picks, and return the numbers they covered; those may be put again."""
        gone = [(level, index) for (level, index), item in self._alive.items() if item is not None and lost(item)]
        for place in gone:
            del self._alive[place]
        return [n for level, index in gone for n in range(index << level, min(self._count, (index + 1) << level))]

    def __len__(self) -> int:
        """Return how many partial sums are alive."""
        return sum(item is not None for item in self._alive.values())

    def result(self) -> T | None:
        """Return the sum over all numbers; `None` if no item added anything.

        Raises:
            ValueError: some have not come yet.
        """
        if self._count == 0:
            return None
        if (self._top, 0) not in self._alive:
            raise ValueError("the sum is not complete")
        return self._alive[self._top, 0]
