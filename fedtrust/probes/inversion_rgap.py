"""R-GAP: a convolutional network inverted layer by layer, from the last to the first, by solving linear systems."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from fedtrust.fits import RunFacts, first
from fedtrust.models.architecture import Architecture
from fedtrust.models.entrance import head
from fedtrust.probes.base import ProbeContext, Result, need, probe
from fedtrust.probes.guesses import Reconstruction, Reconstructions
from fedtrust.probes.inversion_analytic import single
from fedtrust.probes.inversion_labels import labels_of, unlabelled
from fedtrust.probes.inversion_update import Seen, acts, mean_gradient, seen, undone

Count = Annotated[int, Field(ge=1, le=100_000)]

#: Systems with more unknowns than this take too long.
_LARGEST = 4000


class Block(NamedTuple):
    """A convolution and the activation behind it.

    Attributes:
        name: the convolution's dotted name.
        layer: the convolution.
        smooth: its activation, `nn.Tanh` or `nn.Sigmoid`.
        given: shape of its input [c, h, w].
        out: shape of its output [c', h', w'].
    """

    name: str
    layer: nn.Conv2d
    smooth: nn.Module
    given: tuple[int, int, int]
    out: tuple[int, int, int]

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros around its input, in rows and columns."""
        if isinstance(self.layer.padding, str):
            raise ValueError(f"reads convolutions with a padding in pixels, not '{self.layer.padding}'")
        return self.layer.padding[0], self.layer.padding[1]


def blocks_of(model: Architecture, shape: tuple[int, ...]) -> list[Block]:
    """Return the convolutions of a network that can be inverted, in the order of the data.

    Args:
        model: the network.
        shape: of a sample.

    Raises:
        ValueError: the network is not made of convolutions with tanh or sigmoid and one linear layer, or a layer is too wide.
    """
    found: list[Block] = []
    layers = list(model.leaves.items())
    body = [pair for pair in layers[:-1] if not isinstance(pair[1], nn.Flatten)]
    otherwise = ValueError("inverts convolutions with tanh or sigmoid and one linear layer (lenet); this model is made otherwise")
    if not body or len(body) % 2 or not isinstance(layers[-1][1], nn.Linear):
        raise otherwise
    for (name, conv), (_, smooth) in zip(body[::2], body[1::2], strict=True):
        if not isinstance(conv, nn.Conv2d) or not isinstance(smooth, nn.Tanh | nn.Sigmoid):
            raise otherwise
        with torch.no_grad():
            out = tuple(F.conv2d(torch.zeros(1, *shape), torch.zeros(conv.weight.shape), None, conv.stride, conv.padding)[0].shape)
        found.append(Block(name, conv, smooth, shape, out))  # type: ignore[arg-type]
        shape = out
    widest = max(block.given[0] * block.given[1] * block.given[2] for block in found)
    if widest > _LARGEST:
        raise ValueError(f"would have to solve for {widest} unknowns at once, {_LARGEST} at most")
    return found


def _made_otherwise(facts: RunFacts) -> str | None:
    try:
        for block in blocks_of(facts.model, facts.task.shape):
            block.padding  # noqa: B018  # raises where it is a word
    except ValueError as error:
        return str(error)
    return None


def inverted(block: Block, weight: Tensor, bias: Tensor, gradient: Tensor, output: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Return a convolution's input [c, h, w] and the gradient there [c, h, w]; Zhu and Blaschko, section 3.

    The input solves two sets of linear equations: its convolution is what the activation's inverse says (weight constraints), and its
    correlation with the gradient at the convolution's output is the gradient of the weights (gradient constraints). The least-squares
    solution of both is taken, each scaled to the size of its matrix.

    Args:
        block: the convolution.
        weight: its weight, float64 [c', c, k, k]; bias [c'].
        bias: its bias [c'].
        gradient: the gradient of its weight [c', c, k, k].
        output: what the activation put out [c', h', w'].
        upstream: the gradient there [c', h', w'].
    """
    if isinstance(block.smooth, nn.Tanh):
        inside = output.clamp(-1 + 1e-12, 1 - 1e-12)
        before, slope = inside.atanh(), 1 - inside.square()
    else:
        inside = output.clamp(1e-12, 1 - 1e-12)
        before, slope = inside.logit(), inside * (1 - inside)
    at = upstream * slope
    size, stride, padding = block.given[0] * block.given[1] * block.given[2], block.layer.stride, block.padding
    kernel = weight.shape[2:]
    forward, backward = [], []
    for unit in torch.split(torch.eye(size, dtype=weight.dtype).view(size, *block.given), 256):
        forward.append(F.conv2d(unit, weight, None, stride, padding).flatten(1))
        patches = F.unfold(unit, kernel, padding=padding, stride=stride)  # [m, c k k, h' w']
        backward.append(torch.einsum("mkp,op->mok", patches, at.flatten(1)).flatten(1))
    first, second = torch.cat(forward).T, torch.cat(backward).T  # [c' h' w', size], [c' c k k, size]
    scales = [1 / part.norm().clamp(min=1e-300) for part in (first, second)]
    system = torch.cat([first * scales[0], second * scales[1]])
    right = torch.cat([(before - bias[:, None, None]).flatten() * scales[0], gradient.flatten() * scales[1]])
    x = torch.linalg.lstsq(system, right[:, None]).solution[:, 0].view(block.given)
    back = conv2d_input((1, *block.given), weight, at[None], stride, padding)[0]  # type: ignore[no-untyped-call]
    return x, back


def unrolled(ctx: ProbeContext, what: Seen) -> Tensor:
    """Return the one sample that gave an update [*shape]."""
    model, layout = need(ctx.model, "the model"), need(ctx.layout, "the layout")
    blocks, last = blocks_of(model, ctx.task.shape), head(model, layout)
    if last is None:
        raise ValueError("needs a last linear layer with a bias")
    gradient = mean_gradient(what, need(ctx.recipe, "the recipe"))
    weights, gradients = (layout.unflatten(flat.double()) for flat in (what.start, gradient))
    rows, biases = last.of(gradient)
    x = single(rows, biases).double()
    upstream = last.of(what.start)[0].double().T @ biases.double()
    for block in reversed(blocks):
        names = f"{block.name}.weight", f"{block.name}.bias"
        shaped = x.view(block.out), upstream.view(block.out)
        x, upstream = inverted(block, weights[names[0]], weights[names[1]], gradients[names[0]], *shaped)
    return x.float()


@probe(
    "r-gap",
    role="curious-server",
    task="classification",
    once=True,
    fits=first(_made_otherwise, unlabelled, undone),
    paper="Zhu and Blaschko (R-GAP), ICLR 2021, section 3",
)
def r_gap(ctx: ProbeContext, *, at_round: Count = 1, clients: Count = 2) -> Result:
    """A sample in closed form from a convolutional network: recursively, each layer's input from its output and its gradients.

    The last layer's input is a ratio of gradients, as in `analytic-inversion`; every convolution before it is a system of linear equations.
    For one sample and one step, and networks of convolutions with invertible activations and no pooling (`lenet` with tanh or sigmoid).
    Clients with more samples are passed over. Where the paper goes from the loss to the last layer's input, the ratio of the gradients of
    that layer's weight and bias is taken here.

    Args:
        ctx: what a curious server knows.
        at_round: when it acts.
        clients: how many clients it attacks, those with the smallest ids that replied with a single sample.
    """
    if not acts(ctx, at_round):
        return {}
    alone = [one for one in seen(ctx, len(ctx.clients)) if one.samples == 1][:clients]
    items = tuple(Reconstruction(one.client, unrolled(ctx, one)[None], labels_of(ctx, one, 1)) for one in alone)
    return {"r-gap": Reconstructions(items)} if items else {}
