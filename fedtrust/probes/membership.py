"""Membership inference from what a model says to the candidates themselves: the loss threshold."""

from __future__ import annotations

from torch import Tensor
from torch.func import vmap

from fedtrust.fits import within_budget
from fedtrust.probes.base import ProbeContext, Result, need, probe
from fedtrust.probes.guesses import Membership
from fedtrust.release import log_probabilities


def sample_losses(ctx: ProbeContext, output: Tensor, y: Tensor) -> Tensor:
    """Return the protocol's loss of each sample [q], from outputs [q, C] and labels [q]."""
    each: Tensor = vmap(lambda o, t: ctx.criterion(o[None], t[None]))(output.float(), y)
    return each


def scaled_confidence(output: Tensor, y: Tensor) -> Tensor:
    """Return log(p/(1 − p)) of the confidence p in the label, float64 [...], from logits [..., C] and labels [...].

    Carlini et al., S&P 2022, section V-A: nearly Gaussian over models, where p and the loss are not. Computed as the logit of the label
    less the log-sum-exp of the others, as they advise: 1 − p rounds to 0 for the very samples that matter.
    """
    output = output.double()
    index = y.unsqueeze(-1)
    own = output.gather(-1, index).squeeze(-1)
    rest = output.scatter(-1, index, float("-inf")).logsumexp(-1)
    return (own - rest).clamp(-1e6, 1e6)


def told(ctx: ProbeContext, x: Tensor) -> Tensor:
    """Return what the observer takes for the model's output [q, C], given what it is answered."""
    answer = ctx.query(x)
    return answer if ctx.answers == "logits" else log_probabilities(answer, ctx.answers)


@probe(
    "loss-threshold",
    role="user",
    asks="membership",
    fits=within_budget(lambda facts: facts.candidates),
    paper="Yeom, Giacomelli, Fredrikson and Jha, CSF 2018, section 3 (adversary 2)",
)
def loss_threshold(ctx: ProbeContext) -> Result:
    """Take samples with a small loss for members: a query a candidate and nothing else is needed.

    The score is the loss with its sign turned; the paper's adversary accepts where it is below the mean training loss, one point of the
    curve that is measured here. Where the release tells no more than the label, all that is left is whether it is right (the paper's gap
    attack).
    """
    x, y = need(ctx.candidates, "the candidates")
    return {"loss-threshold": Membership(-sample_losses(ctx, told(ctx, x), y))}
