"""The models of the GPU bench with torch alone: those of `fedtrust.models.nets`, which needs pydantic and torchvision for them.

A test compares them, parameter by parameter and output by output. All are for images [1, 28, 28] and ten classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8


def cnn() -> nn.Module:
    """The 54k-parameter CNN."""
    convolutions = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn_large() -> nn.Module:
    """The 1.2M-parameter CNN."""
    convolutions = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10))


class Block(nn.Module):
    """Two 3x3 convolutions and a way round them (He et al., CVPR 2016, section 3), with GroupNorm."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.GroupNorm(GROUPS, width)
        if stride != 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride=stride, bias=False), nn.GroupNorm(GROUPS, width))
        else:
            self.downsample = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet-18 with GroupNorm and the stem for small images; 11.2M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.bn1 = nn.GroupNorm(GROUPS, 64)
        widths = (64, 64, 128, 256, 512)
        for i in range(1, 5):
            first = Block(widths[i - 1], widths[i], 1 if i == 1 else 2)
            self.add_module(f"layer{i}", nn.Sequential(first, Block(widths[i], widths[i], 1)))
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [b, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        out: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return out


#: The models by the names that they have in fedtrust.
NETS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "cnn-large": cnn_large, "resnet18": ResNet18}
