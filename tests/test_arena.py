"""Damages, ranks, intervals and costs of hand-made cells, worked out by hand or by the plainest enumeration."""

from __future__ import annotations

import itertools
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from fedtrust.arena import Arena, Entry, Standing, accuracy_damage, judge, score, success_damage
from fedtrust.intervals import Interval, percentiles, ranks, resamples


def cell(attack: str | None, defence: str, accuracy: float | None, seed: int = 1, **more: Any) -> Entry:
    """A finished cell on one partition with ten balanced classes."""
    return Entry(attack, defence, more.pop("partition", "iid"), str(seed), accuracy=accuracy, **({"floor": 0.1} | more))


def damage(arena: Arena, attack: str, defence: str) -> float | None:
    return arena.pairs[attack, defence].damage


def standings(side: list[Standing]) -> list[tuple[str, int | None, float, str, float]]:
    """Name, rank, mean damage, and the worst opponent with its damage."""
    return [(s.name, s.rank, round(s.mean or 0.0, 9), name, round(most, 9)) for s in side for name, most in [s.extreme or ("", 0.0)]]


# ----------------------------------------------------------------------------------------------------------------------- one cell


@pytest.mark.parametrize(
    ("clean", "attacked", "floor", "expected"),
    [
        (0.9, 0.5, 0.1, 0.5),  # 0.4 of 0.8
        (0.9, 0.9, 0.1, 0.0),
        (0.9, 0.95, 0.1, 0.0),  # an attack that helps does no damage
        (0.9, 0.02, 0.1, 1.0),  # worse than the floor is not worse than everything
        (0.8, 0.3, 0.3, 1.0),
        (0.15, 0.1, 0.1, 1.0),  # exactly the least that counts as learnt
        (0.14, 0.1, 0.1, None),
        (None, 0.5, 0.1, None),
        (0.9, None, 0.1, None),
        (0.9, 0.5, None, None),
    ],
)
def test_damage_to_the_accuracy(clean: float | None, attacked: float | None, floor: float | None, expected: float | None) -> None:
    found = accuracy_damage(clean, attacked, floor)
    assert found == (None if expected is None else pytest.approx(expected))


def test_damage_of_a_goal() -> None:
    assert success_damage(0.75, 0.05) == pytest.approx(0.7)
    assert success_damage(0.75, None) == 0.75
    assert success_damage(0.01, 0.05) == 0.0


def test_the_score_by_hand() -> None:
    """0.5 · (0.9 + 0.5) / 2 + 0.25 · 0.5 + 0.25 · 0.9 / 0.96."""
    assert score([0.1, 0.5], 0.9, 0.96) == pytest.approx(0.35 + 0.125 + 0.234375)
    assert score([0.0], 0.98, 0.96) == 1.0, "better than FedAvg is no more than all of it"
    assert score([1.0], 0.0, 0.96) == 0.0
    assert score([], 0.9, 0.96) is None
    assert score([0.1], None, 0.96) is None
    assert score([0.1], 0.9, None) is None


# ----------------------------------------------------------------------------------------------------------------------- a matrix


def two_by_two() -> list[Entry]:
    """Mean: clean 0.9, noise 0.5 → 0.5, backdoor 0.8 − 0.05 → 0.75. Median: clean 0.8, noise 0.73 → 0.1, backdoor 0.25 − 0.05 → 0.2."""
    base = {"backdoor": 0.05}
    return [
        cell(None, "mean", 0.9, base=base),
        cell(None, "median", 0.8, base=base),
        cell("noise", "mean", 0.5),
        cell("noise", "median", 0.73),
        cell("backdoor", "mean", 0.88, success=0.8),
        cell("backdoor", "median", 0.79, success=0.25),
    ]


def test_damages_and_ranks_by_hand() -> None:
    found = judge(two_by_two(), "mean")
    assert damage(found, "noise", "mean") == pytest.approx(0.5)
    assert damage(found, "noise", "median") == pytest.approx(0.1)
    assert damage(found, "backdoor", "mean") == pytest.approx(0.75)
    assert damage(found, "backdoor", "median") == pytest.approx(0.2)
    assert found.pairs["backdoor", "mean"].broken == pytest.approx(0.025)
    assert standings(found.defenders) == [("median", 1, 0.15, "backdoor", 0.2), ("mean", 2, 0.625, "backdoor", 0.75)]
    assert standings(found.attackers) == [("backdoor", 1, 0.475, "mean", 0.75), ("noise", 2, 0.3, "mean", 0.5)]
    assert found.resamples == 0
    assert all(s.interval is None for s in found.defenders + found.attackers)


def test_costs_by_hand() -> None:
    entries = two_by_two()
    entries[1] = cell(None, "median", 0.8, seconds=0.02, base={"backdoor": 0.05})
    entries[3] = cell("noise", "median", 0.73, seconds=0.04)
    found = judge(entries, "mean").costs
    assert found["median"].lost == pytest.approx(0.1)
    assert found["mean"].lost == 0.0
    assert found["median"].seconds == pytest.approx(0.03)
    assert found["mean"].seconds is None
    assert found["median"].score == pytest.approx(0.5 * 0.85 + 0.25 * 0.8 + 0.25 * 0.8 / 0.9)
    nobody = judge(entries, None).costs["median"]
    assert (nobody.clean, nobody.lost, nobody.score) == (0.8, None, None)


def test_lost_accuracy_is_counted_where_both_played() -> None:
    """Median has a second seed that the mean lacks; its accuracy there must not pass for a loss."""
    entries = [cell(None, "mean", 0.9), cell(None, "median", 0.88), cell(None, "median", 0.2, seed=2)]
    found = judge(entries, "mean").costs["median"]
    assert found.lost == pytest.approx(0.02)
    assert found.clean == pytest.approx(0.54)


def test_who_is_shut_out() -> None:
    calm = {"rare/trust": 0.0, "common/trust": 0.3}
    entries = [
        cell(None, "krum", 0.9, means={"detection/fpr": 0.8, "detection/excluded-honest": 0.3, "rare/fpr": 1.0, "common/fpr": 0.7} | calm),
        cell("noise", "krum", 0.9, means={"detection/fpr": 0.6, "rare/fpr": 0.9, "common/fpr": 0.5}),
        cell("noise", "mean", 0.5),
        cell("zero", "krum", 0.5, status="failed", means={"rare/fpr": 0.0}),
    ]
    found = judge(entries).excluded
    assert found["krum"].honest == pytest.approx(0.7)
    assert found["krum"].out == pytest.approx(0.3)
    assert found["krum"].gap == pytest.approx(0.95 - 0.6)
    assert (found["krum"].rare_trust, found["krum"].common_trust) == (0.0, 0.3)
    assert found["mean"].gap is None


def test_against_the_defences_own_clean_cell() -> None:
    """The same partition and the same seed, never a neighbour's."""
    entries = [
        cell(None, "mean", 0.9, seed=1),
        cell(None, "mean", 0.7, seed=2),
        cell(None, "mean", 0.5, seed=1, partition="skewed"),
        cell("noise", "mean", 0.5, seed=1),
        cell("noise", "mean", 0.55, seed=2),
        cell("noise", "mean", 0.4, seed=1, partition="skewed"),
    ]
    found = [f.damage for f in judge(entries).fights]
    assert found == [pytest.approx(0.5), pytest.approx(0.25), pytest.approx(0.25)]
    # settings count alike, whatever the number of their seeds: (mean of 0.5 and 0.25, and 0.25) / 2
    assert judge(entries).defenders[0].mean == pytest.approx((0.375 + 0.25) / 2)


def test_a_clean_cell_serves_all_shares() -> None:
    entries = [cell(None, "mean", 0.9), cell("noise", "mean", 0.7, share="0.1"), cell("noise", "mean", 0.3, share="0.4")]
    assert damage(judge(entries), "noise", "mean") == pytest.approx((0.25 + 0.75) / 2)


def test_a_model_that_never_learnt_is_not_ranked() -> None:
    """Its backdoor fails as well: that is no merit of the defence."""
    entries = [
        cell(None, "useless", 0.12),
        cell("noise", "useless", 0.1),
        cell("backdoor", "useless", 0.1, success=0.0),
        cell(None, "mean", 0.9),
        cell("noise", "mean", 0.5),
        cell("backdoor", "mean", 0.9, success=0.9),
    ]
    found = judge(entries)
    assert found.pairs["backdoor", "useless"].status == "unjudged"
    assert [(s.name, s.rank) for s in found.defenders] == [("mean", 1), ("useless", None)]
    assert found.attackers[0].met == 1
    assert found.attackers[0].of == 2


def test_refused_failed_and_missing_cells() -> None:
    entries = [
        *two_by_two(),
        cell(None, "bulyan", 0.9),
        Entry("noise", "bulyan", "iid", "1", status="refused", why="needs 4f + 3 rows"),
        Entry("noise", "bulyan", "skewed", "1", status="refused", why="needs 4f + 3 rows"),
        Entry("backdoor", "krum", "iid", "1", status="failed", why="no quorum"),
        Entry("noise", "krum", "iid", "1", status="refused", why="too few"),
        cell("backdoor", "krum", None, seed=2),
    ]
    found = judge(entries, "mean")
    assert (found.pairs["noise", "bulyan"].status, found.pairs["noise", "bulyan"].why) == ("refused", "needs 4f + 3 rows")
    assert found.pairs["backdoor", "bulyan"].status == "missing"
    assert found.pairs["backdoor", "krum"].status == "unjudged"
    assert found.pairs["backdoor", "krum"].why == "no quorum"
    assert damage(found, "noise", "bulyan") is None
    assert [(s.name, s.rank) for s in found.defenders] == [("median", 1), ("mean", 2), ("bulyan", None), ("krum", None)]
    assert found.attackers[0].met == 2
    assert found.costs["bulyan"].clean == 0.9
    failed = judge([cell(None, "mean", 0.9), Entry("noise", "mean", "iid", "1", status="failed"), *two_by_two()[1:2]])
    assert failed.pairs["noise", "mean"].status == "failed"


def test_a_failed_clean_cell_is_no_baseline() -> None:
    found = judge([cell(None, "mean", 0.9, status="failed"), cell("noise", "mean", 0.5), cell("backdoor", "mean", 0.5, success=0.6)])
    assert damage(found, "noise", "mean") is None
    assert damage(found, "backdoor", "mean") == 0.6, "success needs no baseline of accuracy"


def test_one_seed_missing_of_a_pair() -> None:
    entries = [e for seed in (1, 2) for e in (cell(None, "mean", 0.9, seed), cell("noise", "mean", 0.5 if seed == 1 else 0.9, seed))]
    entries[-1] = Entry("noise", "mean", "iid", "2", status="failed", why="no quorum")
    found = judge(entries).pairs["noise", "mean"]
    assert found.damage == pytest.approx(0.5)
    assert (found.known, found.of, found.status, found.why) == (1, 2, "", "no quorum")


def test_nothing_at_all() -> None:
    empty = judge([])
    assert (empty.attackers, empty.defenders, empty.pairs) == ([], [], {})
    calm = judge([cell(None, "mean", 0.9)], "mean")
    assert [(s.name, s.rank, s.of) for s in calm.defenders] == [("mean", None, 0)]


# ----------------------------------------------------------------------------------------------------------------- over the seeds


def seeded(damages: dict[tuple[str, str], list[float]]) -> list[Entry]:
    """Cells whose damages are these, by attack and defence, one a seed: clean 0.9, floor 0.1."""
    entries = []
    for (attack, defence), values in damages.items():
        for seed, value in enumerate(values):
            entries += [cell(None, defence, 0.9, seed), cell(attack, defence, 0.9 - 0.8 * value, seed)]
    return entries


def enumerated(values: list[list[float]]) -> Interval:
    """The plainest bootstrap: every way to draw seeds with replacement; `values` [rows][seeds] are averaged over rows first."""
    count = len(values[0])
    means = sorted(fmean(fmean(row[s] for s in pick) for row in values) for pick in itertools.product(range(count), repeat=count))
    cut = int(0.025 * len(means))
    return Interval(means[cut], means[-1 - cut])


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_intervals_against_every_resample(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    damages = {(a, d): rng.uniform(0, 1, seeds).tolist() for a in ("x", "y", "z") for d in ("p", "q")}
    found = judge(seeded(damages))
    assert found.resamples == seeds**seeds
    for pair, values in damages.items():
        assert found.pairs[pair].interval == pytest.approx(enumerated([values]))
    for standing in found.defenders:
        assert standing.interval == pytest.approx(enumerated([damages[a, standing.name] for a in "xyz"]))
    for standing in found.attackers:
        assert standing.interval == pytest.approx(enumerated([damages[standing.name, d] for d in "pq"]))


def test_two_and_three_seeds_span_what_was_seen() -> None:
    """Each extreme has more than 2.5 % of the resamples: 1/4 and 1/27."""
    found = judge(seeded({("x", "p"): [0.2, 0.6], ("x", "q"): [0.5, 0.3]})).pairs
    assert found["x", "p"].interval == pytest.approx((0.2, 0.6))
    assert judge(seeded({("x", "p"): [0.2, 0.6, 0.3]})).pairs["x", "p"].interval == pytest.approx((0.2, 0.6))


def test_many_seeds_are_drawn_from_a_fixed_stream() -> None:
    """Close to the normal interval of the mean, the same every time."""
    values = np.random.default_rng(0).uniform(0.2, 0.8, 30).tolist()
    one, two = (judge(seeded({("x", "p"): values})) for _ in range(2))
    assert one.resamples == 4096
    assert one.pairs["x", "p"].interval == two.pairs["x", "p"].interval
    half = 1.96 * float(np.std(values)) / 30**0.5
    assert one.pairs["x", "p"].interval == pytest.approx((fmean(values) - half, fmean(values) + half), abs=0.01)


def test_all_cells_of_a_seed_are_drawn_together() -> None:
    """Two attacks whose damages go against each other: their mean is the same in every seed, so there is no doubt about it."""
    found = judge(seeded({("x", "p"): [0.2, 0.8, 0.5], ("y", "p"): [0.8, 0.2, 0.5]}))
    assert found.defenders[0].interval == pytest.approx((0.5, 0.5))
    assert found.attackers[0].interval == pytest.approx((0.2, 0.8))


def test_a_cell_without_a_result_counts_for_nothing_in_a_resample() -> None:
    entries = seeded({("x", "p"): [0.2, 0.6, 0.4]})
    entries[-1] = Entry("x", "p", "iid", "2", status="failed")
    assert judge(entries).pairs["x", "p"].interval == pytest.approx((0.2, 0.6))
    alone = [*seeded({("x", "p"): [0.2, 0.4]})[:-1], *seeded({("x", "q"): [0.1, 0.3]})]
    assert judge(alone).pairs["x", "p"].interval == pytest.approx((0.2, 0.2))


def test_resamples_are_counts_that_add_up() -> None:
    for seeds, count in ((1, 1), (2, 4), (3, 27), (6, 4096)):
        weights = resamples(seeds)
        assert weights.shape == (count, seeds)
        assert (weights.sum(1) == seeds).all()
    assert sorted(map(tuple, resamples(2).tolist())) == [(0, 2), (1, 1), (1, 1), (2, 0)]


def test_percentiles_are_values_that_occurred() -> None:
    assert percentiles(np.arange(1000.0)) == Interval(25.0, 974.0)
    assert percentiles(np.array([np.nan, 3.0])) == Interval(3.0, 3.0)
    assert percentiles(np.array([np.nan])) is None


def test_overlapping_intervals_tie() -> None:
    """a and b overlap, b and c too, but c lies wholly above a."""
    places = [(0.1, Interval(0.0, 0.2)), (0.25, Interval(0.15, 0.35)), (0.4, Interval(0.3, 0.5)), None]
    assert ranks(places, low_is_best=True) == [1, 1, 2, None]
    assert ranks(places, low_is_best=False) == [2, 1, 1, None]
    assert ranks([(0.1, None), (0.2, None), (0.1, None)], low_is_best=True) == [1, 3, 1]
    touching = [(0.1, Interval(0.0, 0.2)), (0.3, Interval(0.2, 0.4))]
    assert ranks(touching, low_is_best=True) == [1, 1]


def test_a_ranking_with_ties() -> None:
    found = judge(seeded({("x", "p"): [0.1, 0.3], ("x", "q"): [0.2, 0.4], ("x", "r"): [0.8, 0.9], ("x", "s"): [0.0, 0.05]}))
    assert [(s.name, s.rank) for s in found.defenders] == [("s", 1), ("p", 2), ("q", 2), ("r", 4)]


def test_who_breaks_the_model_has_not_done_less_than_who_teaches_it() -> None:
    """The larger of the two damages counts: 0.9 → 0.5 is half of what there was; success 0.25 − 0.05 is 0.2."""
    entries = [cell(None, "mean", 0.9, base={"backdoor": 0.05}), cell("backdoor", "mean", 0.5, success=0.25)]
    fight = judge(entries, "mean").fights[0]
    assert (fight.damage, fight.broken, fight.gained) == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.2))
