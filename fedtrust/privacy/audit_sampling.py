"""What an accountant takes on trust: that units are drawn as it assumes, and that there is as much noise as it says, never used twice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats
from torch import Tensor

from fedtrust.privacy.audit import Finding
from fedtrust.privacy.samplers import Fixed, Poisson, Sampler

Inside = npt.NDArray[np.bool_]

#: The least expected number of draws in a bin of a χ² test.
_BIN = 8


def poisson_test(name: str, inside: Inside, q: float, alpha: float) -> Finding:
    """Test that every unit is in every draw with probability q, whatever the others do.

    The sizes of the draws are held against the binomial law, and how often each unit was in against its mean and spread; both by χ².

    Args:
        name: of the finding.
        inside: who was in which draw [draws, units].
        q: the probability claimed.
        alpha: how often this may be wrong.
    """
    draws, units = inside.shape
    setting = f"Poisson, q = {q:.4g} of {units}"
    sizes = inside.sum(axis=1)
    if q >= 1:
        return _finding(name, setting, bool(inside.all()), f"draws of {sizes.min()} to {sizes.max()} of {units} units", draws)
    size_p = _sizes(sizes, stats.binom(units, q))
    unit_p = _members(inside, q, 1.0)
    said = f"sizes {sizes.mean():.4g} ± {sizes.std():.3g}, expected {units * q:.4g} ± {(units * q * (1 - q)) ** 0.5:.3g}: p = {size_p:.2g}"
    said += f"; each unit in {inside.mean(axis=0).min():.3g} to {inside.mean(axis=0).max():.3g} of the draws: p = {unit_p:.2g}"
    return _finding(name, setting, min(size_p, unit_p) > alpha / 2, said, draws)


def cohort_test(sampler: Sampler, draws: int, alpha: float) -> Finding:
    """Test that a server's cohorts are drawn as its accountant assumes."""
    inside = np.zeros((draws, sampler.count), dtype=bool)
    for number in range(draws):
        inside[number, sampler.draw(number + 1)] = True
    if isinstance(sampler, Poisson):
        return poisson_test("cohorts", inside, sampler.q, alpha)
    sizes = inside.sum(axis=1)
    exact = bool((sizes == sampler.per_round).all())
    said = f"cohorts of {sizes.min()} to {sizes.max()}"
    if isinstance(sampler, Fixed):
        share = sampler.per_round / sampler.count
        spread = sampler.count / (sampler.count - 1) if sampler.count > 1 else 1.0
        unit_p = 1.0 if share == 1 else _members(inside, share, spread)
        return _finding("cohorts", sampler.describe(), exact and unit_p > alpha, f"{said}; clients alike with p = {unit_p:.2g}", draws)
    promised = sorted(sampler.participations(draws)) if hasattr(sampler, "participations") else []
    found = sorted({tuple(np.flatnonzero(column).tolist()) for column in inside.T if column.any()})
    return _finding("cohorts", sampler.describe(), exact and found == promised, f"{said}, in the promised order", draws)


def noise_test(releases: Tensor, least: float, sigma: float, alpha: float) -> Finding:
    """Test that noise is as large as claimed, and that no release has that of another one.

    Its sum of squares is held against the χ² law; the cosine of two independent releases is about normal, ± 1 / √d.

    Args:
        releases: noise and nothing else [r, d].
        least: the standard deviation that it has at least, in each coordinate.
        sigma: the noise multiplier, for the finding.
        alpha: how often this may be wrong.
    """
    rows = releases.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    count, size = rows.shape
    cosines = (rows @ rows.T).abs().numpy()[np.triu_indices(count, 1)]
    limit = float(stats.norm.isf(alpha / 4 / max(1, len(cosines)))) / size**0.5
    # One release alone: were they all the same, more of them would say nothing more.
    sizes = releases.double().square().sum(dim=1).numpy()
    enough = least * float(stats.chi2.ppf(alpha / 2 / count, size) / size) ** 0.5
    smallest = float((sizes.min() / size) ** 0.5)
    said = f"smallest standard deviation {smallest:.4g}, claimed {least:.4g}, by chance from {enough:.4g}"
    said += f"; largest likeness of two releases {cosines.max(initial=0.0):.3g}, by chance up to {limit:.3g}"
    setting = f"σ = {sigma:.4g}, {count} releases of noise alone"
    return _finding("noise", setting, smallest >= enough and bool((cosines <= limit).all()), said, count)


def _sizes(sizes: npt.NDArray[np.int64], law: stats.rv_discrete) -> float:
    """Return the p-value of sizes against a discrete law; neighbouring sizes share a bin until enough are expected in it."""
    draws = len(sizes)
    edges, mass, support = [], 0.0, range(int(sizes.min()), int(sizes.max()) + 1)
    low, high = int(law.ppf(1e-12)), int(law.ppf(1 - 1e-12))
    for size in range(min(low, support[0]), max(high, support[-1]) + 1):
        mass += draws * float(law.pmf(size))
        if mass >= _BIN:
            edges.append(size)
            mass = 0.0
    if len(edges) < 2:
        return 1.0
    bounds = np.array([-1, *edges[:-1], 10**18])
    expected = draws * np.diff(np.concatenate([law.cdf(bounds[:-1]), [1.0]]))
    seen = np.histogram(sizes, bins=bounds + 0.5)[0]
    return float(stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue)


def _members(inside: Inside, q: float, spread: float) -> float:
    """Return the p-value of how often each unit was in; `spread`: 1, or more where the units of a draw exclude one another."""
    draws, units = inside.shape
    off = (inside.sum(axis=0) - draws * q) ** 2 / (draws * q * (1 - q))
    if spread == 1.0:
        return float(2 * min(0.5, stats.chi2.sf(off.sum(), units), stats.chi2.cdf(off.sum(), units)))
    return float(stats.chi2.sf(off.sum() / spread, units - 1))


def _finding(name: str, setting: str, passed: bool, said: str, draws: int) -> Finding:
    return Finding(name, setting, None, None, 0.0, passed, said, draws)
