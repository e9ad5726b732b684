"""The loss of many models at once, and its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap


def with_gradient(criterion: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a loss for k models at once, with its gradient.

    Args:
        criterion: a loss, as a scenario names it (with its parameters bound), or any function of output and y. If it has a function
            `by_hand` of the same parameters, that is taken: autograd and vmap cost more than a small model's last layer.

    Returns:
        A function of output [k, b, ...] and y [k, b, ...] that returns the losses [k] and the gradient of their sum, shaped as output.
    """
    bare, bound = (criterion.func, criterion.keywords) if isinstance(criterion, functools.partial) else (criterion, {})
    written = getattr(bare, "by_hand", None)
    if written is not None:
        return functools.partial(written, **bound)
    mapped = vmap(criterion)

    def recorded(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        output = output.detach().requires_grad_()
        losses: Tensor = mapped(output, y)
        (gradient,) = torch.autograd.grad(losses.sum(), output)
        return losses.detach(), gradient

    return recorded
