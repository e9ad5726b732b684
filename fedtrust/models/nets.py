"""The models that clients train.

A model is a function `(task, *, params) -> nn.Module` from samples [b, *task.shape] to outputs [b, task.classes] (logits; for a
regression the predicted value [b, 1]). None has buffers, dropout or in-place activations: every model must give the same result one at
a time, under `torch.func.vmap` and fused (`fedtrust.engine.fused`), and running statistics would be averaged behind the server rule's
back (hence GroupNorm, Wu and He, ECCV 2018, never BatchNorm; Hsieh et al., ICML 2020, section 5, on why BatchNorm fails under label skew).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fedtrust.data.base import Task
from fedtrust.errors import InputError
from fedtrust.registry import model

Width = Annotated[int, Field(ge=1, le=65536)]
Activation = Literal["relu", "tanh", "sigmoid"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
_MLP_HIDDEN = [128, 64]

#: Images with a shorter side than this get a residual network's small stem, as in He et al. (CVPR 2016), section 4.2.
SMALL_IMAGE = 64


@model("logistic")
def logistic(task: Task) -> nn.Module:
    """Multinomial logistic regression: one linear layer (linear regression where the task is one)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(task.shape), task.classes))


@model("mlp")
def mlp(task: Task, *, hidden: list[Width] = _MLP_HIDDEN, activation: Activation = "relu") -> nn.Module:
    """A multi-layer perceptron.

    Args:
        task: what it is for; any shape of sample.
        hidden: width of each hidden layer; an empty list leaves one linear layer.
        activation: the non-linearity; `tanh` and `sigmoid` are smooth, as attacks that differentiate gradients want it.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(task.shape)
    for size in hidden:
        layers += [nn.Linear(width, size), _ACTIVATIONS[activation]()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, task.classes))


@model("cnn", paper="the plain form of LeCun et al., Proc. IEEE 1998, section II")
def cnn(task: Task, *, hidden: Width = 64, activation: Activation = "relu") -> nn.Module:
    """A small convolutional network: two convolutions with pooling and two linear layers; 54k parameters on 28x28 digits.

    Sixteen channels in both convolutions fill the vector registers of a CPU; eight would leave half of each idle.

    Args:
        task: an image task with sides of at least 4 pixels.
        hidden: width of the hidden linear layer.
        activation: the non-linearity.

    Raises:
        InputError: the samples are not images, or too small.
    """
    channels, height, width = _image(task, "cnn", smallest=4)
    act = _ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2),
        act(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        act(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (height // 4) * (width // 4), hidden),
        act(),
        nn.Linear(hidden, task.classes),
    )


@model("cnn-large", paper="the network of PyTorch's MNIST example, without its dropout")
def cnn_large(task: Task, *, hidden: Width = 128) -> nn.Module:
    """A larger convolutional network: 1.2M parameters on 28x28 digits.

    Args:
        task: an image task with sides of at least 6 pixels.
        hidden: width of the hidden linear layer.

    Raises:
        InputError: the samples are not images, or too small.
    """
    channels, height, width = _image(task, "cnn-large", smallest=6)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), hidden),
        nn.ReLU(),
        nn.Linear(hidden, task.classes),
    )


@model("resnet18", paper="He et al., CVPR 2016, section 4; GroupNorm: Wu and He, ECCV 2018")
def resnet18(task: Task, *, groups: Literal[1, 2, 4, 8, 16, 32, 64] = 8, stem: Literal["auto", "small", "large"] = "auto") -> nn.Module:
    """The ResNet-18 of torchvision with GroupNorm; 11.2M parameters.

    Args:
        task: an image task with sides of at least 8 pixels.
        groups: groups of every GroupNorm.
        stem: what comes first. `large`: the 7x7 convolution of stride 2 and the max-pool of torchvision, made for ImageNet; `small`: a 3x3
            convolution of stride 1 and no max-pool, as in He et al. (CVPR 2016), section 4.2, which takes fourteen times the
            arithmetic on digits; `auto`: the small one for images below 64 pixels.

    Raises:
        InputError: the samples are not images, or too small.
    """
    from torchvision.models import resnet18 as torchvision_resnet18  # imports only beside the torch it was built for

    channels, height, width = _image(task, "resnet18", smallest=8)
    net: nn.Module = torchvision_resnet18(weights=None, norm_layer=lambda c: nn.GroupNorm(groups, c), num_classes=task.classes)
    if stem == "small" or (stem == "auto" and min(height, width) < SMALL_IMAGE):
        net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    for layer in net.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # writing over a tensor that torch.func still needs is an error there
    return net


def _image(task: Task, name: str, smallest: int) -> tuple[int, int, int]:
    """Return (channels, height, width), or refuse a task that is not images of at least `smallest` pixels a side."""
    if not task.image:
        raise InputError(f"model '{name}' needs images [channels, height, width], but a sample has the shape {list(task.shape)}; use mlp")
    channels, height, width = task.shape
    if min(height, width) < smallest:
        raise InputError(f"model '{name}' needs images of at least {smallest}x{smallest} pixels, these have {height}x{width}")
    return channels, height, width
