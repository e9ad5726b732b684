"""Coalitions that work out how far they can go: Min-Max, Min-Sum, Fang's attacks, and searches against the very rule that is in place.

Formulas for models hold for updates too: a distance between two models is that between their updates, and Krum and the trimmed mean move
with their inputs. Where a formula speaks of models themselves (Fang's attack on the trimmed mean) it is applied to models.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, View, behaviour
from fedtrust.clients.collusion import InnerProduct, alie_z, in_view, little

#: Coordinates that are looked at together.
_BLOCK = 1 << 16


def squared_gaps(rows: Tensor) -> Tensor:
    """Return the squared distances between the rows, float64 [m, m]."""
    mean = rows.mean(0)
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for block, middle in zip(torch.split(rows, _BLOCK, dim=1), torch.split(mean, _BLOCK), strict=True):
        centred = block.double() - middle.double()
        gram += centred @ centred.T
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0).fill_diagonal_(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bounded(Behaviour):
    """What Min-Max and Min-Sum share: a direction to go, and a distance that must not be exceeded."""

    direction: Literal["unit", "std", "sign"] = "std"

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the mean of the updates in view plus γ times the direction, k times [k, d]."""
        seen = in_view(updates, view)
        mean = seen.mean(0)
        if self.direction == "std":
            perturbation = -seen.std(0, correction=0)
        else:
            perturbation = -(mean / mean.norm().clamp(min=1e-30) if self.direction == "unit" else mean.sign())
        exact = perturbation.double()
        # ‖mean + γp − uᵢ‖² = away[i] + 2γ·along[i] + γ²‖p‖²
        pairs = [(float(gap @ gap), float(gap @ exact)) for gap in (mean.double() - row.double() for row in seen)]
        away, along = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        gamma = self._gamma(away, along, float(exact @ exact), squared_gaps(seen))
        return (mean + gamma * perturbation).expand_as(updates)

    @abstractmethod
    def _gamma(self, away: Tensor, along: Tensor, length: float, gaps: Tensor) -> float:
        """Return the largest γ that is allowed."""


def _larger_root(square: float, half: Tensor, constant: Tensor) -> Tensor:
    """Return the larger root of square·γ² + 2·half·γ + constant, for constants below or at zero."""
    return (-half + (half.square() - square * constant.clamp(max=0)).sqrt()) / square


_SHEJWALKAR = "Shejwalkar and Houmansadr, NDSS 2021, section IV"


@behaviour("min-max", knowledge="coalition", spread=True, paper=f"{_SHEJWALKAR} and algorithm 1 (Min-Max)")
class MinMax(_Bounded):
    """Go as far as the farthest honest pair is apart: the largest distance to any benign update is at most that between two of these.

    `direction` is the paper's ∇ᵖ: against the mean (`unit`), against its signs (`sign`), or down by the standard deviations (`std`). γ is
    the largest that keeps the bound. The paper's algorithm 1 halves steps towards it until they are smaller than a tolerance; the bound
    is a quadratic in γ, so it is solved here, which is what the search converges to where its start is large enough. Benign updates are
    the honest clients' where granted (`omniscient`), else what the coalition's own training gave; a member that is alone with these leaves
    itself no room, and sends its honest update.
    """

    def _gamma(self, away: Tensor, along: Tensor, length: float, gaps: Tensor) -> float:
        return float(_larger_root(length, along, away - gaps.max()).min()) if length else 0.0


@behaviour("min-sum", knowledge="coalition", spread=True, paper=f"{_SHEJWALKAR} and algorithm 1 (Min-Sum)")
class MinSum(_Bounded):
    """Go as far as the loneliest honest client is.

    The sum of squared distances to the benign updates is at most the largest such sum of one of these. Otherwise as `min-max`: γ is solved
    for, where the paper searches.
    """

    def _gamma(self, away: Tensor, along: Tensor, length: float, gaps: Tensor) -> float:
        over = away.sum() - gaps.sum(1).max()
        return float(_larger_root(len(away) * length, along.sum(), over)) if length else 0.0


@behaviour("fang-krum", knowledge="coalition", paper="Fang, Cao, Jia and Gong, USENIX Security 2020, section 4.2 (Krum)")
class FangKrum(Behaviour):
    """Send the global model moved by λ in every coordinate against the direction in which it would go, so that Krum picks that.

    Full knowledge (`omniscient`): the direction is that of the update that Krum would pick without attack; λ starts at the paper's upper
    bound (theorem 1) and is halved until Krum, given the k crafted copies and the honest updates, picks a crafted one, or λ falls below
    `threshold`. Partial knowledge: the direction is that of the mean of the coalition's own updates, which also stand for the honest ones,
    and if no λ will do one more crafted copy is added to them, as in the paper. Krum's number of attackers in these trials is the number of
    crafted copies, which the paper leaves open. The k copies are equal (the paper's ε is 0). A coordinate whose update is exactly zero
    has no direction and is left alone, and d in the bound is the number of the others.
    """

    threshold: Annotated[float, Field(gt=0)] = 1e-5

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the same row k times [k, d]."""
        k = len(updates)
        if view.others is not None and len(view.others):
            everybody = torch.cat([updates, view.others])
            signs = everybody[int(_krum_scores(squared_gaps(everybody), k).argmin())].sign()
            benign, copies = view.others, [k]
        else:
            signs, benign, copies = updates.mean(0).sign(), updates, list(range(1, k + 1))
        gaps = squared_gaps(benign)
        reach = [(float(row.double() @ row.double()), float(row.double() @ signs.double())) for row in benign]
        norms, along = torch.tensor(reach, dtype=torch.float64).unbind(1)
        size, factor = float(signs.abs().sum()), 0.0
        for crafted in copies:
            factor, picked = self._search(gaps, norms, along, size, crafted)
            if picked:
                break
        return (-factor * signs).expand_as(updates)

    def _search(self, gaps: Tensor, norms: Tensor, along: Tensor, size: float, crafted: int) -> tuple[float, bool]:
        """Return λ and whether Krum picks a crafted copy of `crafted` at it."""
        if size == 0:
            return 0.0, False
        factor = upper_bound(gaps, norms, size, crafted)
        while True:
            between = (norms + 2 * factor * along + factor**2 * size).clamp(min=0)  # ‖−λs − uᵢ‖²
            if _picks_crafted(gaps, between, crafted):
                return factor, True
            if factor < self.threshold:
                return factor, False
            factor /= 2


def _krum_scores(gaps: Tensor, f: int) -> Tensor:
    """Return each row's sum of squared distances to its n − f − 2 nearest other rows (at least one); Blanchard et al., section 4."""
    others = gaps.clone().fill_diagonal_(math.inf)
    return others.sort(dim=1).values[:, : max(1, len(gaps) - f - 2)].sum(dim=1)


def _picks_crafted(gaps: Tensor, between: Tensor, crafted: int) -> bool:
    """Return whether Krum picks a crafted copy: `gaps` [m, m] between benign updates, `between` [m] from these to the copies."""
    m = len(gaps)
    full = torch.zeros(crafted + m, crafted + m, dtype=torch.float64)
    full[crafted:, crafted:] = gaps
    full[:crafted, crafted:] = between
    full[crafted:, :crafted] = between[:, None]
    return int(_krum_scores(full, crafted).argmin()) < crafted


def upper_bound(gaps: Tensor, norms: Tensor, size: float, crafted: int) -> float:
    """Return Fang et al.'s theorem 1: no larger λ can be picked by Krum.

    Args:
        gaps: squared distances between the m benign updates, float64 [m, m].
        norms: their squared norms, that is squared distances to the global model [m].
        size: the number of coordinates that are moved.
        crafted: how many crafted copies there are, c; n = m + c.
    """
    m = len(gaps)
    nearest = gaps.clone().fill_diagonal_(math.inf).sort(dim=1).values[:, : max(1, m - 2)]  # n − c − 2 = m − 2
    closest = float(nearest.sum(dim=1).min()) if m > 1 else 0.0
    return math.sqrt(closest / (max(1, m - crafted - 1) * size)) + math.sqrt(float(norms.max()) / size)


@behaviour(
    "fang-trimmed-mean",
    knowledge="coalition",
    spread=True,
    paper="Fang, Cao, Jia and Gong, USENIX Security 2020, sections 4.3 (and 4.4: median)",
)
class FangTrimmedMean(Behaviour):
    """Send, in every coordinate, numbers just beyond all honest ones on the side that the model is not going to.

    Full knowledge (`omniscient`): where the trimmed mean of all updates before the attack would go up, numbers below the honest minimum,
    between it and `b` times as far or 1/b as far from zero, whichever lies below; mirrored where it would go down. As the paper has it
    these are numbers of the local model, so large weights allow far more than small ones; `of = "update"` takes the update in place of the
    model, as the authors' later code does. Partial knowledge: with mean μ and deviation σ of the coalition's own updates, numbers between
    μ − 4σ and μ − 3σ where μ goes up, between μ + 3σ and μ + 4σ where it goes down; alone a member then sees no deviation and sends its
    honest update. Each member draws its own. A coordinate that would not move at all is left alone.
    """

    b: Annotated[float, Field(gt=1)] = 2.0
    of: Literal["model", "update"] = "model"

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the crafted updates [k, d]."""
        draw = torch.rand(updates.shape, generator=view.rng)
        if view.others is None or not len(view.others):
            mean, std = updates.mean(0), updates.std(0, correction=0)
            return mean - mean.sign() * (3 + draw) * std
        signs = _trimmed_mean(torch.cat([updates, view.others]), len(updates)).sign()
        base = view.params if self.of == "model" else torch.zeros_like(view.params)
        edge = base + torch.where(signs > 0, view.others.amin(0), view.others.amax(0))
        # Away from zero where the edge lies on the side to go to, towards it where it does not.
        far = torch.where(signs * edge > 0, edge / self.b, edge * self.b)
        return (edge + draw * (far - edge) - base) * signs.abs()


def _trimmed_mean(rows: Tensor, f: int) -> Tensor:
    """Return the mean of each coordinate without its f largest and f smallest numbers [d]; of all of them where too few are left."""
    cut = f if len(rows) > 2 * f else 0
    return torch.cat([part.sort(dim=0).values[cut : len(rows) - cut].mean(0) for part in torch.split(rows, _BLOCK, dim=1)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Search(Behaviour):
    """What the searches share: the factor that moves the server's rule the farthest away from the honest mean."""

    evaluations: Annotated[int, Field(ge=10)] = 16
    most: Annotated[float, Field(gt=0)] = 16.0

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the same row k times [k, d]."""
        if view.defence is None:
            raise ValueError("the server's rule cannot be tried: only fedtrust's own rules can be granted, not Flower's")
        if view.others is None or not len(view.others):
            return updates
        honest, defence, k = view.others, view.defence, len(updates)
        mean = honest.mean(0)

        def damage(factor: float) -> float:
            crafted = self._row(honest, factor).expand(k, -1)
            return float((defence(torch.cat([honest, crafted])) - mean).double().norm())

        tried = {factor: damage(factor) for factor in {self._fixed(view, k), *(self.most / 2**i for i in range(8))}}
        side = 1
        while len(tried) < self.evaluations:  # between the best so far and its neighbours, left and right in turn
            factors = sorted(tried)
            best = factors.index(_best(tried))
            side = -side if 0 < best < len(factors) - 1 else 1 if best == 0 else -1
            middle = (factors[best] + factors[best + side]) / 2
            if middle in tried:
                break
            tried[middle] = damage(middle)
        return self._row(honest, _best(tried)).expand_as(updates)

    @abstractmethod
    def _row(self, honest: Tensor, factor: float) -> Tensor:
        """Return the attack with that factor [d]."""

    @abstractmethod
    def _fixed(self, view: View, k: int) -> float:
        """Return the factor of the attack without a search."""


def _best(tried: dict[float, float]) -> float:
    """Return the factor that does the most damage; of equals the smallest."""
    return max(sorted(tried), key=lambda factor: tried[factor])


_LINE_SEARCH = "Allouah et al., AISTATS 2023, and Gonzalez et al. (ByzFL), 2025: the optimised form, by line search"


@behaviour("alie-search", knowledge="omniscient+defence", paper=f"Baruch et al., NeurIPS 2019, algorithm 3; {_LINE_SEARCH}")
class ALittleIsEnoughSearch(_Search):
    """ALIE (mean − z·std of the honest updates) with the z that does the server's own rule the most harm this round.

    What is maximised is ‖rule(honest updates, k copies of the crafted one) − mean of the honest updates‖, with the rule as the scenario
    grants it. Tried are ALIE's own z and `most`/2⁷ … `most`/2, `most`; then, up to `evaluations` calls of the rule, midpoints between the
    best so far and its neighbours. ByzFL doubles a step from zero and then shrinks it; a grid first finds the peaks of rules that cut
    off what is too large. So the search never does less harm, by this measure, than the fixed attack. The rule is tried as the
    server will use it: with its past, on the rows of clients that it knows again (FoolsGold, FLDetector, FLANDERS, DPA). In a
    round without honest clients the coalition sends its honest updates.
    """

    def _row(self, honest: Tensor, factor: float) -> Tensor:
        return little(honest, factor)

    def _fixed(self, view: View, k: int) -> float:
        return alie_z(max(view.cohort, k), k)


@behaviour("ipm-search", knowledge="omniscient+defence", paper=f"Xie et al., UAI 2019, section 3; {_LINE_SEARCH}")
class InnerProductSearch(_Search):
    """IPM (−ε times the mean of the honest updates) with the ε that does the server's own rule the most harm this round.

    The search is that of `alie-search`; it starts with `ipm`'s own 0.5.
    """

    def _row(self, honest: Tensor, factor: float) -> Tensor:
        return -factor * honest.mean(0)

    def _fixed(self, view: View, k: int) -> float:
        return InnerProduct.epsilon
