"""The numbers of the classroom, worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtrust.classroom import scoring
from fedtrust.classroom.judging import judge
from fedtrust.classroom.scoring import Fault, Field, Outcome, Rules
from fedtrust.intervals import Interval

FLOOR = 0.1


@pytest.mark.parametrize(
    ("clean", "attacked", "expected"),
    [(0.9, 0.9, 0.0), (0.9, 0.1, 1.0), (0.9, 0.5, 0.5), (0.9, 0.95, 0.0), (0.9, 0.05, 1.0), (0.14, 0.1, None), (None, 0.5, None)],
)
def test_damage_is_measured_from_the_defences_own_clean_value_down_to_the_floor(clean, attacked, expected):
    assert scoring.damage(clean, attacked, FLOOR) == pytest.approx(expected)


def test_goal_damage_takes_off_what_a_clean_model_does_by_itself():
    assert scoring.goal_damage(0.8, 0.1) == pytest.approx(0.7)
    assert scoring.goal_damage(0.05, 0.1) == 0.0
    assert scoring.goal_damage(0.8, None) == pytest.approx(0.8)
    assert scoring.goal_damage(None, 0.1) is None


def test_an_attack_that_is_noticed_does_no_damage_where_stealth_is_asked_for():
    assert scoring.goal_damage(0.8, 0.1, lost=0.151, stealth=0.15) == 0.0
    assert scoring.goal_damage(0.8, 0.1, lost=0.15, stealth=0.15) == pytest.approx(0.7)
    assert scoring.goal_damage(0.8, 0.1, lost=0.5) == pytest.approx(0.7)


def test_defence_effect_is_the_issues_formula():
    # 0.5 · mean(0.8, 0.4) + 0.25 · 0.4 + 0.25 · 0.9
    assert scoring.defence_effect([0.2, 0.6], 0.81, 0.9) == pytest.approx(0.5 * 0.6 + 0.25 * 0.4 + 0.25 * 0.9)
    assert scoring.defence_effect([0.0], 0.95, 0.9) == 1.0  # better than FedAvg counts no more than as good
    assert scoring.defence_effect([], 0.9, 0.9) is None
    assert scoring.defence_effect([0.5], 0.9, 0.9, Rules(mean=0.0, worst=0.0, clean=1.0)) == 1.0


def test_the_utility_gate_opens_at_three_points_and_at_ten_for_the_worst_client():
    assert scoring.gate(0.87, 0.90, 0.70, 0.80) == ""
    assert "3.1 points of accuracy" in scoring.gate(0.869, 0.90, 0.80, 0.80)
    assert "worst client loses 10.1 points" in scoring.gate(0.90, 0.90, 0.699, 0.80)
    assert scoring.gate(0.90, 0.90, None, 0.80) == ""


def test_cost_is_the_mean_share_of_the_budgets_that_count():
    budget = {"queries": 200, "bytes": None, "gradients": 1000}
    prices = {"queries": 1.0, "bytes": 1.0, "gradients": 1.0}
    assert scoring.cost_share({"queries": 100, "bytes": 1e9, "gradients": 0}, budget, prices) == pytest.approx(0.25)
    assert scoring.cost_share({"queries": 100}, budget, {"queries": 3.0, "gradients": 1.0}) == pytest.approx(0.375)
    assert scoring.cost_share({"queries": 500}, {"queries": 200}, prices) == 1.0
    assert scoring.cost_share({"queries": 500}, {"queries": None}, prices) == 0.0


def test_half_of_the_score_goes_with_the_cost():
    assert scoring.score(0.8, 0.0) == pytest.approx(0.8)
    assert scoring.score(0.8, 1.0) == pytest.approx(0.4)
    assert scoring.score(0.8, 0.25) == pytest.approx(0.5 * 0.8 + 0.5 * 0.8 * 0.75)
    assert scoring.score(0.1, 0.0, penalty=0.25) == 0.0


def test_penalties_add_up_to_a_most():
    assert [scoring.penalty(n) for n in (0, 1, 4, 9)] == pytest.approx([0.0, 0.05, 0.2, 0.25])


def test_rescaling_puts_chance_at_zero():
    assert scoring.rescaled(0.5, 0.5) == 0.0
    assert scoring.rescaled(0.75, 0.5) == 0.5
    assert scoring.rescaled(0.3, 0.5) == 0.0


# ---------------------------------------------------------------------------------------------------------------------------- ties


def test_a_chain_of_overlaps_is_cut_at_the_leader():
    chain = [(0.8, Interval(0.7, 0.9)), (0.65, Interval(0.55, 0.75)), (0.5, Interval(0.4, 0.6))]
    assert scoring.groups(chain) == [1, 1, 2]  # the third overlaps the second, but not the leader


def test_the_first_beyond_the_leader_leads_whoever_follows():
    places = [(0.9, Interval(0.88, 0.92)), (0.8, Interval(0.75, 0.85)), (0.7, Interval(0.6, 0.76)), (0.5, Interval(0.45, 0.74))]
    assert scoring.groups(places) == [1, 2, 2, 3]


def test_a_wide_interval_does_not_lift_anybody_over_a_better_score():
    places = [(0.9, Interval(0.88, 0.92)), (0.8, Interval(0.79, 0.81)), (0.7, Interval(0.3, 0.95))]
    assert scoring.groups(places) == [1, 2, 2]


def test_without_intervals_only_equal_scores_tie():
    assert scoring.groups([(0.5, None), (0.7, None), (0.5, None)]) == [2, 1, 2]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.3), st.floats(0, 0.3)), max_size=12))
def test_groups_fall_with_the_scores_and_leave_no_number_out(drawn):
    places = [(mean, Interval(mean - low, mean + high)) for mean, low, high in drawn]
    found = scoring.groups(places)
    ordered = [g for _, g in sorted(zip([-m for m, _ in places], found, strict=True))]
    assert ordered == sorted(ordered)
    assert sorted(set(found)) == list(range(1, len(set(found)) + 1))


def test_marks_go_by_group_and_the_last_band_is_for_all_that_follow():
    assert [scoring.mark(g, 0.5) for g in (1, 2, 3, 6, 7, 40)] == [100, 90, 80, 50, 50, 50]
    assert scoring.mark(1, 0.0) == 0
    assert scoring.mark(2, 0.5, Rules(bands=(95, 85))) == 85


# --------------------------------------------------------------------------------------------------------------------------- cells

FIELD = Field({"house": True, "ann": False}, {"FedAvg": True, "bob": False}, "FedAvg")


def cell(attack, defence, accuracy, seed=0, **more):
    return Outcome(attack, defence, "p", seed, accuracy=accuracy, worst=more.pop("worst", 0.7), floor=FLOOR, **more)


def cells(seed=0, **changes):
    """FedAvg 0.9, bob 0.88 clean; the house takes half of FedAvg and nothing of bob, ann a quarter of both."""
    table = {
        (None, "FedAvg"): 0.9, (None, "bob"): 0.88,
        ("house", "FedAvg"): 0.5, ("house", "bob"): 0.88,
        ("ann", "FedAvg"): 0.7, ("ann", "bob"): 0.685,
    }  # fmt: skip
    made = {key: cell(*key, value, seed) for key, value in table.items()}
    return [dataclasses.replace(one, **changes.get(f"{key[0]}/{key[1]}", {})) for key, one in made.items()]


def line(board, side, name):
    return next(ln for ln in board.lines[side] if ln.name == name)


def test_the_board_of_two_attacks_and_two_defences():
    board = judge(FIELD, cells())
    assert line(board, "attack", "ann").effect == pytest.approx(0.25)
    assert line(board, "attack", "house").effect == pytest.approx(0.25)  # (0.5 + 0) / 2
    bob = line(board, "defence", "bob")
    assert bob.effect == pytest.approx(0.5 * (1 - 0.125) + 0.25 * (1 - 0.25) + 0.25 * 0.88 / 0.9)
    assert (bob.group, bob.mark, bob.gate) == (1, 100, "")
    assert line(board, "defence", "FedAvg").mark is None
    assert board.pairs["house", "FedAvg"] == pytest.approx(0.5)
    assert line(board, "attack", "ann").interval is None


def test_an_attack_that_fails_is_no_attack_and_no_credit_for_the_defence():
    broken = {"ann/bob": {"fault": Fault("attack", "crash", "line 3"), "accuracy": None}}
    board = judge(FIELD, cells(**broken))
    ann = line(board, "attack", "ann")
    assert ann.effect == pytest.approx(0.125)
    assert ann.penalty == pytest.approx(0.05)
    assert ann.score == pytest.approx(0.075)
    assert [fault.kind for _, fault in ann.faults] == ["crash"]
    bob = line(board, "defence", "bob")  # judged by the house's attack alone
    assert bob.effect == pytest.approx(0.5 + 0.25 + 0.25 * 0.88 / 0.9)
    assert bob.penalty == 0.0


def test_a_defence_that_fails_is_plain_fedavg_for_both_sides():
    broken = {"house/bob": {"fault": Fault("defence", "timeout", "slow"), "accuracy": None}}
    board = judge(FIELD, cells(**broken))
    bob = line(board, "defence", "bob")
    assert bob.effect == pytest.approx(0.5 * (1 - (0.5 + 0.25) / 2) + 0.25 * 0.5 + 0.25 * 0.88 / 0.9)
    assert bob.penalty == pytest.approx(0.05)
    assert line(board, "attack", "house").effect == pytest.approx(0.5)


def test_a_defence_that_fails_without_an_attack_is_plain_fedavg_throughout():
    board = judge(FIELD, cells(**{"None/bob": {"fault": Fault("defence", "crash", "x"), "accuracy": None}}))
    bob, plain = line(board, "defence", "bob"), line(board, "defence", "FedAvg")
    assert bob.effect == pytest.approx(plain.effect)
    assert bob.score == pytest.approx(plain.score - 0.05)


def test_who_never_played_is_worth_nothing():
    lost = {"fault": Fault("defence", "crash", "x"), "accuracy": None}
    board = judge(FIELD, cells(**{"None/bob": lost, "house/bob": lost, "ann/bob": lost}))
    bob = line(board, "defence", "bob")
    assert (bob.score, bob.mark, bob.gate) == (0.0, 0, "it failed wherever it was asked")


def test_the_gate_makes_a_defence_worth_nothing():
    board = judge(FIELD, cells(**{"None/bob": {"accuracy": 0.86}}))
    bob = line(board, "defence", "bob")
    assert bob.score == 0.0
    assert bob.mark == 0
    assert "4.0 points" in bob.gate
    board = judge(FIELD, cells(**{"None/bob": {"worst": 0.55}}))
    assert "worst client loses 15.0 points" in line(board, "defence", "bob").gate


def test_a_model_that_is_no_longer_finite_is_worth_what_the_floor_is():
    board = judge(FIELD, cells(**{"ann/bob": {"note": "not finite", "accuracy": 0.3}}))
    assert board.pairs["ann", "bob"] == 1.0


def test_in_an_exercise_with_a_goal_damage_is_its_success_alone():
    goal = dataclasses.replace(FIELD, goal=True)
    found = cells(**{"ann/bob": {"success": 0.6}, "ann/FedAvg": {"success": 0.9}, "None/bob": {"base": {"": 0.1}}})
    board = judge(goal, found, Rules(stealth=0.3))
    assert board.pairs["ann", "bob"] == pytest.approx(0.5)
    assert board.pairs["ann", "FedAvg"] == pytest.approx(0.9)
    assert judge(goal, found, Rules(stealth=0.1)).pairs["ann", "bob"] == 0.0
    assert ("house", "bob") not in board.pairs  # it has no goal


def test_a_house_attack_with_a_goal_of_its_own_counts_by_whichever_is_more():
    found = cells(**{"house/bob": {"success": 0.7}, "None/bob": {"base": {"house": 0.2}}})
    assert judge(FIELD, found).pairs["house", "bob"] == pytest.approx(0.5)


def test_cost_lowers_the_score_and_failed_games_do_not_count_in_it():
    costs = {"ann/bob": {"costs": {"attack": {"queries": 100.0}}}, "ann/FedAvg": {"costs": {"attack": {"queries": 200.0}}}}
    who = dataclasses.replace(FIELD, budget={"queries": 300})
    ann = line(judge(who, cells(**costs)), "attack", "ann")
    assert ann.cost == pytest.approx(0.5)
    assert ann.used == {"queries": 150.0}
    assert ann.score == pytest.approx(0.25 * 0.75)
    costs["ann/FedAvg"] |= {"fault": Fault("attack", "budget", "too many")}
    assert line(judge(who, cells(**costs)), "attack", "ann").used == {"queries": 100.0}


def test_intervals_are_over_seeds_and_ties_share_the_mark():
    steady = [o for seed in range(3) for o in cells(seed)]
    moved = [dataclasses.replace(o, accuracy=0.75 - 0.05 * o.seed) if o.key[:2] == ("ann", "FedAvg") else o for o in steady]
    ann = line(judge(FIELD, moved), "attack", "ann")
    # D against FedAvg 0.1875, 0.25, 0.3125, against bob 0.25: E by seed 0.21875, 0.25, 0.28125; the ends are the extreme resamples
    assert ann.interval == pytest.approx((0.21875, 0.28125))
    two = Field({"ann": False, "cleo": False}, {"FedAvg": True}, "FedAvg")
    rows = [o for o in moved if o.attack in (None, "ann")]
    rows += [dataclasses.replace(o, attack="cleo", accuracy=0.71) for o in rows if o.attack == "ann"]
    board = judge(two, [o for o in rows if o.defence == "FedAvg"])
    assert [ln.mark for ln in board.lines["attack"]] == [100, 100]


def test_cells_in_any_order_and_cells_that_are_missing():
    found = [o for seed in range(3) for o in cells(seed)]
    assert judge(FIELD, found[::-1]) == judge(FIELD, found)
    few = judge(FIELD, [o for o in found if o.key[:2] != ("ann", "bob")])
    assert line(few, "attack", "ann").effect == pytest.approx(0.25)
    assert ("ann", "bob") not in few.pairs


def test_audits_are_scored_by_their_measure_and_faults_count_as_guessing():
    who = Field({"house": True, "ann": False, "bob": False}, {}, side="audit")
    rows = [Outcome("ann", "-", "p", s, measure=0.8, chance=0.5) for s in (0, 1)]
    rows += [
        Outcome("bob", "-", "p", 0, measure=0.9, chance=0.5),
        Outcome("bob", "-", "p", 1, fault=Fault("audit", "crash", "x"), chance=0.5),
    ]
    rows += [Outcome("house", "-", "p", s, measure=0.6, chance=0.5) for s in (0, 1)]
    board = judge(who, rows)
    assert line(board, "audit", "ann").score == pytest.approx(0.6)
    assert line(board, "audit", "bob").effect == pytest.approx(0.4)
    assert line(board, "audit", "bob").score == pytest.approx(0.35)
    assert line(board, "audit", "house").effect == pytest.approx(0.2)
    assert line(board, "audit", "ann").parts["measure"] == pytest.approx(0.8)
