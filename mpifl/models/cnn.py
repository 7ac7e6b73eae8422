"""Convolutional networks for small images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mpifl.config import UserError
from mpifl.models.linear import classes_of, input_shape
from mpifl.rand import dropout


class EmnistConv(nn.Module):
    """3x3x32 and 3x3x64 convolutions, max-pool, dropout .25, 128 units, dropout .5 (TFF's and FedJAX's EMNIST net).

    1,206,590 parameters at 62 classes. forward: x (B, 28, 28) or (B, 1, 28, 28) -> (B, classes).
    """

    def __init__(self, classes: int = 62) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(64 * 12 * 12, 128), nn.Linear(128, classes)

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """Scores, (B, classes); key, () int64, of the step in training, None in evaluation."""
        x = F.relu(self.conv1(x.view(-1, 1, 28, 28)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = dropout(x.flatten(1), 0.25, key, salt=0)
        x = dropout(F.relu(self.fc1(x)), 0.5, key, salt=1)
        return self.fc2(x)


def emnist_conv(features: dict[str, Any]) -> nn.Module:
    """EmnistConv for the dataset's number of classes; images must be 28x28."""
    shape = input_shape(features)
    if shape not in ((28, 28), (1, 28, 28), (28, 28, 1)):
        raise UserError(f"model emnist_conv needs images of 28x28, this dataset has {shape}; use mlp or your own")
    return EmnistConv(classes_of(features))
