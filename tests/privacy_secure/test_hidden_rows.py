"""Secure aggregation inside a run: what is refused, who is lost, what observers see, and what a resume keeps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtrust.errors import InputError, TooFewError
from fedtrust.observers import observer_cards
from fedtrust.privacy.distributed import DiscreteGaussianSum, epsilon_of_rho
from fedtrust.registry import REGISTRY
from fedtrust.runner import resume, run
from fedtrust.scenario import Scenario, check, parse
from tests.conftest import SMALL, merged
from tests.strategies.rules_kit import context, normal, verdict

Small = Callable[..., Scenario]
SUM, NOISED = "secure-aggregation", "distributed-discrete-gaussian"
CLIP = {"name": "norm-clip", "max_norm": 1.0}

SPY = '''
from fedtrust.probes.base import probe

@probe("spy", role="curious-server")
def spy(ctx):
    """Says what a curious server sees."""
    rows = None if ctx.updates is None else ctx.updates
    return {
        "rows": -1.0 if rows is None else float(len(rows)),
        "length": -1.0 if rows is None else float(rows.norm(dim=1).max()),
        "clients": float(len(ctx.clients)),
        "trust": -1.0 if ctx.trust is None else float(len(ctx.trust)),
        "off": -1.0 if rows is None else float((rows.mean(0) - (ctx.params - ctx.sent[min(ctx.sent)])).abs().max()),
        "sent": float(len(ctx.sent)),
    }

@probe("insider", role="teacher", updates=True)
def insider(ctx):
    """Says what the teacher sees."""
    return {"teacher-rows": -1.0 if ctx.updates is None else float(len(ctx.updates)), "teacher-clients": float(len(ctx.clients))}
'''


def strategy(*filters: Any, **rest: Any) -> dict[str, Any]:
    return {"strategy": {"filters": list(filters), **rest}}


@pytest.mark.parametrize("name", [SUM, NOISED])
@pytest.mark.parametrize(
    ("changes", "place", "why"),
    [
        (lambda name: {"filters": [name], "aggregator": "krum"}, 0, "'krum' needs rows, and only the sum is visible"),
        (lambda name: {"filters": [name], "aggregator": "median"}, 0, "'median' needs rows, and only the sum is visible"),
        (lambda name: {"filters": [name], "aggregator": "flame"}, 0, "only the sum is visible"),
        (lambda name: {"filters": [name, "nnm"]}, 0, "'nnm' stands behind it and would need rows, and only the sum"),
        (lambda name: {"filters": [name, CLIP]}, 0, "'norm-clip' stands behind it"),
        (lambda name: {"filters": ["norm-clip", name]}, 1, "'norm-clip' before it looks at several rows at once"),
        (lambda name: {"filters": ["bucketing", name]}, 1, "'bucketing' before it looks at several rows at once"),
        (lambda name: {"filters": [name, name]}, 0, "it stands there twice"),
        (lambda name: {"filters": [name], "aggregator": "weighted-mean"}, 0, "counts rows otherwise than the sum does"),
    ],
)
def test_what_needs_rows_is_refused(name: str, changes: Callable[[str], dict[str, Any]], place: int, why: str, small: Small) -> None:
    with pytest.raises(InputError, match=why) as caught:
        small(strategy=changes(name))
    assert caught.value.where == f"strategy.filters[{place}]"


def test_what_can_be_meant_is_not_refused(small: Small) -> None:
    small(strategy={"filters": [CLIP, SUM], "steps": ["fedadam"]})
    small(strategy={"filters": [{"name": SUM, "weights": "examples"}], "aggregator": "weighted-mean"})
    small(strategy={"filters": [NOISED], "steps": ["fedavgm"]})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"strategy": {"filters": [SUM]}, "clients": {"per_round": 1}}, "at least two clients a round"),
        ({"strategy": {"filters": [SUM], "steps": ["gaussian-noise"]}}, "noise without a clip protects nothing"),
        ({"strategy": {"filters": [CLIP, SUM], "steps": ["gaussian-noise"]}}, "noise without a clip protects nothing"),
        ({"strategy": {"filters": [{"name": NOISED, "bits": 4}]}, "clients": {"count": 40}}, "4 bits are too few for the sum of 40"),
        ({"strategy": {"filters": [NOISED], "assumed_malicious": 8}}, "nobody's noise can be counted on"),
    ],
)
def test_what_would_protect_nobody_is_refused(changes: dict[str, Any], why: str, small: Small) -> None:
    with pytest.raises(InputError, match=why):
        small(**changes)


@pytest.mark.parametrize("weights", ["equal", "examples"])
def test_the_filter_gives_the_mean_in_one_row(weights: str) -> None:
    rows, counts = normal(9, 50, 3, 0.3), torch.arange(1.0, 10.0)
    found = verdict("filter", SUM, rows, context(9, 50, weights=counts), weights=weights)
    expected = (rows if weights == "equal" else rows * counts[:, None] * 9 / 45).mean(0)
    assert found.value.shape == (1, 50)
    assert found.members is not None
    assert found.members.tolist() == [0] * 9
    assert found.trust is None
    assert found.bound is None
    assert float((found.value[0] - expected).abs().max()) <= 16 / (2**22 - 1) + 1e-7
    assert float((found.value[0] - expected).abs().max()) > 0


def test_a_coordinate_says_no_more_than_the_clip() -> None:
    rows = torch.zeros(4, 3)
    rows[0] = torch.tensor([1e6, -1e6, 0.25])
    found = verdict("filter", SUM, rows, clip=1.0, bits=20).value[0]
    assert found.tolist() == pytest.approx([0.25, -0.25, 0.0625], abs=4e-6)


def test_playing_the_masks_changes_no_bit() -> None:
    rows = normal(5, 40, 1)
    for name in (SUM, NOISED):
        quick, played = (verdict("filter", name, rows, context(5, 40, asked=6), masks=m) for m in ("cancelled", "played"))
        assert torch.equal(quick.value, played.value)


@pytest.mark.parametrize("name", [SUM, NOISED])
def test_too_few_replies_make_no_sum(name: str) -> None:
    with pytest.raises(TooFewError, match="unmasked by 6 of 8 clients, and 5 are left"):
        verdict("filter", name, normal(5, 10, 0), context(5, 10, asked=8))
    assert verdict("filter", name, normal(6, 10, 0), context(6, 10, asked=8)).value.shape == (1, 10)
    with pytest.raises(TooFewError, match="by 8 of 8 clients, and 7"):
        verdict("filter", name, normal(7, 10, 0), context(7, 10, asked=8), threshold=1.0)


def records(folder: Path, name: str = "rounds") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_clients_that_fail_are_left_out_of_the_sum(small: Small, tmp_path: Path) -> None:
    """Two of eight send NaN: the sum of the other six is the mean of the other six. Three are too many."""
    base = {"rounds": 2, "attackers": [{"behaviour": "malformed", "ids": [1, 5]}], "strategy": {}}
    models = {}
    for label, filters in {"plain": [], "hidden": [{"name": SUM, "clip": 2.0, "bits": 24}]}.items():
        done = run(small(**merged(base, {"strategy": {"filters": filters}})), tmp_path / label, engine="local")
        rounds = records(tmp_path / label)
        assert [r["counted"] for r in rounds] == [True] * 3
        assert rounds[1]["valid"] == 6
        models[label] = done.summary["metrics"]["accuracy"], rounds[-1]["delta_norm"]
    assert models["hidden"] == pytest.approx(models["plain"], abs=1e-4)
    three = small(**merged(base, {"attackers": [{"behaviour": "malformed", "ids": [1, 5, 6]}], **strategy(SUM)}))
    run(three, tmp_path / "three", engine="local")
    reason = "5 valid replies of 8 are too few: .* secure aggregation can be unmasked by 6 of 8 clients, and 5 are left"
    for r in records(tmp_path / "three")[1:]:
        assert not r["counted"]
        assert re.fullmatch(reason, r["why"])
        assert r["delta_norm"] == 0


def spied(tmp_path: Path, label: str, changes: dict[str, Any]) -> list[dict[str, float]]:
    """What the spies of a run said, by round."""
    (tmp_path / "spies.py").write_text(SPY)
    document = merged(SMALL, {"probes": ["spies:spy", "spies:insider"], **changes})
    scenario = parse(document, folder=tmp_path, allow_plugins=["spies"])
    run(scenario, tmp_path / label, engine="local")
    return [r["metrics"] for r in records(tmp_path / label)]


def test_a_curious_server_sees_the_sum_and_nothing_else(tmp_path: Path) -> None:
    plain = spied(tmp_path, "plain", strategy(CLIP))[1]
    assert (plain["rows"], plain["clients"], plain["trust"], plain["sent"]) == (8, 8, 8, 8)
    hidden = spied(tmp_path, "hidden", strategy(CLIP, SUM))
    for metrics in hidden[1:]:
        assert (metrics["rows"], metrics["clients"], metrics["trust"], metrics["sent"]) == (1, 0, -1, 8)
        assert metrics["off"] < 1e-6  # the mean, which is what the model moved by
        assert (metrics["teacher-rows"], metrics["teacher-clients"]) == (8, 8)
    assert hidden[1]["length"] < plain["length"]
    noised = spied(tmp_path, "noised", strategy(NOISED))[1]
    assert (noised["rows"], noised["clients"], noised["trust"]) == (1, 0, -1)
    assert noised["off"] < 1e-6


def test_in_a_round_that_does_not_count_it_sees_nothing(tmp_path: Path) -> None:
    changes = {"attackers": [{"behaviour": "malformed", "count": 3}], **strategy(SUM)}
    for metrics in spied(tmp_path, "few", changes):
        assert (metrics["rows"], metrics["clients"], metrics["trust"]) == (-1, 0, -1)


def test_the_records_of_the_clients_are_the_teachers(small: Small, tmp_path: Path) -> None:
    run(small(**strategy({"name": "norm-clip", "max_norm": 0.05}, SUM)), tmp_path / "run", engine="local")
    rows = [r for r in records(tmp_path / "run", "clients") if r["round"] == 1]
    assert len(rows) == 8
    assert all(r["norm"] > 0 and 0 < r["trust"] <= 1 for r in rows)


def test_the_card_of_a_curious_server_says_what_it_sees(tmp_path: Path) -> None:
    (tmp_path / "spies.py").write_text(SPY)
    for filters, sees, does in (
        (["norm-clip"], "the updates", "reads what clients send"),
        ([SUM], "the sum of the updates", "reads the sum"),
    ):
        document = merged(SMALL, {"probes": ["spies:spy"], **strategy(*filters)})
        (card,) = observer_cards(parse(document, folder=tmp_path, allow_plugins=["spies"]))
        assert sees in card["knowledge"]
        assert does in card["capability"][0]


def test_an_attacker_who_knows_the_rule_is_not_told_the_clients_randomness(small: Small, tmp_path: Path) -> None:
    """Granted the rule, an attacker plays it with noise of its own: it does not foresee the clients'."""
    from fedtrust.setup import build

    setup = build(small(**strategy({"name": NOISED, "noise_multiplier": 1.0})))
    rows = torch.zeros(8, setup.world.layout.size)
    guessed = setup.strategy.preview(1, setup.params)(rows)
    again = setup.strategy.preview(1, setup.params)(rows)
    context_of = setup.strategy._context(1, setup.params, torch.ones(8), (), asked=8)
    real = REGISTRY.make("filter", NOISED)(rows, context_of).value[0]
    assert torch.equal(guessed, again)
    assert float((guessed - real).norm()) > 0.9 * float(real.norm())


def test_the_price_of_noise_is_told_round_by_round(small: Small, tmp_path: Path) -> None:
    """The ε of each record is theorem 1's for the client that took part most often so far."""
    changes = {"rounds": 6, "clients": {"per_round": 5}, **strategy({"name": NOISED, "noise_multiplier": 2.0, "clip": 0.5})}
    done = run(small(**changes), tmp_path / "run", engine="local")
    rounds = records(tmp_path / "run")[1:]
    mechanism = DiscreteGaussianSum(650, 5, 0.5, 2.0, 16)
    most = 0
    counts: dict[int, int] = {}
    for r in rounds:
        for client in r["cohort"]:
            counts[client] = counts.get(client, 0) + 1
        most = max(counts.values())
        assert r["metrics"][f"{NOISED}/epsilon"] == pytest.approx(epsilon_of_rho(most * mechanism.rho(5), 1e-5), rel=1e-9)
    assert 1 < most < 6
    (told,) = done.summary["privacy"]
    assert told["epsilon"] == rounds[-1]["metrics"][f"{NOISED}/epsilon"]
    assert (told["releases"], counts[told["worst_client"]], told["clients"]) == (most, most, len(counts))
    assert (told["by"], told["relation"], told["delta"]) == ("clients", "zero-out-one", 1e-5)


class Killed(BaseException):
    """The run is taken down."""


def test_killed_between_rounds_it_goes_on_with_the_same_bits_and_the_same_price(small: Small, tmp_path: Path) -> None:
    changes = {"rounds": 4, "clients": {"per_round": 5}, **strategy({"name": NOISED, "noise_multiplier": 1.0})}
    straight = run(small(**changes), tmp_path / "straight", engine="local")

    from fedtrust.listener import SilentListener

    class Stop(SilentListener):
        def round_done(self, cell: str, record: dict[str, Any]) -> None:
            if record["round"] == 2:
                raise Killed

    with pytest.raises(Killed):
        run(small(**changes), tmp_path / "killed", engine="local", listener=Stop())
    assert len(records(tmp_path / "killed")) == 3
    resumed = resume(tmp_path / "killed", engine="local")
    assert resumed.summary["model_sha256"] == straight.summary["model_sha256"]
    prices = [[r["metrics"].get(f"{NOISED}/epsilon") for r in records(tmp_path / name)] for name in ("straight", "killed")]
    assert prices[0] == prices[1]
    assert all(a <= b for a, b in zip(prices[0][1:], prices[0][2:], strict=False))


def test_fewer_replies_and_assumed_attackers_make_it_dearer() -> None:
    rows = normal(10, 30, 2)
    price = [
        verdict("filter", NOISED, rows[:n], context(n, 30, f=f, asked=10)).numbers["epsilon"] for n, f in ((10, 0), (8, 0), (10, 2), (8, 2))
    ]
    assert price[0] < price[1] < price[3]
    assert price[1] == pytest.approx(price[2])
    with pytest.raises(TooFewError, match="nobody's noise"):
        verdict("filter", NOISED, rows, context(10, 30, f=10, asked=10))


def test_the_noise_on_the_mean_is_what_was_asked_for() -> None:
    """Zero updates of 10 clients: the mean is noise of noise_multiplier · clip ÷ 10."""
    rows = torch.zeros(10, 20_000)
    found = verdict("filter", NOISED, rows, context(10, 20_000, asked=10), clip=2.0, noise_multiplier=3.0).value[0]
    assert float(found.std()) == pytest.approx(2.0 * 3.0 / 10, rel=0.03)
    assert abs(float(found.mean())) < 5 * 0.6 / math.sqrt(20_000)


@pytest.mark.parametrize("assumed", [0, 2])
def test_check_says_the_epsilon_that_a_run_then_records(assumed: int, small: Small, out: Path) -> None:
    noised = {"name": NOISED, "clip": 0.5, "noise_multiplier": 2.0}
    scenario = small(**strategy(noised, assumed_malicious=assumed), rounds=3)
    told = [fact for fact in check(scenario) if NOISED in fact or "drowns" in fact or fact.startswith(("privacy:", "warning:"))]
    claimed = run(scenario, out, engine="local").summary["privacy"][0]
    assert (claimed["releases"], claimed["clients"]) == (3, 8)
    assert f"ε = {claimed['epsilon']:.4g} at δ = 1e-05 for a client asked in each of 3 rounds" in told[0]
    assert ("2 are not counted on" in told[0]) == (assumed == 2)
    assert f"over 650 parameters it is {2.0 * math.sqrt(650) / 8:.3g} times" in told[1]
    assert told[2].startswith("warning: 8 clients a round cannot pay for this noise: about 17 would")


def test_noise_that_is_next_to_none_is_refused_before_the_run(small: Small) -> None:
    scenario = small(**strategy({"name": NOISED, "noise_multiplier": 1e-6}))
    with pytest.raises(InputError, match=rf"strategy\.filters\[0\]: '{NOISED}' cannot work here: the noise is .* so next to none"):
        check(scenario)
