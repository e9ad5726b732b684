"""Honest clients that protect each of their records by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field

from fedtrust.client import Behaviour, behaviour
from fedtrust.privacy.accountants import COARSE, noise_for
from fedtrust.privacy.accounts import Participation, Spent
from fedtrust.privacy.record import RecordMechanism


@behaviour("dp-sgd", role="honest", paper="Abadi et al., CCS 2016, algorithm 1 (DP-SGD)")
class DpSgd(Behaviour):
    """Clip each record's gradient to the norm `clip` over all layers together, add them up, and add Gaussian noise to every local step.

    Each record is in each local batch with probability q = batch size ÷ number of samples (Poisson sampling), and sums are divided by the
    expected batch. Whoever sees all updates of the client learns little about any one record: ε at `delta`, one record more or less, over
    all rounds in which it took part. The noise has a standard deviation of `noise_multiplier` · `clip`; with a target `epsilon` in its
    place the multiplier is calibrated so that no client pays more, even if it were asked in every round.
    """

    clip: Annotated[float, Field(gt=0)] = 1.0
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    def __post_init__(self) -> None:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("needs either a noise_multiplier or a target epsilon")

    def per_sample(self, samples: int, batch_size: int) -> RecordMechanism:
        """Return the Poisson sampler, clip, noise and accountant of a client with so many samples."""
        if self.noise_multiplier is None:
            raise ValueError("its noise was not calibrated to its target epsilon")
        return RecordMechanism(samples, min(batch_size, samples), self.clip, self.noise_multiplier)

    def calibrated(self, parts: Sequence[Participation]) -> DpSgd:
        """Return the behaviour with the least noise with which none of these clients pays more than the target."""
        if self.epsilon is None:
            return self
        target, sigma = self.epsilon, 0.0
        # Few samples mean a large q, many rounds many steps: whoever leads in both pays most, and the others are only looked at.
        asked = sorted({(p.examples, p.batch_size, p.rounds * p.steps) for p in parts}, key=lambda a: -a[2] * min(1.0, a[1] / a[0]) ** 2)
        for samples, batch_size, steps in asked:
            one = RecordMechanism(samples, min(batch_size, samples), self.clip, sigma)
            spent = _spent(one, steps, self.delta)
            # Rényi divergences are quick and never too small: mostly they are enough to see that the target is kept.
            if not sigma or (one.epsilon(steps, self.delta, method="rdp") > target and spent(sigma) > target):
                sigma = noise_for(target, spent)
        return dataclasses.replace(self, epsilon=None, noise_multiplier=sigma)

    def account(self, part: Participation) -> Spent:
        """Return what a client has spent."""
        one = self.per_sample(part.examples, part.batch_size)
        steps = part.rounds * part.steps
        return Spent(
            unit="record",
            relation="add-or-remove-one",
            sampling=f"Poisson, q = {one.probability:.4g}",
            clip=self.clip,
            noise_multiplier=one.noise_multiplier,
            releases=steps,
            delta=self.delta,
            epsilon=one.epsilon(steps, self.delta),
            epsilon_rdp=one.epsilon(steps, self.delta, method="rdp"),
        )


def _spent(one: RecordMechanism, steps: int, delta: float) -> Callable[[float], float]:
    return lambda sigma: dataclasses.replace(one, noise_multiplier=sigma).epsilon(steps, delta, grid=COARSE)
