"""Logistic regression and multilayer perceptrons, as plain `nn.Sequential`s that load without this package."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from mpifl.config import UserError


def flat_inputs(features: dict[str, Any]) -> int:
    """Number of inputs of one example of feature "x"."""
    return math.prod(input_shape(features))


def input_shape(features: dict[str, Any]) -> tuple[int, ...]:
    """Shape of one example of feature "x"; UserError for a dataset without it."""
    if "x" not in features:
        raise UserError(f"this model reads column 'x'; the dataset has {', '.join(features)}: name a model of your own")
    return tuple(features["x"].shape)


def classes_of(features: dict[str, Any]) -> int:
    """Number of classes of feature "y"; UserError if the dataset does not say."""
    classes = features["y"].classes if "y" in features else None
    if not classes:
        raise UserError("this model needs a dataset whose column 'y' records its number of classes")
    return classes


def logistic(features: dict[str, Any]) -> nn.Module:
    """Linear map from (B, *x.shape) to (B, classes)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(flat_inputs(features), classes_of(features)))


def mlp(features: dict[str, Any], hidden: tuple[int, ...] = (200, 200)) -> nn.Module:
    """ReLU perceptron from (B, *x.shape) to (B, classes); 784-200-200-62 is FedJAX's and LEAF's EMNIST "dense"."""
    if not all(1 <= units <= 10**6 for units in hidden):
        raise UserError(f"mlp hidden is {list(hidden)}; every layer must have at least 1 unit, and at most 1000000")
    layers: list[nn.Module] = [nn.Flatten()]
    width = flat_inputs(features)
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, classes_of(features)))
