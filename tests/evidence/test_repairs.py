"""After the last round and beside the rule: repairs by the server, caution of honest clients, and a vote with a certificate.

Measured, mean of seeds 1 and 2. Repairs with 200 samples, after 12 rounds of BadNets (3 of 10 clients, squares of 2 × 2) on scikit-learn's
digits with the convolutional network, where accuracy is 97 % and success 95 %, (accuracy, success) after the repair:

    Neural Cleanse 95, 2 %; NAD 93, 40; fine-pruning 95, 55; ANP 96, 76; RNP 92, 87.

NAD's price hangs on the last bits: another processor, where all else was the same, ended at 82, 46 (seeds 1 to 4: 96, 69, 94 and 94 %
accuracy, and 93, 86, 95 and 83 a client at a time). With lr = 0.02 it is steady and does less: 96, 71.

ANP and RNP hardly repair: with few samples and rounds the backdoor is no small set of its own units that one could cut out.

What honest clients do by themselves against BadNets (world of the kit, 89 % success among trusting clients at an accuracy of 89 %): ABL
67 % at 67 %, trimmed loss 74 at 76, k-NN filter 64 at 83. None stops it: the attackers' clients run these programs, too, but half of their
samples are triggered, so that the trigger is what looks normal there. Against labels that are wrong everywhere (10 clients of 200 samples,
40 % of the labels random, 15 rounds of 4 epochs) they do what they were made for: 78 % without, 87 with a trimmed loss, 86 with the filter.

DPA, five logistic models, two clients of 20 sending turned updates (scale 8) on digits: 86 %; the mean of one model falls from 90 to 20.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.evidence.kit_backdoors import IID, ROUNDS, attack, merged, played

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Convolutions, which attention maps need, on pictures that are small enough for them.
DIGITS: dict[str, Any] = {"data": {"source": {"name": "digits", "limit": 1438}, "partition": IID}}
CONVOLUTIONS = merged(DIGITS, {"model": "cnn", "clients": {"count": 10, "train": {"epochs": 4}}})
SQUARE = attack("badnets", count=3, target=2, size=2)
PATCH = attack("badnets", target=2)

# A repair, the least that it takes from success, the most that it takes from accuracy.
REPAIRS = {"neural-cleanse": (0.6, 0.04), "nad": (0.35, 0.25), "fine-pruning": (0.25, 0.05)}


def repaired(name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return what was measured after the last round, and after a repair."""
    records = played(SQUARE, **merged(CONVOLUTIONS, {"strategy": {"root_samples": 200, "repairs": [name]}})).records
    return records[ROUNDS], records[ROUNDS + 1]


@pytest.mark.parametrize("name", REPAIRS)
def test_the_repair_takes_the_backdoor_out(name: str) -> None:
    taken, price = REPAIRS[name]
    before, after = repaired(name)
    assert before["attack-success"] > 0.8
    assert before["attack-success"] - after["attack-success"] > taken
    assert before["accuracy"] - after["accuracy"] < price


@pytest.mark.parametrize("name", ["anp", "rnp"])
def test_pruning_by_perturbation_or_reconstruction_does_not_find_it(name: str) -> None:
    """Measured: 95 % before; ANP took more than 8 points of it on one processor and 1 on another, RNP 8 for five points of accuracy."""
    before, after = repaired(name)
    assert after["attack-success"] > 0.6 < before["attack-success"]


def test_neural_cleanse_names_the_class() -> None:
    """Measured: the target's trigger takes 3.7 pixels, the others' 9 to 12; its anomaly index is 7, the next 1.1 and the limit 2."""
    metrics = played(SQUARE, **merged(CONVOLUTIONS, {"strategy": {"root_samples": 200, "repairs": ["neural-cleanse"]}})).metrics
    anomaly = {label: metrics[f"neural-cleanse/anomaly/{label}"] for label in range(10)}
    assert max(anomaly, key=anomaly.__getitem__) == 2
    assert anomaly[2] > 4 > 2 > max(value for label, value in anomaly.items() if label != 2)


GUARDS: dict[str, dict[str, Any]] = {
    "abl": {"name": "abl", "rate": 0.05, "isolate_until": 4, "strength": 10.0},
    "trimmed-loss": {"name": "trimmed-loss", "trim": 0.3},
    "knn-filter": {"name": "knn-filter", "k": 5},
}


@pytest.mark.parametrize("name", GUARDS)
def test_careful_clients_do_not_stop_a_backdoor(name: str) -> None:
    """They lower it, and accuracy with it."""
    found = played(PATCH, clients={"behaviour": GUARDS[name]})
    assert 0.4 < found.success < played(PATCH).success - 0.08
    assert found.accuracy < played(PATCH).accuracy - 0.03


@pytest.mark.parametrize("guard", [{"name": "trimmed-loss", "trim": 0.4}, {"name": "knn-filter", "k": 10}])
def test_careful_clients_learn_through_random_labels(guard: dict[str, Any]) -> None:
    noise = attack("label-flip", count=10, mode="random", fraction=0.4)
    long: dict[str, Any] = {"rounds": 15, "clients": {"count": 10, "train": {"epochs": 4}}}
    plain = played(noise, **long).accuracy
    assert plain < 0.83
    assert played(noise, **merged(long, {"clients": {"behaviour": guard}})).accuracy > plain + 0.055


LOGISTIC = merged(DIGITS, {"clients": {"train": {"lr": 0.1, "momentum": 0.0, "batch_size": 16}}, "probes": ["accuracy"]})
VOTING = merged(
    LOGISTIC,
    {
        "model": {"name": "ensemble", "of": "logistic", "members": 5},
        "clients": {"behaviour": "dpa"},
        "strategy": {"aggregator": "dpa"},
        "probes": ["accuracy", {"name": "dpa-certificate", "radii": [0, 1, 2]}],
    },
)
WRONG = attack("sign-flip", count=2, scale=8.0)


def test_a_vote_survives_what_a_mean_does_not_and_keeps_its_promise() -> None:
    """Certified without attack: 92 % for r = 0, 85 for r = 1, 70 for r = 2; two attackers leave 86 %, at least what was promised."""
    one = {**LOGISTIC, "model": "logistic"}
    assert played(None, **one).accuracy - played(WRONG, **one).accuracy > 0.4
    peace, war = played(None, **VOTING), played(WRONG, **VOTING)
    assert peace.accuracy > played(None, **one).accuracy - 0.02
    assert peace.accuracy - war.accuracy < 0.1
    assert 0.4 < peace.metrics["dpa-certificate/2"] < peace.metrics["dpa-certificate/1"] < peace.metrics["dpa-certificate/0"]
    assert war.accuracy >= peace.metrics["dpa-certificate/2"]


def test_six_clients_can_reach_every_voter() -> None:
    """Measured: 10 %, a guess; that is more than the certificate speaks of."""
    assert played(attack("sign-flip", count=6, scale=8.0), **VOTING).accuracy < 0.3
