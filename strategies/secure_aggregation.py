"""What the server does not get to see: secure aggregation, and the distributed discrete Gaussian on top of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.errors import TooFewError
from fedtrust.fits import RunFacts
from fedtrust.privacy import secure_sum
from fedtrust.privacy.build import DROWNS
from fedtrust.privacy.distributed import DiscreteGaussianSum, epsilon_of_rho
from fedtrust.privacy.secure_sum import Integers, Masks, Quantiser
from fedtrust.registry import REGISTRY
from fedtrust.server import AggContext, PipelineFacts, Verdict, server_filter

Threshold = Annotated[float, Field(gt=0.5, le=1)]

#: How many standard deviations of a coordinate of the noised sum must fit into the group (the paper's k).
SPREAD = 4.0


def one_row(facts: PipelineFacts) -> int:
    """Return how many rows are left: the sum."""
    return 1


def hidden_rows(facts: PipelineFacts, name: str, counts: str) -> str | None:
    """Say why the rows of a pipeline cannot be hidden from its server by the filter `name`.

    Args:
        facts: the pipeline.
        name: the filter that hides them.
        counts: how the rows count in its sum, "equal" or "examples".
    """
    place = facts.filters.index(name)
    if facts.filters.count(name) > 1:
        return "it stands there twice"
    if place < len(facts.filters) - 1:
        return f"'{facts.filters[place + 1]}' stands behind it and would need rows, and only the sum is visible; it must be the last filter"
    seeing = [other for other, alone in zip(facts.filters, facts.rowwise, strict=True) if not alone and other != name]
    if seeing:
        return (
            f"'{seeing[0]}' before it looks at several rows at once, and only the sum is visible; what clients can do alone, each with its "
            "own row, may stand there: norm-clip with a fixed max_norm, say"
        )
    linear = REGISTRY.get("aggregator", facts.aggregator).meta.get("linear")
    if linear is None:
        return f"'{facts.aggregator}' needs rows, and only the sum is visible; use mean"
    if linear != counts:
        return f"'{facts.aggregator}' counts rows otherwise than the sum does (weights = '{counts}'), and only the sum is visible"
    if facts.n < 2:
        return "the sum of one client's row is that row; it needs at least two clients a round"
    return None


def _needs(facts: PipelineFacts) -> str | None:
    return hidden_rows(facts, "secure-aggregation", facts.params["weights"])


@server_filter(
    "secure-aggregation",
    needs=_needs,
    rows=one_row,
    hides=True,
    paper="Bonawitz et al., CCS 2017, figure 4 (for a curious server that keeps to the protocol)",
)
def secure_aggregation(
    updates: Tensor,
    ctx: AggContext,
    *,
    clip: Annotated[float, Field(gt=0)] = 8.0,
    bits: Annotated[int, Field(ge=2, le=32)] = 22,
    threshold: Threshold = 2 / 3,
    weights: secure_sum.Counts = "equal",
    masks: Masks = "cancelled",
) -> Verdict:
    """Let the server see the sum of the updates and no single one: they are masked, and the masks cancel in the sum.

    Each client cuts its update off at ±`clip` in every coordinate, puts it on a grid of 2^`bits` numbers (stochastic rounding; both
    defaults are Flower's), multiplies it by its `weights` (1, or its registered number of samples) and adds pairwise masks modulo a power
    of two large enough for the sum. Rows of clients that do not reply are missing from the sum; their masks are recovered from Shamir
    shares if at least the share `threshold` of the clients asked is left, and two of them. If not, the round does not count.

    The masks change no bit of the sum, so they are left out unless they are `played`: with keys, shares and all, for the same result (40
    clients with 10⁴ parameters take some twenty seconds a round). The server is honest but curious: against one that lies about who
    is left the paper has a further step, which is not here.

    Simulated: validation and the filters before this one look at single rows in the clients' stead. Attackers' rows pass the same
    grid, so none says more than ±`clip` in a coordinate; in a real protocol nothing but a proof would stop one from sending any number.
    """
    grid = Quantiser(clip, bits)
    counts = [int(w) for w in ctx.weights] if weights == "examples" else [1] * len(updates)
    size = secure_sum.group_bits(sum(counts) * grid.top)
    rows = secure_sum.weighted([row.numpy() for row in updates.detach()], counts, grid, ctx.private("secure-aggregation"))
    total = secure_sum.add(rows, size, masks=masks, count=len(updates), asked=ctx.asked, threshold=threshold)
    mean = torch.from_numpy(grid.decode(total, sum(counts))).float()
    return Verdict(mean[None], members=torch.zeros(len(updates), dtype=torch.int64))


def _noise_needs(facts: PipelineFacts) -> str | None:
    if facts.f >= facts.n:
        return "everybody is assumed malicious: nobody's noise can be counted on"
    if 4 ** facts.params["bits"] <= facts.n * SPREAD**2:
        return f"{facts.params['bits']} bits are too few for the sum of {facts.n} clients"
    return hidden_rows(facts, "distributed-discrete-gaussian", "equal")


def _planned(params: Mapping[str, Any], size: int, asked: int) -> DiscreteGaussianSum:
    return DiscreteGaussianSum(size, asked, params["clip"], params["noise_multiplier"], params["bits"], params["beta"], SPREAD)


def _noise_fits(facts: RunFacts) -> str | None:
    try:
        _planned(facts.params, facts.layout.size, facts.per_round)
    except ValueError as error:
        return str(error)
    return None


def _promise(facts: RunFacts, assumed: int) -> list[str]:
    """Return what the noise will have given in the end to a client that is asked in each round, and what it costs; a line each."""
    params, n, size = facts.params, facts.per_round, facts.layout.size
    rho = _planned(params, size, n).rho(n - assumed) * facts.rounds
    burden = params["noise_multiplier"] * math.sqrt(size) / n
    std = params["noise_multiplier"] * params["clip"] / n
    lines = [
        f"privacy: distributed-discrete-gaussian, {n} clients' noise together σ = {params['noise_multiplier']:.4g}"
        f"{f', of which {assumed} are not counted on' if assumed else ''}; ε = {epsilon_of_rho(rho, params['delta']):.4g} at "
        f"δ = {params['delta']:g} for a client asked in each of {facts.rounds} rounds if all reply (zero-out-one)",
        f"privacy: noise on the mean has std {std:.3g} a coordinate at clip {params['clip']:.3g}; "
        f"over {size:,} parameters it is {burden:.3g} times as long as the longest update",
    ]
    if burden > DROWNS:
        lines.append(
            f"warning: {n} clients a round cannot pay for this noise: about {math.ceil(n * burden / DROWNS):,} would bring it down to "
            f"{DROWNS:g} times the longest update; so would a smaller model or less noise"
        )
    return lines


def _guarantee(params: Mapping[str, Any], state: Mapping[str, Tensor], size: int) -> dict[str, Any] | None:
    """Return what the noise has given so far to the client that took part most often."""
    if "spent" not in state:
        return None
    times, rho = state["spent"]
    client = int(rho.argmax())
    epsilon = epsilon_of_rho(float(rho[client]), params["delta"])
    return {
        "by": "clients",
        "mechanism": "distributed-discrete-gaussian",
        "unit": "client",
        "relation": "zero-out-one",
        "sampling": "none is assumed: who took part is known",
        "clip": params["clip"],
        "noise_multiplier": params["noise_multiplier"],
        "releases": int(times[client]),
        "delta": params["delta"],
        "epsilon": epsilon,
        "epsilon_rdp": epsilon,
        "worst_client": client,
        "clients": int((times > 0).sum()),
        "warnings": [],
    }


@server_filter(
    "distributed-discrete-gaussian",
    needs=_noise_needs,
    fits=_noise_fits,
    guarantee=_guarantee,
    promise=_promise,
    rows=one_row,
    hides=True,
    paper="Kairouz, Liu and Steinke, ICML 2021, algorithms 1 and 2, theorem 1; the sampler: Canonne, Kamath and Steinke, NeurIPS 2020",
)
def distributed_discrete_gaussian(
    updates: Tensor,
    ctx: AggContext,
    *,
    clip: Annotated[float, Field(gt=0)] = 1.0,
    noise_multiplier: Annotated[float, Field(gt=0)] = 1.0,
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5,
    bits: Annotated[int, Field(ge=4, le=20)] = 16,
    beta: Annotated[float, Field(ge=0, lt=1)] = math.exp(-0.5),
    threshold: Threshold = 2 / 3,
    masks: Masks = "cancelled",
) -> Verdict:
    """Let every client add a share of whole-number noise to its clipped update, and the server see the noised sum alone.

    The update is clipped to the L2 norm `clip`, turned by random signs and a Walsh–Hadamard transform, rounded on a grid (conditional
    rounding, `beta`), noised by the discrete Gaussian, and added up modulo 2^`bits` as `secure-aggregation` does it. The noise of all
    clients asked together has the standard deviation `noise_multiplier` · `clip`, on the sum; the rule gives the mean of those who replied.

    The ε at `delta` that is recorded (`distributed-discrete-gaussian/epsilon`) holds for the client that took part most often so far,
    against a server that sees the sums and who is in them; neighbours: that client's updates replaced by zeros. No sampling is assumed.
    It counts on the noise of those who replied, less as many as the defender assumes malicious. A million parameters cost about a second
    a client and round.
    """
    n, d = updates.shape
    if ctx.assumed_malicious >= n:
        raise TooFewError(f"there are {n} updates and {ctx.assumed_malicious} assumed attackers: nobody's noise can be counted on")
    mechanism = DiscreteGaussianSum(d, max(n, ctx.asked), clip, noise_multiplier, bits, beta, SPREAD)
    clients = ctx.clients or tuple(range(n))
    signs = mechanism.signs(ctx.private("distributed-discrete-gaussian/signs"))

    def encoded() -> Iterator[Integers]:
        for client, row in zip(clients, updates.detach(), strict=True):
            rounding, noise = (ctx.private(f"distributed-discrete-gaussian/{what}", client) for what in ("rounding", "noise"))
            yield mechanism.encode(row.numpy(), signs, rounding, noise)

    total = secure_sum.add(encoded(), bits, masks=masks, count=n, asked=ctx.asked, threshold=threshold)
    mean = torch.from_numpy(mechanism.decode(total, signs) / n).float()
    spent = _paid(ctx.state.get("spent"), clients, mechanism.rho(n - ctx.assumed_malicious))
    epsilon = epsilon_of_rho(float(spent[1].max()), delta)
    return Verdict(mean[None], members=torch.zeros(n, dtype=torch.int64), state={"spent": spent}, numbers={"epsilon": epsilon})


def _paid(spent: Tensor | None, clients: tuple[int, ...], rho: float) -> Tensor:
    """Return how often each client took part, and its ρ, float64 [2, largest id + 1], after these have paid once more."""
    before = torch.zeros(2, 0, dtype=torch.float64) if spent is None else spent
    after = torch.nn.functional.pad(before, (0, max(0, max(clients) + 1 - before.shape[1])))
    after[:, list(clients)] += torch.tensor([[1.0], [rho]], dtype=torch.float64)
    return after
