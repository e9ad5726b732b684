"""Property inference: whose data have something in common that has nothing to do with what is learnt?"""

from __future__ import annotations

from statistics import median
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.data.skew import PROPERTIES
from fedtrust.fits import RunFacts
from fedtrust.probes.base import ProbeContext, Result, need, probe
from fedtrust.probes.guesses import Property
from fedtrust.probes.inversion_update import acts


def _nobody_has_it(facts: RunFacts) -> str | None:
    what = facts.params["what"]
    hint = f'set data.feature_skew = {{ kind = "property", what = "{what}" }}'
    return None if what in facts.properties else f"no client's data are '{what}', so there is nothing to infer; {hint}"


@probe(
    "property-inference",
    role="curious-server",
    task="classification",
    population=True,
    once=True,
    fits=_nobody_has_it,
    paper="Melis, Song, De Cristofaro and Shmatikov, S&P 2019, section IV-C and algorithm 3 (passive)",
)
def property_inference(
    ctx: ProbeContext,
    *,
    what: Literal["framed", "thick"] = "thick",
    at_round: Annotated[int, Field(ge=1)] = 1,
    clients: Annotated[int, Field(ge=4)] = 30,
) -> Result:
    """Learn what updates of clients with a property look like, on clients of one's own, and ask it of each real update of round `at_round`.

    From the model that was sent in that round the server trains `clients` clients of its own, each on as many samples as a real one has in
    the median: every second one on samples that were given the property `what`, the others on samples without it (it recognises and
    makes the property, see `fedtrust.data.skew.PROPERTIES`; its samples are drawn like all clients' together). A logistic regression tells
    the updates of the two kinds apart, brought to unit length so that a client's number of steps does not matter; its probability is the
    score. The paper trains a random forest on updates of all rounds; here it is linear, and one round is enough. Behind secure aggregation
    there is no client's update to ask, and nothing is found.

    Raises:
        ValueError: nearly all samples of the server have the property already, or the run never had such a round.
    """
    if not acts(ctx, at_round) or ctx.updates is None or not ctx.clients:
        return {}
    sent, train = need(ctx.sent, "the models that were sent"), need(ctx.shadow, "a trainer")
    size = int(median(need(ctx.examples, "the registered numbers of samples").values()))
    start = sent[ctx.clients[0]]
    own = train(_sets(ctx, what, clients, size), start=start) - start
    has = torch.arange(clients) % 2 == 0
    chances = _told(own, has, ctx.updates)
    return {"property-inference": Property(what, dict(zip(ctx.clients, chances.tolist(), strict=True)))}


def _sets(ctx: ProbeContext, what: str, clients: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the samples of the server's own clients; every second one's have the property."""
    x, y = need(ctx.population, "samples of its own")
    chosen = PROPERTIES[what]
    plain = ~chosen.has(x)
    x, y = x[plain], y[plain]
    if len(x) < 20:
        raise ValueError(f"only {len(x)} of the server's {len(plain)} samples lack the property '{what}'")
    sets = []
    for i in range(clients):
        rows = torch.randperm(len(x), generator=ctx.rng)[: max(1, min(size, len(x) // 2))]
        sets.append((chosen.put(x[rows]) if i % 2 == 0 else x[rows], y[rows]))
    return sets


def _told(own: Tensor, has: Tensor, asked: Tensor) -> Tensor:
    """Return how likely each of the asked updates [n, d] is of the kind of those that have it, float64 [n]."""
    from sklearn.linear_model import LogisticRegression

    known, other = (part.double() / part.double().norm(dim=1, keepdim=True).clamp(min=1e-30) for part in (own, asked))
    middle = known.mean(0)
    # All that a linear rule with an L2 penalty can see lies in the span of the known rows: a few coordinates in place of d.
    _, _, basis = torch.linalg.svd(known - middle, full_matrices=False)
    inside, outside = (known - middle) @ basis.T, (other - middle) @ basis.T
    scale = inside.norm(dim=1).mean().clamp(min=1e-30)
    model = LogisticRegression(C=10.0, max_iter=2000).fit((inside / scale).numpy(), has.numpy())
    return torch.from_numpy(model.predict_proba((outside / scale).numpy())[:, 1])
