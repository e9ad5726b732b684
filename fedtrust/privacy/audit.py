"""Empirical lower bounds on ε: what an adversary can be shown to have learnt, against what was claimed.

Two audits, side by side. In many trials the mechanism runs with and without a canary, and a threshold test says which; Clopper–Pearson
bounds on its errors bound ε from below, at any δ, with the stated confidence (Jagielski, Ullman and Oprea, NeurIPS 2020; Nasr et al., IEEE
S&P 2021). In one run with many canaries, each there by the fall of a fair coin, an auditor guesses the coins (Steinke, Nasr and Jagielski,
NeurIPS 2023). The first is sharper, the second needs one run.

A mechanism does not promise one pair of ε and δ but a whole curve ε(δ), and few trials can show nothing about a δ of 1e-5. So the trials
are held against several points of the curve that the mechanism's own accountant gives, and the bound at the δ that the user asked for is
reported beside that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

#: The points of a mechanism's curve ε(δ) that trials are held against, beside the δ asked for.
DELTAS = (1e-3, 0.01, 0.05, 0.15, 0.3)
#: Where less than that is claimed, trials have little to say.
_LEAST = 0.4
#: How many thresholds are tried on the trials that choose one.
_THRESHOLDS = 128
#: The share of the trials that choose.
_LEARN = 0.3


class Observations(NamedTuple):
    """What an adversary saw in the trials: one row a trial, one column a release; float64 [trials, releases] each."""

    without: Floats
    present: Floats


@dataclass(frozen=True)
class Finding:
    """What one test says.

    Attributes:
        name: what was tested.
        setting: in which configuration.
        claimed: ε at `delta`, or `None` where the test is not about an ε.
        bound: the empirical lower bound on ε at `delta`.
        delta: δ of both.
        passed: whether what was seen fits what was claimed.
        said: in words, what was seen where it does not fit; or at which point it came closest.
        trials: how many there were.
        sharpest: the point of the curve where trials say most: δ, ε claimed and ε measured at least.
    """

    name: str
    setting: str
    claimed: float | None
    bound: float | None
    delta: float
    passed: bool
    said: str
    trials: int
    sharpest: tuple[float, float, float] | None = None

    def plain(self) -> dict[str, Any]:
        """Return it as plain data; an ε without bound is `None`, for which JSON has a word."""
        found = {k: _plain(getattr(self, k)) for k in ("name", "setting", "claimed", "bound", "delta", "passed", "said", "trials")}
        if self.sharpest is not None:
            found["sharpest"] = dict(zip(("delta", "claimed", "bound"), map(_plain, self.sharpest), strict=True))
        return found


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def upper(hits: npt.ArrayLike, trials: int, alpha: float) -> Floats:
    """Return one-sided Clopper–Pearson upper bounds on a probability, from how often it came true; each is wrong with `alpha` at most."""
    k = np.asarray(hits, dtype=np.float64)
    found: Floats = np.where(k >= trials, 1.0, stats.beta.ppf(1 - alpha, k + 1, np.maximum(trials - k, 1e-9)))
    return found


def epsilon_bound(false_positive: npt.ArrayLike, false_negative: npt.ArrayLike, delta: float) -> Floats:
    """Return the ε that a test with these error rates at most proves at `delta` (Kairouz, Oh and Viswanath, ICML 2015, theorem 2.1)."""
    fp, fn = np.asarray(false_positive, dtype=np.float64), np.asarray(false_negative, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.log(np.maximum(1 - delta - fn, 0.0)) - np.log(fp)
        other = np.log(np.maximum(1 - delta - fp, 0.0)) - np.log(fn)
    found: Floats = np.maximum(0.0, np.nan_to_num(np.maximum(one, other), nan=0.0, neginf=0.0))
    return found


def scores(learn: Observations, rows: Floats) -> Floats:
    """Return one number a trial from its releases: Fisher's linear discriminant, learnt from other trials."""
    centred = np.concatenate([learn.without - learn.without.mean(0), learn.present - learn.present.mean(0)])
    shift = learn.present.mean(0) - learn.without.mean(0)
    size = float(np.abs(centred).max(initial=0.0)) + float(np.abs(shift).max(initial=0.0)) or 1.0
    spread = np.atleast_2d(np.cov(centred / size, rowvar=False)) + 1e-9 * np.eye(len(shift))
    found: Floats = (rows / size) @ np.linalg.solve(spread, shift / size)
    return found


def canary_test(name: str, setting: str, seen: Observations, claim: Callable[[float], float], delta: float, alpha: float) -> Finding:
    """Hold trials with and without a canary against what was claimed.

    Some of the trials choose the direction, the thresholds and the point of the curve; the others are counted.

    Args:
        name: of the finding.
        setting: the configuration.
        seen: the trials.
        claim: ε by δ, from the mechanism's own accountant.
        delta: the δ asked for.
        alpha: how often this may be wrong: four error rates are bounded, each at a quarter of it.
    """
    half = int(_LEARN * len(seen.without))
    learn = Observations(seen.without[:half], seen.present[:half])
    curve = {d: claim(d) for d in (delta, *(d for d in DELTAS if d > delta))}
    points = tuple(d for d, told in curve.items() if told >= _LEAST or d == delta)
    claims = np.array([curve[d] for d in points])
    values = [scores(learn, part) for part in (*learn, seen.without[half:], seen.present[half:])]
    thresholds = np.unique(np.quantile(np.concatenate(values[:2]), np.linspace(0.001, 0.999, _THRESHOLDS)))
    bounds = _bounds(values[0], values[1], thresholds, points, alpha / 4)  # [points, thresholds]
    point, chosen = (int(i) for i in np.unravel_index(np.argmax(bounds - claims[:, None]), bounds.shape))
    picked = thresholds[[chosen, int(bounds[0].argmax())]]
    counted = _bounds(values[2], values[3], picked, points, alpha / 4)
    sharpest = (points[point], float(claims[point]), float(counted[point, 0]))
    at_delta = float(counted[0].max())
    passed = at_delta <= claims[0] and sharpest[2] <= sharpest[1]
    where, told, measured = (delta, float(claims[0]), at_delta) if at_delta > claims[0] else sharpest
    said = f"at δ = {where:.3g}: claimed ε = {told:.4g}, measured ε ≥ {measured:.4g}"
    return Finding(name, setting, float(claims[0]), at_delta, delta, bool(passed), said, 2 * len(seen.without), sharpest)


def _bounds(without: Floats, present: Floats, thresholds: Floats, points: Sequence[float], alpha: float) -> Floats:
    """Return what each threshold proves at each δ, [points, thresholds]."""
    wrong = upper([(without > t).sum() for t in thresholds], len(without), alpha)
    missed = upper([(present <= t).sum() for t in thresholds], len(present), alpha)
    return np.stack([epsilon_bound(wrong, missed, d) for d in points])


def one_run_p(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return how likely at least so many right guesses are under (ε, δ)-differential privacy, at most.

    Steinke, Nasr and Jagielski, NeurIPS 2023, theorem 5.2: without δ every guess is right with probability e^ε / (1 + e^ε) at most; δ adds
    2 m δ times the largest mean of the binomial's probabilities just below the count.

    Args:
        canaries: m, each there by the fall of a fair coin.
        guesses: how many of the coins the auditor dared to guess.
        right: how many of these were right.
        epsilon: ε.
        delta: δ.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"cannot be right {right} times in {guesses} guesses about {canaries} canaries")
    law = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(law.sf(right - 1))
    below = np.cumsum(law.pmf(np.arange(right - 1, -1, -1)))  # from right - 1 down to right - i
    worst = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, tail + 2 * canaries * delta * worst)


def one_run_bound(canaries: int, guesses: int, right: int, delta: float, alpha: float) -> float:
    """Return the largest ε that is refuted at level `alpha` (0 where none is), to 1e-3."""
    if one_run_p(canaries, guesses, right, 0.0, delta) > alpha:
        return 0.0
    low, high = 0.0, 1.0
    while high < 64 and one_run_p(canaries, guesses, right, high, delta) <= alpha:
        low, high = high, 2 * high
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if one_run_p(canaries, guesses, right, middle, delta) <= alpha else (low, middle)
    return low


def one_run_test(
    name: str, setting: str, values: Floats, coins: npt.NDArray[np.bool_], claimed: float, delta: float, alpha: float
) -> Finding:
    """Guess which canaries were there: those with the largest values were, those with the smallest were not, the rest is left open.

    Args:
        name: of the finding.
        setting: the configuration.
        values: how much of each canary was seen [m].
        coins: which were there [m].
        claimed: ε at `delta`.
        delta: δ.
        alpha: how often this may be wrong.
    """
    order = np.argsort(values, kind="stable")
    each = max(1, len(values) // 20)
    right = int(coins[order[-each:]].sum() + (~coins[order[:each]]).sum())
    bound = one_run_bound(len(values), 2 * each, right, delta, alpha)
    said = f"{right} of {2 * each} guesses about {len(values)} canaries were right: measured ε ≥ {bound:.4g}"
    return Finding(name, setting, claimed, bound, delta, bound <= claimed, said, 1)
