"""What is audited of a scenario: every mechanism that claims an ε, with small settings in which faults show and in the scenario's own.

Few trials cannot tell ε = 8 from ε = 12. In a setting in which everybody takes part and the noise is small, the same code is easy to
measure: a clip that is too loose, noise that is too small or always the same shows there, whatever the scenario's own ε is. What the
accountant assumes of the sampler is tested on the sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fedtrust.client import overrides
from fedtrust.engine import seeds
from fedtrust.engine.prepare import local_steps
from fedtrust.errors import InputError
from fedtrust.privacy import audit_sampling as sampling
from fedtrust.privacy import audit_trials as trials_of
from fedtrust.privacy.accountants import COARSE
from fedtrust.privacy.accounts import ClientAccount, Participation
from fedtrust.privacy.audit import Finding, canary_test, one_run_test
from fedtrust.privacy.clipping import AdaptiveClip
from fedtrust.privacy.mechanisms import BandedMechanism, Mechanism
from fedtrust.privacy.server import PrivateStrategy
from fedtrust.server import Stage
from fedtrust.setup import Setup
from fedtrust.strategy import FedTrustStrategy

#: σ and the number of releases of the two settings of our own: the distance of a canary is 2 and 1 standard deviations of the noise.
SHARP, LONG = (0.5, 1), (2.0, 4)
#: How many units take part in these, all of them every time.
_FEW = 4
#: Canaries of the audit in one run.
_CANARIES = 1000
#: Releases of the scenario's own that a trial plays at most: rounds of a server, and local steps of clients.
_ROUNDS, _STEPS = 2, 48
#: The share of a test's chance of error that is left to those on samplers and on noise: a fault there shows beyond any doubt, and they err
#: exactly as often as they may, which the bounds on ε do not.
_CERTAIN = 0.01
#: Draws that the sampler is asked for.
_DRAWS = 1000

#: A test that waits for its share of what may go wrong.
Test = Callable[[float], Finding]


class Subject(NamedTuple):
    """A mechanism under audit.

    Attributes:
        name: its name.
        unit: whose presence it hides.
        claims: what it claims of the whole run, in words.
        tests: what is done about it.
    """

    name: str
    unit: str
    claims: str
    tests: tuple[Test, ...]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        subjects: each mechanism's name, unit and claim, and what was found.
        confidence: the probability that no sound mechanism fails.
        trials: trials a test, with and without a canary.
    """

    subjects: tuple[tuple[Subject, tuple[Finding, ...]], ...]
    confidence: float
    trials: int

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts what is claimed."""
        return all(finding.passed for _, findings in self.subjects for finding in findings)


def audit(setup: Setup, trials: int, confidence: float, seed: int, told: Callable[[str], None] = lambda line: None) -> Audit:
    """Audit every mechanism of a run that claims an ε.

    Args:
        setup: the run.
        trials: how many a test, half of them with a canary.
        confidence: the probability that a sound mechanism passes all tests.
        seed: of everything that is drawn.
        told: hears which test is next.

    Raises:
        InputError: nothing claims an ε.
    """
    subjects = list(_subjects(setup, trials // 2, seed))
    noised = [stage.name for stage in setup.strategy.noised] if isinstance(setup.strategy, FedTrustStrategy) else []
    if not subjects and noised:
        raise InputError(
            f"cannot be audited: the ε of '{noised[0]}' is an upper bound by concentrated privacy for whole-number noise in a group, and "
            "the trials here play noise on real numbers; its sampler and its bound have tests of their own"
        )
    if not subjects:
        raise InputError(
            "claims no ε, so there is nothing to audit: it has neither [privacy] nor clients that protect themselves (dp-sgd, local-dp)"
        )
    alpha = (1 - confidence) / sum(len(subject.tests) for subject in subjects)
    done = []
    for subject in subjects:
        findings = []
        for number, test in enumerate(subject.tests, 1):
            told(f"{subject.name}: test {number} of {len(subject.tests)}")
            findings.append(test(alpha))
        done.append((subject, tuple(findings)))
    return Audit(tuple(done), confidence, 2 * (trials // 2))


def _subjects(setup: Setup, trials: int, seed: int) -> Iterator[Subject]:
    if isinstance(setup.strategy, PrivateStrategy):
        yield server_subject(setup.strategy.mechanism, setup.strategy.aggregator, trials, seed)
    honest = setup.roster.honest
    if isinstance(honest, ClientAccount):
        missing = [name for name in ("clip", "delta", "noise_multiplier") if not hasattr(honest, name)]
        if missing:
            raise InputError(
                f"cannot be audited: it has no parameter '{missing[0]}' (needs clip, delta, noise_multiplier)", "clients.behaviour"
            )
        sizes = [setup.world.examples(c) for c in range(setup.roster.count)]
        fewest = min(sizes)  # the largest share of its records in a batch
        steps = local_steps(fewest, setup.world.batch_size, setup.world.epochs)
        part = Participation(sizes.index(fewest), setup.scenario.rounds, fewest, setup.world.batch_size, steps)
        name = setup.scenario.clients.behaviour.name
        yield (record_subject if overrides(honest, "per_sample") else local_subject)(name, honest, part, trials, seed)


def _setting(sigma: float, sampled: str, releases: int, kind: str) -> str:
    return f"σ = {sigma:.4g}, {sampled}, {releases} {kind}{'s' if releases > 1 else ''}"


# Records


def record_subject(name: str, behaviour: Any, part: Participation, trials: int, seed: int) -> Subject:
    """Return the audit of clients that protect their records (`Behaviour.per_sample`), by the account of the one with the fewest."""
    batch = min(part.batch_size, part.examples)
    rounds, steps = _horizon(part)
    spent = behaviour.account(part)
    tests = []
    for sigma, count in (SHARP, LONG):
        own = _noised(behaviour, sigma)
        tests.append(_record_test(own, _setting(sigma, "every record", count, "step"), _FEW, _FEW, (1, count), trials, seed))
    setting = _setting(spent.noise_multiplier, spent.sampling, rounds * steps, "step")
    setting += f" ({rounds} of {part.rounds} rounds)" if rounds < part.rounds else ""
    tests.append(_record_test(behaviour, setting, part.examples, batch, (rounds, steps), trials, seed))
    many = max(1, round(_CANARIES * batch / part.examples))

    def one_run(alpha: float) -> Finding:
        values, coins = trials_of.record_one_run(behaviour, _CANARIES, many, rounds, steps, seed)
        claimed = behaviour.per_sample(_CANARIES, many).epsilon(rounds * steps, behaviour.delta, grid=COARSE)
        return one_run_test("one run, many canaries", setting, values, coins, claimed, behaviour.delta, alpha)

    def drawn(alpha: float) -> Finding:
        made = behaviour.per_sample(part.examples, batch)
        batches = made.draw(_DRAWS, seeds.stream(seed, "audit/draws"))
        inside = np.zeros((_DRAWS, part.examples), dtype=bool)
        rows, columns = np.nonzero(batches >= 0)
        inside[rows, batches[rows, columns]] = True
        return sampling.poisson_test("batches", inside, made.probability, _CERTAIN * alpha)

    def fresh(alpha: float) -> Finding:
        own = _noised(behaviour, LONG[0])
        return sampling.noise_test(trials_of.record_noise(own, seed), LONG[0] * behaviour.clip, LONG[0], _CERTAIN * alpha)

    claims = (
        f"ε = {spent.epsilon:.4g} at δ = {spent.delta:g} for a client with {part.examples} records asked in {part.rounds} rounds "
        f"({spent.relation})"
    )
    return Subject(name, spent.unit, claims, (*tests, one_run, drawn, fresh))


def _horizon(part: Participation) -> tuple[int, int]:
    """Return how many rounds, and local steps in each, a trial plays."""
    steps = min(part.steps, _STEPS)
    return max(1, min(part.rounds, _STEPS // steps)), steps


def _noised(behaviour: Any, sigma: float) -> Any:
    return dataclasses.replace(behaviour, noise_multiplier=sigma)


def _record_test(behaviour: Any, setting: str, samples: int, batch: int, many: tuple[int, int], trials: int, seed: int) -> Test:
    rounds, steps = many
    made = behaviour.per_sample(samples, batch)

    def claim(delta: float) -> float:
        epsilon: float = made.epsilon(rounds * steps, delta, grid=COARSE)
        return epsilon

    def test(alpha: float) -> Finding:
        seen = trials_of.record_trials(behaviour, samples, batch, rounds, steps, trials, seed)
        return canary_test("a canary record", setting, seen, claim, behaviour.delta, alpha)

    return test


# Clients that noise their own update


def local_subject(name: str, behaviour: Any, part: Participation, trials: int, seed: int) -> Subject:
    """Return the audit of clients that noise their own update in `craft`."""
    spent = behaviour.account(part)
    rounds = min(part.rounds, _ROUNDS)
    settings = [(*SHARP, ""), (*LONG, ""), (spent.noise_multiplier, rounds, f" (of {part.rounds})" if rounds < part.rounds else "")]
    tests = []
    for sigma, count, note in settings:
        setting = _setting(sigma, "every update", count, "round") + note
        tests.append(_local_test(_noised(behaviour, sigma), setting, part._replace(rounds=count), trials, seed))

    def fresh(alpha: float) -> Finding:
        own = _noised(behaviour, LONG[0])
        return sampling.noise_test(trials_of.local_noise(own, seed), LONG[0] * 2 * behaviour.clip, LONG[0], _CERTAIN * alpha)

    claims = f"ε = {spent.epsilon:.4g} at δ = {spent.delta:g} for a client asked in {part.rounds} rounds ({spent.relation})"
    return Subject(name, spent.unit, claims, (*tests, fresh))


def _local_test(behaviour: Any, setting: str, part: Participation, trials: int, seed: int) -> Test:
    def claim(delta: float) -> float:
        epsilon: float = dataclasses.replace(behaviour, delta=delta).account(part).epsilon
        return epsilon

    def test(alpha: float) -> Finding:
        seen = trials_of.local_trials(behaviour, part.rounds, trials, behaviour.clip, seed)
        return canary_test("a canary update", setting, seen, claim, behaviour.delta, alpha)

    return test


# The server


def server_subject(mechanism: Mechanism, aggregator: Stage, trials: int, seed: int) -> Subject:
    """Return the audit of a server with a privacy mechanism."""
    tests = [
        _server_test(_everybody(mechanism, sigma, count), aggregator, "all clients", count, trials, seed, summed=summed)
        for (sigma, count), summed in ((SHARP, True), (LONG, False))
    ]
    rounds = min(mechanism.rounds, _ROUNDS)
    note = f" of {mechanism.rounds}" if rounds < mechanism.rounds else ""
    tests.append(_server_test(mechanism, aggregator, mechanism.sampler.describe(), rounds, trials, seed, summed=True, note=note))
    share = mechanism.sampler.per_round / mechanism.sampler.count
    crowd = dataclasses.replace(
        mechanism, sampler=dataclasses.replace(mechanism.sampler, count=_CANARIES, per_round=max(1, round(share * _CANARIES)))
    )

    def one_run(alpha: float) -> Finding:
        values, coins = trials_of.server_one_run(crowd, aggregator, _CANARIES, rounds, seed)
        setting = _setting(crowd.sigma, crowd.sampler.describe(), rounds, "round")
        return one_run_test("one run, many canaries", setting, values, coins, crowd.epsilon(rounds, grid=COARSE), crowd.delta, alpha)

    def drawn(alpha: float) -> Finding:
        return sampling.cohort_test(dataclasses.replace(mechanism.sampler, seed=seed), _DRAWS, _CERTAIN * alpha)

    def fresh(alpha: float) -> Finding:
        own = _everybody(mechanism, *LONG)
        # Correlated noise is not fresh from round to round, and need not be.
        rounds = 1 if isinstance(mechanism, BandedMechanism) else LONG[1]
        least = LONG[0] * own.sampler.reach * own.clip.first
        return sampling.noise_test(trials_of.server_noise(own, aggregator, rounds, seed), least, LONG[0], _CERTAIN * alpha)

    claims = f"ε = {mechanism.epsilon(mechanism.rounds, grid=COARSE):.4g} at δ = {mechanism.delta:g} after {mechanism.rounds} rounds"
    return Subject(mechanism.name, "client", f"{claims} ({mechanism.sampler.relation})", (*tests, one_run, drawn, fresh))


def _everybody(mechanism: Mechanism, sigma: float, rounds: int) -> Mechanism:
    """Return the mechanism with few clients, all of whom take part in every round, and other noise."""
    clip = mechanism.clip
    if isinstance(clip, AdaptiveClip):  # the count keeps its share of the release
        clip = dataclasses.replace(clip, noise=clip.noise * sigma / mechanism.sigma)
    sampler = dataclasses.replace(mechanism.sampler, count=_FEW, per_round=_FEW)
    return dataclasses.replace(mechanism, sampler=sampler, sigma=sigma, clip=clip, rounds=rounds)


def _server_test(
    mechanism: Mechanism, aggregator: Stage, sampled: str, rounds: int, trials: int, seed: int, *, summed: bool, note: str = ""
) -> Test:
    def claim(delta: float) -> float:
        return dataclasses.replace(mechanism, delta=delta).epsilon(rounds, grid=COARSE)

    def test(alpha: float) -> Finding:
        seen = trials_of.server_trials(mechanism, aggregator, rounds, trials, seed, summed=summed)
        name = "a canary client" if summed else "a canary client, updates one by one"
        return canary_test(name, _setting(mechanism.sigma, sampled, rounds, "round") + note, seen, claim, mechanism.delta, alpha)

    return test
