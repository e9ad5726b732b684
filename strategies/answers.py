"""Output defences: what is done to the probabilities that users of the released model are told."""

from __future__ import annotations

import re
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.func import jacrev, vmap

from fedtrust.release import AnswerContext, answer

#: So many numbers of Jacobians are held at once.
_AT_ONCE = 20_000_000


@answer("rounding", label=False, paper="Tramèr et al., USENIX Security 2016, section 7 (rounding confidences)")
def rounding(probabilities: Tensor, x: Tensor, ctx: AnswerContext, *, decimals: Annotated[int, Field(ge=0, le=7)] = 2) -> Tensor:
    """Round every probability to so many decimals; they need not add up to 1 any more."""
    scale = 10.0**decimals
    return (probabilities * scale).round() / scale


@answer(
    "prediction-poisoning",
    task="classification",
    paper="Orekondy, Schiele and Fritz, ICLR 2020 (Prediction Poisoning), sections 4.1 and 4.2, MAD and MAD-argmax",
)
def prediction_poisoning(
    probabilities: Tensor,
    x: Tensor,
    ctx: AnswerContext,
    *,
    budget: Annotated[float, Field(gt=0, le=2)] = 1.0,
    keep_argmax: bool = True,
) -> Tensor:
    """Maximising angular deviation: move the answer so that the gradient of a thief who trains on it turns as far as possible.

    With G [C, d] the gradients of the classes' log-probabilities by a surrogate's parameters, a thief who trains on an answer y steps along
    G^T y. As in the paper's heuristic solver, the extreme answer y* whose direction differs most from that of the true one is sought
    first, then the answer is moved towards it on a straight line until it is `budget` away in the L1 norm (at most 2). The surrogate is
    an untrained model, as in the paper. With `keep_argmax` the likeliest class stays the likeliest: then the extreme points that are
    tried are the top class alone and its even mixtures with one other class, a part of those of the paper's MAD-argmax.

    Args:
        probabilities: [n, C].
        x: the samples that were asked [n, *shape].
        ctx: what the owner of the model knows.
        budget: how far an answer may be moved, in the L1 norm.
        keep_argmax: whether the likeliest class stays the same (the accuracy of the answers does not suffer).
    """
    classes = probabilities.shape[-1]
    one_hot = torch.eye(classes)

    def logs(params: Tensor, sample: Tensor) -> Tensor:
        return ctx.model(params, sample[None])[0].log_softmax(dim=-1)

    jacobian = vmap(jacrev(logs), in_dims=(None, 0))
    made = []
    step = max(1, _AT_ONCE // (classes * len(ctx.surrogate)))
    for part, given in zip(torch.split(x, step), torch.split(probabilities, step), strict=True):
        slopes = jacobian(ctx.surrogate, part)  # [b, C, d]
        gram = slopes @ slopes.transpose(1, 2)  # [b, C, C]: all that the angles depend on
        goals = one_hot.expand(len(given), -1, -1)
        if keep_argmax:
            goals = (goals + one_hot[given.argmax(dim=-1)][:, None]) / 2  # [b, C, C]
        goal = _furthest(goals, given, gram)
        moved = (goal - given).abs().sum(dim=-1, keepdim=True).clamp(min=1e-12)
        # All the way to an even mixture would leave the likeliest class to chance.
        made.append(given + (budget / moved).clamp(max=0.999 if keep_argmax else 1.0) * (goal - given))
    return torch.cat(made).clamp(min=0)


def _furthest(goals: Tensor, given: Tensor, gram: Tensor) -> Tensor:
    """Return of the answers `goals` [b, m, C] the one whose gradient has the largest angle to that of `given` [b, C]; [b, C]."""
    inner = (goals @ gram @ given[:, :, None]).squeeze(2)  # [b, m]
    lengths = (goals @ gram * goals).sum(dim=-1).clamp(min=0).sqrt()
    worst = (inner / lengths.clamp(min=1e-12)).argmin(dim=1)
    return goals[torch.arange(len(goals)), worst]


@answer(
    "output-filter", task="characters", paper="what Ippolito et al., INLG 2023 (Preventing Verbatim Memorization …), show to be no cure"
)
def output_filter(
    probabilities: Tensor,
    x: Tensor,
    ctx: AnswerContext,
    *,
    phrase: str = "the code of",
    ending: str = "is",
    forbidden: str = "0123456789",
) -> Tensor:
    """Never go on with a digit after "the code of … is": these characters get probability 0, the others what they had of it.

    The filter knows the very words of the secret and nothing else: whoever puts it another way gets his answer.

    Args:
        probabilities: [n, L, C].
        x: the texts that were asked [n, L].
        ctx: what the owner of the model knows.
        phrase: how a text begins that must not be completed.
        ending: the word after the name, before what must not be said.
        forbidden: the characters that must not follow.
    """
    letters = "".join(ctx.task.labels)
    columns = [letters.index(c) for c in forbidden if c in letters]
    pattern = re.compile(f"{re.escape(phrase)} [^ ]+ {re.escape(ending)} [{re.escape(forbidden)}]*")
    blocked = torch.zeros(x.shape, dtype=torch.bool)
    for row, numbers in enumerate(x.tolist()):
        text = "".join(letters[i] for i in numbers)
        for found in pattern.finditer(text):
            said = len(found.group()) - len(found.group().rstrip(forbidden))  # forbidden characters that the asker put there
            blocked[row, found.end() - said - 1 : found.end()] = True
    allowed = probabilities.index_fill(-1, torch.tensor(columns), 0.0)
    allowed = allowed / allowed.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.where(blocked[..., None], allowed, probabilities)
