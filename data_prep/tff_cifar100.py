"""CIFAR-100 by TensorFlow Federated: images 32x32 in colour, 100 classes, on 500 clients and 100 for test.

What to put where: into --source, unpacked from
https://storage.googleapis.com/tff-datasets-public/fed_cifar100.tar.bz2
(mirror: https://fedml.s3-us-west-1.amazonaws.com/fed_cifar100.tar.bz2),
    fed_cifar100_train.h5  fed_cifar100_test.h5
Clients have 100 images each, shared out by the Pachinko allocation of S. Reddi et al. (2021). Images are
stored whole and channels first; what the model needs of them (24x24, mostly) it crops itself, or --crop 24
keeps the centre only. The clients of test are none of train.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import tff
from data_prep.conversion import Conversion
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

ARCHIVE = "fed_cifar100.tar.bz2"
CLASSES, SIDE = 100, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are and how much of the images to keep."""
    parser.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder of the HDF5 files")
    parser.add_argument("--crop", type=int, default=SIDE, help=f"side of the centre to keep (default: {SIDE}, all)")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files and list their clients."""
    content = cropped(options.crop)
    paths = {name: tff.find(options.source, f"fed_cifar100_{name}.h5", ARCHIVE) for name in ("train", "test")}
    return content.conversion(tff.splits(paths, content, options.shard_mb), tff.FILES)


def cropped(side: int) -> tff.Content:
    """What becomes of Federated CIFAR-100; UserError unless `side` is that of a part of the images."""
    if not 1 <= side <= SIDE:
        raise UserError(f"--crop {side}: must be 1 to {SIDE}, the side of the images")
    return tff.Content(
        layout={"image": ("uint8", (SIDE, SIDE, 3)), "label": ("int64", ())},
        features={"x": Feature("uint8", (3, side, side)), "y": Feature("uint8", (), classes=CLASSES)},
        convert=partial(to_columns, side=side),
        source="Federated CIFAR-100: A. Krizhevsky (2009), shared out by S. Reddi et al. (2021)",
        made=f"the centre {side}x{side} of 32x32, channels first, values 0 to 255; fine labels",
        licence="none is stated by its authors",
        standardize="x",
    )


def to_columns(client: str, found: dict[str, Any], path: Path, side: int) -> Columns:
    """Crop a client's images: x uint8 (n, 3, side, side), y uint8 (n,)."""
    start = (SIDE - side) // 2
    centre = slice(start, start + side)
    x = np.ascontiguousarray(found["image"].transpose(0, 3, 1, 2)[..., centre, centre])
    return {"x": x, "y": tff.labels(found["label"], CLASSES, path, client)}
