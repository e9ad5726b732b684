"""Models that papers on gradient inversion attack: a smooth network without pooling, and one with an imprint module in front."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import nn

from fedtrust.data.base import Task
from fedtrust.models.nets import _ACTIVATIONS, Activation, Width, _image
from fedtrust.registry import model


@model("lenet", paper="Zhu, Liu and Han (DLG), NeurIPS 2019, section 4.1: LeNet with smooth activations and strides in place of pooling")
def lenet(task: Task, *, channels: Width = 12, activation: Activation = "tanh") -> nn.Module:
    """Three 5x5 convolutions with strides 2, 2, 1 and one linear layer; 13k parameters on 28x28 digits.

    The network that deep leakage from gradients is shown on, its initial weights apart (here PyTorch's; there uniform in ±0.5). Smooth and
    without pooling, it can be differentiated twice everywhere, and its layers can be inverted one by one.

    Args:
        task: an image task with sides of at least 4 pixels.
        channels: of every convolution.
        activation: the paper's is `sigmoid`; under PyTorch's initial weights `tanh` lets far more of the gradient through.

    Raises:
        InputError: the samples are not images, or too small.
    """
    depth, height, width = _image(task, "lenet", smallest=4)
    layers: list[nn.Module] = []
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(depth, channels, 5, stride=stride, padding=2), _ACTIVATIONS[activation]()]
        depth, height, width = channels, math.ceil(height / stride), math.ceil(width / stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, task.classes))


@model("imprint", paper="Fowl et al. (Robbing the Fed), ICLR 2022, section 3: the imprint module before a network")
def imprint(
    task: Task, *, bins: Annotated[int, Field(ge=2, le=4096)] = 64, hidden: Width = 64, activation: Activation = "relu"
) -> nn.Module:
    """A linear layer of `bins` rectified units and one back to the size of the image, in front of the model `cnn`.

    The change of the agreed architecture that Robbing the Fed asks for. A linear layer before the first convolution makes no sense for
    images, and nothing is won by it; an honest client that looks sees it. The attack itself is the sender `robbing-the-fed`, which fills in
    the parameters; without it this is a model like any other.

    Args:
        task: an image task with sides of at least 4 pixels.
        bins: units of the first layer; samples that share one are mixed up.
        hidden: width of the convolutional network's hidden linear layer.
        activation: of the convolutional network.

    Raises:
        InputError: the samples are not images, or too small.
    """
    from fedtrust.models.nets import cnn

    _image(task, "imprint", smallest=4)
    size = math.prod(task.shape)
    front = [nn.Flatten(), nn.Linear(size, bins), nn.ReLU(), nn.Linear(bins, size), nn.Unflatten(1, task.shape)]
    return nn.Sequential(*front, *cnn(task, hidden=hidden, activation=activation))
