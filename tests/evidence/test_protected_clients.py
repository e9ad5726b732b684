"""What honest clients that blur their updates pay, and what an inversion still gets: accuracy on digits, PSNR on single gradients.

Measured (seeds 1 to 3). Accuracy: digits, MLP, 20 clients, Dirichlet 1.0, 15 rounds of 2 epochs, in points. PSNR: Inverting Gradients on
four clients with one digit of mnist5k each, untrained LeNet, one step; median in dB (the average digit would give 12).

                                  accuracy   PSNR
    nothing                           92.9   83.6
    sparsified, 10 %                  91.6   15.3
    sparsified, 1 %                   76.2    8.7
    pruned, 30 %                      92.8   36.6
    pruned, 90 %                      89.2   15.3
    pruned, 99 %                      51.8    8.7
    noise, std 0.001                     -   20.9
    noise, std 0.01                   92.5    7.2
    noise, std 0.1                    94.1      -
    quantised, 4 bits                 92.9   11.6
    quantised, 2 bits                 93.0    6.8
    Soteria, 20 %                     92.2   13.3
    Soteria, 80 %                     81.3   11.5
    label smoothing, 0.1              92.7   73.5
    label smoothing, 0.5              86.5   52.2
    secure aggregation                92.9      -  (scenarios/secure-aggregation.toml)
    discrete Gaussian, z = 0.1        92.0      -
    discrete Gaussian, z = 1          89.8      -

A mean of twenty takes the clients' own noise away again, and many steps do the rest: single updates are blurred far more than the model.
What is forgotten for good (pruned) costs more than what is only late (sparsified): 40 and 17 points at one entry in a hundred.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from fedtrust.runner import run
from fedtrust.scenario import parse

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SEEDS = [1, 2, 3]
DDG = "distributed-discrete-gaussian"


def ref(name: str, **params: Any) -> str:
    """A component with its parameters, as text, so that a measurement is found again."""
    return json.dumps({"name": name, **params}, sort_keys=True)


@functools.cache
def metrics(document: str) -> dict[str, float]:
    """The metrics after the last round, averaged over the seeds."""
    with tempfile.TemporaryDirectory() as folder:
        summary = run(parse(json.loads(document)), Path(folder) / "run", engine="local").summary
    assert summary["status"] == "finished", json.dumps(summary, indent=1)
    cells = [cell["metrics"] for cell in summary["cells"]]
    return {name: fmean(cell[name] for cell in cells) for name in cells[0]}


def accuracy(behaviour: str = ref("honest"), *filters: str) -> float:
    return metrics(
        json.dumps(
            {
                "title": "cost",
                "rounds": 15,
                "seed": SEEDS[0],
                "data": {"source": {"name": "digits", "limit": 1438}, "partition": {"kind": "dirichlet", "alpha": 1.0}},
                "model": "mlp",
                "clients": {
                    "count": 20,
                    "behaviour": json.loads(behaviour),
                    "train": {"optimiser": "sgd", "lr": 0.05, "momentum": 0.9, "batch_size": 16, "epochs": 2},
                },
                "strategy": {"filters": [json.loads(each) for each in filters]},
                "probes": ["accuracy"],
                "sweep": {"seeds": SEEDS},
            }
        )
    )["accuracy"]


def psnr(behaviour: str) -> float:
    """Of Inverting Gradients on one digit, in dB."""
    return metrics(
        json.dumps(
            {
                "title": "gain",
                "rounds": 1,
                "seed": SEEDS[0],
                "data": {"source": {"name": "mnist5k", "limit": 40}, "partition": "iid"},
                "model": "lenet",
                "clients": {
                    "count": 40,
                    "per_round": 4,
                    "behaviour": json.loads(behaviour),
                    "train": {"optimiser": "sgd", "lr": 0.1, "batch_size": 1, "epochs": 1},
                },
                "probes": [{"name": "inverting-gradients", "clients": 4, "restarts": 1}],
                "sweep": {"seeds": SEEDS},
            }
        )
    )["inverting-gradients/psnr"]


@pytest.mark.parametrize(
    ("behaviour", "most"),
    [
        (ref("sparsified", keep=0.1), 0.03),
        (ref("pruned", rate=0.3), 0.01),
        (ref("pruned", rate=0.9), 0.06),
        (ref("gradient-noise", std=0.01), 0.015),
        (ref("quantised", bits=4), 0.01),
        (ref("quantised", bits=2), 0.01),
        (ref("soteria", rate=0.2), 0.02),
        (ref("label-smoothing", smoothing=0.1), 0.015),
    ],
)
def test_what_it_costs_the_model(behaviour: str, most: float) -> None:
    assert accuracy() > 0.9
    assert accuracy() - accuracy(behaviour) <= most


def test_what_is_late_costs_less_than_what_is_lost() -> None:
    late, lost = accuracy(ref("sparsified", keep=0.01)), accuracy(ref("pruned", rate=0.99))
    assert late - lost > 0.1
    assert accuracy() - late > 0.1


def test_soteria_freezes_what_tells_most_and_pays_for_it() -> None:
    """The paper reports next to no loss. Measured here, 80 % of the last layer's columns, always the same ones: 11 points."""
    assert accuracy() - accuracy(ref("soteria", rate=0.8)) > 0.06


def test_the_sum_costs_nothing_and_its_noise_something() -> None:
    assert accuracy(ref("honest"), ref("secure-aggregation")) == pytest.approx(accuracy(), abs=0.005)
    little, much = (accuracy(ref("honest"), ref(DDG, clip=1.0, noise_multiplier=z)) for z in (0.1, 1.0))
    assert accuracy() - little < 0.025
    assert 0.01 < accuracy() - much < 0.06


@pytest.mark.parametrize(
    ("behaviour", "most"),
    [
        (ref("sparsified", keep=0.1), 20.0),
        (ref("pruned", rate=0.9), 20.0),
        (ref("pruned", rate=0.3), 45.0),
        (ref("gradient-noise", std=0.001), 25.0),
        (ref("gradient-noise", std=0.01), 10.0),
        (ref("quantised", bits=4), 15.0),
        (ref("soteria", rate=0.8), 15.0),
    ],
)
def test_what_it_takes_from_the_inversion(behaviour: str, most: float) -> None:
    assert psnr(ref("honest")) > 60
    assert psnr(behaviour) < most


def test_a_little_is_not_enough() -> None:
    """DLG's authors saw their attack fail from 20 % pruning on; with a cosine distance, on this network, 30 % leave a clear picture."""
    assert psnr(ref("pruned", rate=0.3)) > 30
    assert psnr(ref("gradient-noise", std=0.001)) > 17
    assert psnr(ref("label-smoothing", smoothing=0.1)) > 50  # smooth labels are a regulariser and no protection
