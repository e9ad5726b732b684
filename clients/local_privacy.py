"""Honest clients that protect all of their data by themselves, from the server too."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, View, behaviour
from fedtrust.errors import RunError
from fedtrust.privacy.accountants import COARSE, noise_for
from fedtrust.privacy.accounts import Participation, Spent
from fedtrust.privacy.local import LocalMechanism


@behaviour(
    "local-dp",
    role="honest",
    paper="Duchi, Jordan and Wainwright, FOCS 2013 (local privacy); Dwork and Roth, 2014, appendix A (Gaussian mechanism)",
)
class LocalDp(Behaviour):
    """Clip the own update to the norm `clip` and add Gaussian noise before it is sent: nobody has to be trusted, at a price.

    Every client's noise is as large as what a trusted server adds to the sum of all, and twice that since a whole data set may be
    replaced: with n clients a round the mean is noisier by 2 √n than with central privacy at the same σ, and no sampling helps. The
    standard deviation is `noise_multiplier` · 2 · `clip` in each coordinate; with a target `epsilon` in its place the multiplier is the
    least that keeps ε at `delta` for a client that is asked in every round.
    """

    clip: Annotated[float, Field(gt=0)] = 1.0
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    def __post_init__(self) -> None:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("needs either a noise_multiplier or a target epsilon")

    @property
    def mechanism(self) -> LocalMechanism:
        """The clip, noise and accountant.

        Raises:
            RunError: the noise has not been calibrated to the target yet.
        """
        if self.noise_multiplier is None:
            raise RunError("local-dp's noise was not calibrated to its target epsilon")
        return LocalMechanism(self.clip, self.noise_multiplier)

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the clipped update with its noise."""
        assert view.private is not None
        return self.mechanism.release(updates, view.private("local-dp"))

    def calibrated(self, parts: Sequence[Participation]) -> LocalDp:
        """Return the behaviour with the least noise that keeps the target for whoever takes part most."""
        if self.epsilon is None:
            return self
        rounds = max((part.rounds for part in parts), default=0)
        sigma = noise_for(self.epsilon, lambda s: LocalMechanism(self.clip, s).epsilon(rounds, self.delta, grid=COARSE))
        return dataclasses.replace(self, epsilon=None, noise_multiplier=sigma)

    def account(self, part: Participation) -> Spent:
        """Return what a client has spent."""
        made = self.mechanism
        return Spent(
            unit="client",
            relation="replace-one",
            sampling="none: whoever takes part is seen to",
            clip=self.clip,
            noise_multiplier=made.sigma,
            releases=part.rounds,
            delta=self.delta,
            epsilon=made.epsilon(part.rounds, self.delta),
            epsilon_rdp=made.epsilon(part.rounds, self.delta, method="rdp"),
        )
