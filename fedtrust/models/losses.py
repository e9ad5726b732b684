"""The losses that a protocol may prescribe.

A loss is a function `(output [b, C], y [b], *, params) -> scalar`, the mean over the batch; of a text, output [b, L, C] and y [b, L], the
mean over its characters too. It works under `torch.func.vmap`: no control flow on values, no `.item()`. In the formulas
p = softmax(output), p_y is the probability of the label and e_y its one-hot vector.

The regression losses (mse, mae, huber) read the kind of task off `y`: floating `y` is compared with the one output, output [b, 1];
integer `y` is a label, and p is compared with e_y, summed over the classes.

Gradients stay finite for any finite output: powers of probabilities are taken as exponentials of log-softmax.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedtrust.registry import loss

NonNegative = Annotated[float, Field(ge=0)]

_CLASSIFICATION = ("classification", "characters")
_BOTH = ("classification", "characters", "regression")


@loss("cross-entropy", tasks=_CLASSIFICATION, paper="label smoothing: Szegedy et al., CVPR 2016, section 7")
def cross_entropy(output: Tensor, y: Tensor, *, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> Tensor:
    """Cross-entropy: -log p_y.

    Args:
        output: logits [b, C].
        y: labels [b].
        label_smoothing: the share s of the target that is spread evenly over all classes: (1 - s) e_y + s / C.
    """
    logs = F.log_softmax(output, dim=-1)
    value = -_pick(logs, y)
    if label_smoothing:
        value = (1 - label_smoothing) * value - label_smoothing * logs.mean(dim=-1)
    return value.mean()


def _cross_entropy_by_hand(output: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the losses [k] of k models and the gradient of their sum, from output [k, b, ..., C] and y [k, b, ...]."""
    logs = F.log_softmax(output, dim=-1)
    at = y.unsqueeze(-1)
    values = -logs.gather(-1, at).squeeze(-1)
    if label_smoothing:
        values = (1 - label_smoothing) * values - label_smoothing * logs.mean(dim=-1)
    # d value / d output = p - (1 - s) e_y - s / C
    slope = logs.exp_()
    slope.scatter_add_(-1, at, slope.new_full((), label_smoothing - 1).expand(at.shape))
    if label_smoothing:
        slope.sub_(label_smoothing / output.shape[-1])
    return values.flatten(1).mean(1), slope.div_(values[0].numel())


cross_entropy.by_hand = _cross_entropy_by_hand  # see fedtrust/engine/loss_gradient.py


@loss("gce", tasks=_CLASSIFICATION, paper="Zhang and Sabuncu, NeurIPS 2018, section 3.2, eq. 6")
def gce(output: Tensor, y: Tensor, *, q: Annotated[float, Field(gt=0, le=1)] = 0.7) -> Tensor:
    """Generalised cross-entropy: (1 - p_y^q) / q, robust to wrong labels.

    Args:
        output: logits [b, C].
        y: labels [b].
        q: towards 0 it becomes cross-entropy; at 1 it is 1 - p_y, half of `mae`.
    """
    log_p = _pick(F.log_softmax(output, dim=-1), y)
    return (-torch.expm1(q * log_p) / q).mean()


@loss("sce", tasks=_CLASSIFICATION, paper="Wang et al., ICCV 2019, section 3.2, eq. 7")
def sce(
    output: Tensor, y: Tensor, *, alpha: NonNegative = 0.1, beta: NonNegative = 1.0, log_zero: Annotated[float, Field(lt=0)] = -4.0
) -> Tensor:
    """Symmetric cross-entropy: alpha * cross-entropy + beta * reverse cross-entropy, robust to wrong labels.

    The reverse term is -sum_c p_c log e_y[c], where log 0 is set to a finite A: -A (1 - p_y).

    Args:
        output: logits [b, C].
        y: labels [b].
        alpha: weight of the cross-entropy.
        beta: weight of the reverse term.
        log_zero: what log 0 counts as (the paper's A).
    """
    log_p = _pick(F.log_softmax(output, dim=-1), y)
    reverse = log_zero * torch.expm1(log_p)  # -A (1 - p_y), without cancellation where p_y is near 1
    return (-alpha * log_p + beta * reverse).mean()


@loss("apl", tasks=_CLASSIFICATION, paper="Ma et al., ICML 2020, section 3.2 (active passive loss)")
def apl(
    output: Tensor,
    y: Tensor,
    *,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 1.0,
    passive: Literal["rce", "mae"] = "rce",
    log_zero: Annotated[float, Field(lt=0)] = -4.0,
) -> Tensor:
    """Active passive loss: alpha * normalised cross-entropy + beta * a passive loss, both robust to wrong labels.

    Normalised cross-entropy, log p_y / sum_c log p_c, only raises p_y; the passive loss lowers the other probabilities too. It is `rce`,
    the reverse cross-entropy -A (1 - p_y) of `sce`, or `mae`, 2 - 2 p_y as in the paper's text (its published code uses half of that).
    The paper takes alpha = beta = 1 for CIFAR-10 and beta = 100 for MNIST.

    Args:
        output: logits [b, C].
        y: labels [b].
        alpha: weight of the active loss.
        beta: weight of the passive loss.
        passive: which passive loss.
        log_zero: what log 0 counts as in `rce` (the paper's A).
    """
    logs = F.log_softmax(output, dim=-1)
    log_p = _pick(logs, y)
    scale = -log_zero if passive == "rce" else 2.0
    return (alpha * log_p / logs.sum(dim=-1) - beta * scale * torch.expm1(log_p)).mean()


@loss("focal", tasks=_CLASSIFICATION, paper="Lin et al., ICCV 2017, section 3.2, eq. 4")
def focal(output: Tensor, y: Tensor, *, gamma: NonNegative = 2.0) -> Tensor:
    """Focal loss: -(1 - p_y)^gamma log p_y; well-classified samples count less.

    Args:
        output: logits [b, C].
        y: labels [b].
        gamma: 0 is cross-entropy.
    """
    log_p = _pick(F.log_softmax(output, dim=-1), y)
    # The floor keeps the slope of a power below 1 finite where p_y rounds to 1.
    miss = (-torch.expm1(log_p)).clamp(min=torch.finfo(output.dtype).tiny)
    return (-(miss**gamma) * log_p).mean()


@loss("mse", tasks=_BOTH, paper="for labels: Brier, Monthly Weather Review 1950")
def mse(output: Tensor, y: Tensor) -> Tensor:
    """Squared error: (output - y)^2 for a regression, sum_c (p_c - e_y[c])^2 for labels.

    Args:
        output: predictions [b, 1], or logits [b, C].
        y: targets [b], or labels [b].
    """
    return _residuals(output, y).square().sum(dim=-1).mean()


@loss("mae", tasks=_BOTH, paper="for labels: Ghosh et al., AAAI 2017, section 3")
def mae(output: Tensor, y: Tensor) -> Tensor:
    """Absolute error: |output - y| for a regression, sum_c |p_c - e_y[c]| = 2 - 2 p_y for labels.

    Args:
        output: predictions [b, 1], or logits [b, C].
        y: targets [b], or labels [b].
    """
    if y.is_floating_point():
        return _residuals(output, y).abs().sum(dim=-1).mean()
    return (-2 * torch.expm1(_pick(F.log_softmax(output, dim=-1), y))).mean()


@loss("huber", tasks=_BOTH, paper="Huber, Annals of Mathematical Statistics 1964")
def huber(output: Tensor, y: Tensor, *, delta: Annotated[float, Field(gt=0)] = 1.0) -> Tensor:
    """Huber loss: r^2 / 2 where |r| <= delta, else delta (|r| - delta / 2).

    r = output - y for a regression; for labels the sum over the classes with r_c = p_c - e_y[c].

    Args:
        output: predictions [b, 1], or logits [b, C].
        y: targets [b], or labels [b].
        delta: from where on an error counts linearly.
    """
    size = _residuals(output, y).abs()
    near = size.clamp(max=delta)
    return (near * (size - near / 2)).sum(dim=-1).mean()  # both branches in one expression


def _pick(logs: Tensor, y: Tensor) -> Tensor:
    """Return logs[b, y[b]], [b]."""
    return logs.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def _residuals(output: Tensor, y: Tensor) -> Tensor:
    """Return output - y [b, 1] for floating `y`, else p - e_y [b, C]."""
    if y.is_floating_point():
        return output - y.unsqueeze(-1)
    classes = torch.arange(output.shape[-1], device=output.device)
    return output.softmax(dim=-1) - (classes == y.unsqueeze(-1)).to(output.dtype)
