"""The pipeline: what it hands to whom, in which order, and what it does not let through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fedtrust.data.base import Task
from fedtrust.errors import RunError
from fedtrust.layout import Layout
from fedtrust.registry import REGISTRY
from fedtrust.server import AggContext, Pipeline, Rule, Stage, Verdict, assumed_count

D = 3
LAYOUT = Layout(("a", "b"), ((2,), (1,)))
ROWS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 4.0], [8.0, 8.0, 8.0]])


def context(n: int = len(ROWS), f: int = 1) -> AggContext:
    return AggContext(
        params=torch.zeros(D),
        weights=torch.arange(1.0, n + 1),
        clients=tuple(range(10, 10 + n)),
        round=3,
        assumed_malicious=f,
        layout=LAYOUT,
        task=Task("classification", (2,), 2),
        model=lambda params, x: x,
        criterion=torch.nn.functional.cross_entropy,
        root=None,
        rng=Generator(),
    )


def fresh(place: str) -> Generator:
    return Generator().manual_seed(sum(place.encode()))


def mean(updates: Tensor, ctx: AggContext) -> Tensor:
    return updates.mean(0)


def pipeline(*filters: Rule, aggregator: Rule = mean, steps: tuple[Rule, ...] = ()) -> Pipeline:
    return Pipeline(
        [Stage(f"filters[{i}]", f"filter-{i}", rule) for i, rule in enumerate(filters)],
        Stage("aggregator", "agg", aggregator),
        [Stage(f"steps[{i}]", f"step-{i}", rule) for i, rule in enumerate(steps)],
    )


def play(made: Pipeline, rows: Tensor = ROWS, ctx: AggContext | None = None, states: Any = None) -> Any:
    return made(rows, ctx or context(len(rows)), states or {}, fresh)


def test_filters_then_aggregator_then_steps_in_the_order_written() -> None:
    calls: list[str] = []

    def spy(name: str, work: Callable[[Tensor], Tensor]) -> Rule:
        def rule(value: Tensor, ctx: AggContext) -> Tensor:
            calls.append(f"{name} {list(value.shape)}")
            return work(value)

        return rule

    made = pipeline(
        spy("add", lambda v: v + 1),
        spy("double", lambda v: 2 * v),
        aggregator=spy("sum", lambda v: v.sum(0)),
        steps=(spy("square", torch.square), spy("less", lambda v: v - 1)),
    )
    outcome = play(made)
    assert calls == ["add [4, 3]", "double [4, 3]", "sum [4, 3]", "square [3]", "less [3]"]
    assert torch.equal(outcome.delta, (2 * (ROWS + 1)).sum(0).square() - 1)
    assert list(outcome.seconds) == ["filters[0]", "filters[1]", "aggregator", "steps[0]", "steps[1]"]
    assert outcome.trust is None


def test_every_component_gets_its_own_state_and_randomness_and_the_same_facts() -> None:
    seen: dict[str, Any] = {}

    def look(place: str) -> Rule:
        def rule(value: Tensor, ctx: AggContext) -> Verdict:
            seen[place] = (ctx.state, int(torch.randint(0, 2**31, (), generator=ctx.rng)), ctx.round, ctx.clients, ctx.assumed_malicious)
            return Verdict(value.sum(0) if place == "aggregator" else value)

        return rule

    states = {"aggregator": {"v": torch.ones(1)}, "steps[0]": {"w": torch.zeros(2)}}
    places = ("filters[0]", "aggregator", "steps[0]")
    play(pipeline(look("filters[0]"), aggregator=look("aggregator"), steps=(look("steps[0]"),)), states=states)
    for place in places:
        given, kept = seen[place][0], states.get(place, {})
        assert given.keys() == kept.keys()
        assert all(torch.equal(given[k], kept[k]) and given[k] is not kept[k] for k in kept)
    assert [seen[p][1] for p in places] == [int(torch.randint(0, 2**31, (), generator=fresh(p))) for p in places]
    assert len({seen[p][1] for p in places}) == 3
    assert all(seen[p][2:] == (3, (10, 11, 12, 13), 1) for p in places)


def test_states_are_carried_and_kept_where_nothing_is_returned() -> None:
    def count(value: Tensor, ctx: AggContext) -> Verdict:
        return Verdict(value, state={"calls": ctx.state.get("calls", torch.zeros(())) + 1})

    def remember_once(value: Tensor, ctx: AggContext) -> Verdict:
        return Verdict(value, state=None if ctx.state else {"first": torch.tensor(ctx.round)})

    made = pipeline(count, steps=(remember_once, count))
    states: Any = {}
    for number in (5, 6, 7):
        before = {place: dict(state) for place, state in states.items()}
        outcome = play(made, ctx=replace(context(), round=number), states=states)
        assert states == before  # the old states are as they were: a preview for an attacker must leave no trace
        states = outcome.states
    assert {place: {k: int(v) for k, v in state.items()} for place, state in states.items()} == {
        "filters[0]": {"calls": 3},
        "steps[0]": {"first": 5},
        "steps[1]": {"calls": 3},
    }


def test_trust_is_the_product_of_what_filters_and_aggregator_say() -> None:
    one, two, three = torch.tensor([1.0, 0.5, 0.0, 1.0]), torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([1.0, 0.2, 1.0, 0.3])

    def says(trust: Tensor) -> Rule:
        return lambda value, ctx: Verdict(value, trust=trust)

    outcome = play(pipeline(says(one), says(two), aggregator=lambda v, ctx: Verdict(v.mean(0), trust=three)))
    assert outcome.trust.tolist() == pytest.approx([0.5, 0.05, 0.0, 0.3])
    assert play(pipeline(says(one))).trust.tolist() == one.tolist()


def buckets(value: Tensor, ctx: AggContext) -> Verdict:
    """Average rows 0 and 2, and rows 1 and 3."""
    members = torch.arange(len(value)) % 2
    return Verdict(torch.stack([value[members == b].mean(0) for b in (0, 1)]), members=members)


def test_merged_rows_add_their_weights_and_hide_who_was_who() -> None:
    seen: list[AggContext] = []

    def look(value: Tensor, ctx: AggContext) -> Verdict:
        seen.append(ctx)
        assert torch.equal(value, torch.stack([(ROWS[0] + ROWS[2]) / 2, (ROWS[1] + ROWS[3]) / 2]))
        return Verdict(value.mean(0), trust=torch.tensor([0.25, 1.0]))

    outcome = play(pipeline(buckets, aggregator=look), ctx=context(f=3))
    assert seen[0].weights.tolist() == [1.0 + 3.0, 2.0 + 4.0]
    assert seen[0].clients == ()
    assert seen[0].assumed_malicious == 2  # no more than there are rows
    assert outcome.trust.tolist() == [0.25, 1.0, 0.25, 1.0]  # of a bucket each member is told what the bucket was


def test_trust_before_and_after_merging_twice() -> None:
    rows = torch.arange(8.0 * D).reshape(8, D)

    def halves(value: Tensor, ctx: AggContext) -> Verdict:
        m = len(value) // 2
        members = torch.arange(len(value)) // 2
        return Verdict(value.reshape(m, 2, D).mean(1), trust=torch.linspace(0.5, 1.0, len(value)), members=members)

    last = torch.tensor([0.1, 0.9])
    outcome = play(pipeline(halves, halves, aggregator=lambda v, ctx: Verdict(v.mean(0), trust=last)), rows)
    first, second = torch.linspace(0.5, 1.0, 8), torch.linspace(0.5, 1.0, 4)
    wanted = [float(first[i] * second[i // 2] * last[i // 4]) for i in range(8)]
    assert outcome.trust.tolist() == pytest.approx(wanted)
    assert torch.allclose(outcome.delta, rows.mean(0))


def test_a_registered_rule_behind_buckets_sees_the_buckets() -> None:
    outcome = play(pipeline(buckets, aggregator=REGISTRY.make("aggregator", "weighted-mean")))
    left, right = (ROWS[0] + ROWS[2]) / 2, (ROWS[1] + ROWS[3]) / 2
    assert torch.allclose(outcome.delta, 0.4 * left + 0.6 * right)


def test_only_the_last_filters_bound_reaches_the_steps() -> None:
    seen: list[float | None] = []

    def look(value: Tensor, ctx: AggContext) -> Tensor:
        seen.append(ctx.bound)
        return value

    def bounding(bound: float | None) -> Rule:
        return lambda value, ctx: Verdict(value, bound=bound)

    play(pipeline(look, bounding(5.0), bounding(2.0), look, bounding(3.0), steps=(look,)))
    assert seen == [None, 2.0, 3.0]
    seen.clear()
    play(pipeline(bounding(5.0), look, steps=(look,)))  # the last filter may have scaled the rows up again
    assert seen == [5.0, None]


def test_clip_and_noise_of_the_registry_together() -> None:
    def make(factor: float) -> Pipeline:
        clip, noise = (
            REGISTRY.make("filter", "norm-clip", {"max_norm": 2.0}),
            REGISTRY.make("step", "gaussian-noise", {"noise_multiplier": factor}),
        )
        return pipeline(clip, steps=(noise,))

    clipped = torch.stack([row * min(1.0, 2.0 / float(row.norm())) for row in ROWS]).mean(0)
    drawn = torch.randn(D, generator=fresh("steps[0]"))
    assert torch.allclose(play(make(3.0)).delta, clipped + 3.0 * 2.0 / 4 * drawn, atol=1e-6)
    median = pipeline(REGISTRY.make("filter", "norm-clip"), steps=(REGISTRY.make("step", "gaussian-noise"),))
    with pytest.raises(RunError, match=r"steps\[0\] 'step-0' failed in round 3: ValueError: no filter gave a bound"):
        play(median)


def shown(value: Any) -> Rule:
    return lambda updates, ctx: value


def raising(updates: Tensor, ctx: AggContext) -> Tensor:
    raise ZeroDivisionError("by nothing")


NAN, INF = float("nan"), float("inf")
BAD_DELTAS: list[tuple[Any, str]] = [
    (None, "returned NoneType, not a tensor"),
    ([0.0] * D, "returned list, not a tensor"),
    ((torch.zeros(D), None), "returned tuple, not a tensor"),
    (torch.zeros(1), r"returned shape \[1\], expected \[3\]"),
    (torch.zeros(1, D), r"returned shape \[1, 3\], expected \[3\]"),
    (torch.zeros(()), r"returned shape \[\], expected \[3\]"),
    (torch.zeros(D, dtype=torch.float64), "returned torch.float64, expected torch.float32"),
    (torch.zeros(D, dtype=torch.int64), "returned torch.int64"),
    (torch.tensor([0.0, NAN, 0.0]), "not finite"),
    (torch.tensor([0.0, 0.0, -INF]), "not finite"),
    (Verdict(torch.zeros(D), state={"n": 3}), "returned state 'n' as int, not a tensor"),  # type: ignore[dict-item]
]
BAD_TRUST: list[tuple[Any, str]] = [
    (torch.ones(3), r"trust of shape \[3\], expected one value a row"),
    (torch.ones(4, 1), r"trust of shape \[4, 1\]"),
    ([1.0] * 4, "trust as list, not a tensor"),
    (torch.tensor([1.0, NAN, 1.0, 1.0]), "not between 0 and 1"),
    (torch.tensor([1.0, -0.1, 1.0, 1.0]), "not between 0 and 1"),
    (torch.tensor([1.0, 1.5, 1.0, 1.0]), "not between 0 and 1"),
]


@pytest.mark.parametrize(("value", "why"), BAD_DELTAS)
def test_what_an_aggregator_or_a_step_may_not_return(value: Any, why: str) -> None:
    with pytest.raises(RunError, match=f"^aggregator 'agg' .*{why}"):
        play(pipeline(aggregator=shown(value)))
    with pytest.raises(RunError, match=rf"^steps\[1\] 'step-1' .*{why}"):
        play(pipeline(steps=(lambda delta, ctx: delta, shown(value))))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.zeros(D), r"returned shape \[3\], expected \[m, 3\]"),
        (torch.zeros(4, 2), r"returned shape \[4, 2\], expected \[m, 3\]"),
        (torch.zeros(0, D), r"returned shape \[0, 3\]"),
        (torch.zeros(3, D), "turned 4 rows into 3 without saying which went where"),
        (torch.zeros(4, D, dtype=torch.float16), "returned torch.float16"),
        (torch.full((4, D), NAN), "not finite"),
        (Verdict(torch.zeros(2, D), members=torch.tensor([0, 1, 2, 1])), "no row of the 2"),
        (Verdict(torch.zeros(2, D), members=torch.tensor([0, 1, -1, 1])), "no row of the 2"),
        (Verdict(torch.zeros(2, D), members=torch.tensor([0, 1, 1])), "not 4 integers"),
        (Verdict(torch.zeros(2, D), members=torch.tensor([0.0, 1.0, 1.0, 0.0])), "not 4 integers"),
        (Verdict(torch.zeros(2, D), members=[0, 1, 1, 0]), "not 4 integers"),  # type: ignore[arg-type]
        *((Verdict(ROWS, trust=trust), why) for trust, why in BAD_TRUST),
    ],
)
def test_what_a_filter_may_not_return(value: Any, why: str) -> None:
    with pytest.raises(RunError, match=rf"^filters\[1\] 'filter-1' .*{why}"):
        play(pipeline(lambda rows, ctx: rows, shown(value)))


@pytest.mark.parametrize(("trust", "why"), BAD_TRUST)
def test_trust_that_an_aggregator_may_not_return(trust: Any, why: str) -> None:
    with pytest.raises(RunError, match=f"^aggregator 'agg' .*{why}"):
        play(pipeline(aggregator=shown(Verdict(torch.zeros(D), trust=trust))))


def test_steps_have_no_rows_to_trust_or_to_merge() -> None:
    with pytest.raises(RunError, match=r"steps\[0\] 'step-0' returned trust of shape \[3\]"):
        play(pipeline(steps=(shown(Verdict(torch.zeros(D), trust=torch.ones(D))),)))
    for broken in (
        pipeline(aggregator=shown(Verdict(torch.zeros(D), members=torch.zeros(4, dtype=torch.int64)))),
        pipeline(steps=(shown(Verdict(torch.zeros(D), members=torch.zeros(3, dtype=torch.int64))),)),
    ):
        with pytest.raises(RunError, match="members, which only a filter may"):
            play(broken)


@pytest.mark.parametrize(
    ("made", "who"),
    [
        (pipeline(raising), r"filters\[0\] 'filter-0'"),
        (pipeline(aggregator=raising), "aggregator 'agg'"),
        (pipeline(steps=(lambda delta, ctx: delta, raising)), r"steps\[1\] 'step-1'"),
    ],
)
def test_a_component_that_raises_is_named(made: Pipeline, who: str) -> None:
    with pytest.raises(RunError, match=f"^{who} failed in round 3: ZeroDivisionError: by nothing$") as caught:
        play(made)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_trust_a_hair_above_one_is_rounding_and_taken_for_one() -> None:
    trust = torch.tensor([1.0 + 2**-22, 1.0, 0.5, 0.0])
    assert play(pipeline(aggregator=shown(Verdict(torch.zeros(D), trust=trust)))).trust.tolist() == [1.0, 1.0, 0.5, 0.0]


def test_nothing_of_a_pipeline_keeps_a_graph() -> None:
    weight = torch.ones(D, requires_grad=True)
    outcome = play(pipeline(aggregator=lambda v, ctx: v.mean(0) * weight))
    assert not outcome.delta.requires_grad


@pytest.mark.parametrize(
    ("assumed", "n", "wanted"),
    [
        (0.2, 20, 4), (0.1, 30, 3), (0.3, 10, 3), (0.7, 10, 7), (0.29, 100, 29), (0.07, 100, 7), (1 / 3, 9, 3), (1 / 3, 10, 4),
        (0.2, 19, 4), (0.2, 21, 5), (0.01, 5, 1), (0.0, 7, 0), (0.5, 1, 1), (1.0, 8, 8), (1, 8, 1), (0, 8, 0), (5, 8, 5), (9, 8, 8),
    ],
)  # fmt: skip
def test_the_assumed_number_of_attackers(assumed: float, n: int, wanted: int) -> None:
    assert assumed_count(assumed, n) == wanted


def test_a_share_is_the_exact_ceiling_for_every_percent() -> None:
    for percent in range(101):
        for n in range(1, 201):
            assert assumed_count(percent / 100, n) == -(-percent * n // 100), (percent, n)


def test_a_component_that_computes_in_place_reaches_neither_the_model_nor_the_past() -> None:
    def vandal(value: Tensor, ctx: AggContext) -> Verdict:
        ctx.params.zero_()
        velocity = ctx.state["v"].add_(1.0) if "v" in ctx.state else torch.ones_like(value)
        return Verdict(velocity, state={"v": velocity})

    def scales(value: Tensor, ctx: AggContext) -> Tensor:
        return value.mul_(0.0)

    states = {"steps[0]": {"v": torch.full((ROWS.shape[1],), 5.0)}}
    made = play(pipeline(steps=(vandal, scales)), states=states)
    assert bool((states["steps[0]"]["v"] == 5.0).all())
    assert bool((made.states["steps[0]"]["v"] == 6.0).all())  # not what the next step made of the value
    assert float(made.delta.abs().sum()) == 0.0
