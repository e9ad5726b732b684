"""Stolen models on real digits, averaged over three seeds: what copies cost, and which answers of a released model prevent them.

The world: 5000 MNIST digits, 20 clients with skewed labels, a logistic regression; a user may ask 1000 samples.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from statistics import fmean

import pytest

from fedtrust.runner import run
from fedtrust.scenario import parse

pytestmark = pytest.mark.slow
SEEDS = (1, 2, 3)


@functools.cache
def stolen(answers: str, defences: str = "[]", model: str = "logistic") -> dict[str, float]:
    """Return the metrics after the last round, averaged over the seeds."""
    found = []
    for seed in SEEDS:
        document = {
            "title": "stolen",
            "rounds": 10,
            "seed": seed,
            "data": {"source": {"name": "mnist5k", "test_fraction": 0.4}, "partition": {"kind": "dirichlet", "alpha": 0.5}},
            "model": model,
            "clients": {"count": 20, "train": {"lr": 0.05, "batch_size": 50, "epochs": 2}},
            "attackers": [{"behaviour": "walk-away", "count": 1}],
            "release": {"answers": answers, "queries": 1000, "defences": json.loads(defences)},
            "probes": [
                "accuracy",
                "released-accuracy",
                "equation-solving",
                {"name": "knockoff", "queries": [50, 400]},
                {"name": "jacobian-augmentation", "seeds": 50, "queries": 200, "step": 0.2},
            ],
        }
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(parse(document), Path(folder) / "run", engine="local").summary["metrics"])
    return {key: fmean(one[key] for one in found) for key in found[0]}


ROUNDED = '[{"name": "rounding", "decimals": 2}]'
POISONED = '["prediction-poisoning"]'


def test_equations_give_the_model_away_and_whoever_walks_away_has_it_too() -> None:
    """Measured: fidelity 1 with 785 answers; 0.99 for who left with the model of the last round; accuracy 0.81."""
    found = stolen("probabilities")
    assert found["accuracy"] > 0.7
    assert found["equation-solving/queries"] == 785
    assert found["equation-solving/fidelity"] == 1
    assert found["equation-solving/parameter-error"] < 1e-3
    assert found["walk-away/fidelity"] > 0.95


@pytest.mark.parametrize(("answers", "defences"), [("probabilities", ROUNDED), ("label", "[]"), ("probabilities", POISONED)])
def test_equations_no_longer_hold_for_coarse_answers(answers: str, defences: str) -> None:
    """Measured: fidelity 0.29 with two decimals, 0.20 with the label alone, 0.17 poisoned; users lose a thousandth of accuracy at most."""
    found = stolen(answers, defences)
    assert found["equation-solving/fidelity"] < 0.6
    assert found["released-accuracy"] > found["accuracy"] - 0.01


def test_training_on_answers_needs_no_equation_and_hardly_minds_coarse_ones() -> None:
    """Measured, with 50 and 400 answers: 0.73 and 0.91 of probabilities, 0.73 and 0.90 of rounded ones, 0.62 and 0.90 of labels."""
    plain, rounded, label = stolen("probabilities"), stolen("probabilities", ROUNDED), stolen("label")
    assert plain["knockoff/fidelity/400"] > plain["knockoff/fidelity/50"] + 0.1
    assert plain["knockoff/fidelity/400"] > 0.8
    assert rounded["knockoff/fidelity/400"] > plain["knockoff/fidelity/400"] - 0.05
    assert label["knockoff/fidelity/50"] < plain["knockoff/fidelity/50"] - 0.03
    assert label["knockoff/fidelity/400"] > plain["knockoff/fidelity/400"] - 0.05


def test_poisoned_answers_spoil_copies_that_trust_them_and_not_those_that_read_the_label() -> None:
    """Measured with 400 answers: 0.49 in place of 0.91; Jacobian augmentation, which uses the label alone, does not mind (0.64)."""
    plain, poisoned = stolen("probabilities"), stolen("probabilities", POISONED)
    assert poisoned["knockoff/fidelity/400"] < plain["knockoff/fidelity/400"] - 0.25
    assert poisoned["released-accuracy"] == pytest.approx(poisoned["accuracy"])
    assert poisoned["jacobian-augmentation/fidelity"] == pytest.approx(plain["jacobian-augmentation/fidelity"], abs=0.03)


def test_a_set_that_grows_by_the_copys_own_jacobian_is_worth_more_than_its_seeds() -> None:
    """Measured: fidelity 0.53 with the 50 seeds, 0.64 with 200 samples made of them."""
    found = stolen("label")
    assert found["jacobian-augmentation/fidelity/200"] > found["jacobian-augmentation/fidelity/50"] + 0.05
