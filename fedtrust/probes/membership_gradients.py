"""Membership inference by a server that looks at gradients and updates: Nasr, Shokri and Houmansadr's passive and active attacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad, vmap

from fedtrust.probes.base import ProbeContext, Result, need, probe
from fedtrust.probes.guesses import Membership
from fedtrust.probes.membership import sample_losses, scaled_confidence
from fedtrust.probes.membership_shadow import answers

#: Gradients of so many candidates lie in memory at once.
_BLOCK = 64


class Shown(NamedTuple):
    """What a round shows a server: the model that it sent [d], what came back [n, d], and the model that it made of that [d]."""

    sent: Tensor
    updates: Tensor
    after: Tensor


@probe(
    "gradient-membership",
    role="curious-server",
    when="end",
    task="classification",
    asks="membership",
    population=True,
    paper="Nasr, Shokri and Houmansadr, S&P 2019, sections III and VI-B (passive global attacker)",
)
def gradient_membership(ctx: ProbeContext, *, rounds: Annotated[int, Field(ge=1)] | None = None) -> Result:
    """Learn from a federation of the server's own what updates and gradients look like where a sample was trained on.

    For each candidate the server works out what the last round shows of it: the scaled confidence in its label of the model that was sent,
    of the new one, and of the clients' models (mean and largest), the size of its gradient, and the cosine between that gradient and the
    clients' updates (mean and smallest: a client that trained on it moves against it). A logistic regression tells members from others; it
    is learnt on a federation that the server plays itself, with shares of its population as clients as large as the real ones, for as many
    `rounds`.

    Simplified from the paper: its attack model is a network with a convolution over each layer's gradients that sees several rounds and
    knows some true members; here it is linear in seven features of the last round and knows none. Behind secure aggregation the one row
    that is seen stands for all clients, in the server's own federation as well.
    """
    if ctx.updates is None or not ctx.sent:
        return {}
    x, y = need(ctx.candidates, "the candidates")
    first = next(iter(ctx.sent.values()))
    real = features(ctx, Shown(first, ctx.updates, need(ctx.params, "the model")), x, y)
    return {"gradient-membership": Membership(_learnt(*_own_federation(ctx, first, rounds or max(ctx.round, 1)), real))}


def _own_federation(ctx: ProbeContext, first: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the features of samples [p, 7] of the server's own federation, and which of them a client of it trained on [p]."""
    x, y = need(ctx.population, "samples of its own")
    train = need(ctx.shadow, "a trainer")
    parts = _shares(len(x), list(need(ctx.examples, "the registered numbers of samples").values()), ctx.rng)
    sets = [(x[part], y[part]) for part in parts]
    # The first round of all starts at the very model that was sent; else at a fresh one, which the trainer keeps to itself.
    before = first if rounds == 1 else train(sets).mean(0)
    local = train(sets, start=before)
    for _ in range(rounds - 2):
        before = local.mean(0)
        local = train(sets, start=before)
    member = torch.zeros(len(x), dtype=torch.bool)
    member[torch.cat(parts)] = True
    updates = local - before
    return features(ctx, Shown(before, updates if ctx.clients else updates.mean(0, keepdim=True), local.mean(0)), x, y), member


def _shares(count: int, sizes: Sequence[int], rng: torch.Generator) -> list[Tensor]:
    """Return the rows of each client of the server's own federation; all of them together are at most half of the samples."""
    fit = min(1.0, count / 2 / max(sum(sizes), 1))
    order, start = torch.randperm(count, generator=rng), 0
    parts: list[Tensor] = []
    for size in sizes:
        stop = start + max(1, int(size * fit))
        if stop > count // 2 and parts:
            break
        parts.append(order[start:stop])
        start = stop
    return parts


def features(ctx: ProbeContext, shown: Shown, x: Tensor, y: Tensor) -> Tensor:
    """Return what a round shows of each sample, float64 [q, 7]; see `gradient_membership`."""
    local = shown.sent + shown.updates
    said = scaled_confidence(answers(ctx, torch.cat([shown.sent[None], shown.after[None], local]), x), y.expand(2 + len(local), -1))
    size, cosine = _gradients(ctx, shown, x, y)
    theirs = said[2:]
    return torch.stack([said[0], said[1], theirs.mean(0), theirs.amax(0), size, cosine.mean(1), cosine.amin(1)], dim=1)


def _gradients(ctx: ProbeContext, shown: Shown, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of each sample's gradient norm at the model that was sent [q], and its cosines with the updates [q, n]."""
    model = need(ctx.model, "the architecture")

    def loss(params: Tensor, one: Tensor, label: Tensor) -> Tensor:
        return ctx.criterion(model(params, one[None]), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    lengths = shown.updates.norm(dim=1).clamp(min=1e-12)
    sizes, cosines = [], []
    for part, labels in zip(torch.split(x, _BLOCK), torch.split(y, _BLOCK), strict=True):
        found = each(shown.sent, part, labels)  # [b, d]
        norms = found.norm(dim=1).clamp(min=1e-12)
        sizes.append(norms.log())
        cosines.append(found @ shown.updates.T / norms[:, None] / lengths)
    return torch.cat(sizes).double(), torch.cat(cosines).double()


def _learnt(known: Tensor, member: Tensor, asked: Tensor) -> Tensor:
    """Return the log-odds of the asked [q] by a logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression

    mean, std = known.mean(0), known.std(0).clamp(min=1e-9)
    model = LogisticRegression(class_weight="balanced", max_iter=2000).fit(((known - mean) / std).numpy(), member.numpy())
    return torch.from_numpy(model.decision_function(((asked - mean) / std).numpy()))


@probe(
    "active-membership",
    role="curious-server",
    asks="membership",
    paper="Nasr, Shokri and Houmansadr, S&P 2019, sections III-E and VI-C (active global attacker)",
)
def active_membership(ctx: ProbeContext) -> Result:
    """Read how far the loss of each candidate has fallen in the training that the clients have just done.

    Together with the sender `gradient-ascent`, which has first pushed these losses up: whoever owns a candidate takes it down again,
    further than training on other samples does. The score is the smallest loss that a client's model is left with, its sign turned. Without
    that sender it is what an honest-but-curious server can read off the clients' models.
    """
    if ctx.updates is None or not ctx.sent:
        return {}
    x, y = need(ctx.candidates, "the candidates")
    first = next(iter(ctx.sent.values()))
    sent = torch.stack([ctx.sent[c] for c in ctx.clients]) if ctx.clients else first[None]
    losses = torch.stack([sample_losses(ctx, output, y) for output in answers(ctx, sent + ctx.updates, x)])  # [n, q]
    return {"active-membership": Membership(-losses.amin(0))}
