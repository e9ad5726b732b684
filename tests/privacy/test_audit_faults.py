"""Planted faults are found, and sound mechanisms are left in peace."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fedtrust.errors import InputError
from fedtrust.privacy.audit_plan import Audit, audit
from tests.privacy import audit_kit as kit

#: Trials a test: enough for most of these faults, and for a clip that is too loose by a half; the command line takes 3000 by default.
TRIALS, MORE = 800, 1500
REPEATS, REPEATED = 20, 400


def faulty(found: Audit) -> set[str]:
    return {finding.name for _, findings in found.subjects for finding in findings if not finding.passed}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "plant"),
    [(changes, plant) for changes, plants in kit.ALL for plant in plants],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_found(changes: dict[str, Any], plant: kit.Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = kit.setup_of(changes)
    plant(monkeypatch)
    found = audit(setup, MORE if plant.__name__.endswith("loose") else TRIALS, 0.95, 0)
    assert not found.passed
    if plant.__name__.endswith(("fixed_batches", "fixed_cohorts")):
        assert faulty(found) & {"batches", "cohorts"}
    elif plant.__name__.endswith(("one_noise", "one_noise_a_round", "root")):
        assert "noise" in faulty(found)
    else:  # by what an adversary can learn, not by a look at the code's numbers
        assert {name for name in faulty(found) if name.startswith("a canary")}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("changes", [changes for changes, _ in kit.ALL], ids=["record", "server", "local"])
def test_sound_mechanisms_raise_no_alarm(changes: dict[str, Any]) -> None:
    setup = kit.setup_of(changes)
    found = [audit(setup, REPEATED, 0.95, seed) for seed in range(REPEATS)]
    assert [faulty(one) for one in found if not one.passed] == []
    bounds = [f.bound for one in found for _, findings in one.subjects for f in findings if f.bound is not None]
    assert max(bounds) > 0.5  # and yet something is seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "privacy",
    [
        {"sampling": "fixed", "noise_multiplier": 0.6},
        {"clip": {"kind": "adaptive", "initial": 0.3}, "noise_multiplier": 1.0},
        {"mechanism": "dp-ftrl", "noise_multiplier": 1.0},
    ],
    ids=["fixed", "adaptive", "banded"],
)
def test_every_kind_of_mechanism_passes_and_fails(privacy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    setup = kit.setup_of({"clients": {"per_round": 4}, "rounds": 6, "privacy": {"clip": 0.5, **privacy}})
    assert faulty(audit(setup, REPEATED, 0.95, 1)) == set()
    kit.server_loose_by_two(monkeypatch)
    assert "a canary client" in faulty(audit(setup, TRIALS, 0.95, 1))


def test_one_fault_is_found_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ordinary run of the tests looks at one mechanism, sound and broken, with few trials."""
    setup = kit.setup_of(kit.RECORD)
    sound = audit(setup, 400, 0.95, 0)
    assert faulty(sound) == set()
    (subject, findings), *others = sound.subjects
    assert (subject.name, subject.unit, others) == ("dp-sgd", "record", [])
    one_run = next(f for f in findings if f.name.startswith("one run"))
    assert one_run.bound is not None
    assert one_run.claimed is not None
    assert one_run.bound < one_run.claimed
    kit.record_known_noise(monkeypatch)
    assert faulty(audit(setup, 400, 0.95, 0)) >= {"a canary record", "noise"}


def test_canaries_of_one_run_are_seen() -> None:
    """With next to no noise every guess is right."""
    setup = kit.setup_of({**kit.RECORD, "clients": {"behaviour": {"name": "dp-sgd", "clip": 0.5, "noise_multiplier": 0.05}}})
    (_, findings), *_ = audit(setup, 400, 0.95, 0).subjects
    one_run = next(f for f in findings if f.name.startswith("one run"))
    assert one_run.said.startswith("100 of 100 guesses")


def test_a_clip_alone_claims_nothing_that_could_be_wrong() -> None:
    setup = kit.setup_of({**kit.RECORD, "clients": {"behaviour": {"name": "dp-sgd", "clip": 0.5, "noise_multiplier": 0.0}}})
    found = audit(setup, 200, 0.95, 0)
    assert found.passed
    own = [f for f in found.subjects[0][1] if f.setting.startswith("σ = 0,")]
    assert {f.plain()["claimed"] for f in own} == {None}
    assert all(f.bound is not None and f.bound > 2 for f in own)


def test_what_claims_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="claims no ε"):
        audit(kit.setup_of({}), 400, 0.95, 0)


def test_an_audit_can_be_repeated() -> None:
    setup = kit.setup_of(kit.LOCAL)
    one, two, other = (audit(setup, 200, 0.9, seed) for seed in (5, 5, 6))
    plain = [[dataclasses.astuple(f) for f in part.subjects[0][1]] for part in (one, two, other)]
    assert plain[0] == plain[1]
    assert plain[0] != plain[2]
