"""Central client-level differential privacy: sampler, clip, noise, accountant and ledger as one object.

The object draws the cohort of every round, clips and sums, adds the noise, notes the release and says what all of it has cost. Nobody else
can name an ε: it is computed from the ledger, under the sampler's neighbouring relation. Everything the server does afterwards (its
optimiser, say) is post-processing.

The noise comes from NumPy's Philox generator with a key of 128 bits derived from the run's seed (`engine/seeds.py`): whoever knows the
seed of a run can take its noise off again, as he can draw its cohorts. A guarantee holds against those who do not.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtrust.engine import seeds
from fedtrust.errors import InputError, RunError
from fedtrust.privacy import banded
from fedtrust.privacy.accountants import COARSE, FINE, Method, Release, epsilon_of
from fedtrust.privacy.clipping import AdaptiveClip, Clip, ClipRule, FixedClip, clip
from fedtrust.privacy.samplers import RoundRobin, Sampler, overlap
from fedtrust.server import Stage, State

#: Where the mechanism's state lies in the checkpoint, and the place of its clip in the pipeline.
PLACE = "privacy"
CLIP_PLACE = "filters[privacy]"

#: The columns of the ledger, a row a release: σ is what the release costs as a whole; `clip` bounded the rows; `std` was on their sum.
LEDGER = ("round", "sigma", "per_round", "count", "clip", "std")


class Released(NamedTuple):
    """A round's release.

    Attributes:
        mean: the noised sum of the clipped rows ÷ the expected size of a cohort [d]; nothing else may leave the server.
        state: the ledger with the release in it, and the next bound.
    """

    mean: Tensor
    state: State


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """DP-FedAvg: clip, sum, add Gaussian noise, divide by the expected number of clients (McMahan et al., ICLR 2018, algorithm 1).

    Its `W` and denominators are those of the fixed-denominator estimator f̃_f of that paper: q·N whatever the size of the cohort, every
    client with the same weight. Clients that were drawn and did not reply count as an update of zero, an empty cohort still releases noise.

    Attributes:
        sampler: who takes part.
        clip: what bounds an update.
        sigma: the noise multiplier: what a release costs is that of Gaussian noise of σ × its sensitivity, which is reach × clip.
        delta: δ.
        rounds: how many releases are planned.
        seed: the run's.
    """

    sampler: Sampler
    clip: Clip
    sigma: float
    delta: float
    rounds: int
    seed: int

    name: ClassVar[str] = "dp-fedavg"

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"the noise multiplier must be above 0, got {self.sigma}")
        self.update_noise  # noqa: B018 -- an adaptive clip may not leave anything for the updates

    # Who takes part

    def cohort(self, round_number: int) -> list[int]:
        """Return who is asked in a round, sorted."""
        return self.sampler.draw(round_number)

    # What is done to the updates

    @functools.cached_property
    def update_noise(self) -> float:
        """The noise multiplier of the sum alone: above σ where an adaptive clip spends a part of the release."""
        return self.clip.update_noise(self.sigma) if isinstance(self.clip, AdaptiveClip) else self.sigma

    def bound(self, state: State) -> float:
        """Return the L2 bound of the next round."""
        return float(state["clip"]) if "clip" in state else self.clip.first

    def sensitivity(self, bound: float) -> float:
        """Return how far two neighbours' sums of clipped rows can lie apart, L2."""
        return self.sampler.reach * bound

    def std(self, bound: float) -> float:
        """Return the standard deviation of the noise on each coordinate of the sum."""
        return self.update_noise * self.sensitivity(bound)

    def stage(self, state: State) -> Stage:
        """Return the server filter that clips in the next round."""
        return Stage(CLIP_PLACE, f"{self.name} clip", ClipRule(self.bound(state)), rowwise=True)

    def apply(self, rows: Tensor, round_number: int, state: State) -> Released:
        """Return what a round releases of the updates of its cohort, rows [n, d]: clip, sum, `release`. What an audit drives."""
        clipped, factor = clip(rows, self.bound(state))
        return self.release(clipped.sum(0), factor, round_number, state)

    def release(self, total: Tensor, factor: Tensor, round_number: int, state: State) -> Released:
        """Return the noised mean and the new ledger.

        Args:
            total: the sum of the rows [d], each clipped by `stage`.
            factor: by how much each row was scaled [n]; 1: it was within the bound.
            round_number: counted from 1; each is released once.
            state: the ledger so far.

        Raises:
            RunError: the round has been released already, or is not the next one: its noise would be used twice.
        """
        ledger = self.ledger(state)
        if round_number != len(ledger) + 1:
            raise RunError(f"round {round_number} cannot be released: the privacy ledger stands at {len(ledger)} releases")
        bound = self.bound(state)
        std = self.std(bound)
        noised = total.double() + torch.from_numpy(std * self.noise(round_number, total.numel()))
        entry = torch.tensor([[round_number, self.sigma, self.sampler.per_round, self.sampler.count, bound, std]], dtype=torch.float64)
        following = torch.tensor(self._next(bound, factor, round_number), dtype=torch.float64)
        new = {"ledger": torch.cat([ledger, entry]), "terms": self._terms, "clip": following}
        return Released((noised / self.sampler.per_round).float(), new)

    def noise(self, round_number: int, size: int) -> npt.NDArray[np.float64]:
        """Return the standard normal noise of a round [size]."""
        return seeds.stream(self.seed, "privacy/noise", round_number).standard_normal(size)

    def _next(self, bound: float, factor: Tensor, round_number: int) -> float:
        if not isinstance(self.clip, AdaptiveClip):
            return bound
        within = float((factor == 1).double().sum())
        noise = self.clip.noise * self.sampler.reach * seeds.stream(self.seed, "privacy/count", round_number).standard_normal()
        return self.clip.next(bound, within - 0.5 * len(factor) + noise, self.sampler.per_round)

    # What it has cost

    def ledger(self, state: State) -> Tensor:
        """Return the releases so far, float64 [r, 6]; see `LEDGER`."""
        return state.get("ledger", torch.zeros(0, len(LEDGER), dtype=torch.float64))

    def check(self, state: State) -> None:
        """Refuse a ledger that is not this mechanism's.

        Raises:
            InputError: some release had other noise or another sampling, or was made for another δ.
        """
        terms = state.get("terms")
        if len(self.ledger(state)) and (terms is None or not torch.equal(terms, self._terms)):
            raise InputError("the privacy ledger was kept under other terms (mechanism, sampling, δ) than this mechanism's")
        for row in self.ledger(state).tolist():
            said = dict(zip(LEDGER, row, strict=True))
            if (said["sigma"], said["per_round"], said["count"]) != (self.sigma, self.sampler.per_round, self.sampler.count):
                raise InputError(f"the privacy ledger's release of round {said['round']:g} is not one of this mechanism")

    @property
    def _terms(self) -> Tensor:
        """What its releases are accounted under, as a checkpoint can hold it: bytes [b]."""
        facts = self.facts()
        said = [str(facts.get(key, "")) for key in ("mechanism", "sampling", "relation", "delta", "bands", "participations")]
        return torch.tensor(list("|".join(said).encode()), dtype=torch.uint8)

    def releases(self, count: int) -> dict[Release, int]:
        """Return how `count` rounds are accounted for."""
        return {self.sampler.release(self.sigma): count}

    def epsilon(self, count: int, *, method: Method | None = None, grid: float = FINE) -> float:
        """Return the ε at δ of the first `count` releases.

        Args:
            count: how many.
            method: `pld` or `rdp`; by default the first of the two that is known for the sampling.
            grid: bin width of the privacy loss distribution.
        """
        return epsilon_of(self.releases(count), self.delta, method=method or self.methods[0], grid=grid)

    @functools.cached_property
    def methods(self) -> tuple[Method, ...]:
        """How it can be accounted for: `pld` where the privacy loss distribution is known, and `rdp`."""
        release = self.sampler.release(self.sigma)
        return ("pld", "rdp") if release.cohort is None or release.whole else ("rdp",)

    def spent(self, state: State, *, grid: float = COARSE) -> float:
        """Return the ε that the releases in a ledger have cost; by default as each round's record has it, never below the true one."""
        return self.epsilon(len(self.ledger(state)), grid=grid)

    def belongs(self, round_number: int, clients: tuple[int, ...]) -> None:
        """Refuse updates of clients whom the sampler did not draw.

        Raises:
            RunError: the accounting assumes the sampling that it drew.
        """
        others = overlap(self.cohort(round_number), clients)
        if others:
            raise RunError(f"client {others[0]} sent an update in round {round_number}, but the privacy mechanism did not draw it")

    # What to say of it

    def burden(self, size: int) -> float:
        """Return the expected L2 norm of a round's noise on the mean, as a multiple of the clip: of the longest update there can be.

        Args:
            size: d, the number of parameters.
        """
        return self.update_noise * self.sampler.reach * math.sqrt(size) / self.sampler.per_round

    def facts(self) -> dict[str, Any]:
        """Return what it is, as plain data."""
        kind = isinstance(self.clip, AdaptiveClip)
        return {
            "mechanism": self.name,
            "unit": "client",
            "relation": self.sampler.relation,
            "sampling": self.sampler.name,
            "sampled": self.sampler.describe(),
            "count": self.sampler.count,
            "per_round": self.sampler.per_round,
            "clip_kind": "adaptive" if kind else "fixed",
            "noise_multiplier": self.sigma,
            "update_noise_multiplier": self.update_noise,
            "sensitivity": f"{self.sampler.reach} × clip" if self.sampler.reach != 1 else "the clip",
            "delta": self.delta,
        }


@dataclass(frozen=True, kw_only=True)
class BandedMechanism(Mechanism):
    """DP-FTRL with a banded square root: noise that partly cancels over the rounds, and no assumption on the sampling.

    Kairouz et al., ICML 2021 (DP-FTRL); Choquette-Choo et al., NeurIPS 2023 (banded matrices); see `fedtrust.privacy.banded`. Clients
    take part in a fixed order. The sensitivity is that of all rounds together, computed exactly for the rounds that each client is in; one
    Gaussian release of σ × that. Neighbours: all of one client's updates replaced by zeros (its place in the order stays).

    Attributes:
        bands: how many rounds the noise is correlated over, b; 1: independent noise.
    """

    bands: int = 1
    sampler: RoundRobin
    clip: FixedClip

    name: ClassVar[str] = "dp-ftrl"

    @functools.cached_property
    def _column(self) -> npt.NDArray[np.float64]:
        return banded.square_root(min(self.bands, self.rounds))

    @functools.cached_property
    def _inverse(self) -> npt.NDArray[np.float64]:
        return banded.inverse(self._column, self.rounds)

    @functools.cached_property
    def _reach(self) -> list[float]:
        """How far one client of clip 1 moves the first t rounds of C x; t = 0 … rounds."""
        parts = self.sampler.participations(self.rounds)
        return [banded.sensitivity(self._column, parts, t) for t in range(self.rounds + 1)]

    def std(self, bound: float) -> float:
        """Return the standard deviation of the independent noise z on each coordinate."""
        return self.sigma * self._reach[self.rounds] * bound

    def noise(self, round_number: int, size: int) -> npt.NDArray[np.float64]:
        """Return (C⁻¹ z) of a round [size] for standard normal z; the noise of earlier rounds is drawn again from its own streams."""
        if round_number > self.rounds:
            raise RunError(f"round {round_number} is beyond the {self.rounds} that the noise was made for")
        total = np.zeros(size)
        for earlier in range(1, round_number + 1):
            factor = self._inverse[round_number - earlier]
            if factor:
                total += factor * super().noise(earlier, size)
        return total

    def releases(self, count: int) -> dict[Release, int]:
        """Return the first `count` rounds as one Gaussian release: what they move is less than what all rounds do."""
        if not count:
            return {}
        return {Release(self.sigma * self._reach[self.rounds] / self._reach[count]): 1}

    def burden(self, size: int) -> float:
        """Return the expected L2 norm of the last round's noise on the mean as a multiple of the clip."""
        return self.std(1.0) * float(np.linalg.norm(self._inverse)) * math.sqrt(size) / self.sampler.per_round

    def facts(self) -> dict[str, Any]:
        """Return what it is, as plain data."""
        most = max(len(part) for part in self.sampler.participations(self.rounds))
        more = {"bands": min(self.bands, self.rounds), "participations": most, "sensitivity": f"{self._reach[self.rounds]:.4g} × clip"}
        return {**super().facts(), **more}
