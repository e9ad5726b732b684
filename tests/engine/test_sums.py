"""The tree that adds up: the same additions in whatever order things come, and few partial sums alive."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtrust.engine.sums import Tree


def written(order: list[int], count: int, missing: frozenset[int] = frozenset()) -> str | None:
    """Return the sum as it was put in brackets."""
    tree: Tree[str] = Tree(count, lambda left, right: f"({left}+{right})")
    for number in order:
        tree.put(number, None if number in missing else str(number))
    return tree.result()


@pytest.mark.parametrize(
    ("count", "expected"), [(1, "0"), (2, "(0+1)"), (3, "((0+1)+2)"), (5, "(((0+1)+(2+3))+4)"), (7, "(((0+1)+(2+3))+((4+5)+6))")]
)
def test_the_brackets_are_fixed(count: int, expected: str) -> None:
    for seed in range(20):
        order = list(range(count))
        random.Random(seed).shuffle(order)
        assert written(order, count) == expected


@given(st.integers(0, 40), st.randoms(), st.data())
def test_every_order_gives_every_number_once_and_the_same_sum(count: int, rng: random.Random, data: st.DataObject) -> None:
    missing = frozenset(data.draw(st.sets(st.integers(0, max(0, count - 1)))))
    order = list(range(count))
    rng.shuffle(order)
    total = written(order, count, missing)
    assert total == written(list(range(count)), count, missing)
    found = [int(part) for part in (total or "").replace("(", "").replace(")", "").split("+") if part]
    assert found == [n for n in range(count) if n not in missing]


def test_sums_of_whole_blocks_fit_in() -> None:
    tree: Tree[str] = Tree(7, lambda left, right: f"({left}+{right})")
    tree.put(6, "6")
    tree.put(4, "(4+5)", 1)
    tree.put(0, "((0+1)+(2+3))", 2)
    assert tree.result() == "(((0+1)+(2+3))+((4+5)+6))"
    for number, level in ((1, 1), (4, 2), (6, 1), (-2, 1)):
        with pytest.raises(ValueError, match=r"of a sum over 7$"):
            Tree[str](7, str.__add__).put(number, "x", level)
    for number, level in ((2, 1), (0, 2), (3, 0)):
        half: Tree[str] = Tree(7, str.__add__)
        half.put(3, "x")
        with pytest.raises(ValueError, match="already"):
            half.put(number, "x", level)


def test_floats_have_the_same_bits_in_any_order() -> None:
    values = torch.randn(37, 100, generator=torch.Generator().manual_seed(1))
    sums = []
    for seed in range(5):
        order = list(range(37))
        random.Random(seed).shuffle(order)
        tree: Tree[torch.Tensor] = Tree(37, torch.Tensor.add_)
        for number in order:
            tree.put(number, values[number].clone())
        sums.append(tree.result())
    assert all(bool((s == sums[0]).all()) for s in sums)
    assert not bool((sums[0] == values.sum(0)).all())  # or the order would not matter here


def test_few_partial_sums_are_alive_when_items_come_nearly_in_order() -> None:
    """400 chunks, 8 under way at a time: log2(400) + 8 at most."""
    rng = random.Random(0)
    tree: Tree[int] = Tree(400, lambda a, b: a + b)
    under_way, coming, most = list(range(8)), iter(range(8, 400)), 0
    while under_way:
        tree.put(under_way.pop(rng.randrange(len(under_way))), 1)
        most = max(most, len(tree))
        under_way.extend(n for n in [next(coming, None)] if n is not None)
    assert tree.result() == 400
    assert most <= 17


def test_what_is_lost_can_be_put_again() -> None:
    tree: Tree[str] = Tree(6, lambda left, right: f"({left}+{right})")
    for number in (0, 1, 2, 3, 5):
        tree.put(number, str(number))
    assert tree.discard(lambda item: "2" in item) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="not complete"):
        tree.result()
    for number in (4, 3, 0, 1, 2):
        tree.put(number, str(number))
    assert tree.result() == "(((0+1)+(2+3))+(4+5))"


def test_an_addition_that_fails_loses_neither_side() -> None:
    fail = [True]

    def add(left: str, right: str) -> str:
        if fail.pop() if fail else False:
            raise OSError
        return f"({left}+{right})"

    tree: Tree[str] = Tree(2, add)
    tree.put(0, "0")
    with pytest.raises(OSError):  # noqa: PT011
        tree.put(1, "1")
    assert tree.discard(lambda item: item == "1") == [1]
    tree.put(1, "again")
    assert tree.result() == "(0+again)"


def test_a_number_comes_once_and_is_in_range() -> None:
    tree: Tree[int] = Tree(3, lambda a, b: a + b)
    tree.put(0, 1)
    tree.put(1, 1)
    for number, message in ((0, "already"), (1, "already"), (3, "a sum over 3"), (-1, "a sum over 3")):
        with pytest.raises(ValueError, match=message):
            tree.put(number, 1)
