"""Clients that send arbitrary updates."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, View, behaviour


@behaviour("gaussian", paper="Blanchard et al., NeurIPS 2017, section 5 (Gaussian attacker); Xie et al., 2018")
class Gaussian(Behaviour):
    """Send Gaussian noise with standard deviation `std` in place of the update."""

    std: Annotated[float, Field(gt=0)] = 1.0

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return noise [k, d]."""
        return self.std * torch.randn(updates.shape, generator=view.rng)


@behaviour("sign-flip", paper="Li et al. (RSA), AAAI 2019, section 5; Karimireddy et al., ICML 2021, section 6 (bit flipping)")
class SignFlip(Behaviour):
    """Send the honest update, turned round and `scale` times as large."""

    scale: Annotated[float, Field(gt=0)] = 1.0

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return the negative updates [k, d]."""
        return -self.scale * updates
