"""The clients' devices and connections: who can be reached, who leaves, who is slow, and what time it is.

Nothing here takes real time. Before a round is trained, its course is worked out on a virtual clock: a client is asked, receives the
model, trains so many samples at its speed, and sends its update back; the round is over when the server has the replies it wants, when
nobody is left to wait for, or at the deadline. Who cannot make it is never trained. The terms are those of FedScale (Lai et al., ICML
2022) and FLASH (Yang et al., WWW 2021): availability, drop-out, and log-normal speeds and bandwidths. Over-selection follows Bonawitz et
al. (MLSys 2019, section 2.2), partial work FedProx (Li et al., MLSys 2020, section 5.2): a straggler stops after as many local steps as
fit and its unfinished update counts. A daily rhythm with a phase of its own for each client is the setting of Eichner et al. (Semi-Cyclic
SGD, ICML 2019).

The cost of a client is what it registered: `local_steps` batches of samples and 4 bytes a parameter each way. What a behaviour does
beyond that (an attacker's optimisation, a regulariser) takes no virtual time.

Every draw is a position in a stream of its own, the client's id being the position: what happens to a client does not depend on who else
is asked.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedtrust.engine import seeds
from fedtrust.engine.prepare import local_steps
from fedtrust.engine.roster import cohort

if TYPE_CHECKING:
    from fedtrust.engine.world import World
    from fedtrust.scenario_parts import RateSpec, SystemSpec

Floats = npt.NDArray[np.float64]

#: What becomes of a client that was asked. Only `replied` and `partial` are trained.
Fate = Literal["replied", "partial", "late", "dropped-out", "surplus"]

#: The ids of clients that cannot be reached are recorded in federations of up to so many.
MOST_LISTED = 1000

_BYTES = 4  # of a parameter on the wire


class Part(NamedTuple):
    """One client's part in a round.

    Attributes:
        fate: what becomes of it.
        seconds: when its reply comes, in virtual seconds from the start of the round; would come, for one that is late or surplus; for one
            that drops out when it leaves.
        steps: the local steps it has time for.
        fault: why the server gets no reply of it, or `None`.
    """

    fate: Fate
    seconds: float
    steps: int
    fault: str | None


@dataclass(frozen=True)
class Plan:
    """The course of a round, known before it is trained.

    Attributes:
        asked: the clients that are asked, sorted.
        parts: what becomes of each; empty in a world without devices.
        wanted: how many replies the server waits for.
        reachable: how many clients could be reached.
        unreachable: the ids of those that could not; empty above `MOST_LISTED` clients.
        duration: virtual seconds that the round takes; `None` where nothing takes time.
    """

    asked: Sequence[int]
    parts: Mapping[int, Part] = field(default_factory=dict)
    wanted: int = 0
    reachable: int | None = None
    unreachable: tuple[int, ...] = ()
    duration: float | None = None

    @cached_property
    def absent(self) -> dict[int, str]:
        """Client → why the server gets no reply of it."""
        return {c: p.fault for c, p in self.parts.items() if p.fault is not None}

    @cached_property
    def limits(self) -> dict[int, int]:
        """Client → the largest number of local steps, for those who do not do all."""
        return {c: p.steps for c, p in self.parts.items() if p.fate == "partial"}

    def after(self, clock: float) -> float:
        """Return the virtual time when the round is over, in seconds; to the microsecond, so that records hold it exactly."""
        return clock if self.duration is None else round(clock + self.duration, 6)

    def round_fields(self, clock: float) -> dict[str, Any]:
        """Return what the line of the round says about it; `clock` is the virtual time when it is over."""
        if self.reachable is None:
            return {}
        fates = ("partial", "late", "dropped-out", "surplus")
        found: dict[str, Any] = {"reachable": self.reachable, "unreachable": list(self.unreachable)}
        found["fates"] = {fate: [c for c, p in self.parts.items() if p.fate == fate] for fate in fates}
        return found if self.duration is None else {**found, "duration": self.duration, "clock": clock}

    def client_fields(self, client: int) -> dict[str, Any]:
        """Return what the line of a client says about it."""
        part = self.parts.get(client)
        if part is None:
            return {}
        found = {"fate": part.fate, "steps": part.steps if part.fault is None else 0}
        return found if self.duration is None else {**found, "virtual_seconds": part.seconds}


class Devices:
    """The devices of a run's clients.

    Attributes:
        steps: the local steps of a whole round's work, by client [n].
        timed: whether anything takes time.
    """

    def __init__(self, spec: SystemSpec, *, seed: int, samples: Sequence[int], batch_size: int, epochs: int, parameters: int) -> None:
        """Deal out speeds, bandwidths and phases.

        Args:
            spec: what the scenario says about them.
            seed: the scenario's seed.
            samples: how many training samples each client has registered.
            batch_size: samples a local step.
            epochs: local epochs a round.
            parameters: the model's size.
        """
        self._spec, self._seed, self.timed = spec, seed, spec.timed
        self._count, self._batch, self._bytes = len(samples), batch_size, 2 * _BYTES * parameters
        self.steps = np.array([local_steps(n, batch_size, epochs) for n in samples])
        self._speed = self._rates(spec.speed, "device/speed")
        self._bandwidth = self._rates(spec.bandwidth, "device/bandwidth")
        self._phase = spec.availability.spread * seeds.stream(self._seed, "device/phase").random(self._count)

    @classmethod
    def of(cls, spec: SystemSpec, world: World) -> Devices:
        """Return the devices of a run's clients."""
        samples = [len(part) for part in world.data.parts]
        size = world.layout.size
        return cls(spec, seed=world.seed, samples=samples, batch_size=world.batch_size, epochs=world.epochs, parameters=size)

    def describe(self) -> str:
        """Say in a line what is to be expected of them, before anything runs."""
        spec = self._spec
        words = [f"{100 * spec.availability.mean:.3g} % of the clients can be reached on average"]
        if self.timed:
            one, there_and_back = self.times(1)
            needed = there_and_back + self.steps * one
            low, middle, high = (f"{t:.3g}" for t in (needed.min(), np.median(needed), needed.max()))
            words.append(f"a round's work takes them {low} to {high} s of virtual time (median {middle})")
            if spec.deadline is not None:
                words.append(f"{100 * float((needed > spec.deadline).mean()):.0f} % cannot do all of it within {spec.deadline:g} s")
        return f"devices: {'; '.join(words)}"

    def _rates(self, spec: RateSpec | None, purpose: str, *counters: int) -> Floats | None:
        """Return each client's own rate [n], or with the round as a counter its factor of that round."""
        if spec is None:
            return None
        sigma, middle = (spec.jitter, 1.0) if counters else (spec.sigma, spec.median)
        factors: Floats = np.exp(sigma * seeds.stream(self._seed, purpose, *counters).standard_normal(self._count))
        return middle * factors

    def probability(self, round_number: int, clock: float) -> Floats:
        """Return how likely each client can be reached [n], in a round that starts at the virtual time `clock` (seconds)."""
        spec = self._spec.availability
        if spec.period is None:
            return np.full(self._count, spec.mean)
        time = clock if spec.unit == "seconds" else round_number
        swing: Floats = np.cos(2 * math.pi * (time / spec.period - self._phase))
        return spec.mean + spec.amplitude * swing

    def times(self, round_number: int) -> tuple[Floats, Floats]:
        """Return, for a round, what one local step takes each client and what sending the model there and back takes, [n] each, seconds."""
        nothing = np.zeros(self._count)
        one, there_and_back = nothing, nothing
        jitter = self._rates(self._spec.speed, "device/speed", round_number)
        if self._speed is not None and jitter is not None:
            one = self._batch / (self._speed * jitter)
        jitter = self._rates(self._spec.bandwidth, "device/bandwidth", round_number)
        if self._bandwidth is not None and jitter is not None:
            there_and_back = self._bytes / (self._bandwidth * jitter)
        return one, there_and_back

    def plan(self, round_number: int, per_round: int, clock: float, acting: Collection[int] = ()) -> Plan:
        """Work out a round.

        Args:
            round_number: from 1.
            per_round: how many replies the scenario wants.
            clock: the virtual time at its start, seconds.
            acting: the malicious clients that act in it.
        """
        spec = self._spec
        favoured = np.isin(np.arange(self._count), list(acting)) & spec.attackers_always_available
        there = (self._draws("device/availability", round_number) < self.probability(round_number, clock)) | favoured
        reachable = np.flatnonzero(there).tolist()
        missing = tuple(np.flatnonzero(~there).tolist()) if self._count <= MOST_LISTED else ()
        idle = spec.idle if self.timed else None
        if not reachable:
            return Plan([], reachable=0, unreachable=missing, duration=idle)
        number = math.ceil(per_round * (1 + spec.over_select) - 1e-9)
        asked = cohort(self._count, number, self._seed, round_number, reachable)
        wanted = min(per_round, len(asked))
        parts, end = self._course(round_number, asked, wanted, favoured)
        return Plan(asked, parts, wanted, len(reachable), missing, round(end, 6) if self.timed else None)

    def _draws(self, purpose: str, round_number: int) -> Floats:
        """Return one uniform draw from [0, 1) a client [n]."""
        return seeds.stream(self._seed, purpose, round_number).random(self._count)

    def _course(
        self, round_number: int, asked: Sequence[int], wanted: int, favoured: npt.NDArray[np.bool_]
    ) -> tuple[dict[int, Part], float]:
        """Return what becomes of each client, and when the round is over."""
        leaves = (self._draws("device/drop-out", round_number) < self._spec.dropout) & ~favoured
        moment = self._draws("device/moment", round_number)  # a client leaves at any point of its work alike
        ties = self._draws("device/arrival", round_number)  # of replies that come at the same time, any may be first
        one, there_and_back = self.times(round_number)
        parts: dict[int, Part] = {}
        for c in asked:
            part = self._alone(int(self.steps[c]), float(one[c]), float(there_and_back[c]))
            if leaves[c] and part.seconds * moment[c] <= self._limit:
                part = Part("dropped-out", round(part.seconds * float(moment[c]), 6), 0, "dropped out")
            parts[c] = part
        arrived = sorted((c for c in asked if parts[c].fault is None), key=lambda c: (parts[c].seconds, ties[c]))
        if len(arrived) >= wanted:
            end = min(self._limit, parts[arrived[wanted - 1]].seconds)
            taken = set(arrived[:wanted])
            for c in asked:
                if c not in taken and (parts[c].fault is None or parts[c].seconds > end):
                    parts[c] = parts[c]._replace(fate="surplus", fault=f"surplus: {wanted} others were faster")
            return parts, end
        return parts, min(self._limit, max(p.seconds for p in parts.values()))

    @property
    def _limit(self) -> float:
        return math.inf if self._spec.deadline is None else self._spec.deadline

    def _alone(self, steps: int, one: float, there_and_back: float) -> Part:
        """Return what becomes of a client that does not leave, as if the server waited for everybody until the deadline."""
        needed = there_and_back + steps * one
        if needed <= self._limit * (1 + 1e-12):
            return Part("replied", round(needed, 6), steps, None)
        fits = math.floor((self._limit - there_and_back) / one + 1e-9) if self._spec.late == "partial" and one > 0 else 0
        fits = min(fits, steps - 1)
        if fits >= 1:
            return Part("partial", round(there_and_back + fits * one, 6), fits, None)
        return Part("late", round(needed, 6), steps, f"late: needed {needed:.4g} s, deadline {self._limit:.4g} s")
