"""From `[privacy]` to a mechanism, with σ calibrated where an ε is asked for; and what such a guarantee costs, in numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtrust.errors import InputError
from fedtrust.privacy.accountants import COARSE, LEAST_NOISE, noise_for
from fedtrust.privacy.accounts import Spent
from fedtrust.privacy.clipping import AdaptiveClip, Clip, FixedClip
from fedtrust.privacy.mechanisms import BandedMechanism, Mechanism
from fedtrust.privacy.samplers import Fixed, Poisson, RoundRobin, Sampler

if TYPE_CHECKING:
    from fedtrust.scenario_privacy import ClipSpec, PrivacySpec

#: The samplers by their names in a scenario.
SAMPLERS: dict[str, type[Sampler]] = {kind.name: kind for kind in (Poisson, Fixed, RoundRobin)}

#: A round's noise longer than so many clips is said to drown what clients can say in it.
DROWNS = 3.0


def build(spec: PrivacySpec, count: int, per_round: int, rounds: int, seed: int) -> Mechanism:
    """Return the mechanism that `[privacy]` describes.

    Args:
        spec: the section.
        count: how many clients there are.
        per_round: how many take part in a round (on average, with Poisson sampling).
        rounds: how many rounds are planned.
        seed: the run's.

    Raises:
        InputError: placed at the key; the parts do not go together, or no noise reaches the target.
    """
    if spec.mechanism == "dp-ftrl":
        return _correlated(spec, count, per_round, rounds, seed)
    sampler = SAMPLERS[spec.sampling or "poisson"](count, per_round, seed)

    def with_noise(sigma: float) -> Mechanism:
        return Mechanism(sampler=sampler, clip=FixedClip(1.0), sigma=sigma, delta=spec.delta, rounds=rounds, seed=seed)

    sigma = _noise(spec, with_noise)
    clip = _clip(spec.clip, sigma, per_round)
    try:
        return replace(with_noise(sigma), clip=clip)
    except ValueError as error:
        raise InputError(str(error), "privacy.clip.noise") from None


def _correlated(spec: PrivacySpec, count: int, per_round: int, rounds: int, seed: int) -> Mechanism:
    sampler = RoundRobin(count, per_round, seed)
    bands = sampler.separation(rounds) if spec.bands is None else min(spec.bands, rounds)
    clip = FixedClip(spec.clip.norm or 0.0)

    def with_noise(sigma: float) -> Mechanism:
        return BandedMechanism(sampler=sampler, clip=clip, sigma=sigma, delta=spec.delta, rounds=rounds, seed=seed, bands=bands)

    return with_noise(_noise(spec, with_noise))


def _clip(spec: ClipSpec, sigma: float, per_round: int) -> Clip:
    if spec.kind == "fixed":
        return FixedClip(spec.norm or 0.0)
    # The paper's n/20; in the small cohorts of a classroom that would leave nothing for the updates.
    noise = max(per_round / 20, sigma) if spec.noise is None else spec.noise
    return AdaptiveClip(spec.quantile, spec.initial, spec.lr, noise)


def _noise(spec: PrivacySpec, made: Callable[[float], Mechanism]) -> float:
    """Return the noise multiplier: as given, or the least that keeps the target ε over all rounds."""
    if spec.noise_multiplier is not None:
        return spec.noise_multiplier
    first = made(1.0)
    sampler = first.sampler
    bands = getattr(first, "bands", 0)
    try:
        return _calibrated(sampler.name, sampler.count, sampler.per_round, bands, first.rounds, spec.delta, spec.epsilon or 0.0)
    except ValueError as error:
        raise InputError(str(error), "privacy.epsilon") from None


@functools.lru_cache(maxsize=256)
def _calibrated(kind: str, count: int, per_round: int, bands: int, rounds: int, delta: float, epsilon: float) -> float:
    """Return the least σ that keeps ε; what it depends on does not hang on the run's seed."""
    sampler = SAMPLERS[kind](count, per_round, 0)
    if isinstance(sampler, RoundRobin):
        made: Callable[[float], Mechanism] = functools.partial(_banded, sampler, bands, rounds, delta)
    else:
        made = functools.partial(_plain, sampler, rounds, delta)
    return noise_for(epsilon, lambda sigma: made(sigma).epsilon(rounds, grid=COARSE))  # rounded up, as every round's ε is


def _plain(sampler: Sampler, rounds: int, delta: float, sigma: float) -> Mechanism:
    return Mechanism(sampler=sampler, clip=FixedClip(1.0), sigma=sigma, delta=delta, rounds=rounds, seed=0)


def _banded(sampler: RoundRobin, bands: int, rounds: int, delta: float, sigma: float) -> Mechanism:
    return BandedMechanism(sampler=sampler, clip=FixedClip(1.0), sigma=sigma, delta=delta, rounds=rounds, seed=0, bands=bands)


def advice(mechanism: Mechanism, size: int) -> list[str]:
    """Return what the guarantee costs in this federation, in numbers, a line each; a warning where the noise drowns the updates.

    Args:
        mechanism: the run's.
        size: d, the model's number of parameters.
    """
    clip = mechanism.clip.first
    std = mechanism.std(clip) / mechanism.sampler.per_round
    burden = mechanism.burden(size)
    told = f"{mechanism.sampler.describe()}; σ = {mechanism.sigma:.4g}"
    lines = [
        f"privacy: {mechanism.name}, {told}, ε = {mechanism.epsilon(mechanism.rounds, grid=COARSE):.4g} at δ = {mechanism.delta:g} "
        f"after {mechanism.rounds} rounds ({mechanism.sampler.relation})",
        f"privacy: noise on the mean has std {std:.3g} a coordinate at clip {clip:.3g}; over {size:,} parameters it is "
        f"{burden:.3g} times as long as the longest update",
    ]
    if LEAST_NOISE <= mechanism.sigma <= LEAST_NOISE * 1.01:  # below it nothing was calibrated: σ was given
        lines.append(f"privacy: the target is so lax that the least noise considered, σ = {mechanism.sigma:.3g}, keeps it")
    if mechanism.delta >= 1 / mechanism.sampler.count:
        share = 1 / mechanism.sampler.count
        lines.append(f"warning: δ = {mechanism.delta:g} is not below 1/N = {share:.2g}: to publish one client outright would keep it")
    if (warning := unpaid(mechanism, size)) is not None:
        lines.append(f"warning: {warning}")
    return lines


def unpaid(mechanism: Mechanism, size: int) -> str | None:
    """Return why the clients are too few for the guarantee, in numbers, or `None` where they can pay it.

    The noise of a round is independent of the number of clients and the sum of the updates is not: with the same share q of them asked,
    the noise on the mean falls with 1/N at the same σ.
    """
    burden = mechanism.burden(size)
    if burden <= DROWNS:
        return None
    factor = burden / DROWNS
    needed, asked = math.ceil(mechanism.sampler.count * factor), math.ceil(mechanism.sampler.per_round * factor)
    std = mechanism.std(1.0) / mechanism.sampler.per_round
    return (
        f"{mechanism.sampler.count} clients cannot pay for this guarantee: a round's noise is {burden:.3g} times as long as the longest "
        f"update (std {std:.3g} × clip on each of {size:,} parameters). About {needed:,} clients, {asked:,} a round, would bring it down "
        f"to {DROWNS:g} times; so would a smaller model, fewer rounds or a larger ε"
    )


def local_burden(spent: Spent, size: int, per_round: float) -> float:
    """Return the expected L2 norm of a round's noise on the mean of updates that their clients noised, as a multiple of the clip.

    Args:
        spent: what a client has paid for an update noised as a whole.
        size: d, the model's number of parameters.
        per_round: how many clients take part in a round.
    """
    reach = 2 if spent.relation == "replace-one" else 1
    return spent.noise_multiplier * reach * math.sqrt(size / per_round)


def drowned(spent: Spent, size: int, per_round: float) -> str | None:
    """Return why the clients' own noise leaves little of their updates, in numbers, or `None` where it does not."""
    burden = local_burden(spent, size, per_round)
    if burden <= DROWNS:
        return None
    needed = math.ceil(per_round * (burden / DROWNS) ** 2)  # independent noises: their mean falls with √n only
    return (
        f"the clients' own noise drowns what they say: on the mean of {per_round:.0f} updates it is {burden:.3g} times as long as the "
        f"longest update. About {needed:,} clients a round would bring it down to {DROWNS:g} times; so would a smaller model or a larger ε"
    )
