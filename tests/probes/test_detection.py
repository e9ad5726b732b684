from __future__ import annotations

import random

import pytest
import torch
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from fedtrust.probes.detection import auc
from tests.probes.probe_kit import context, federated, measure, numbers, truth


def detect(trust: list[float] | None, malicious: set[int], clients: tuple[int, ...] | None = None, **params: float) -> dict[str, float]:
    """The probe over clients 0, 1, 2 … with this trust."""
    values = None if trust is None else torch.tensor(trust)
    named = tuple(range(len(trust or []))) if clients is None else clients
    return measure("detection", context(trust=values, clients=named, truth=truth(*malicious)), **params)


def test_by_hand() -> None:
    """Distrusted: 0, 2, 3; malicious: 0, 1, 2. Of nine pairs 0 and 2 win all three of theirs, 1 beats 4 and ties with 5: 7.5 of 9."""
    found = detect([0.0, 0.9, 0.1, 0.4, 1.0, 0.9], {0, 1, 2})
    assert found == {
        "detection/precision": pytest.approx(2 / 3),
        "detection/recall": pytest.approx(2 / 3),
        "detection/fpr": pytest.approx(1 / 3),
        "detection/auc": pytest.approx(7.5 / 9),
        "detection/excluded": pytest.approx(1 / 3),  # 0 alone: the others were used, if only a little
        "detection/excluded-honest": 0.0,
    }


def test_trust_equal_to_the_threshold_is_trust() -> None:
    assert detect([0.5, 0.5], {0})["detection/recall"] == 0.0
    assert detect([0.5, 0.5], {0}, threshold=0.6)["detection/recall"] == 1.0
    assert detect([0.99, 1.0], {0}, threshold=1.0) == {
        "detection/precision": 1.0,
        "detection/recall": 1.0,
        "detection/fpr": 0.0,
        "detection/auc": 1.0,
        "detection/excluded": 0.0,
        "detection/excluded-honest": 0.0,
    }


def test_nobody_is_distrusted() -> None:
    found = detect([1.0, 1.0, 1.0], {1})
    assert "detection/precision" not in found
    assert found.pop("detection/auc") == 0.5
    assert set(found.values()) == {0.0}


def test_who_is_clipped_is_distrusted_and_not_left_out() -> None:
    """Four attackers: two clipped to a tenth, one left out, one used; of the honest, one clipped, one left out, two used."""
    found = detect([0.1, 0.1, 0.0, 1.0, 0.3, 0.0, 1.0, 1.0], {0, 1, 2, 3})
    assert (found["detection/recall"], found["detection/excluded"]) == (0.75, 0.25)
    assert (found["detection/fpr"], found["detection/excluded-honest"]) == (0.5, 0.25)


def test_nobody_is_malicious() -> None:
    alarm = {"detection/fpr": 0.25, "detection/excluded-honest": 0.25}
    assert detect([0.0, 1.0, 1.0, 1.0], set()) == alarm
    assert detect([0.0, 1.0, 1.0, 1.0], {77}) == alarm  # the attacker was not among the replies


def test_everybody_is_malicious() -> None:
    assert detect([0.0, 1.0], {0, 1}) == {"detection/recall": 0.5, "detection/precision": 1.0, "detection/excluded": 0.5}


def test_a_rule_without_trust_detects_nothing() -> None:
    assert detect(None, {0}) == {}
    assert detect([], {0}) == {}


def test_rows_are_matched_by_client_id() -> None:
    assert detect([0.0, 1.0, 1.0], {9}, clients=(9, 20, 31))["detection/recall"] == 1.0
    assert detect([0.0, 1.0, 1.0], {31}, clients=(9, 20, 31))["detection/recall"] == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_against_scikit_learn(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randrange(4, 40)
    trust = [rng.choice([0.0, 0.25, 0.3, 0.5, 0.75, 1.0]) if seed % 2 else rng.random() for _ in range(n)]
    bad = [True, False] + [rng.random() < 0.3 for _ in range(n - 2)]
    flagged = [t < 0.5 for t in trust]
    found = detect(trust, {i for i, b in enumerate(bad) if b})
    assert found["detection/auc"] == pytest.approx(roc_auc_score(bad, [-t for t in trust]))
    assert found["detection/recall"] == pytest.approx(recall_score(bad, flagged))
    assert found.get("detection/precision", 0.0) == pytest.approx(precision_score(bad, flagged, zero_division=0.0))
    assert found["detection/fpr"] == pytest.approx(1 - recall_score([not b for b in bad], [not f for f in flagged]))


def rewarded(trust: list[float] | None, malicious: set[int], clients: tuple[int, ...] = (0, 1, 2, 3)) -> dict[str, float]:
    """The probe over clients that have 1, 2, 3, 4, … samples."""
    values = None if trust is None else torch.tensor(trust)
    data = federated(numbers(0.0), [0], [[0] * (c + 1) for c in range(10)])
    return measure("reward-share", context(trust=values, clients=clients, truth=truth(*malicious), data=data))


def test_the_reward_is_shared_out_by_trust() -> None:
    """Attackers have 0.5 of 2.5; one in two is a fair half, one in four a quarter."""
    found = rewarded([1.0, 0.5, 1.0, 0.0], {1, 3})
    assert found == {"reward-share/malicious": pytest.approx(0.2), "reward-share/relative": pytest.approx(0.4)}
    assert rewarded([1.0, 1.0, 1.0, 1.0], {2, 77}) == {"reward-share/malicious": 0.25, "reward-share/relative": 1.0}
    assert rewarded([0.0, 0.0, 1.0, 0.0], {2})["reward-share/relative"] == 4.0
    assert rewarded([0.0, 1.0, 1.0, 1.0], {0}) == {"reward-share/malicious": 0.0, "reward-share/relative": 0.0}


def test_without_trust_the_reward_goes_by_samples() -> None:
    found = rewarded(None, {3, 9}, (0, 3, 9))  # 1, 4 and 10 samples
    assert found == {"reward-share/malicious": pytest.approx(14 / 15), "reward-share/relative": pytest.approx(14 / 15 / (2 / 3))}


def test_no_reward_to_speak_of() -> None:
    assert rewarded([1.0, 1.0, 1.0, 1.0], {77}) == {}
    assert rewarded([0.0, 0.0, 0.0, 0.0], {1}) == {}
    assert rewarded(None, {1}, ()) == {}


def test_auc_ends() -> None:
    high, low = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.5])
    assert auc(high, low) == 1.0
    assert auc(low, high) == 0.0
    assert auc(high, high) == 0.5
