"""What every worker holds for the whole run: data, architecture, training recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedtrust.data.base import FederatedData
from fedtrust.engine.fused import Fused, fuse
from fedtrust.engine.fused_branches import Branched
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture

Path = Literal["auto", "loop", "vmap", "fused"]
Precision = Literal["float32", "bfloat16"]
Criterion = Callable[[Tensor, Tensor], Tensor]


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
        precision: what clients multiply in; their parameters, updates and losses are float32 always.
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
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", Layout.of(self.module))
        object.__setattr__(self, "fused", fuse(self.module))

    layout: Layout = None  # type: ignore[assignment]  # derived from the module
    fused: Fused | Branched | None = None  # its fused form, where it has one

    @property
    def dtype(self) -> torch.dtype:
        """What clients multiply in."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def model(self) -> Architecture:
        """The architecture as a function."""
        return Architecture(self.module, self.layout)

    def predict(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the outputs [n, C] on the CPU, without gradients, computed where this world lies, a batch of samples at a time.

        On a CPU the batches are small: they stay in the cache, and glibc's heap does not grow by what it cannot fit into its gaps.
        """
        batch = 512 if self.device.startswith("cuda") else 64
        params = params.to(self.device)
        with torch.no_grad():
            parts = torch.split(x, batch) if len(x) else (x,)
            return torch.cat([self.model(params, part.to(self.device)).cpu() for part in parts])

    def examples(self, client: int) -> int:
        """Return the number of training samples a client has registered with the server."""
        return len(self.data.parts[client])

    def for_measuring(self, device: str) -> World:
        """Return a world whose `predict` computes on a device; its samples stay where they are."""
        return self if device == self.device else replace(self, module=copy.deepcopy(self.module).to(device), device=device)

    def on(self, device: str) -> World:
        """Return this world with its module and samples on a device."""
        if device == self.device:
            return self
        if device.startswith("cuda"):  # the same bits in every run, and the precision that the CPU has
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
        data = replace(self.data, x=self.data.x.to(device), y=self.data.y.to(device))
        # A copy: `Module.to` moves the module itself, which this world keeps.
        return replace(self, data=data, module=copy.deepcopy(self.module).to(device), device=device)
