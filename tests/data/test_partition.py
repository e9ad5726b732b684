from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtrust.data.partition import dirichlet, gamma_similarity, iid, pathological, quantity_skew, shards
from fedtrust.engine.seeds import stream
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY

LABELS = np.repeat(np.arange(10), 200)
ALL: list[tuple[str, dict[str, Any]]] = [
    ("iid", {}),
    ("dirichlet", {}),
    ("dirichlet", {"balance": "cap"}),
    ("dirichlet", {"balance": "equal"}),
    ("pathological", {}),
    ("shards", {}),
    ("gamma-similarity", {}),
    ("gamma-similarity", {"gamma": 0.0}),
    ("quantity-skew", {}),
]


def counts(parts: list[np.ndarray], labels: np.ndarray = LABELS) -> np.ndarray:
    """Samples by client and class."""
    return np.stack([np.bincount(labels[part], minlength=int(labels.max()) + 1) for part in parts])


def check(parts: list[np.ndarray], total: int, clients: int, least: int = 1) -> None:
    rows = np.concatenate(parts)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and len(part) >= least for part in parts)
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < total


@pytest.mark.parametrize(("name", "params"), ALL)
def test_every_kind_is_deterministic_uses_each_sample_once_and_depends_on_the_stream(name: str, params: dict[str, Any]) -> None:
    spread = REGISTRY.make("partition", name, params)
    first, again, other = (spread(LABELS, 20, stream(seed, "partition")) for seed in (1, 1, 2))
    check(first, 2000, 20)
    assert sum(map(len, first)) == 2000
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(ALL),
    st.lists(st.integers(0, 5), min_size=1, max_size=150),
    st.integers(1, 12),
    st.floats(1e-3, 1e3),
    st.integers(0, 1000),
)
def test_any_labels_are_dealt_without_repeats_or_refused_in_one_line(
    kind: tuple[str, dict[str, Any]], labels: list[int], clients: int, alpha: float, seed: int
) -> None:
    name, params = kind
    skewed = name in ("dirichlet", "quantity-skew")
    spread = REGISTRY.make("partition", name, {**params, **({"alpha": alpha, "min_samples": 3} if skewed else {})})
    try:
        parts = spread(np.array(labels, dtype=np.int64), clients, stream(seed, "partition"))
    except InputError as refused:
        message = str(refused)
    else:
        check(parts, len(labels), clients, 3 if skewed else 1)
        return
    assert "\n" not in message
    assert any(character.isdigit() for character in message)


def test_iid_sizes_differ_by_one_at_most_and_classes_are_even() -> None:
    parts = iid(LABELS, 7, stream(0, "partition"))
    assert sorted({len(part) for part in parts}) == [285, 286]
    assert np.abs(counts(parts) - 2000 / 70).max() < 20


def test_more_clients_than_samples_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match="30 clients × at least 1 samples = 30, but there are 20 training samples"):
        iid(LABELS[:20], 30, stream(0, "p"))
    with pytest.raises(InputError, match="30 clients × at least 2 samples = 60, but there are 40"):
        dirichlet(LABELS[:40], 30, stream(0, "p"))
    with pytest.raises(InputError, match="30 clients × at least 2 samples = 60, but there are 40"):
        quantity_skew(LABELS[:40], 30, stream(0, "p"))
    with pytest.raises(InputError, match="30 clients × 2 shards = 60, but there are 40"):
        shards(LABELS[:40], 30, stream(0, "p"))


@pytest.mark.parametrize("balance", ["none", "cap", "equal"])
def test_a_large_alpha_approaches_iid(balance: Any) -> None:
    table = counts(dirichlet(LABELS, 10, stream(3, "p"), alpha=1e6, balance=balance))
    if balance == "equal":  # each client draws a multinomial of its even mix
        assert set(table.sum(1)) == {200}
        assert np.abs(table - 20).mean() < 6  # a multinomial's deviation is 4.2; the last client takes what is left
    elif balance == "none":
        assert np.abs(table - 20).max() <= 1
    else:
        assert np.abs(table[:, :9] - 20).max() <= 1


def test_a_small_alpha_concentrates_labels() -> None:
    def share_of_top_class(alpha: float, balance: Any) -> float:
        draws = [dirichlet(LABELS, 10, stream(seed, "p"), alpha=alpha, min_samples=1, balance=balance) for seed in range(10)]
        return float(np.mean([table.max(1) / table.sum(1) for table in map(counts, draws)]))

    for balance in ("none", "cap"):
        strong, middle, weak = (share_of_top_class(alpha, balance) for alpha in (0.1, 1.0, 100.0))
        assert strong > 0.55
        assert 0.2 < middle < 0.45
        assert weak < 0.13
    # in Hsu's form alpha is the sum of the parameters: 0.1 leaves nearly one class a client
    assert share_of_top_class(0.1, "equal") > 0.8


@pytest.mark.parametrize("gamma", [0.0, 0.33, 0.66, 1.0])
def test_gamma_similarity_deals_its_share_evenly_and_cuts_the_sorted_rest_in_order(gamma: float) -> None:
    """ByzFL's definition: with a client a class, each holds (1 - gamma) of its own class and an even share of everything else."""
    table = counts(gamma_similarity(LABELS, 10, stream(0, "partition"), gamma=gamma))
    assert set(table.sum(1)) == {200}
    sorted_part = 200 * (1 - gamma)
    own = np.diag(table)
    assert np.abs(own - (sorted_part + 20 * gamma)).max() <= 5 * (20 * gamma) ** 0.5 + 25 * gamma * (1 - gamma)
    others = table[~np.eye(10, dtype=bool)].reshape(10, 9).sum(1)
    assert others.sum() == 2000 - own.sum()
    if gamma == 0:
        assert (own == 200).all()
    if gamma == 1:
        assert np.abs(table - 20).max() < 20


def test_gamma_similarity_sorts_what_it_does_not_deal() -> None:
    """At gamma = 0 the clients' labels, one client after another, are in order, and every client holds as many."""
    parts = gamma_similarity(LABELS, 7, stream(1, "partition"), gamma=0.0)
    assert sorted({len(part) for part in parts}) == [285, 286]
    edges = [(LABELS[part].min(), LABELS[part].max()) for part in parts]
    assert all(last <= first for (_, last), (first, _) in pairwise(edges))
    # five samples in two parts for four clients: nobody is left without
    assert sorted(map(len, gamma_similarity(LABELS[:5], 4, stream(1, "partition"), gamma=0.5))) == [1, 1, 1, 2]


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    """Client 0's share of each class is Beta(alpha, (N-1) alpha): mean 1/N, variance (N-1)/(N^2 (N alpha + 1))."""
    labels = np.repeat(np.arange(10), 1000)
    clients, alpha = 5, 0.5
    shares = np.concatenate(
        [counts(dirichlet(labels, clients, stream(seed, "p"), alpha=alpha, min_samples=1), labels) / 1000 for seed in range(60)]
    )
    assert shares.mean() == pytest.approx(1 / clients, abs=1e-9)
    assert shares.var() == pytest.approx((clients - 1) / clients**2 / (clients * alpha + 1), rel=0.08)


def test_hsus_mixes_have_the_moments_of_their_dirichlet() -> None:
    """A client's mix is q ~ Dir(alpha p): variance p(1-p)/(alpha+1) = 0.05, as long as no class has run out."""
    labels = np.repeat(np.arange(2), 5000)
    mixes = []
    for seed in range(150):
        table = counts(dirichlet(labels, 10, stream(seed, "p"), alpha=4.0, balance="equal"), labels)
        assert set(table.sum(1)) == {1000}
        first = stream(seed, "p").permutation(10)[:3]  # the first three to choose
        mixes.append(table[first, 0] / 1000)
    assert np.mean(mixes) == pytest.approx(0.5, abs=0.03)
    assert np.var(mixes) == pytest.approx(0.05, rel=0.15)


def test_cap_keeps_clients_from_growing_far_beyond_their_share() -> None:
    sizes = {
        balance: np.mean(
            [max(map(len, dirichlet(LABELS, 10, stream(s, "p"), alpha=0.1, min_samples=1, balance=balance))) for s in range(15)]
        )
        for balance in ("none", "cap")
    }
    assert sizes["cap"] < 400  # 200 fair, plus at most one class of 200 on top
    assert sizes["none"] > sizes["cap"] + 50


def test_min_samples_is_reached_by_drawing_again_or_refused() -> None:
    sizes = [len(part) for part in dirichlet(LABELS, 20, stream(0, "p"), alpha=0.3, min_samples=30)]
    assert min(sizes) >= 30
    with pytest.raises(InputError, match=r"dirichlet with alpha = 0\.01 does not give each of 20 clients 50 of 2000 samples") as caught:
        dirichlet(LABELS, 20, stream(0, "p"), alpha=0.01, min_samples=50)
    assert caught.value.where == "min_samples"
    assert "raise alpha" in caught.value.message


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.integers(1, 40), st.integers(0, 100))
def test_pathological_gives_each_client_exactly_k_classes_and_leaves_none_out(k: int, clients: int, seed: int) -> None:
    parts = pathological(LABELS, clients, stream(seed, "p"), classes_per_client=k)
    check(parts, 2000, clients)
    table = counts(parts)
    assert set((table > 0).sum(1)) == {k}
    holders = (table > 0).sum(0)
    assert holders.max() - holders.min() <= 1
    assert (holders > 0).sum() == min(10, clients * k)
    assert table.sum() == 200 * min(10, clients * k)
    for column in range(10):
        held = table[:, column][table[:, column] > 0]
        assert len(held) == 0 or held.max() - held.min() <= 1


def test_pathological_refuses_what_cannot_be() -> None:
    with pytest.raises(InputError, match="11 classes a client, but the data has 10"):
        pathological(LABELS, 5, stream(0, "p"), classes_per_client=11)
    rare = np.concatenate([np.zeros(100, dtype=np.int64), np.full(3, 7)])
    with pytest.raises(InputError, match="class 7 has 3 samples for the 5 clients that would hold it"):
        pathological(rare, 5, stream(0, "p"), classes_per_client=2)


def test_labels_need_not_be_consecutive() -> None:
    labels = np.repeat([3, 8], 50)
    for name, params in ALL:
        check(REGISTRY.make("partition", name, params)(labels, 5, stream(0, "p")), 100, 5)


def test_shards_are_runs_of_the_sorted_labels() -> None:
    parts = shards(LABELS, 100, stream(5, "p"))
    assert {len(part) for part in parts} == {20}
    table = counts(parts)
    # 200 shards of 10 in classes of 200: no shard straddles two classes
    assert (table % 10 == 0).all()
    assert set((table > 0).sum(1)) == {1, 2}
    # the shards of a class are drawn from all of its samples, not from runs of the file
    assert np.ptp(parts[0][LABELS[parts[0]] == LABELS[parts[0][0]]]) > 40


def test_quantity_skew_skews_sizes_and_nothing_else() -> None:
    labels = np.tile(np.arange(2), 5000)
    parts = quantity_skew(labels, 10, stream(1, "p"), alpha=0.5)
    sizes = np.array([len(part) for part in parts])
    assert sizes.sum() == 10000
    assert sizes.max() > 4 * sizes.min()
    big = counts(parts, labels)[sizes > 400] / sizes[sizes > 400, None]
    assert np.abs(big - 0.5).max() < 0.08
    even = [len(part) for part in quantity_skew(labels, 10, stream(1, "p"), alpha=1e6)]
    assert max(even) - min(even) < 15
    with pytest.raises(InputError, match=r"quantity-skew with alpha = 0\.01"):
        quantity_skew(labels, 100, stream(1, "p"), alpha=0.01, min_samples=90)


def test_quantity_skew_sizes_have_the_moments_of_the_distribution() -> None:
    """A client's share is Beta(alpha, (N-1) alpha): variance (N-1)/(N^2 (N alpha + 1))."""
    labels = np.zeros(10000, dtype=np.int64)
    draws = [quantity_skew(labels, 5, stream(seed, "p"), alpha=0.5, min_samples=1) for seed in range(300)]
    shares = np.array([[len(part) / 10000 for part in parts] for parts in draws])
    assert shares.var() == pytest.approx(4 / 25 / 3.5, rel=0.08)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("iid", {"alpha": 1.0}, r"no parameter 'alpha' \(parameters: none\)"),
        ("dirichlet", {"alhpa": 1.0}, "did you mean 'alpha'"),
        ("dirichlet", {"alpha": 0}, "greater than 0"),
        ("dirichlet", {"alpha": -1.0}, "greater than 0"),
        ("dirichlet", {"alpha": 1e9}, "less than or equal to 1000000"),
        ("dirichlet", {"alpha": "0.5"}, "valid number"),
        ("dirichlet", {"alpha": float("nan")}, "."),
        ("dirichlet", {"min_samples": 0}, "greater than or equal to 1"),
        ("dirichlet", {"balance": "hsu"}, "'none', 'cap' or 'equal'"),
        ("pathological", {"class_per_client": 2}, "did you mean 'classes_per_client'"),
        ("pathological", {"classes_per_client": 0}, "greater than or equal to 1"),
        ("shards", {"shards_per_clients": 2}, "did you mean 'shards_per_client'"),
        ("shards", {"shards_per_client": 1.5}, "valid integer"),
        ("quantity-skew", {"aplha": 2.0}, "did you mean 'alpha'"),
    ],
)
def test_wrong_parameters_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        REGISTRY.make("partition", name, params)


def test_a_misspelt_partition_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown partition 'dirichlt' .* did you mean 'dirichlet'"):
        REGISTRY.make("partition", "dirichlt")


def test_extreme_alphas_do_not_break_the_arithmetic() -> None:
    for balance in ("cap", "equal"):
        for alpha in (1e-6, 1e6):
            check(dirichlet(LABELS, 5, stream(0, "p"), alpha=alpha, min_samples=1, balance=balance), 2000, 5)
