"""Coalitions whose members send one and the same thing, small enough to pass for honest: ALIE, IPM, Mimic, PoisonedFL, sybils."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, ClientMemory, View, behaviour
from fedtrust.clients.poisoning import LabelFlip


def in_view(updates: Tensor, view: View) -> Tensor:
    """Return the benign updates from which a coalition reckons [m, d].

    What the honest clients send, where that is granted; else what the coalition's own training gave.
    """
    return updates if view.others is None or not len(view.others) else view.others


def alie_z(n: int, m: int) -> float:
    """Return how many standard deviations m of n clients can be off and still look ordinary; Baruch et al., algorithm 3.

    The coalition needs s = ⌊n/2 + 1⌋ − m supporters among the n − m others to be a majority; z is where a normal variable has all but s of
    these n − m below it: Φ(z) = (n − m − s) ÷ (n − m). It is negative for coalitions so small that the s are more than half of the others.
    Where the coalition is a majority by itself the paper has no z: the quantile is kept between 1/n and 1 − 1/n.
    """
    supporters = n // 2 + 1 - m
    quantile = (n - m - supporters) / (n - m) if n > m else 1.0
    return NormalDist().inv_cdf(min(max(quantile, 1 / n), 1 - 1 / n)) if n > 1 else 0.0


def little(seen: Tensor, z: float) -> Tensor:
    """Return the mean of the updates in view [m, d] less `z` times their standard deviation, coordinate by coordinate [d]."""
    return seen.mean(0) - z * seen.std(0, correction=0)


@behaviour("alie", knowledge="coalition", spread=True, paper="Baruch et al. (A Little Is Enough), NeurIPS 2019, algorithm 3")
class ALittleIsEnough(Behaviour):
    """Send the mean of the updates in view, shifted by `z` standard deviations in every coordinate.

    `z` is the paper's (see `alie_z`) unless it is set. The paper takes mean and deviation from the coalition's own honest updates; where
    the scenario grants more (`omniscient`) they are those of all honest clients, as most libraries have it. The shift is downwards
    (mean − z·std), as in the authors' code; the paper's algorithm writes a plus, and some libraries follow it: the rules that are attacked
    do not tell the two apart. The deviation is that of the population (÷ m), as in the authors' code.
    A member that is alone in a round and sees nobody else's update sees no deviation either, and sends its honest update.
    """

    z: float | None = None

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the same row k times [k, d]."""
        z = alie_z(max(view.cohort, len(updates)), len(updates)) if self.z is None else self.z
        return little(in_view(updates, view), z).expand_as(updates)


@behaviour("ipm", knowledge="coalition", paper="Xie et al. (Fall of Empires), UAI 2019, section 3")
class InnerProduct(Behaviour):
    """Send −`epsilon` times the mean of the honest updates: the inner product of the result with the true one is to turn negative.

    The mean is that of the honest clients where it is granted (`omniscient`, as in the paper), else estimated by the coalition's own. Plain
    averaging over n updates with q bad ones turns round where epsilon > (n − q) ÷ q; robust rules fall to small values (the paper's
    0.1 to 0.5), which hide the update among the honest ones.
    """

    epsilon: Annotated[float, Field(gt=0)] = 0.5

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the same row k times [k, d]."""
        return (-self.epsilon * in_view(updates, view).mean(0)).expand_as(updates)


@behaviour("mimic", knowledge="omniscient", paper="Karimireddy, He and Jaggi, ICLR 2022, section 3.2 (mimic) and its appendix (Oja's rule)")
class Mimic(Behaviour):
    """Copy one honest client, the one that stands out most along the direction in which honest updates differ most.

    Nothing that is sent can be told from honest; what is lost is the others' say. In the first `warm_up` rounds of the attack the direction
    z is learnt by Oja's rule, z ← z·t/(t+1) + v/‖v‖/(t+1) with v = Σ (x − μ)⟨x − μ, z⟩ over the honest updates x and the running mean μ,
    starting at random; the client with the largest ⟨x, z⟩ is copied from the first round on. The paper fixes that client after the warm-up;
    here updates carry no names and cohorts change, so it is z that is fixed, and each round's largest projection is copied. In a round
    without honest clients the coalition sends its honest updates.
    """

    warm_up: Annotated[int, Field(ge=1)] = 10

    def remember(self, size: int) -> ClientMemory:
        """Return the direction [d], the running mean [d], and the number of rounds learnt from [1]."""
        return {"direction": torch.zeros(size), "mean": torch.zeros(size), "rounds": torch.zeros(1, dtype=torch.int64)}

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the chosen honest update k times [k, d]."""
        if view.others is None or not len(view.others):
            return updates
        if int(view.memory["rounds"]) < self.warm_up:
            self._learn(view.others, view)
        return view.others[int((view.others @ view.memory["direction"]).argmax())].expand_as(updates)

    def _learn(self, honest: Tensor, view: View) -> None:
        memory, t = view.memory, int(view.memory["rounds"])
        mean = (t * memory["mean"] + honest.mean(0)) / (t + 1)
        start = torch.randn(honest.shape[1], generator=view.rng) if t == 0 else memory["direction"]
        centred = honest - mean
        pull = (centred @ start) @ centred  # Σ (x − μ)⟨x − μ, z⟩
        learnt = t * memory["direction"] + _unit(pull)
        memory["direction"], memory["mean"] = _unit(learnt), mean
        memory["rounds"] = memory["rounds"] + 1


def _unit(vector: Tensor) -> Tensor:
    """Return the vector with length 1, zero if it is zero."""
    unit: Tensor = vector / vector.norm().clamp(min=1e-30)
    return unit


@behaviour("poisoned-fl", knowledge="coalition", paper="Xie, Fang and Gong (PoisonedFL), CVPR 2025, section 4")
class PoisonedFL(Behaviour):
    """Push the model the same way in every round: along signs s that are drawn once, without looking at anybody's honest update.

    What is sent is λ·v ⊙ s. The magnitudes v are |g − k‖g‖/‖k‖| at unit length, with g the last change of the global model and k what was
    sent before: what remains of g beside the attack itself. The size is λ = c·‖g‖. "Last" and "before" are of the last round in which a
    member was asked. Every `period` rounds of the attack it is tested whether the model has followed s since the last test, if so many
    coordinates as chance would give with probability 1 % or less have the wanted sign (a coordinate that has not moved counts by its
    present sign, as in the authors' code); if not, `c` shrinks by `beta`, not below 0.5. In its first round, with no change of the model
    to go by, the coalition sends no change. Needs no data: these are the paper's fake clients.
    """

    c: Annotated[float, Field(ge=0.5)] = 8.0
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.7
    period: Annotated[int, Field(ge=1)] = 50

    def remember(self, size: int) -> ClientMemory:
        """Return the signs, what was sent, the last model and that of the last test [d], the factor c and the rounds played [1]."""
        vectors = {name: torch.zeros(size) for name in ("signs", "sent", "last", "tested")}
        return {**vectors, "c": torch.full((1,), self.c), "rounds": torch.zeros(1, dtype=torch.int64)}

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the same row k times [k, d]."""
        memory, params = view.memory, view.params
        played = int(memory["rounds"])
        if played == 0:
            memory["signs"] = torch.randint(0, 2, params.shape, generator=view.rng).float() * 2 - 1
            memory["tested"] = params.clone()
        elif played % self.period == 0:
            self._test(memory, params)
        sent = torch.zeros_like(params)
        if played:
            change, before = params - memory["last"], memory["sent"]
            rest = (change - before * (change.norm() / before.norm().clamp(min=1e-30))).abs()
            sent = memory["c"] * change.norm() * _unit(rest) * memory["signs"]
        memory["sent"], memory["last"], memory["rounds"] = sent, params.clone(), memory["rounds"] + 1
        return sent.expand_as(updates)

    def _test(self, memory: ClientMemory, params: Tensor) -> None:
        """Shrink the factor if the model has not followed."""
        moved = params - memory["tested"]
        agree = int((torch.where(moved == 0, params, moved).sign() == memory["signs"]).sum())
        d = len(params)
        if agree < d / 2 + NormalDist().inv_cdf(0.99) * math.sqrt(d) / 2 and float(memory["c"]) * self.beta >= 0.5:
            memory["c"] = memory["c"] * self.beta
        memory["tested"] = params.clone()


@behaviour("sybil", knowledge="coalition", paper="Fung et al. (FoolsGold), RAID 2020, sections 2 and 4: label-flipping sybils")
class Sybil(LabelFlip):
    """One attacker behind many clients: all train on the same wrong labels (see `label-flip`) and, with `clone`, send the same update.

    The clones' update is the mean of what the coalition's training gave. Without `clone` each sends its own: sybils that share a goal and
    not their data, which is the paper's setting.
    """

    clone: bool = True

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the updates [k, d]."""
        return updates.mean(0).expand_as(updates) if self.clone else updates
