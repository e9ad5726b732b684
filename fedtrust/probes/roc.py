"""Receiver operating characteristic of scores that tell members from others: curve, area, true positives at few false alarms, intervals."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from fedtrust.intervals import Interval

#: How sure all intervals of this file are.
LEVEL = 0.95


class Curve(NamedTuple):
    """A ROC curve, a point for every threshold that makes a difference, from (0, 0) to (1, 1); equal scores share a point.

    Attributes:
        fpr, tpr: shares of the others and of the members whose score reaches the threshold, float64 [t].
    """

    fpr: Tensor
    tpr: Tensor


class Rate(NamedTuple):
    """A share that was counted, with its Clopper–Pearson interval."""

    value: float
    low: float
    high: float


def counted(scores: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many others and how many members reach each threshold, from the strictest (nobody) to the laxest (all), int64 [t].

    Args:
        scores: finite, one a candidate [q]; higher means rather a member.
        member: who is one, bool [q].

    Raises:
        ValueError: the shapes differ, a score is not finite, or there is nobody on one of the sides.
    """
    if scores.shape != member.shape or scores.dim() != 1:
        raise ValueError(f"scores {list(scores.shape)} for candidates {list(member.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{int((~torch.isfinite(scores)).sum())} of {len(scores)} scores are not finite")
    if not bool(member.any()) or bool(member.all()):
        raise ValueError(f"{int(member.sum())} of {len(member)} candidates are members: nobody can be told apart")
    order = scores.argsort(descending=True, stable=True)
    ranked, hits = scores[order], member[order].long()
    last = torch.ones(len(ranked), dtype=torch.bool)  # the last of each run of equal scores
    last[:-1] = ranked[1:] != ranked[:-1]
    nobody = torch.zeros(1, dtype=torch.int64)
    return torch.cat([nobody, (1 - hits).cumsum(0)[last]]), torch.cat([nobody, hits.cumsum(0)[last]])


def curve(scores: Tensor, member: Tensor) -> Curve:
    """Return the ROC curve of scores [q], see `counted`."""
    others, members = counted(scores, member)
    return Curve(others.double() / others[-1], members.double() / members[-1])


def auc(scores: Tensor, member: Tensor) -> float:
    """Return the area under the curve: how likely a member scores higher than another candidate; a tie counts half."""
    fpr, tpr = curve(scores, member)
    return float(torch.trapezoid(tpr, fpr))


def auc_interval(area: float, members: int, others: int) -> Interval:
    """Return the interval around an area under the curve of so many members and others.

    Newcombe (Statistics in Medicine 2006, part 2, method 5): all areas θ whose distance from the one seen is at most z·√V(θ), where V is
    Hanley and McNeil's variance with both group sizes replaced by their mean N: θ(1 − θ)(1 + (N − 1)((1 − θ)/(2 − θ) + θ/(1 + θ)))/(mn).
    Unlike DeLong's it has a width where the scores separate the candidates perfectly, which few clients often do.
    """
    z, mean = NormalDist().inv_cdf(0.5 + LEVEL / 2), (members + others) / 2

    def excess(theta: float) -> float:
        spread = theta * (1 - theta) * (1 + (mean - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))) / (members * others)
        return abs(theta - area) - z * math.sqrt(max(spread, 0.0))

    def end(outside: float) -> float:
        inside = area
        if excess(outside) <= 0:
            return outside
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if excess(middle) <= 0 else (inside, middle)
        return inside

    return Interval(end(0.0), end(1.0))


def clopper_pearson(hits: int, of: int) -> Interval:
    """Return the exact interval of a share, given `hits` out of `of` (Clopper and Pearson, Biometrika 1934)."""
    from scipy.special import betaincinv  # type: ignore[import-untyped, unused-ignore]

    tail = (1 - LEVEL) / 2
    low = float(betaincinv(hits, of - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, of - hits, 1 - tail)) if hits < of else 1.0
    return Interval(low, high)


def tpr_at(scores: Tensor, member: Tensor, fpr: float) -> Rate | None:
    """Return the share of the members that is found at a false positive rate of at most `fpr` (Carlini et al., S&P 2022, section IV).

    The interval is that of the share, given the threshold. `None` where there are fewer than 1/`fpr` others: then no threshold between
    "no false alarm" and one that is too many can be told, and the number would be that at a rate of 0.
    """
    others, members = counted(scores, member)
    if int(others[-1]) * fpr < 1 - 1e-9:
        return None
    allowed = others.double() / others[-1] <= fpr + 1e-12
    hits, of = int(members[allowed].max()), int(members[-1])
    return Rate(hits / of, *clopper_pearson(hits, of))


def best_accuracy(scores: Tensor, member: Tensor) -> float:
    """Return the largest balanced accuracy (TPR + 1 − FPR)/2 of all thresholds: what an attacker who knew the best one would have."""
    fpr, tpr = curve(scores, member)
    return float((tpr + 1 - fpr).max() / 2)
