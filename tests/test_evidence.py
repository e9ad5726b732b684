"""The attacks hurt plain averaging, and the defences give back what they say. Margins were measured first, then fixed here.

The fast tests use digits and a logistic model; the slow ones the quickstart itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from fedtrust.runner import run
from fedtrust.scenario import Scenario, load

Small = Callable[..., Scenario]
QUICKSTART = Path(__file__).parent.parent / "scenarios" / "quickstart.toml"
SEEDS = [1, 2, 3]


def metric(summary: dict[str, Any], name: str, attack: str, strategy: str) -> float:
    """Return a metric of a cell, averaged over the seeds."""
    found = [c["metrics"][name] for c in summary["cells"] if (c["attackers"], c["strategies"]) == (attack, strategy)]
    assert found
    return fmean(found)


def test_on_digits_untargeted_attacks_break_the_mean_and_not_multi_krum(small: Small, out: Path) -> None:
    """Accuracies measured (seeds 1 to 3, mean of three): without attack 90, 84, 86 %; sign flip 15, 64, 89 %; Gaussian 54, 80, 89 %.

    That sign flipping costs the median 20 points is a finding: label-skewed honest updates leave it room. Multi-Krum gains by an attack,
    because the updates it throws out are then the attackers', and no longer those of rare honest clients.
    """
    attackers: dict[str, Any] = {
        "none": [],
        "sign flip": [{"behaviour": "sign-flip", "count": 4, "params": {"scale": 4.0}}],
        "gaussian": [{"behaviour": "gaussian", "count": 4, "params": {"std": 1.0}}],
    }
    scenario = small(
        rounds=10,
        data={"source": {"name": "digits", "limit": 1438}},
        clients={"count": 20, "train": {"epochs": 2}},
        strategy={"assumed_malicious": 0.2},
        sweep={"attackers": attackers, "strategies": ["mean", "median", "multi-krum"], "seeds": SEEDS},
    )
    summary = run(scenario, out, engine="local").summary
    clean = {rule: metric(summary, "accuracy", "none", rule) for rule in ("mean", "median", "multi-krum")}
    lost = {(a, r): clean[r] - metric(summary, "accuracy", a, r) for a in ("sign flip", "gaussian") for r in clean}
    assert min(clean.values()) > 0.8
    assert lost["sign flip", "mean"] > 0.6
    assert 0.1 < lost["sign flip", "median"] < 0.3
    assert lost["gaussian", "mean"] > 0.25
    assert lost["gaussian", "median"] < 0.1
    assert max(lost["sign flip", "multi-krum"], lost["gaussian", "multi-krum"]) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quickstart_tells_its_story(out: Path) -> None:
    """The thresholds that the first page promises, on the very file.

    What label flipping costs the mean with one seed hangs on the last bit: with seed 4, which swings by ten points from round to round, it
    ended at 88.1 % with machine code, 88.0 % with PyTorch's layers, 81.3 % a client at a time, and 74.9 % on another machine.
    """
    summary = run(load(QUICKSTART), out, engine="local").summary
    assert summary["status"] == "finished"
    _story(summary, flip_cost=None)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_story_does_not_hang_on_the_seed(out: Path) -> None:
    """Averaged over seeds 1 to 3. Label flipping alone depends on whose data the attackers hold: 95, 79 and 67 % accuracy."""
    summary = run(load(QUICKSTART, ["sweep.seeds=[1,2,3]"]), out, engine="local").summary
    _story(summary, flip_cost=0.10)


def _story(summary: dict[str, Any], flip_cost: float | None) -> None:
    rules = ("mean", "median", "multi-krum")
    for rule in rules:
        assert metric(summary, "accuracy", "none", rule) >= 0.93
    lost = {rule: metric(summary, "accuracy", "none", rule) - metric(summary, "accuracy", "label flip", rule) for rule in rules}
    assert flip_cost is None or lost["mean"] >= flip_cost
    assert lost["multi-krum"] <= 0.04
    assert metric(summary, "attack-success", "backdoor", "mean") >= 0.9
    assert metric(summary, "accuracy", "backdoor", "mean") >= 0.93
    assert max(metric(summary, "attack-success", "backdoor", rule) for rule in ("median", "multi-krum")) <= 0.1
