"""Devices on a virtual clock: the draws' statistics, the course of a round against a small event simulation, and what is refused."""

from __future__ import annotations

import heapq
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from fedtrust.engine.devices import MOST_LISTED, Devices, Plan
from fedtrust.engine.prepare import local_steps
from fedtrust.engine.roster import cohort
from fedtrust.errors import InputError
from fedtrust.scenario import Scenario, check, parse, schema
from fedtrust.scenario_parts import SystemSpec

Small = Callable[..., Scenario]
TIMED: dict[str, Any] = {"speed": {"median": 20.0, "sigma": 0.8, "jitter": 0.3}, "bandwidth": {"median": 5000.0, "sigma": 0.5}}
HARD: dict[str, Any] = {
    **TIMED,
    "availability": {"mean": 0.7, "amplitude": 0.25, "period": 30, "unit": "seconds"},
    "dropout": 0.15,
    "deadline": 4.0,
    "late": "partial",
    "over_select": 0.4,
}


def devices(count: int, seed: int = 1, samples: Callable[[int], int] = lambda c: 20 + c % 7, size: int = 50, **system: Any) -> Devices:
    """Devices of clients with `samples` each, of which 5 make a step, and two epochs a round."""
    spec, sizes = SystemSpec.model_validate(system), [samples(c) for c in range(count)]
    return Devices(spec, seed=seed, samples=sizes, batch_size=5, epochs=2, parameters=size)


# ------------------------------------------------------------------------------------------------------------------ the draws


def within(successes: int, trials: int, p: float) -> bool:
    """Whether a count lies within 4.5 standard deviations of what is expected (1 in 150 000 does not)."""
    return abs(successes - trials * p) <= 4.5 * math.sqrt(trials * p * (1 - p))


def test_availability_and_dropout_have_the_probabilities_that_are_asked_for() -> None:
    made = devices(800, availability=0.3, dropout=0.2)
    plans = [made.plan(r, 800, 0.0) for r in range(1, 101)]
    reached = Counter(c for p in plans for c in p.asked)
    assert within(sum(reached.values()), 800 * 100, 0.3)
    assert all(within(reached[c], 100, 0.3) for c in range(800))  # … every client, not only on average
    assert all(within(len(p.asked), 800, 0.3) for p in plans)  # … and every round
    left = [c for p in plans for c in p.asked if p.parts[c].fate == "dropped-out"]
    assert within(len(left), sum(reached.values()), 0.2)
    assert all(p.parts[c].fault == "dropped out" for p in plans for c in p.asked if p.parts[c].fate == "dropped-out")
    both = sum(c in plans[0].asked and c in plans[1].asked for c in range(800))
    assert within(both, 800, 0.09)  # rounds are independent


def test_what_happens_to_a_client_does_not_depend_on_who_else_there_is() -> None:
    few, many = (devices(n, **HARD) for n in (50, 400))
    for r in (1, 2):
        np.testing.assert_array_equal(few.times(r), np.array(many.times(r))[:, :50])
        np.testing.assert_array_equal(few.probability(r, 7.0), many.probability(r, 7.0)[:50])
    assert set(few.plan(1, 400, 0.0).unreachable) == {c for c in many.plan(1, 400, 0.0).unreachable if c < 50}
    other = devices(50, seed=2, **HARD)
    assert not np.array_equal(few.times(1)[0], other.times(1)[0])


def test_days() -> None:
    day = {"mean": 0.5, "amplitude": 0.4, "period": 24}
    made = devices(300, availability=day)
    curves = np.array([made.probability(r, 0.0) for r in range(24)])  # [rounds, n]
    np.testing.assert_allclose(curves.mean(0), 0.5, atol=1e-12)
    assert curves.min() >= 0.1 - 1e-12
    assert curves.max() <= 0.9 + 1e-12
    peaks = np.bincount(curves.argmax(0), minlength=24)
    assert (peaks > 0).all()  # round the clock
    np.testing.assert_allclose(curves.mean(1), 0.5, atol=0.1)  # so about as many are there at any time
    alike = devices(300, availability={**day, "spread": 0})
    for r in range(24):
        np.testing.assert_allclose(alike.probability(r, 0.0), 0.5 + 0.4 * math.cos(2 * math.pi * r / 24))
    seconds = devices(3, availability={**day, "unit": "seconds", "spread": 0}, speed=1.0)
    np.testing.assert_allclose(seconds.probability(5, 12.0), 0.1)
    np.testing.assert_allclose(seconds.probability(6, 12.0), 0.1)
    quiet, busy = alike.plan(12, 300, 0.0), alike.plan(24, 300, 0.0)
    assert within(len(quiet.asked), 300, 0.1)
    assert within(len(busy.asked), 300, 0.9)


def test_speeds_are_log_normal_and_a_clients_own() -> None:
    made = devices(
        20_000, samples=lambda c: 20, speed={"median": 40.0, "sigma": 0.7}, bandwidth={"median": 100.0, "sigma": 0.2, "jitter": 0.5}
    )
    (one, wire), (again, other) = made.times(1), made.times(2)
    np.testing.assert_array_equal(one, again)  # no jitter: the same in every round
    logs = np.log(5 / one)  # a step is 5 samples
    assert abs(logs.mean() - math.log(40)) < 4.5 * 0.7 / math.sqrt(20_000)
    assert abs(logs.std() - 0.7) < 4.5 * 0.7 / math.sqrt(2 * 20_000)
    rates = np.log(2 * 4 * 50 / wire)  # 50 parameters of 4 bytes, there and back
    assert abs(rates.mean() - math.log(100)) < 4.5 * math.hypot(0.2, 0.5) / math.sqrt(20_000)
    assert abs(rates.std() - math.hypot(0.2, 0.5)) < 0.02
    assert abs((np.log(wire) - np.log(other)).std() - 0.5 * math.sqrt(2)) < 0.02
    shaky = devices(20_000, speed={"median": 40.0, "sigma": 0.7, "jitter": 0.3})
    change = np.log(shaky.times(1)[0]) - np.log(shaky.times(2)[0])  # a client's own speed cancels out
    assert abs(change.std() - 0.3 * math.sqrt(2)) < 0.02
    assert abs(np.corrcoef(logs, rates)[0, 1]) < 0.04  # a fast processor says nothing about the line


def test_the_cohort_is_drawn_among_the_reachable() -> None:
    assert cohort(40, 5, 3, 1, list(range(40))) == cohort(40, 5, 3, 1)  # a world in which everybody is there is the old one
    assert cohort(40, 5, 3, 1, [7, 9, 11]) == [7, 9, 11]
    assert cohort(40, 5, 3, 1, []) == []
    drawn = Counter(c for r in range(400) for c in cohort(40, 5, 3, r, list(range(1, 40, 2))))
    assert set(drawn) == set(range(1, 40, 2))
    assert all(within(n, 400, 0.25) for n in drawn.values())


# ------------------------------------------------------------------------------------------------------- the course of a round


def test_time_is_bytes_and_samples() -> None:
    made = devices(2, samples=lambda c: (20, 23)[c], speed=10.0, bandwidth=100.0)
    plan = made.plan(1, 2, 0.0)
    # 50 parameters of 4 bytes there and back at 100 bytes/s: 4 s; 8 (10) steps of 5 samples at 10 samples/s: 4 (5) s
    assert made.steps.tolist() == [8, 10] == [local_steps(20, 5, 2), local_steps(23, 5, 2)]
    assert {c: p.seconds for c, p in plan.parts.items()} == {0: 8.0, 1: 9.0}
    assert plan.duration == 9.0
    assert plan.after(1.5) == 10.5


@pytest.mark.parametrize(
    ("deadline", "late", "fates", "steps", "seconds", "duration"),
    [
        (9.0, "drop", ["replied", "replied"], [8, 10], [8.0, 9.0], 9.0),  # on the dot is in time
        (8.9, "drop", ["replied", "late"], [8, 10], [8.0, 9.0], 8.9),
        (8.9, "partial", ["replied", "partial"], [8, 9], [8.0, 8.5], 8.5),
        (5.2, "partial", ["partial", "partial"], [2, 2], [5.0, 5.0], 5.0),
        (4.5, "partial", ["partial", "partial"], [1, 1], [4.5, 4.5], 4.5),
        (4.4, "partial", ["late", "late"], [8, 10], [8.0, 9.0], 4.4),  # not even one step
        (3.0, "partial", ["late", "late"], [8, 10], [8.0, 9.0], 3.0),  # the model alone takes longer
    ],
)
def test_deadlines(deadline: float, late: str, fates: list[str], steps: list[int], seconds: list[float], duration: float) -> None:
    made = devices(2, samples=lambda c: (20, 23)[c], speed=10.0, bandwidth=100.0, deadline=deadline, late=late)
    plan = made.plan(1, 2, 0.0)
    assert [plan.parts[c].fate for c in (0, 1)] == fates
    assert [plan.parts[c].steps for c in (0, 1)] == steps
    assert [plan.parts[c].seconds for c in (0, 1)] == seconds
    assert plan.duration == duration
    assert plan.limits == {c: n for c, n, fate in zip((0, 1), steps, fates, strict=True) if fate == "partial"}
    if fates[1] == "late":
        assert plan.absent[1] == f"late: needed 9 s, deadline {deadline:g} s"


def reference(made: Devices, plan: Plan, number: int, wanted: int, deadline: float, partial: bool) -> tuple[dict[int, str], float]:
    """Play the round event by event, as a server would see it."""
    one, wire = made.times(number)
    moment = made._draws("device/moment", number)
    leaves = made._draws("device/drop-out", number) < made._spec.dropout
    events: list[tuple[float, int, str]] = []
    for c in plan.asked:
        steps, word = int(made.steps[c]), "replied"
        while partial and steps > 1 and wire[c] + steps * one[c] > deadline:
            steps, word = steps - 1, "partial"
        end = wire[c] + steps * one[c]
        if end > deadline:
            end, word = wire[c] + int(made.steps[c]) * one[c], "replied"
        heapq.heappush(events, (end * moment[c], c, "dropped-out") if leaves[c] else (end, c, word))
    fates: dict[int, str] = {}
    now, replies = 0.0, 0
    while events and replies < wanted:
        at, c, word = heapq.heappop(events)
        if at > deadline:
            fates |= {c: "late", **{c: "late" for _, c, _ in events}}
            return fates, deadline
        now, fates[c] = at, word
        replies += word != "dropped-out"
    return fates | {c: "surplus" for _, c, _ in events}, now


@pytest.mark.parametrize("late", ["drop", "partial"])
@pytest.mark.parametrize("deadline", [None, 4.0])
@pytest.mark.parametrize("over", [0.0, 0.4])
def test_the_course_of_a_round_against_an_event_simulation(late: str, deadline: float | None, over: float) -> None:
    if late == "partial" and deadline is None:
        late = "drop"
    made = devices(60, **TIMED, dropout=0.15, availability=0.8, deadline=deadline, late=late, over_select=over, size=400)
    seen: Counter[str] = Counter()
    for number in range(1, 60):
        plan = made.plan(number, 20, 0.0)
        fates, end = reference(made, plan, number, 20, deadline or math.inf, late == "partial")
        assert {c: p.fate for c, p in plan.parts.items()} == fates
        assert plan.duration == pytest.approx(end, abs=1e-6)
        assert sum(p.fault is None for p in plan.parts.values()) <= plan.wanted == 20
        seen.update(fates.values())
    expected = {"replied", "dropped-out"} | ({"surplus"} if over else set())
    expected |= set() if deadline is None else {"partial"} if late == "partial" else {"late"}
    assert seen.keys() >= expected


def test_over_selection_takes_the_fastest() -> None:
    made = devices(100, **TIMED, over_select=0.25)
    assert len(made.plan(1, 10, 0.0).asked) == 13  # 12.5, rounded up
    plain = devices(100, **TIMED)
    shorter = 0
    for number in range(1, 30):
        plan = made.plan(number, 20, 0.0)
        assert len(plan.asked) == 25
        taken = {c for c, p in plan.parts.items() if p.fault is None}
        assert len(taken) == 20
        slowest = max(plan.parts[c].seconds for c in taken)
        assert plan.duration == slowest <= min(plan.parts[c].seconds for c in plan.asked if c not in taken)
        assert set(plan.absent.values()) == {"surplus: 20 others were faster"}
        shorter += slowest < (plain.plan(number, 20, 0.0).duration or 0.0)
    assert shorter > 22


def test_where_nothing_takes_time_any_reply_may_be_first() -> None:
    made = devices(30, over_select=0.5, dropout=0.1)
    taken: Counter[int] = Counter()
    for number in range(1, 301):
        plan = made.plan(number, 20, 0.0)
        assert plan.duration is None
        assert "clock" not in plan.round_fields(0.0)
        taken.update(c for c, p in plan.parts.items() if p.fault is None)
    assert all(within(taken[c], 300, 20 / 30) for c in range(30))


def test_what_is_to_be_expected_is_said_beforehand(small: Small) -> None:
    made = devices(4, samples=lambda c: 20 + 10 * c, speed=10.0, bandwidth=100.0, deadline=11.0, availability=0.25)
    assert made.describe() == (  # 4 s on the wire, and 8 to 20 steps of half a second
        "devices: 25 % of the clients can be reached on average; a round's work takes them 8 to 14 s of virtual time (median 11); "
        "50 % cannot do all of it within 11 s"
    )
    assert any(fact.startswith("devices: 70 % ") for fact in check(small(clients={"per_round": 6, "system": HARD})))
    assert not any(fact.startswith("devices") for fact in check(small()))


def test_nobody_there() -> None:
    made = devices(5, availability=1e-9, speed=1.0, idle=30.0)
    plan = made.plan(1, 3, 0.0)
    assert (plan.asked, plan.reachable, plan.unreachable) == ([], 0, (0, 1, 2, 3, 4))
    assert plan.after(12.0) == 42.0  # the server waits, so a night passes
    assert plan.round_fields(42.0)["clock"] == 42.0
    assert devices(MOST_LISTED + 1, availability=1e-9).plan(1, 3, 0.0).unreachable == ()


def test_attackers_that_are_always_there() -> None:
    system: dict[str, Any] = {"availability": 0.3, "dropout": 0.5, **TIMED}
    bad = {1, 4, 9}
    usual, favoured = devices(40, **system), devices(40, **system, attackers_always_available=True)
    for number in range(1, 40):
        plan, before = favoured.plan(number, 40, 0.0, bad), usual.plan(number, 40, 0.0, bad)
        assert bad <= set(plan.asked)
        assert all(plan.parts[c].fault is None for c in bad)
        assert {c: p for c, p in plan.parts.items() if c not in bad} == {c: p for c, p in before.parts.items() if c not in bad}
    assert not bad <= set(favoured.plan(1, 40, 0.0).asked)  # while they do not act they are like others


# ------------------------------------------------------------------------------------------------------------ in the scenario


WRONG = [
    ({"dropout": 1.0}, r"^clients.system.dropout: .*less than 1"),
    ({"droput": 0.1}, r"^clients.system.droput: unknown key .*did you mean 'dropout'"),
    ({"availability": 1.5}, r"^clients.system.availability.mean: .*less than or equal to 1 \(got 1.5\)"),
    ({"availability": "often"}, r"^clients.system.availability.mean: .*number \(got 'often'\)"),
    ({"availability": {"mean": 0.5, "amplitude": 0.1}}, r"^clients.system.availability: an amplitude needs a period"),
    ({"availability": {"mean": 0.5, "period": 3}}, r"^clients.system.availability: a period needs an amplitude"),
    ({"availability": {"mean": 0.8, "amplitude": 0.3, "period": 9}}, r"^clients.system.availability: .*within 0 and 1 \(got 0.8 ± 0.3\)"),
    ({"availability": {"mean": 0.8, "unit": "hours"}}, r"^clients.system.availability.unit: .*'rounds' or 'seconds' \(got 'hours'\)"),
    ({"availability": {"mean": 0.5, "amplitude": 0.1, "period": 9, "unit": "seconds"}}, r"^clients.system: .*no time passes"),
    ({"speed": 0}, r"^clients.system.speed.median: .*greater than"),
    ({"speed": {"sigma": 1.0}}, r"^clients.system.speed.median: is required and not set"),
    ({"bandwidth": {"median": 1e6, "sigma": -1}}, r"^clients.system.bandwidth.sigma: .*greater than or equal to 0"),
    ({"deadline": 10}, r"^clients.system: a deadline needs `speed` or `bandwidth`"),
    ({"speed": 3, "late": "partial"}, r"^clients.system: late = 'partial' needs a `deadline` and a `speed`"),
    ({"bandwidth": 3, "deadline": 4, "late": "partial"}, r"^clients.system: late = 'partial' needs a `deadline` and a `speed`"),
    ({"speed": 3, "deadline": 4, "late": "wait"}, r"^clients.system.late: .*'drop' or 'partial' \(got 'wait'\)"),
    ({"over_select": 0.3}, r"^clients.system.over_select: a round takes every client already; set clients.per_round below"),
]


@pytest.mark.parametrize(("system", "said"), WRONG, ids=[str(w[0])[:50] for w in WRONG])
def test_what_cannot_be_meant_is_refused(small: Small, system: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        small(clients={"system": system})
    assert "\n" not in str(caught.value)


def test_the_documented_section_names_every_key(small: Small) -> None:
    text = (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8")
    block = text.split("```toml\n")[1].split("```")[0]
    given = tomllib.loads(block)["clients"]["system"]
    assert given.keys() == SystemSpec.model_fields.keys()
    assert small(clients={"per_round": 4, "system": given}).clients.system == SystemSpec.model_validate(given)
    plain = SystemSpec()
    for key, default in re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE):
        value = getattr(plain, key)
        if isinstance(value, bool | int | float | str):
            assert default.strip("`") == (f"{value:g}" if isinstance(value, float) else str(value).lower()), key
        else:
            assert value is None or (key == "availability" and value.mean == float(default))


def test_the_section_reads_back_and_fits_the_schema(small: Small) -> None:
    made = small(clients={"per_round": 6, "system": HARD})
    again = parse(tomllib.loads(made.resolved_toml()))
    assert again == made
    assert again.clients.system == SystemSpec.model_validate(HARD)
    assert small().clients.system is None
    assert "system" not in small().resolved_toml()
    validator = jsonschema.Draft202012Validator(schema())
    document = tomllib.loads(made.resolved_toml())
    validator.validate(document)
    document["clients"]["system"] |= {"availability": 0.5, "speed": 3}
    validator.validate(document)
    document["clients"]["system"]["speed"] = {"median": 3, "sgima": 1}
    assert not validator.is_valid(document)
