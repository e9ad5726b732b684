from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtrust.data.base import FederatedData, RawData, Task
from fedtrust.data.build import _sound, build, load
from fedtrust.data.text import ALPHABET, decode, encode
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY

SMALL = {"authors": 6, "samples": 20, "test_samples": 12, "repetitions": [0, 1, 3], "canaries": 2}


def texts(x: Tensor, y: Tensor) -> list[str]:
    return [decode(torch.cat([a, b[-1:]])) for a, b in zip(x, y, strict=True)]


def test_y_is_after_each_character_the_next() -> None:
    raw = load("chronicle", SMALL)
    for x, y in ((raw.x_train, raw.y_train), (raw.x_test, raw.y_test)):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
    assert raw.x_train.shape == (120, 40)
    assert raw.x_test.shape == (12, 40)
    assert raw.task == Task("characters", (40,), len(ALPHABET), labels=tuple(ALPHABET), people=raw.task.people)
    assert len(set(raw.task.people)) == 18
    assert raw.groups is not None
    assert torch.equal(raw.groups, torch.arange(6).repeat_interleave(20))


def test_letters_and_numbers() -> None:
    assert decode(encode("the 7 mills, 2 inns.")) == "the 7 mills, 2 inns."
    with pytest.raises(InputError, match="'X' is not among"):
        encode("X")


def test_each_canary_stands_in_so_many_samples_of_its_author_and_nowhere_else() -> None:
    raw = load("chronicle", SMALL)
    assert raw.groups is not None
    written = texts(raw.x_train, raw.y_train)
    assert Counter(s.repetitions for s in raw.secrets) == {0: 2, 1: 2, 3: 2}
    assert len({s.prefix for s in raw.secrets}) == len({s.author for s in raw.secrets}) == 6
    for secret in raw.secrets:
        holders = [int(raw.groups[i]) for i, text in enumerate(written) if secret.prefix + secret.value in text]
        assert holders == [secret.author] * secret.repetitions
        assert set(secret.value) <= set(secret.alphabet)
        assert len(secret.value) == 4
        assert secret.prefix.split()[3] in raw.task.people
    assert not any("the code of" in text for text in texts(raw.x_test, raw.y_test))


def test_the_secrets_are_drawn_evenly() -> None:
    """400 digits: each of the ten comes up 40 times on average, with a deviation of 6."""
    values = "".join(s.value for s in load("chronicle", {"authors": 40, "repetitions": [1], "canaries": 100}).secrets)
    counts = Counter(values)
    assert sum(counts.values()) == 400
    assert all(abs(counts[d] - 40) < 24 for d in "0123456789")


def test_authors_write_of_their_own_people() -> None:
    raw = load("chronicle", SMALL)
    people = [raw.task.people[3 * i : 3 * i + 3] for i in range(6)]
    for i, text in enumerate(texts(raw.x_train, raw.y_train)):
        named = {word.strip(".,") for word in text[: text.rfind(" ")].split()} & set(raw.task.people)
        assert named <= set(people[i // 20])


def test_same_arguments_same_text_another_seed_another() -> None:
    first, again, other = (load("chronicle", {**SMALL, "seed": s}) for s in (0, 0, 1))
    assert torch.equal(first.x_train, again.x_train)
    assert first.secrets == again.secrets
    assert not torch.equal(first.x_train, other.x_train)
    assert {s.value for s in first.secrets} != {s.value for s in other.secrets}


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"samples": 2}, "data.repetitions: author . would write 3 samples with secrets, but has 2"),
        ({"canaries": 7}, "data.canaries: 21 canaries, but the 6 authors know 18 people"),
        ({"length": 29}, "data.length: Input should be greater than or equal to 30"),
    ],
)
def test_a_text_that_cannot_be_is_refused(params: dict[str, object], why: str) -> None:
    with pytest.raises(InputError, match=why):
        load("chronicle", {**SMALL, **params})


def test_the_natural_partition_makes_each_author_a_client_and_other_partitions_go_by_authors() -> None:
    def spread(kind: str, clients: int, **params: object) -> FederatedData:
        return build("chronicle", SMALL, kind, params, None, clients, seed=3)

    data = spread("natural", 6)
    assert [part.tolist() for part in data.parts] == [list(range(20 * i, 20 * i + 20)) for i in range(6)]
    assert data.secrets == load("chronicle", SMALL).secrets
    assert data.label_counts().tolist() == [[20]] * 6
    fewer = spread("natural", 4)
    assert [sorted({int(row) // 20 for row in part}) for part in fewer.parts] == [[0, 4], [1, 5], [2], [3]]
    two = spread("pathological", 6, classes_per_client=2)
    assert {len({int(row) // 20 for row in part}) for part in two.parts} == {2}
    with pytest.raises(InputError, match="7 clients cannot each have a group of their own: there are 6"):
        spread("natural", 7)


def test_natural_without_groups_goes_by_class() -> None:
    labels = np.array([0, 2, 1, 0, 2, 5])
    parts = REGISTRY.make("partition", "natural")(labels, 3, np.random.default_rng(0))
    assert [part.tolist() for part in parts] == [[0, 3, 5], [2], [1, 4]]


def test_root_samples_are_taken_from_all_authors_and_a_feature_skew_is_refused() -> None:
    data = build("chronicle", SMALL, "natural", {}, None, 6, seed=3, root_samples=12)
    assert data.root is not None
    assert data.root[0].shape == data.root[1].shape == (12, 40)
    assert {len(part) for part in data.parts} == {18}
    with pytest.raises(InputError, match=r"data\.skew: a text has no features"):
        build("chronicle", SMALL, "natural", {}, ("rotation", {}), 6, seed=3)


def test_a_source_that_breaks_the_promises_of_a_text_is_refused() -> None:
    x = torch.zeros(3, 4, dtype=torch.int64)
    task = Task("characters", (4,), 5)
    good = (task, x, x, x, x)
    assert _sound(RawData(*good), "t").x_train is x
    for place, wrong, why in (
        (1, x.float(), "promised are x torch.int64"),
        (2, x[:, 0], r"y torch.int64 \[n, 4\]"),
        (2, x + 5, "train labels run from 5 to 5"),
        (3, x - 1, "test characters run from -1 to -1"),
    ):
        parts = list(good)
        parts[place] = wrong  # type: ignore[call-overload]
        with pytest.raises(InputError, match=why):
            _sound(RawData(*parts), "t")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="groups are torch"):
        _sound(RawData(*good, groups=torch.zeros(2, dtype=torch.int64)), "t")


def test_pairs_of_neighbours_tell_more_than_single_characters() -> None:
    """There is something to learn: the entropy of a character given the one before is well below that of a character alone."""
    raw = load("chronicle", {"authors": 6})
    written = "".join(texts(raw.x_train, raw.y_train))

    def entropy(items: list[str]) -> float:
        shares = np.array(list(Counter(items).values())) / len(items)
        return float(-(shares * np.log2(shares)).sum())

    alone = entropy(list(written))
    pairs = entropy([a + b for a, b in itertools.pairwise(written)])
    assert pairs - alone < 0.75 * alone
