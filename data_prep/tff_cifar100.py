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
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import tff
from data_prep.conversion import Conversion
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

ARCHIVE = "fed_cifar100.tar.bz2"
CLASSES, SIDE = 100, 32
LAYOUT: tff.Layout = {"image": ("uint8", (SIDE, SIDE, 3)), "label": ("int64", ())}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are and how much of the images to keep."""
    parser.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder of the HDF5 files")
    parser.add_argument("--crop", type=int, default=SIDE, help=f"side of the centre to keep (default: {SIDE}, all)")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files and list their clients."""
    side = options.crop
    if not 1 <= side <= SIDE:
        raise UserError(f"--crop {side}: must be 1 to {SIDE}, the side of the images")
    paths = {name: tff.find(options.source, f"fed_cifar100_{name}.h5", ARCHIVE) for name in ("train", "test")}
    return Conversion(
        features={"x": Feature("uint8", (3, side, side)), "y": Feature("uint8", (), classes=CLASSES)},
        splits=tff.splits(paths, partial(read, side=side)),
        provenance={
            "source": "Federated CIFAR-100, TensorFlow Federated, HDF5: A. Krizhevsky (2009), shared out by "
            "S. Reddi et al. (2021)",
            "made": f"the centre {side}x{side} of 32x32, channels first, values 0 to 255; fine labels",
            "licence": "none is stated by its authors",
        },
        standardize="x",
    )


def read(ids: Iterable[str], path: Path, side: int) -> Iterator[tuple[str, Columns]]:
    """Yield each client's images: x uint8 (n, 3, side, side), y uint8 (n,)."""
    start = (SIDE - side) // 2
    centre = slice(start, start + side)
    for client, columns in tff.clients(path, ids, LAYOUT):
        channels_first = columns["image"].transpose(0, 3, 1, 2)
        x = np.ascontiguousarray(channels_first[..., centre, centre])
        yield client, {"x": x, "y": tff.labels(columns["label"], CLASSES, path, client)}
