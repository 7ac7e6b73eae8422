"""Residual networks with group normalization: no statistics of a batch, none that outlives it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mpifl.config import UserError
from mpifl.models.cnn import image_shape
from mpifl.models.linear import classes_of

WIDTHS = (64, 128, 256, 512)


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016) with GroupNorm (Wu and He 2018) in place of BatchNorm.

    stem: 7 is a 7x7 convolution of stride 2 and a max-pool, for large images (11,227,812 parameters at 3 channels and
    100 classes); 3 is a 3x3 convolution, for those of CIFAR's size (11,220,132). groups: of each norm; 2 in Reddi et
    al. 2020. forward: x (B, C, H, W), or (B, H, W) if C is 1 -> (B, classes).
    """

    def __init__(self, channels: int, classes: int, stem: int = 7, groups: int = 2) -> None:
        super().__init__()
        self.channels, self.small = channels, stem == 3
        self.conv = nn.Conv2d(channels, WIDTHS[0], stem, stride=1 if self.small else 2, padding=stem // 2, bias=False)
        self.norm = nn.GroupNorm(groups, WIDTHS[0])
        blocks = []
        for before, width in zip((WIDTHS[0], *WIDTHS), WIDTHS):
            stride = 1 if before == width else 2
            blocks += [_Block(before, width, stride, groups), _Block(width, width, 1, groups)]
        self.blocks = nn.Sequential(*blocks)
        self.out = nn.Linear(WIDTHS[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Scores, (B, classes)."""
        x = F.relu(self.norm(self.conv(x.view(-1, self.channels, *x.shape[-2:]))))
        if not self.small:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        return self.out(self.blocks(x).mean(dim=(-2, -1)))


class _Block(nn.Module):
    """Two 3x3 convolutions added to their input, which a 1x1 convolution brings to their shape where it differs."""

    def __init__(self, before: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.shortcut = nn.Sequential()
        if before != width:
            self.shortcut.append(nn.Conv2d(before, width, 1, stride, bias=False))
            self.shortcut.append(nn.GroupNorm(groups, width))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet18(features: dict[str, Any], stem: int = 7, groups: int = 2) -> nn.Module:
    """ResNet18 for the dataset's channels and classes."""
    if stem not in (3, 7):
        raise UserError(f"resnet18 stem is {stem}; it must be 7 (large images) or 3 (images of CIFAR's size)")
    if groups < 1 or WIDTHS[0] % groups:
        raise UserError(f"resnet18 groups is {groups}; it must divide the {WIDTHS[0]} channels of the first layer")
    channels, _, _ = image_shape(features, "resnet18", least=8)
    return ResNet18(channels, classes_of(features), stem, groups)
