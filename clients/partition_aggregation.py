"""Deep partition aggregation on the client's side: each client trains one member of the ensemble."""

from __future__ import annotations

import torch
from torch import Tensor

from fedtrust.client import Behaviour, ClientMemory, Predict, View, behaviour
from fedtrust.data.base import Task
from fedtrust.fits import RunFacts
from fedtrust.models.ensemble import member_of


def _no_ensemble(facts: RunFacts) -> str | None:
    return "needs the model 'ensemble' with at least two members" if len(facts.layout.members) == 1 else None


@behaviour(
    "dpa", role="honest", fits=_no_ensemble, paper="Levine and Feizi, ICLR 2021, section 2 (DPA); FLCert-P: Cao et al., IEEE TIFS 2022"
)
class PartitionAggregation(Behaviour):
    """Train only the member of the ensemble that the own id falls to; needs the model `ensemble` and the aggregator `dpa`.

    Optimisers with weight decay also shrink the other members in the update that is sent; the aggregator does not look there.
    """

    def check(self, task: Task) -> str | None:
        """Refuse regressions: there is nothing to vote on."""
        return f"votes for classes, but the task is {task.called}" if task.kind != "classification" else None

    def remember(self, size: int) -> ClientMemory:
        """Return the place of the member's number []."""
        return {"member": torch.tensor(-1)}

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Note which member is its own; the data stay as they are."""
        members = len(view.layout.members)
        assert view.client is not None
        view.memory["member"] = torch.tensor(member_of(view.client, members))
        return x, y

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return the protocol's loss of the own member."""
        return view.criterion(predict(x, member=view.memory["member"]), y)
