"""Convolutional networks for small images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mpifl.config import UserError
from mpifl.models.linear import classes_of, input_shape
from mpifl.rand import dropout


class SmallConv(nn.Module):
    """3x3x32 and 3x3x64 convolutions, max-pool, dropout .25, 128 units, dropout .5.

    shape: of one image, (C, H, W). forward: x (B, C, H, W), or (B, H, W) if C is 1 -> (B, classes).
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.shape = (channels, height, width) = shape
        self.conv1, self.conv2 = nn.Conv2d(channels, 32, 3), nn.Conv2d(32, 64, 3)
        pooled = 64 * ((height - 4) // 2) * ((width - 4) // 2)
        self.fc1, self.fc2 = nn.Linear(pooled, 128), nn.Linear(128, classes)

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """Scores, (B, classes); key, () int64, of the step in training, None in evaluation."""
        x = F.relu(self.conv1(x.view(-1, *self.shape)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = dropout(x.flatten(1), 0.25, key, salt=0)
        x = dropout(F.relu(self.fc1(x)), 0.5, key, salt=1)
        return self.fc2(x)


class EmnistConv(SmallConv):
    """SmallConv for images of 28x28: TFF's and FedJAX's EMNIST net, 1,206,590 parameters at 62 classes."""

    def __init__(self, classes: int = 62) -> None:
        super().__init__((1, 28, 28), classes)


def emnist_conv(features: dict[str, Any]) -> nn.Module:
    """EmnistConv for the dataset's number of classes; images must be 28x28."""
    shape = input_shape(features)
    if shape not in ((28, 28), (1, 28, 28), (28, 28, 1)):
        raise UserError(f"model emnist_conv needs images of 28x28, this dataset has {shape}; use mlp or your own")
    return EmnistConv(classes_of(features))


def cifar_cnn(features: dict[str, Any]) -> nn.Module:
    """SmallConv for images (C, H, W) of any size; 1,626,442 parameters at 3x32x32 and 10 classes (pfl's simple_cnn)."""
    shape = image_shape(features, "cifar_cnn", least=6)
    return SmallConv(shape, classes_of(features))


def image_shape(features: dict[str, Any], model: str, least: int) -> tuple[int, int, int]:
    """(C, H, W) of feature "x", 1 channel if it has no channel axis; UserError unless sides are at least `least`."""
    shape = input_shape(features)
    if len(shape) not in (2, 3) or min(shape[-2:]) < least:
        raise UserError(
            f"model {model} needs images (C, H, W) or (H, W) of at least {least}x{least}, this dataset has {shape}"
        )
    channels = shape[0] if len(shape) == 3 else 1
    return channels, *shape[-2:]
