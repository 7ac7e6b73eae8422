"""What happens to a batch of images between normalisation and the net: augmentation in training, the crop, the scale.

Every random choice is an example's own: a function of the step's key, (seed, round, client, step), and of which
example of its client the row is. It does not depend on the rest of the batch, nor on the row's place in it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpifl.config import UserError, require_count
from mpifl.rand import integers_at
from mpifl.tree import Tree

SALT = 0x1A6E  # apart from the small salts of dropout layers, which draw with the same key


@dataclass(frozen=True)
class Images:
    """Options, in the order of their effect, on x (B, H, W) or (B, C, H, W), float32.

    pad: zeros around an image, in training. crop: side of the square that the net sees (default: the image's own
    sides), at a random place of the padded image in training, the image's centre in evaluation. flip: mirror left to
    right half of the examples, in training. standardize: per image (x - mean) / max(std, 1 / sqrt(N)), the mean and
    population standard deviation of its N numbers, as tf.image.per_image_standardization does; N's floor is in the
    units of x, so a dataset that records no mean and std, or 0 and 1, gives TensorFlow's numbers.
    """

    pad: int = 0
    crop: int | None = None
    flip: bool = False
    standardize: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that no image has."""
        require_count("model.images.pad", self.pad, least=0, most=1024)
        if self.crop is not None:
            require_count("model.images.crop", self.crop, least=1)

    def __call__(self, x: Tensor, batch: Tree) -> Tensor:
        """The images that the net sees, (B, h, w) or (B, C, h, w); without `batch["key"]`, evaluation's."""
        height, width = self._sides(x.shape[-2:])
        if "key" not in batch:
            x = x[..., _centre(x.shape[-2], height), _centre(x.shape[-1], width)]
        elif self.pad or self.flip or (height, width) != x.shape[-2:]:
            x = self._augmented(x, height, width, batch)
        return standardized(x) if self.standardize else x

    def seen(self, feature: Any) -> Any:
        """The column's Feature with the shape that the net sees; UserError if these options do not fit it."""
        shape = tuple(feature.shape)
        if len(shape) not in (2, 3):
            raise UserError(f"model.images is for images (H, W) or (C, H, W); the column has {shape}")
        if self.crop is not None and self.crop > min(shape[-2:]):
            raise UserError(
                f"model.images.crop is {self.crop}; the images are {shape[-2]}x{shape[-1]}, crop at most that"
            )
        return dataclasses.replace(feature, shape=(*shape[:-2], *self._sides(shape[-2:])))

    def _sides(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sides) if self.crop is None else (self.crop, self.crop)

    def _augmented(self, x: Tensor, height: int, width: int, batch: Tree) -> Tensor:
        """Padded, cropped and mirrored, by gathering each example's rows and then its columns."""
        x = F.pad(x, (self.pad,) * 4)
        places = (x.shape[-2] - height + 1, x.shape[-1] - width + 1, 2 if self.flip else 1)
        top, left, mirrored = (n.unsqueeze(-1) for n in integers_at(batch["key"], batch["index"], places, SALT))
        rows = top + torch.arange(height, device=x.device)
        columns = torch.arange(width, device=x.device)
        columns = left + torch.where(mirrored == 1, width - 1 - columns, columns)
        between = (1,) * (x.dim() - 3)  # the axis of channels, if there is one
        rows, columns = rows.view(-1, *between, height, 1), columns.view(-1, *between, 1, width)
        x = x.gather(-2, rows.expand(*x.shape[:-2], height, x.shape[-1]))
        return x.gather(-1, columns.expand(*x.shape[:-1], width))


def standardized(x: Tensor) -> Tensor:
    """Each image of (B, ...) with its own mean and deviation taken out; an image of one colour becomes zeros."""
    x = x.to(torch.float32)
    axes = tuple(range(1, x.dim()))
    x = x - x.mean(dim=axes, keepdim=True)
    deviation = x.square().mean(dim=axes, keepdim=True).sqrt()
    return x / deviation.clamp(min=1 / math.sqrt(x[0].numel()))


def _centre(side: int, crop: int) -> slice:
    start = (side - crop) // 2
    return slice(start, start + crop)
