"""How the samples are spread over the clients.

A partition is a function `(labels int64 [n], clients, rng, *, parameters) → list of int64 rows`, one array a client. No row is in
two arrays and no array is empty; where that cannot be had it raises `InputError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedtrust.data.base import IntArray
from fedtrust.errors import InputError
from fedtrust.registry import partition

Alpha = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1)]

#: How often a random spread is drawn again before its minimum is called out of reach.
ATTEMPTS = 300


@partition("iid", paper="McMahan et al., Communication-Efficient Learning of Deep Networks, AISTATS 2017, section 3 (IID)")
def iid(labels: IntArray, clients: int, rng: np.random.Generator) -> list[IntArray]:
    """Shuffle and deal evenly: sizes differ by one at most.

    Raises:
        InputError: more clients than samples.
    """
    _check_room(len(labels), clients, 1)
    return _sorted(np.array_split(rng.permutation(len(labels)), clients))


@partition(
    "dirichlet",
    paper="Yurochkin et al., Bayesian Nonparametric FL, ICML 2019, Experiments; Li et al., Federated Learning on Non-IID Data Silos, "
    "ICDE 2022 (distribution-based label imbalance); 'equal': Hsu et al., arXiv:1909.06335, 2019 (synthetic non-identical client data)",
)
def dirichlet(
    labels: IntArray,
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: Alpha = 0.5,
    min_samples: Count = 2,
    balance: Literal["none", "cap", "equal"] = "none",
) -> list[IntArray]:
    """Label skew: each class is spread over the clients by Dirichlet(alpha); small alpha, strong skew.

    Every sample is used. A draw that leaves a client with fewer than `min_samples` is thrown away and drawn again.

    Args:
        labels: class of each sample, [n].
        clients: number of clients.
        rng: where the draws come from.
        alpha: concentration.
        min_samples: fewest samples a client may have.
        balance: `none`: for each class p ~ Dir_clients(alpha), as the papers of Yurochkin and Li write it; sizes differ too.
            `cap`: the same, but a client that already holds n/clients samples gets no more of the classes that follow (what the
            released code of both papers does). `equal`: Hsu's form: all clients have the same size, each draws its own class mix
            q ~ Dir(alpha · class shares); when a class runs out, the rest of the mix is
            taken from the others, so the last to choose take what is left. Its alpha is the
            sum of the Dirichlet's parameters, not each of them, so the same number means a stronger skew.

    Raises:
        InputError: more samples are asked for than there are, or no draw of `ATTEMPTS` reaches `min_samples`.
    """
    _check_room(len(labels), clients, min_samples)
    held = np.unique(labels, return_counts=True)[1]  # [classes]
    draws: dict[str, Callable[[], IntArray]] = {
        "none": lambda: _spread_classes(held, clients, rng, alpha, cap=False),
        "cap": lambda: _spread_classes(held, clients, rng, alpha, cap=True),
        "equal": lambda: _equal_mixes(held, clients, rng, alpha),
    }
    counts = _redraw(draws[balance], min_samples, f"dirichlet with alpha = {alpha}", clients, len(labels))
    return _deal(labels, counts, rng)


@partition("pathological", paper="Li et al., Federated Learning on Non-IID Data Silos, ICDE 2022 (quantity-based label imbalance, #C=k)")
def pathological(labels: IntArray, clients: int, rng: np.random.Generator, *, classes_per_client: Count = 2) -> list[IntArray]:
    """Label skew: each client holds exactly k classes, and each class is shared evenly by the clients that hold it.

    Clients take, in random order, the classes with the fewest holders so far (ties at random), so every class has a holder as soon
    as clients · k reaches the number of classes; below that, the samples of the classes left over are not used.

    Args:
        labels: class of each sample, [n].
        clients: number of clients.
        rng: where the draws come from.
        classes_per_client: k.

    Raises:
        InputError: k is more than there are classes, or a class has fewer samples than holders.
    """
    classes, held = np.unique(labels, return_counts=True)
    if classes_per_client > len(classes):
        raise InputError(f"{classes_per_client} classes a client, but the data has {len(classes)}", "classes_per_client")
    owns = np.zeros((clients, len(classes)), dtype=bool)
    for client in rng.permutation(clients):
        order = rng.permutation(len(classes))
        fewest = np.argsort(owns.sum(axis=0)[order], kind="stable")[:classes_per_client]
        owns[client, order[fewest]] = True
    short = np.flatnonzero(held < owns.sum(axis=0))
    if len(short):
        first = short[0]
        raise InputError(
            f"class {classes[first]} has {held[first]} samples for the {owns[:, first].sum()} clients that would hold it: "
            f"take fewer than {clients} clients, or fewer classes a client",
            "classes_per_client",
        )
    counts = np.zeros(owns.shape, dtype=np.int64)
    for column, total in enumerate(held):
        holders = np.flatnonzero(owns[:, column])
        if len(holders):
            counts[holders, column] = [len(piece) for piece in np.array_split(np.arange(total), len(holders))]
    return _deal(labels, counts, rng)


@partition("shards", paper="McMahan et al., Communication-Efficient Learning of Deep Networks, AISTATS 2017, section 3 (Non-IID)")
def shards(labels: IntArray, clients: int, rng: np.random.Generator, *, shards_per_client: Count = 2) -> list[IntArray]:
    """Label skew: sort by label, cut into clients · s shards of equal size (±1), deal s shards at random to each client.

    Args:
        labels: class of each sample, [n].
        clients: number of clients.
        rng: where the draws come from.
        shards_per_client: s.

    Raises:
        InputError: more shards than samples.
    """
    total = clients * shards_per_client
    if total > len(labels):
        raise InputError(
            f"{clients} clients × {shards_per_client} shards = {total}, but there are {len(labels)} training samples", "shards_per_client"
        )
    shuffled = rng.permutation(len(labels))
    pieces = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], total)
    dealt = rng.permutation(total).reshape(clients, shards_per_client)
    return _sorted([np.concatenate([pieces[i] for i in row]) for row in dealt])


@partition(
    "gamma-similarity",
    paper="Gonzalez, Guerraoui, Pinot, Rizk, Stephan and Taiani (ByzFL), arXiv:2505.24802, 2025 (gamma_similarity_niid), "
    "after Karimireddy et al. (SCAFFOLD), ICML 2020, section 7 (s % similarity)",
)
def gamma_similarity(
    labels: IntArray, clients: int, rng: np.random.Generator, *, gamma: Annotated[float, Field(ge=0, le=1)] = 0.5
) -> list[IntArray]:
    """Label skew: the share gamma of the samples is dealt IID, the rest is sorted by label and cut in order; 1 is IID, 0 is sorted.

    Client 0 gets the first piece of the sorted part, and so on: with as many clients as classes, one class each. Every sample is used;
    sizes differ by one at most (in ByzFL by two: there both parts give their remainders to the first clients).

    Args:
        labels: class of each sample, [n].
        clients: number of clients.
        rng: where the draws come from.
        gamma: the share that is dealt IID, ⌊gamma · n⌋ samples.

    Raises:
        InputError: more clients than samples.
    """
    _check_room(len(labels), clients, 1)
    shuffled = rng.permutation(len(labels))
    alike, rest = np.split(shuffled, [int(gamma * len(labels) + 1e-9)])  # int(0.29 · 100) is 28
    ordered = rest[np.argsort(labels[rest], kind="stable")]
    even = np.array_split(alike, clients)[::-1]  # its remainder goes to the last clients, that of the sorted part to the first
    return _sorted([np.concatenate(both) for both in zip(even, np.array_split(ordered, clients), strict=True)])


@partition("natural", paper="Caldas et al., LEAF, arXiv 1812.01097, section 3 (the writer of a sample is its client)")
def natural(labels: IntArray, clients: int, rng: np.random.Generator) -> list[IntArray]:
    """Give each group of samples (the author of a text; where there are none, each class) to one client, whole.

    The groups are dealt in the order of their numbers: with as many clients as groups, group i is client i.

    Raises:
        InputError: more clients than groups.
    """
    groups = np.unique(labels)
    if clients > len(groups):
        raise InputError(f"{clients} clients cannot each have a group of their own: there are {len(groups)}")
    return _sorted([np.flatnonzero(np.isin(labels, groups[client::clients])) for client in range(clients)])


@partition("quantity-skew", paper="Li et al., Federated Learning on Non-IID Data Silos, ICDE 2022 (quantity skew)")
def quantity_skew(
    labels: IntArray, clients: int, rng: np.random.Generator, *, alpha: Alpha = 0.5, min_samples: Count = 2
) -> list[IntArray]:
    """Size skew: sizes ~ Dir_clients(alpha), labels IID; every sample is used.

    Args:
        labels: class of each sample, [n].
        clients: number of clients.
        rng: where the draws come from.
        alpha: concentration; small alpha, a few clients hold nearly everything.
        min_samples: fewest samples a client may have; a draw that gives less is drawn again.

    Raises:
        InputError: more samples are asked for than there are, or no draw of `ATTEMPTS` reaches `min_samples`.
    """
    total = len(labels)
    _check_room(total, clients, min_samples)

    def draw() -> IntArray:
        return _cut(rng.dirichlet(np.full(clients, alpha)), total)[:, None]

    sizes = _redraw(draw, min_samples, f"quantity-skew with alpha = {alpha}", clients, total)[:, 0]
    return _sorted(np.split(rng.permutation(total), np.cumsum(sizes)[:-1]))


def _check_room(total: int, clients: int, min_samples: int) -> None:
    if clients * min_samples > total:
        raise InputError(
            f"{clients} clients × at least {min_samples} samples = {clients * min_samples}, but there are {total} training samples"
        )


def _sorted(parts: list[IntArray]) -> list[IntArray]:
    return [np.sort(part).astype(np.int64) for part in parts]


def _cut(shares: np.ndarray[tuple[int], np.dtype[np.float64]], total: int) -> IntArray:
    """Return whole numbers in the proportion of `shares` [k] that add up to `total` exactly."""
    ends = np.floor(np.cumsum(shares) * total + 0.5).astype(np.int64).clip(0, total)
    ends[-1] = total  # the shares add up to one, but for rounding
    return np.diff(ends, prepend=0)


def _redraw(draw: Callable[[], IntArray], min_samples: int, what: str, clients: int, total: int) -> IntArray:
    """Return the first draw of counts [clients, classes] that gives each client at least `min_samples`."""
    best = 0
    for _ in range(ATTEMPTS):
        counts = draw()
        smallest = int(counts.sum(axis=1).min())
        if smallest >= min_samples:
            return counts
        best = max(best, smallest)
    raise InputError(
        f"{what} does not give each of {clients} clients {min_samples} of {total} samples (best smallest client in {ATTEMPTS} draws: "
        f"{best}): raise alpha, or lower min_samples or the number of clients",
        "min_samples",
    )


def _spread_classes(held: IntArray, clients: int, rng: np.random.Generator, alpha: float, cap: bool) -> IntArray:
    """Spread each class over the clients by Dir(alpha); counts [clients, classes]."""
    counts = np.zeros((clients, len(held)), dtype=np.int64)
    fair = held.sum() / clients
    for column, total in enumerate(held):
        shares = rng.dirichlet(np.full(clients, alpha))
        if cap:
            below = counts.sum(axis=1) < fair
            kept = np.where(below, shares, 0.0)
            # at a tiny alpha all of the draw may lie on clients that are full
            shares = kept / kept.sum() if kept.sum() > 0 else below / below.sum()
        counts[:, column] = _cut(shares, int(total))
    return counts


def _equal_mixes(held: IntArray, clients: int, rng: np.random.Generator, alpha: float) -> IntArray:
    """Give each client, one after another, the same number of samples in its own class mix; counts [clients, classes]."""
    total = int(held.sum())
    left = held.astype(np.int64).copy()
    counts = np.zeros((clients, len(held)), dtype=np.int64)
    for place, client in enumerate(rng.permutation(clients)):
        mix = rng.dirichlet(alpha * held / total)
        need = total // clients + (place < total % clients)
        while need:
            open_mix = np.where(left > 0, mix, 0.0)
            shares = open_mix / open_mix.sum() if open_mix.sum() > 0 else left / left.sum()
            taken = np.minimum(rng.multinomial(need, shares), left)
            left -= taken
            counts[client] += taken
            need -= int(taken.sum())
    return counts


def _deal(labels: IntArray, counts: IntArray, rng: np.random.Generator) -> list[IntArray]:
    """Give each client `counts[client, class]` random samples of each class."""
    parts: list[list[IntArray]] = [[] for _ in counts]
    for column, label in enumerate(np.unique(labels)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        pieces = np.split(rows, np.cumsum(counts[:, column]))  # the last piece is what nobody holds
        for part, piece in zip(parts, pieces[:-1], strict=True):
            part.append(piece)
    return _sorted([np.concatenate(part) for part in parts])
