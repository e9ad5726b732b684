"""The bench's client work in pfl: two processes, one thread each. Runs in a virtualenv of its own that has pfl and torch, not fedtrust.

    PYTHON -m torch.distributed.run --standalone --nproc_per_node 2 -m bench.pfl_app WORK.pt --save FILE

WORK.pt is made by the bench: the model, the samples and who has which, and the batches of every round and client. One JSON object a
round goes to standard output: its seconds, from one end of a central iteration to the next.
"""

# mypy: disable-error-code="import-not-found, misc"
from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from bench.contender import channel, say

#: pfl evaluates in every so manieth iteration and always in the first, which is not counted.
NEVER = 10**9


class Scheduled(PyTorchTensorDataset):
    """A user's samples in the batches that the bench prescribes, so that every contender trains on the same."""

    def __init__(self, x: Tensor, y: Tensor, batches: Tensor, user_id: str) -> None:
        super().__init__((x, y), user_id=user_id)
        self._batches_of_round = batches

    def iter(self, batch_size: int | None) -> Iterator[Any]:
        """Yield the batches."""
        for batch in self._batches_of_round:
            yield [tensor[batch] for tensor in self.raw_data]


class Net(nn.Module):
    """The bench's model with the two methods that pfl asks for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        result: Tensor = self.module(x)
        return result

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(self(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return the loss; pfl evaluates once, before the first round."""
        with torch.no_grad():
            return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


class Clock(TrainingProcessCallback):
    """Tells the seconds of each central iteration, from the first process."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers, self._last = answers, time.perf_counter()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> tuple[bool, Metrics]:
        """Tell."""
        now = time.perf_counter()
        if os.environ.get("RANK", "0") == "0":
            say(self._answers, seconds=now - self._last)
        self._last = time.perf_counter()
        return False, Metrics()


def federation(work: dict[str, Any]) -> FederatedDataset:
    """Return pfl's view of the clients."""
    taken: Counter[int] = Counter()

    def user(client: int) -> Scheduled:
        rows, number = work["parts"][client], taken[client]
        taken[client] += 1
        return Scheduled(work["x"][rows], work["y"][rows], work["batches"][number][client], str(client))

    return FederatedDataset(user, get_user_sampler("minimize_reuse", list(range(len(work["parts"])))))


def main() -> None:
    """Run and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work")
    parser.add_argument("--save")
    asked = parser.parse_args()
    answers = channel()
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002  # pfl draws its own seeds from it, and the processes must draw the same
    work = torch.load(asked.work, weights_only=False)  # the bench's own file, made a moment ago
    clients, rounds = len(work["parts"]), len(work["batches"])
    if clients % int(os.environ.get("WORLD_SIZE", "1")):
        parser.error("pfl deals the users out in turn: their number must be a multiple of the processes")
    net = Net(work["module"])
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    data = federation(work)
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()])
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(rounds, NEVER, clients, None),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work["lr"], local_batch_size=work["batch"], local_max_grad_norm=None
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Clock(answers)],
        send_metrics_to_platform=False,
    )
    if asked.save and os.environ.get("RANK", "0") == "0":
        np.save(asked.save, torch.cat([p.detach().flatten() for p in net.parameters()]).numpy())


if __name__ == "__main__":
    main()
