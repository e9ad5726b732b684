"""An ensemble whose members vote: the model of deep partition aggregation.

The file also says which client belongs to which member, so that clients, server and certificate cannot differ about it.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fedtrust.data.base import Task
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY, model


class Ensemble(nn.Module):
    """Models of one architecture that vote; the output is the number of votes of each class, [b, C].

    A member votes for its largest output, of equal ones for the smallest class. The votes have no gradient; in its place stands that of
    the members' summed probabilities (the straight-through estimator of Bengio et al., arXiv 1308.3432, section 4), so that the protocol's
    loss and whatever else differentiates the model still work.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor, member: Tensor | None = None) -> Tensor:
        """Return the votes [b, C] for `x` [b, *shape]; with `member`, a whole number [], the outputs of that member alone.

        Only the one member is computed then, also under `torch.func.vmap` with another member for each client.
        """
        if member is not None:
            return self._alone(x, member)
        outputs = torch.stack([one(x) for one in self.members])  # [k, b, C]
        classes = torch.arange(outputs.shape[-1], device=x.device)
        votes = (outputs.argmax(dim=-1, keepdim=True) == classes).sum(dim=0).to(outputs.dtype)
        soft = outputs.softmax(dim=-1).sum(dim=0)
        return votes + (soft - soft.detach())

    def _alone(self, x: Tensor, member: Tensor) -> Tensor:
        own = [dict(one.named_parameters()) for one in self.members]
        which = member.long().reshape(1)
        chosen = {name: torch.stack([one[name] for one in own]).index_select(0, which).squeeze(0) for name in own[0]}
        result: Tensor = functional_call(self.members[0], chosen, (x,))
        return result


@model("ensemble", paper="Levine and Feizi, ICLR 2021, section 2 (DPA)")
def ensemble(task: Task, *, of: str = "cnn", members: Annotated[int, Field(ge=1, le=1000)] = 5) -> nn.Module:
    """`members` models of the kind `of`, each with initial weights of its own, that vote; the output is the number of votes of each class.

    To be trained with the honest behaviour `dpa` and the aggregator `dpa`, which keep every client to one member.

    Args:
        task: a classification.
        of: another model, with its defaults.
        members: how many (the paper's k).

    Raises:
        InputError: a regression, or `of` is no model that can be a member.
    """
    if task.kind != "classification":
        raise InputError(f"model 'ensemble' votes for classes, but the task is {task.called}")
    if of == "ensemble":
        raise InputError("model 'ensemble' cannot be made of ensembles", "of")
    made: list[nn.Module] = [REGISTRY.make("model", of)(task) for _ in range(members)]
    return Ensemble(made)


@functools.cache
def member_of(client: int, members: int) -> int:
    """Return which member a client trains, 0 … members - 1; it depends on the client's id alone, which the client does not choose.

    A hash of the id, as in FLCert-P (Cao et al., IEEE TIFS 2022), but one that deals out evenly: of every `members` ids in a row each
    member gets one, in an order given by the hash. A plain hash leaves members of a small federation without clients.
    """
    block, place = divmod(client, members)
    return sorted(range(members), key=lambda member: hashlib.blake2b(f"{block}/{member}".encode(), digest_size=8).digest())[place]
