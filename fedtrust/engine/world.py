"""What every worker holds for the whole run: data, architecture, training recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedtrust.data.base import FederatedData
from fedtrust.layout import Layout

Path = Literal["auto", "loop", "vmap", "fused"]
Criterion = Callable[[Tensor, Tensor], Tensor]


class Architecture:
    """A model's architecture as a function `(params [d], x [b, *shape]) -> [b, C]`; holds no data, so it can be handed to anybody.

    Not for two threads at once: the parameters stand in the module while it runs.
    """

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self._module, self._layout = module, layout

    def __call__(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the outputs [b, C]."""
        result: Tensor = functional_call(self._module, self._layout.unflatten(params), (x,))
        return result


@dataclass(frozen=True)
class World:
    """Everything about a run that does not change from round to round; sent to a worker once.

    Attributes:
        data: the samples and whose they are.
        module: the architecture; its own parameter values are never used.
        criterion: the loss that the protocol prescribes, (output [b, C], y [b]) -> scalar.
        optimiser: a client optimiser (see `fedtrust.models.optimisers`).
        lr: its learning rate.
        batch_size: samples a local step.
        epochs: local epochs a round.
        seed: the scenario's seed.
        path: how a chunk of clients is trained; see `fedtrust.engine.cohort`.
        device: where: `cpu` or `cuda`.
    """

    data: FederatedData
    module: nn.Module
    criterion: Criterion
    optimiser: Any
    lr: float
    batch_size: int
    epochs: int
    seed: int
    path: Path = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", Layout.of(self.module))

    layout: Layout = None  # type: ignore[assignment]  # derived from the module

    @property
    def model(self) -> Architecture:
        """The architecture as a function."""
        return Architecture(self.module, self.layout)

    def predict(self, params: Tensor, x: Tensor, batch: int = 512) -> Tensor:
        """Return the outputs [n, C] without gradients, a batch of samples at a time."""
        with torch.no_grad():
            return torch.cat([self.model(params, part) for part in torch.split(x, batch)]) if len(x) else self.model(params, x)

    def examples(self, client: int) -> int:
        """Return the number of training samples a client has registered with the server."""
        return len(self.data.parts[client])

    def on(self, device: str) -> World:
        """Return this world with its module and samples on a device."""
        if device == self.device:
            return self
        if device.startswith("cuda"):  # the same bits in every run, and the precision that the CPU has
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
        data = replace(self.data, x=self.data.x.to(device), y=self.data.y.to(device))
        return replace(self, data=data, module=self.module.to(device), device=device)
