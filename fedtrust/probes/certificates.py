"""What cannot happen however clients misbehave: certificates read off the model's votes."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.fits import RunFacts
from fedtrust.probes.base import Artefact, ProbeContext, Result, need, probe, share

_RADII = [0, 1, 2]


def certified_radius(votes: Tensor) -> Tensor:
    """Return how many voters may change their minds at will without changing the class that wins, int64 [n]; Levine and Feizi, theorem 1.

    ⌊(n_c − max over c' ≠ c of (n_c' + 1 if c' < c)) / 2⌋, c the class that wins: of equal counts the smallest class does.

    Args:
        votes: the number of votes of each class, int64 [n, C].
    """
    winner = votes.argmax(dim=1, keepdim=True)  # of equal counts the first
    classes = torch.arange(votes.shape[1], device=votes.device)
    rivals = votes + (classes < winner)
    best = rivals.scatter(1, winner, -1).amax(dim=1)
    return (votes.gather(1, winner).squeeze(1) - best).div(2, rounding_mode="floor")


def _no_votes(facts: RunFacts) -> str | None:
    return None if facts.layout.names[0].startswith("members.") else "the model's outputs are no votes; it is for the model 'ensemble'"


@probe(
    "dpa-certificate",
    when="end",
    task="classification",
    fits=_no_votes,
    paper="Levine and Feizi, ICLR 2021, theorem 1; Cao et al., IEEE TIFS 2022",
)
def dpa_certificate(ctx: ProbeContext, *, radii: list[Annotated[int, Field(ge=0)]] = _RADII) -> Result:
    """Certified accuracy of an ensemble: the share of test samples that it gets right whatever any r clients of the federation send.

    A client reaches one member (behaviour `dpa`, aggregator `dpa`), so r clients change at most r votes. As in the papers, they are counted
    from the federation as it was in this run: clients that were malicious in it have had their say already. The curve shows every r;
    `radii` says which become numbers (`dpa-certificate/2` for r = 2). Only the votes are looked at: that no other part of the pipeline lets
    a client reach further is the aggregator's to check.

    Raises:
        ValueError: the model's outputs are no votes.
    """
    _, y = need(ctx.test, "the test samples")
    output = ctx.test_output
    votes = output.round().long()
    cast = votes.sum(dim=1)
    if not torch.equal(votes.to(output.dtype), output) or bool((cast != cast[0]).any()) or int(votes.min()) < 0:
        raise ValueError("the model's outputs are no votes: the certificate is for the model 'ensemble'")
    radius = certified_radius(votes)
    right = votes.argmax(dim=1) == y
    most = int(cast[0]) // 2 + 1
    curve = [[float(r), share(right & (radius >= r))] for r in range(most + 1)]
    caption = (
        "The share of test samples that the ensemble gets right and goes on to get right whatever r clients send, "
        "with the tie-break in favour of the smaller class."
    )
    artefact = Artefact(
        "curve",
        "Certified accuracy",
        caption,
        {"x": "malicious clients r", "y": "certified accuracy", "series": {"certified": curve}},
    )
    return {f"dpa-certificate/{r}": share(right & (radius >= r)) for r in radii} | {"certificate": artefact}
