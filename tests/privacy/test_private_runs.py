"""Private runs: what cannot get past the clip, what a resume keeps, what faults cost, what is refused, what is said."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from torch import Tensor

from fedtrust.client import Behaviour, View
from fedtrust.engine import flower
from fedtrust.engine.grid import CohortGrid
from fedtrust.engine.validate import validate
from fedtrust.engine.workers import LocalExecutor
from fedtrust.errors import InputError
from fedtrust.listener import SilentListener
from fedtrust.privacy.accountants import epsilon_gaussian, epsilon_poisson
from fedtrust.privacy.server import PrivateStrategy
from fedtrust.registry import REGISTRY
from fedtrust.runner import resume, run
from fedtrust.runs import RunDirectory
from fedtrust.scenario import Scenario, check
from fedtrust.setup import Setup, build

Small = Callable[..., Scenario]

CLIENTS = {"count": 12, "per_round": 6}
PRIVATE: dict[str, Any] = {"privacy": {"clip": 0.2, "noise_multiplier": 1.0}, "clients": CLIENTS}
QUIET: dict[str, Any] = {"privacy": {"clip": 0.2, "noise_multiplier": 1e-6}, "clients": CLIENTS}
ADAPTIVE = {"clip": {"kind": "adaptive", "initial": 0.3}, "noise_multiplier": 1.0}
BOUNDED = {"name": "norm-clip", "max_norm": 1.0}
FTRL = {"mechanism": "dp-ftrl", "clip": 0.2, "noise_multiplier": 1.0}


def lines(path: Path, name: str = "rounds.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def strategy_of(setup: Setup) -> PrivateStrategy:
    assert isinstance(setup.strategy, PrivateStrategy)
    return setup.strategy


def one_round(setup: Setup, path: str = "loop") -> Tensor:
    """Play one round of a setup without recording anything; return the change of the model [d]."""
    world, strategy = dataclasses.replace(setup.world, path=path), strategy_of(setup)
    executor = LocalExecutor(1)
    try:
        grid = CohortGrid(world, setup.roster, executor.open(world), stock=False)
        asked = strategy.mechanism.cohort(1)
        grid.begin(1, asked, sums=strategy.sums)
        messages = list(strategy.configure_train(1, flower.FlatRecord(setup.params, world.layout), ConfigRecord(), grid))
        valid = validate(grid.send_and_receive(messages), {c: world.examples(c) for c in asked}, world.layout)
        arrays, _ = strategy.aggregate_train(1, valid.messages)
    finally:
        executor.close()
    assert arrays is not None
    return flower.to_flat(arrays, world.layout) - setup.params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shouts(Behaviour):
    """Send a huge update in one direction, or none at all."""

    size: float = 1e10

    def craft(self, updates: Tensor, view: View) -> Tensor:
        return torch.full_like(updates, self.size)


@pytest.fixture
def shouting() -> Iterator[None]:
    Shouts.role, Shouts.needs_knowledge = "malicious", "own"
    REGISTRY.add("behaviour", "shouts", Shouts, role="malicious", knowledge="own")
    yield
    del REGISTRY._entries["behaviour", "shouts"]


# What cannot get past the clip


def moved_by(small: Small, attackers: list[dict[str, Any]], **changes: Any) -> tuple[Tensor, Tensor]:
    """Return the sums of a round with and without the attackers (whose place is then empty: they do not reply)."""
    silent = [{**group, "behaviour": "malformed", "params": {"fault": "no-reply"}} for group in attackers]
    sums = []
    for group in (attackers, silent):
        setup = build(small(attackers=group, **{**QUIET, **changes}))
        sums.append(one_round(setup) * strategy_of(setup).mechanism.sampler.per_round)
    return sums[0], sums[1]


def drawn(small: Small) -> int:
    return strategy_of(build(small(**QUIET))).mechanism.cohort(1)[0]


@pytest.mark.usefixtures("shouting")
def test_a_client_that_shouts_moves_the_sum_by_no_more_than_the_clip(small: Small) -> None:
    loud, silent = moved_by(small, [{"behaviour": "shouts", "ids": [drawn(small)]}])
    assert float((loud - silent).norm()) == pytest.approx(0.2, rel=1e-3)


@pytest.mark.usefixtures("shouting")
def test_a_zero_update_moves_nothing(small: Small) -> None:
    zero, silent = moved_by(small, [{"behaviour": "shouts", "params": {"size": 0.0}, "ids": [drawn(small)]}])
    assert torch.allclose(zero, silent, atol=1e-6)


@pytest.mark.parametrize("fault", ["permuted-keys", "nan", "inf", "huge-weight", "negative-weight", "scalar", "float64", "error"])
def test_a_broken_reply_counts_as_an_update_of_zero(small: Small, fault: str) -> None:
    broken, silent = moved_by(small, [{"behaviour": "malformed", "ids": [drawn(small)], "params": {"fault": fault}}])
    assert torch.equal(broken, silent)


def test_every_client_counts_the_same_whatever_it_holds(small: Small) -> None:
    setup = build(small(**QUIET, data={"partition": {"kind": "dirichlet", "alpha": 0.1}}))
    strategy = strategy_of(setup)
    asked = strategy.mechanism.cohort(1)
    sizes = {setup.world.examples(c) for c in asked}
    assert len(sizes) > 1
    delta = one_round(setup)
    world = dataclasses.replace(setup.world, path="loop")
    executor = LocalExecutor(1)
    grid = CohortGrid(world, setup.roster, executor.open(world), stock=False)
    grid.begin(1, asked)
    other = strategy_of(build(small(**QUIET, data={"partition": {"kind": "dirichlet", "alpha": 0.1}})))
    messages = list(other.configure_train(1, flower.FlatRecord(setup.params, world.layout), ConfigRecord(), grid))
    rows = torch.stack([other.update(m) for m in grid.send_and_receive(messages)])
    executor.close()
    factor = (0.2 / rows.norm(dim=1)).clamp(max=1)
    assert torch.allclose(delta, (factor[:, None] * rows).sum(0) / 6, atol=2e-6)


def test_updates_are_added_up_where_they_are_made(small: Small) -> None:
    strategy = strategy_of(build(small(**PRIVATE)))
    assert strategy.sums is not None
    assert not strategy.sums.by_examples
    assert strategy.sums.filters[-1].place == "filters[privacy]"


@pytest.mark.parametrize("path", ["loop", "vmap", "fused"])
def test_all_paths_release_the_same(small: Small, path: str) -> None:
    changes = {**PRIVATE, "model": "mlp"}
    assert torch.allclose(one_round(build(small(**changes)), path), one_round(build(small(**changes))), atol=1e-5)


# A whole run


@pytest.mark.parametrize("privacy", [PRIVATE["privacy"], {**PRIVATE["privacy"], "sampling": "fixed"}, ADAPTIVE, FTRL])
def test_a_run_asks_whom_the_mechanism_draws_and_reports_what_it_cost(small: Small, out: Path, privacy: dict[str, Any]) -> None:
    scenario = small(privacy=privacy, clients=CLIENTS, rounds=4)
    result = run(scenario, out, engine="local")
    mechanism = strategy_of(build(scenario)).mechanism
    records = lines(out)
    assert [r["cohort"] for r in records[1:]] == [mechanism.cohort(t) for t in range(1, 5)]
    assert [r["epsilon"] for r in records[1:]] == pytest.approx([mechanism.epsilon(t) for t in range(1, 5)], abs=2e-3)
    (block,) = result.summary["privacy"]
    assert block["by"] == "server"
    assert block["releases"] == 4
    assert block["epsilon"] == pytest.approx(mechanism.epsilon(4))
    assert block["epsilon"] <= block["epsilon_rdp"]
    assert block["relation"] == mechanism.sampler.relation
    assert result.status == "finished"


def test_the_noise_is_what_differs_from_a_run_without(small: Small, out: Path) -> None:
    """With as good as no noise the mechanism is the clipped mean of the cohort; with noise it is that and the noise."""
    quiet, noisy = (one_round(build(small(**changes))) for changes in (QUIET, PRIVATE))
    std = float((noisy - quiet).std())
    assert std == pytest.approx(1.0 * 0.2 / 6, rel=0.15)  # 650 parameters


def test_an_empty_cohort_is_a_round_that_counts_and_releases_noise(small: Small, out: Path) -> None:
    scenario = small(privacy=PRIVATE["privacy"], clients={"count": 12, "per_round": 1}, rounds=6)
    mechanism = strategy_of(build(scenario)).mechanism
    empty = [t for t in range(1, 7) if not mechanism.cohort(t)]
    assert empty
    result = run(scenario, out, engine="local")
    record = lines(out)[empty[0]]
    assert record["counted"]
    assert record["cohort"] == []
    assert record["delta_norm"] == pytest.approx(0.2 * math.sqrt(650), rel=0.1)
    assert result.summary["privacy"][0]["releases"] == 6


def test_a_round_below_its_quorum_is_released_all_the_same_and_the_run_says_so(small: Small, out: Path) -> None:
    attackers = [{"behaviour": "malformed", "share": 0.6, "params": {"fault": "error"}}]
    result = run(small(**PRIVATE, attackers=attackers), out, engine="local")
    assert result.status == "failed"
    assert "released all the same" in result.why
    assert result.summary["privacy"][0]["releases"] == 2
    assert all(r["delta_norm"] > 0 for r in lines(out)[1:])


class Stops(SilentListener):
    """Stop the run after some rounds, as a kill would between two of them."""

    def __init__(self, after: int) -> None:
        self.left = after + 1  # the record before the first round

    def round_done(self, cell: str, record: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("privacy", [PRIVATE["privacy"], ADAPTIVE, FTRL], ids=["fixed clip", "adaptive clip", "dp-ftrl"])
def test_a_killed_and_resumed_run_has_the_bits_and_the_ledger_of_a_whole_one(small: Small, tmp_path: Path, privacy: dict[str, Any]) -> None:
    scenario = small(privacy=privacy, clients=CLIENTS, rounds=5)
    whole = run(scenario, tmp_path / "whole", engine="local")
    cut = tmp_path / "cut"
    assert run(scenario, cut, engine="local", listener=Stops(2)).status == "interrupted"
    assert resume(cut, engine="local", listener=Stops(0)).status == "interrupted"  # and once more in round 3
    done = resume(cut, engine="local")
    assert done.summary["model_sha256"] == whole.summary["model_sha256"]
    assert done.summary["privacy"] == whole.summary["privacy"]
    assert [r.get("epsilon") for r in lines(cut)] == [r.get("epsilon") for r in lines(tmp_path / "whole")]
    ledgers = [RunDirectory(path).restore() for path in (cut, tmp_path / "whole")]
    assert all(saved is not None for saved in ledgers)
    a, b = (saved.states["privacy"]["ledger"] for saved in ledgers if saved is not None)
    assert torch.equal(a, b)
    assert a[:, 0].tolist() == [1, 2, 3, 4, 5]


def test_a_resume_with_other_noise_is_refused(small: Small, out: Path) -> None:
    run(small(**PRIVATE, rounds=3), out, engine="local", listener=Stops(1))
    text = (out / "scenario.toml").read_text()
    (out / "scenario.toml").write_text(text.replace("noise_multiplier = 1.0", "noise_multiplier = 2.0"))
    with pytest.raises(InputError, match="not one of this mechanism"):
        resume(out, engine="local")


def test_a_ledger_kept_under_other_terms_is_refused(small: Small, out: Path) -> None:
    """The same noise costs less if the cohorts were drawn by Poisson sampling, or if δ is larger."""
    run(small(**PRIVATE, rounds=3), out, engine="local", listener=Stops(1))
    text = (out / "scenario.toml").read_text()
    for old, new in (("noise_multiplier = 1.0", 'noise_multiplier = 1.0, sampling = "fixed"'), ("delta = 1e-05", "delta = 0.001")):
        assert old in text
        (out / "scenario.toml").write_text(text.replace(old, new))
        with pytest.raises(InputError, match="under other terms"):
            resume(out, engine="local")


# What is refused


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"strategy": {"aggregator": "median"}}, "strategy.aggregator", "moves more than its clip"),
        ({"strategy": {"aggregator": "weighted-mean"}}, "strategy.aggregator", "equal weights"),
        ({"strategy": {"aggregator": "flwr:FedAvg"}}, "strategy.privacy", "stock Flower"),
        ({"strategy": {"filters": ["nnm"]}}, "strategy.filters[0]", "behind it a clip bounds nothing"),
        ({"strategy": {"filters": ["norm-clip"]}}, "strategy.filters[0]", "behind it a clip bounds nothing"),
        ({"strategy": {"filters": [BOUNDED]}, "privacy": ADAPTIVE}, "strategy.filters[0]", "leave filters empty"),
        ({"clients": {**CLIENTS, "system": {"dropout": 0.1}}}, "clients.system", "not the mechanism's draw"),
        ({"privacy": {"clip": 1.0}}, "strategy.privacy", "exactly one of noise_multiplier and epsilon"),
        ({"privacy": {"clip": 1.0, "epsilon": 1.0, "noise_multiplier": 1.0}}, "strategy.privacy", "got both"),
        ({"privacy": {"noise_multiplier": 1.0}}, "strategy.privacy.clip", "required"),
        ({"privacy": {"clip": 0, "noise_multiplier": 1.0}}, "strategy.privacy.clip.norm", "greater than 0"),
        ({"privacy": {**ADAPTIVE, "clip": {"kind": "adaptive", "norm": 1.0}}}, "strategy.privacy.clip", "'adaptive' has no 'norm'"),
        ({"privacy": {"clip": {"kind": "fixed"}, "noise_multiplier": 1.0}}, "strategy.privacy.clip", "needs its `norm`"),
        ({"privacy": {**FTRL, "sampling": "poisson"}}, "strategy.privacy", "'round-robin'"),
        ({"privacy": {**ADAPTIVE, "mechanism": "dp-ftrl"}}, "strategy.privacy", "clip must be fixed"),
        ({"privacy": {**PRIVATE["privacy"], "bands": 2}}, "strategy.privacy", "parameter of dp-ftrl"),
        ({"privacy": {**PRIVATE["privacy"], "unit": "record"}}, "strategy.privacy", "dp-sgd"),
        ({"privacy": {**PRIVATE["privacy"], "sigma": 2}}, "strategy.privacy.sigma", "unknown key 'sigma'"),
        ({"privacy": {**PRIVATE["privacy"], "delta": 1.0}}, "strategy.privacy.delta", "less than 1"),
        ({"strategy": {"privacy": PRIVATE["privacy"]}}, "privacy", "write it once"),
        ({"strategy": {"behaviour": "honest"}}, "strategy.behaviour", "clients.behaviour"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_the_reason(small: Small, changes: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        small(**{**PRIVATE, **changes})
    assert caught.value.where == where
    assert message in str(caught.value)


def test_attackers_who_could_copy_an_honest_update_into_the_sum_are_refused(small: Small) -> None:
    """One client's update would be in it several times, and its ε larger than what is reported."""
    mimic = [{"behaviour": "mimic", "count": 2}]
    for changes, where in (
        ({**PRIVATE, "attackers": mimic}, "attackers[0].knowledge"),
        ({"strategy": {"filters": [{"name": "distributed-discrete-gaussian"}]}, "attackers": mimic}, "attackers[0].knowledge"),
        ({**PRIVATE, "sweep": {"attackers": {"none": [], "copy": mimic}}}, "sweep.attackers.copy[0].knowledge"),
    ):
        with pytest.raises(InputError, match="more than once") as caught:
            small(**changes)
        assert caught.value.where == where
    small(**PRIVATE, attackers=[{"behaviour": "ipm", "count": 2}])  # sees its own coalition only
    small(clients={"behaviour": {"name": "local-dp", "noise_multiplier": 1.0}}, attackers=mimic)  # sees noised updates only


def test_central_privacy_by_a_server_that_attacks_is_refused(small: Small) -> None:
    with pytest.raises(InputError, match="trusts the server"):
        small(**PRIVATE, malicious_server={"sender": "gradient-ascent"})


@pytest.mark.parametrize(("behaviour", "filters"), [({"name": "dp-sgd", "noise_multiplier": 1.0}, []), ("honest", ["secure-aggregation"])])
def test_clients_who_protect_themselves_are_not_asked_by_repairs(small: Small, behaviour: Any, filters: list[str]) -> None:
    strategy = {"filters": filters, "repairs": [{"name": "fine-pruning", "by": "clients"}]}
    with pytest.raises(InputError, match="asks the clients about their data"):
        small(clients={"behaviour": behaviour}, model="cnn", strategy=strategy)


def test_an_adaptive_clip_whose_count_costs_all_is_refused(small: Small) -> None:
    clip = {"kind": "adaptive", "noise": 0.4}
    with pytest.raises(InputError, match="above half the noise multiplier") as caught:
        build(small(privacy={"clip": clip, "noise_multiplier": 1.0}, clients=CLIENTS))
    assert caught.value.where == "strategy.privacy.clip.noise"


def test_repairs_that_ask_the_clients_are_refused(small: Small) -> None:
    repairs = [{"name": "fine-pruning", "by": "clients"}]
    with pytest.raises(InputError, match="outside of the mechanism"):
        small(**PRIVATE, model="cnn", strategy={"repairs": repairs})


# Calibration, and what it costs


@pytest.mark.parametrize("sampling", ["poisson", "fixed", "round-robin"])
def test_a_target_is_kept_and_not_undercut_by_much(small: Small, sampling: str) -> None:
    mechanism = "dp-ftrl" if sampling == "round-robin" else "dp-fedavg"
    privacy = {"mechanism": mechanism, "sampling": sampling, "clip": 0.2, "epsilon": 4.0}
    made = strategy_of(build(small(privacy=privacy, clients=CLIENTS, rounds=10))).mechanism
    assert 0.98 * 4.0 <= made.epsilon(10) <= 4.0


def test_a_target_that_these_clients_cannot_pay_is_explained_in_numbers_and_played(small: Small, out: Path) -> None:
    scenario = small(privacy={"clip": 0.2, "epsilon": 0.1}, clients=CLIENTS)
    made = strategy_of(build(scenario)).mechanism
    (warning,) = [line for line in check(scenario) if "cannot pay" in line]
    assert f"{made.burden(650):.3g} times as long as the longest update" in warning
    assert f"std {made.sigma / 6:.3g} × clip on each of 650 parameters" in warning
    enough = math.ceil(12 * made.burden(650) / 3)
    assert f"About {enough:,} clients" in warning
    result = run(scenario, out, engine="local")
    assert result.status == "finished"
    assert any("cannot pay" in line for line in result.summary["warnings"])


def test_so_many_clients_as_it_asks_for_can_pay(small: Small) -> None:
    made = strategy_of(build(small(privacy={"clip": 0.2, "epsilon": 0.1}, clients=CLIENTS))).mechanism
    factor = math.ceil(made.burden(650) / 3)
    more = dataclasses.replace(made, sampler=dataclasses.replace(made.sampler, count=12 * factor, per_round=6 * factor))
    assert more.epsilon(2) == pytest.approx(made.epsilon(2))
    assert more.burden(650) <= 3.0


def test_check_says_what_a_private_scenario_costs(small: Small) -> None:
    told = "\n".join(check(small(**PRIVATE)))
    assert f"ε = {epsilon_poisson(0.5, 1.0, 2, 1e-5):.4g} at δ = 1e-05 after 2 rounds (add-or-remove-one)" in told
    assert "δ = 0.1 is not below 1/N" in "\n".join(check(small(privacy={**PRIVATE["privacy"], "delta": 0.1}, clients=CLIENTS)))


# Sweeps


def test_a_sweep_may_give_each_strategy_its_privacy_and_its_clients_part(small: Small) -> None:
    strategies = {
        "none": {},
        "central": {"privacy": {"clip": 0.2, "epsilon": 8.0}},
        "local": {"behaviour": {"name": "local-dp", "clip": 0.2, "epsilon": 8.0}},
    }
    scenario = small(sweep={"strategies": strategies}, clients=CLIENTS)
    again = Scenario.model_validate(scenario.model_dump())
    cells = {cell.labels["strategies"]: cell.scenario for cell in scenario.cells()}
    assert again == scenario
    assert [cells[name].privacy is not None for name in strategies] == [False, True, False]
    assert [cells[name].clients.behaviour.name for name in strategies] == ["honest", "honest", "local-dp"]
    assert isinstance(build(cells["central"]).strategy, PrivateStrategy)


def test_a_resolved_private_scenario_reads_back_the_same(small: Small, tmp_path: Path) -> None:
    from fedtrust.scenario import load

    for privacy in (PRIVATE["privacy"], ADAPTIVE, {**FTRL, "bands": 2}, {"clip": 0.3, "epsilon": 2.0, "sampling": "fixed"}):
        scenario = small(privacy=privacy, clients=CLIENTS)
        path = tmp_path / "resolved.toml"
        path.write_text(scenario.resolved_toml())
        assert load(path) == scenario


def test_errors_in_the_section_at_the_top_are_placed_at_its_line(tmp_path: Path, small: Small) -> None:
    from fedtrust.scenario import load

    text = small(clients=CLIENTS).resolved_toml() + "\n[privacy]\nclip = 0.5\nnoise_multiplier = -1.0\n"
    path = tmp_path / "top.toml"
    path.write_text(text)
    line = text[: text.index("noise_multiplier")].count("\n") + 1
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:{line}: privacy.noise_multiplier: ")


# Local privacy


def test_local_noise_is_on_every_update(small: Small, out: Path) -> None:
    scenario = small(clients={"count": 8, "behaviour": {"name": "local-dp", "clip": 0.1, "noise_multiplier": 2.0}})
    result = run(scenario, out, engine="local")
    norms = [row["norm"] for row in lines(out, "clients.jsonl")]
    assert norms == pytest.approx([2.0 * 2 * 0.1 * math.sqrt(650)] * len(norms), rel=0.12)
    assert len(set(norms)) == len(norms)
    (block,) = result.summary["privacy"]
    assert block["by"] == "clients"
    assert block["relation"] == "replace-one"
    assert block["epsilon"] == pytest.approx(epsilon_gaussian(2.0, 2, 1e-5))


def test_what_local_noise_drowns_is_said_in_numbers(small: Small, out: Path) -> None:
    scenario = small(clients={"count": 8, "behaviour": {"name": "local-dp", "clip": 0.1, "noise_multiplier": 2.0}})
    burden = 2.0 * 2 * math.sqrt(650 / 8)
    told = "\n".join(check(scenario))
    epsilon = f"{epsilon_gaussian(2.0, 2, 1e-5):.4g}"  # the same for every client
    assert re.search(rf"σ = 2, ε = {re.escape(epsilon)} at δ = 1e-05 for client \d if it is asked in each of 2 rounds", told)
    assert f"on the mean of 8 updates it is {burden:.3g} times as long as the longest update" in told
    summary = run(scenario, out, engine="local").summary
    assert summary["privacy"][0]["noise_to_clip"] == pytest.approx(burden)
    assert any("drowns" in line for line in summary["warnings"])
    assert not [line for line in check(small(clients={"behaviour": {"name": "local-dp", "noise_multiplier": 0.1}})) if "drowns" in line]


def test_a_local_target_is_kept_by_whoever_takes_part_most(small: Small, out: Path) -> None:
    behaviour = {"name": "local-dp", "clip": 0.1, "epsilon": 5.0}
    scenario = small(clients={"count": 8, "per_round": 4, "behaviour": behaviour}, rounds=4)
    (block,) = run(scenario, out, engine="local").summary["privacy"]
    parts = [row["client"] for row in lines(out, "clients.jsonl")]
    assert block["releases"] == max(parts.count(c) for c in set(parts))
    assert block["epsilon"] <= 5.0
    assert epsilon_gaussian(block["noise_multiplier"], 4, 1e-5) == pytest.approx(5.0, rel=0.01)


def test_local_privacy_needs_noise_or_a_target(small: Small) -> None:
    with pytest.raises(InputError, match="either a noise_multiplier or a target"):
        small(clients={"behaviour": {"name": "local-dp"}})
