"""From what was released to (ε, δ): privacy loss distributions and Rényi divergences, by Google's dp-accounting.

σ is always the noise's standard deviation ÷ the L2 sensitivity of what it is added to, under the neighbouring relation of the sampling.
Of a sum of vectors clipped to C that is C where one vector is added or removed (Poisson sampling), and 2C where one is replaced (cohorts
of fixed size): the same σ then means twice the noise.

dp-accounting takes a second to import, so it is imported where it is used.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np

Method = Literal["pld", "rdp"]
Relation = Literal["add-or-remove-one", "replace-one"]

#: Width of the bins of a privacy loss distribution: what is reported at the end, and what is good enough for every round and for
#: calibration. Both round the loss up, so that a wider bin never gives a smaller ε than is true.
FINE, COARSE = 1e-4, 1e-3

#: A distribution over a longer range gets wider bins: one made with next to no noise would have billions, for an ε of many thousand.
_MOST_BINS = 300_000
#: Orders that bound how long that range is: whole ones are quick, and a bound twice as long does no harm.
_FEW_ORDERS = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0, 256.0)

#: The least σ that is looked for: below it the privacy loss is beyond anything that is called private.
LEAST_NOISE = 0.05


#: Noise below this is none: its privacy loss is beyond what floating point can say.
_NO_NOISE = 1e-100


class Release(NamedTuple):
    """One release of a noised sum.

    Attributes:
        sigma: standard deviation of the noise ÷ sensitivity.
        q: probability of each unit to take part (Poisson sampling, add-or-remove-one); 1: everybody does.
        cohort: (n, N) where exactly n of N units are drawn without replacement (replace-one); `q` is then not read.
    """

    sigma: float
    q: float = 1.0
    cohort: tuple[int, int] | None = None

    @property
    def relation(self) -> Relation:
        """Which data sets are neighbours."""
        return "add-or-remove-one" if self.cohort is None else "replace-one"

    @property
    def whole(self) -> bool:
        """Whether everybody takes part: no amplification by sampling."""
        return self.q == 1.0 if self.cohort is None else self.cohort[0] == self.cohort[1]

    def check(self) -> None:
        """Raise `ValueError` for what is no release."""
        if not self.sigma >= 0:
            raise ValueError(f"noise multiplier must be at least 0, got {self.sigma}")
        if self.cohort is None and not 0 < self.q <= 1:
            raise ValueError(f"a sampling probability lies in (0, 1], got {self.q}")
        if self.cohort is not None and not 1 <= self.cohort[0] <= self.cohort[1]:
            raise ValueError(f"a cohort has between 1 and N units, got n, N = {self.cohort}")


def epsilon_of(releases: Mapping[Release, int], delta: float, *, method: Method = "pld", grid: float = FINE) -> float:
    """Return the ε at `delta` of releases about the same units, each so many times, composed adaptively.

    Args:
        releases: release → how often.
        delta: in (0, 1).
        method: `pld`, privacy loss distributions (Koskela, Jälkö and Honkela, AISTATS 2020; Doroshenko et al., PoPETs 2022), or `rdp`,
            Rényi differential privacy (Mironov, Talwar and Zhang, 2019), which is never smaller. For cohorts of fixed size below N only
            `rdp` is known (Wang, Balle and Kasiviswanathan, AISTATS 2019, theorem 27).
        grid: bin width of the privacy loss distribution.

    Raises:
        ValueError: δ is not in (0, 1), a release is impossible, they do not have one neighbouring relation, or there is no such method.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    told = {release: count for release, count in releases.items() if count}
    for release in told:
        release.check()
    if len({release.relation for release in told}) > 1:
        raise ValueError("releases under different neighbouring relations do not compose to one ε")
    if not told:
        return 0.0
    if any(release.sigma < _NO_NOISE for release in told):
        return math.inf
    if method == "rdp":
        return _by_rdp(told, delta)
    if not all(release.cohort is None or release.whole for release in told):
        raise ValueError("the privacy loss distribution of a cohort of fixed size is not known; ask for method 'rdp'")
    return _by_pld(told, delta, grid)


def epsilon_poisson(q: float, sigma: float, steps: int, delta: float, *, method: Method = "pld", grid: float = FINE) -> float:
    """Return ε of `steps` Gaussian releases that each unit is in with probability `q` (add-or-remove-one; sensitivity: the clip)."""
    return epsilon_of({Release(sigma, q): steps}, delta, method=method, grid=grid)


def epsilon_gaussian(sigma: float, steps: int, delta: float, *, method: Method = "pld", grid: float = FINE) -> float:
    """Return ε of `steps` Gaussian releases in which every unit takes part; `sigma` refers to whatever relation the sensitivity does."""
    return epsilon_of({Release(sigma): steps}, delta, method=method, grid=grid)


def epsilon_fixed(n: int, total: int, sigma: float, steps: int, delta: float) -> float:
    """Return ε, by RDP, of `steps` Gaussian releases on cohorts of `n` of `total` units (replace-one; sensitivity: twice the clip)."""
    return epsilon_of({Release(sigma, cohort=(n, total)): steps}, delta, method="rdp")


def noise_for(epsilon: float, spent: Callable[[float], float], *, tolerance: float = 1e-3) -> float:
    """Return the least σ with `spent(σ)` ≤ `epsilon`, up to the relative `tolerance` and rounded up: the target is kept.

    Args:
        epsilon: the target, above 0.
        spent: the ε that a σ gives in the whole run; falls with σ; for instance
            `lambda s: epsilon_poisson(q, s, steps, delta, grid=COARSE)`.
        tolerance: relative.

    Returns:
        At least `LEAST_NOISE`.

    Raises:
        ValueError: ε is not above 0, or no σ up to 10⁶ reaches it.
    """
    if not epsilon > 0:
        raise ValueError(f"a target ε is above 0, got {epsilon}")
    low, high = LEAST_NOISE, 1.0
    while spent(high) > epsilon:
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"no noise up to 10⁶ times the sensitivity gives ε ≤ {epsilon:g}")
    while low < high / 2 and spent(high / 2) <= epsilon:  # from above: the distribution of a small σ is wide, and slow
        high /= 2
    low = max(low, high / 2)
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high


def _by_rdp(releases: Mapping[Release, int], delta: float, orders: tuple[float, ...] = ()) -> float:
    from dp_accounting import rdp

    orders = orders or _orders()
    total = sum(count * _rdp_curve(release, orders) for release, count in releases.items())
    with _quiet():
        epsilon, _ = rdp.compute_epsilon(np.array(orders), total, delta)
    return float(epsilon)


def _by_pld(releases: Mapping[Release, int], delta: float, grid: float) -> float:
    if all(release.whole for release in releases):  # Gaussian releases add up in 1/σ²
        return _gaussian(1 / math.sqrt(sum(count / release.sigma**2 for release, count in releases.items())), delta)
    grid = max(grid, _span(releases, delta) / _MOST_BINS)
    if grid > 1:  # an ε of hundreds of thousands: whichever bound says so
        return _by_rdp(releases, delta)
    parts = []
    for release, count in releases.items():
        if release.whole:
            parts.append(_loss(release.sigma / math.sqrt(count), 1.0, grid))
        else:
            parts.append(_loss(release.sigma, release.q, grid).self_compose(count))
    return max(0.0, float(functools.reduce(lambda a, b: a.compose(b), parts).get_epsilon_for_delta(delta)))


def _gaussian(sigma: float, delta: float) -> float:
    """Return the exact ε of one Gaussian release (Balle and Wang, ICML 2018, theorem 8), whose privacy loss is itself Gaussian.

    δ(ε) = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ), solved for ε.
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def over(epsilon: float) -> float:
        first, second = log_ndtr(0.5 / sigma - epsilon * sigma), epsilon + log_ndtr(-0.5 / sigma - epsilon * sigma)
        gap = -math.expm1(min(0.0, second - first))
        return float(first + math.log(gap) - math.log(delta)) if gap > 0 else -math.inf

    most = 0.5 / sigma**2 + math.sqrt(2 * math.log(1 / delta)) / sigma  # by concentrated privacy (Bun and Steinke, TCC 2016)
    low = over(0.0)
    return 0.0 if low <= 0 else float(brentq(lambda epsilon: max(over(epsilon), -low), 0.0, most, xtol=1e-9 * max(1.0, most)))


def _span(releases: Mapping[Release, int], delta: float) -> float:
    """Return roughly how far the privacy loss of releases reaches: with next to no noise a narrow grid would have billions of bins."""
    one = max(0.5 / release.sigma**2 + 9 / release.sigma for release in releases)
    bound = _by_rdp(releases, delta, _FEW_ORDERS)
    return max(one, bound if math.isfinite(bound) else sum(releases.values()) * one)


@functools.lru_cache(maxsize=64)
def _loss(sigma: float, q: float, grid: float) -> Any:
    """Return the privacy loss distribution of one release (both directions of add-or-remove-one)."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(sigma, value_discretization_interval=grid, sampling_prob=q)


@functools.lru_cache(maxsize=1)
def _orders() -> tuple[float, ...]:
    from dp_accounting import rdp

    return tuple(float(order) for order in rdp.RdpAccountant().orders)


@functools.lru_cache(maxsize=256)
def _rdp_curve(release: Release, orders: tuple[float, ...]) -> Any:
    """Return the Rényi divergence bound of one release at each order [orders]."""
    import dp_accounting
    from dp_accounting import NeighboringRelation, rdp

    event = dp_accounting.GaussianDpEvent(release.sigma)
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    if release.cohort is not None:
        n, total = release.cohort
        event, relation = dp_accounting.SampledWithoutReplacementDpEvent(total, n, event), NeighboringRelation.REPLACE_ONE
    elif not release.whole:
        event = dp_accounting.PoissonSampledDpEvent(release.q, event)
    with _quiet():
        return rdp.RdpAccountant(orders, relation).compose(event).rdp


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep dp-accounting from warning of single orders that it leaves out: the ε of the others is the bound."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
