"""The optimisers that clients train with, on blocks: one row per client.

An optimiser is a frozen dataclass whose fields are its parameters. Its arithmetic is that of `torch.optim`, row by row:

* `init(params [k, d])` returns its state, blocks [k, d] by name;
* `step(params, grads, state, t, lr)` changes `params` and `state` in place, and never `grads`. `t` counts from 1 and every row has made
  the same number of steps. Clients with less data finish earlier: the caller then passes the first rows only, of everything;
* `torch(parameters, lr)` is the same optimiser of PyTorch, for the path that trains a client at a time.

Weight decay is L2 regularisation: `weight_decay * params` is added to the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch.optim as reference
from pydantic import Field
from torch import Tensor

from fedtrust.registry import optimiser

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

State = dict[str, Tensor]


class Optimiser(Protocol):
    """What the engine asks of a client optimiser; see the module's docstring."""

    def init(self, params: Tensor) -> State:
        """Return the state before the first step, for `params` [k, d]."""

    def step(self, params: Tensor, grads: Tensor, state: State, t: int, lr: float) -> None:
        """Take step number `t` (from 1) with learning rate `lr`, in place."""

    def torch(self, parameters: Iterable[Tensor], lr: float) -> reference.Optimizer:
        """Return the same optimiser of PyTorch for one client's parameters."""


def _decayed(params: Tensor, grads: Tensor, weight_decay: float) -> Tensor:
    return grads.add(params, alpha=weight_decay) if weight_decay else grads


@optimiser("sgd", paper="momentum: Sutskever et al., ICML 2013, section 2")
@dataclass(frozen=True, kw_only=True)
class Sgd:
    """Stochastic gradient descent, plain unless `momentum` is set.

    Attributes:
        momentum: share of the velocity that is kept at each step.
        dampening: share of the gradient that does not enter the velocity (not at the first step, as in PyTorch).
        nesterov: look ahead along the velocity.
        weight_decay: L2 regularisation.
    """

    momentum: Fraction = 0.0
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def __post_init__(self) -> None:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening = 0")
        if self.dampening and self.momentum == 0:
            raise ValueError("dampening does nothing without momentum")

    def init(self, params: Tensor) -> State:
        """Return the velocity [k, d], where there is momentum."""
        return {"velocity": params.new_zeros(params.shape)} if self.momentum else {}

    def step(self, params: Tensor, grads: Tensor, state: State, t: int, lr: float) -> None:
        """Take a step in place."""
        grads = _decayed(params, grads, self.weight_decay)
        if self.momentum:
            velocity = state["velocity"]
            velocity.mul_(self.momentum).add_(grads, alpha=1.0 if t == 1 else 1 - self.dampening)
            grads = grads.add(velocity, alpha=self.momentum) if self.nesterov else velocity
        params.add_(grads, alpha=-lr)

    def torch(self, parameters: Iterable[Tensor], lr: float) -> reference.Optimizer:
        """Return `torch.optim.SGD`."""
        return reference.SGD(
            parameters, lr, momentum=self.momentum, dampening=self.dampening, nesterov=self.nesterov, weight_decay=self.weight_decay
        )


@optimiser("momentum", paper="Polyak, USSR Computational Mathematics and Mathematical Physics 1964")
@dataclass(frozen=True, kw_only=True)
class Momentum(Sgd):
    """Stochastic gradient descent with momentum (heavy ball)."""

    momentum: Fraction = 0.9


@optimiser("nesterov", paper="Nesterov, Soviet Mathematics Doklady 1983; as in Sutskever et al., ICML 2013, section 2")
@dataclass(frozen=True, kw_only=True)
class Nesterov(Sgd):
    """Stochastic gradient descent with Nesterov's momentum."""

    momentum: Fraction = 0.9
    nesterov: bool = True


@optimiser("adagrad", paper="Duchi et al., JMLR 2011, section 1.1")
@dataclass(frozen=True, kw_only=True)
class Adagrad:
    """AdaGrad: each parameter's rate falls with the sum of its squared gradients.

    Attributes:
        lr_decay: the rate is divided by 1 + (t - 1) * lr_decay.
        initial_accumulator: what the sum of squares starts with.
        eps: added to the root.
        weight_decay: L2 regularisation.
    """

    lr_decay: NonNegative = 0.0
    initial_accumulator: NonNegative = 0.0
    eps: Positive = 1e-10
    weight_decay: NonNegative = 0.0

    def init(self, params: Tensor) -> State:
        """Return the sum of squared gradients [k, d]."""
        return {"squares": params.new_full(params.shape, self.initial_accumulator)}

    def step(self, params: Tensor, grads: Tensor, state: State, t: int, lr: float) -> None:
        """Take a step in place."""
        grads = _decayed(params, grads, self.weight_decay)
        squares = state["squares"].addcmul_(grads, grads)
        params.addcdiv_(grads, squares.sqrt().add_(self.eps), value=-lr / (1 + (t - 1) * self.lr_decay))

    def torch(self, parameters: Iterable[Tensor], lr: float) -> reference.Optimizer:
        """Return `torch.optim.Adagrad`."""
        return reference.Adagrad(
            parameters,
            lr,
            lr_decay=self.lr_decay,
            weight_decay=self.weight_decay,
            initial_accumulator_value=self.initial_accumulator,
            eps=self.eps,
        )


@optimiser("rmsprop", paper="Tieleman and Hinton, Coursera lecture 6.5, 2012; centred: Graves, arXiv 1308.0850, section 4.2")
@dataclass(frozen=True, kw_only=True)
class RmsProp:
    """RMSprop: gradients divided by the root of their running mean square.

    Attributes:
        alpha: share of the running mean that is kept.
        eps: added to the root.
        momentum: share of the velocity that is kept.
        centred: divide by the running standard deviation instead.
        weight_decay: L2 regularisation.
    """

    alpha: Fraction = 0.99
    eps: Positive = 1e-8
    momentum: Fraction = 0.0
    centred: bool = False
    weight_decay: NonNegative = 0.0

    def init(self, params: Tensor) -> State:
        """Return the running means and the velocity, as far as they are used, each [k, d]."""
        names = ["squares", *(["mean"] if self.centred else []), *(["velocity"] if self.momentum else [])]
        return {name: params.new_zeros(params.shape) for name in names}

    def step(self, params: Tensor, grads: Tensor, state: State, t: int, lr: float) -> None:
        """Take a step in place."""
        grads = _decayed(params, grads, self.weight_decay)
        squares = state["squares"].mul_(self.alpha).addcmul_(grads, grads, value=1 - self.alpha)
        if self.centred:
            mean = state["mean"].lerp_(grads, 1 - self.alpha)
            root = squares.addcmul(mean, mean, value=-1).sqrt_()
        else:
            root = squares.sqrt()
        root.add_(self.eps)
        if self.momentum:
            params.add_(state["velocity"].mul_(self.momentum).addcdiv_(grads, root), alpha=-lr)
        else:
            params.addcdiv_(grads, root, value=-lr)

    def torch(self, parameters: Iterable[Tensor], lr: float) -> reference.Optimizer:
        """Return `torch.optim.RMSprop`."""
        return reference.RMSprop(
            parameters,
            lr,
            alpha=self.alpha,
            eps=self.eps,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            centered=self.centred,
        )


@optimiser("adadelta", paper="Zeiler, arXiv 1212.5701, section 3")
@dataclass(frozen=True, kw_only=True)
class Adadelta:
    """Adadelta: steps scaled by the running root mean square of past steps; meant for a learning rate of 1.

    Attributes:
        rho: share of the running means that is kept.
        eps: added inside the roots.
        weight_decay: L2 regularisation.
    """

    rho: Fraction = 0.9
    eps: Positive = 1e-6
    weight_decay: NonNegative = 0.0

    def init(self, params: Tensor) -> State:
        """Return the running means of squared gradients and squared steps, each [k, d]."""
        return {"squares": params.new_zeros(params.shape), "steps": params.new_zeros(params.shape)}

    def step(self, params: Tensor, grads: Tensor, state: State, t: int, lr: float) -> None:
        """Take a step in place."""
        grads = _decayed(params, grads, self.weight_decay)
        squares = state["squares"].mul_(self.rho).addcmul_(grads, grads, value=1 - self.rho)
        delta = state["steps"].add(self.eps).sqrt_().div_(squares.add(self.eps).sqrt_()).mul_(grads)
        state["steps"].mul_(self.rho).addcmul_(delta, delta, value=1 - self.rho)
        params.add_(delta, alpha=-lr)

    def torch(self, parameters: Iterable[Tensor], lr: float) -> reference.Optimizer:
        """Return `torch.optim.Adadelta`."""
        return reference.Adadelta(parameters, lr, rho=self.rho, eps=self.eps, weight_decay=self.weight_decay)


@optimiser("adam", paper="Kingma and Ba, ICLR 2015, algorithm 1")
@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam: momentum divided by the root of the running mean square, both corrected for their start at zero.

    Attributes:
        beta1: share of the running mean that is kept.
        beta2: share of the running mean square that is kept.
        eps: added to the root.
        weight_decay: L2 regularisation (not decoupled).
    """

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0

    def init(self, params: Tensor) -> State:
        """Return the running mean and mean square of the gradients, each [k, d]."""
        return {"mean": params.new_zeros(params.shape), "squares": params.new_zeros(params.shape)}

    def step(self, params: Tensor, grads: Tensor, state: State, t: int, lr: float) -> None:
        """Take a step in place."""
        grads = _decayed(params, grads, self.weight_decay)
        mean = state["mean"].lerp_(grads, 1 - self.beta1)
        squares = state["squares"].mul_(self.beta2).addcmul_(grads, grads, value=1 - self.beta2)
        root = squares.sqrt().div_((1 - self.beta2**t) ** 0.5).add_(self.eps)
        params.addcdiv_(mean, root, value=-lr / (1 - self.beta1**t))

    def torch(self, parameters: Iterable[Tensor], lr: float) -> reference.Optimizer:
        """Return `torch.optim.Adam`."""
        return reference.Adam(parameters, lr, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay)
