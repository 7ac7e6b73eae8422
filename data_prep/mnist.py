"""MNIST: 70,000 images 28x28 of handwritten digits, from its four IDX files.

What to put where: into --source, gzipped or not,
    train-images-idx3-ubyte.gz  train-labels-idx1-ubyte.gz
    t10k-images-idx3-ubyte.gz   t10k-labels-idx1-ubyte.gz
from https://ossci-datasets.s3.amazonaws.com/mnist/ (a mirror). Unless told otherwise, each of 100 clients gets 45
training images of every label. The test images are the central split "test".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep import corpus, idx, sharing
from data_prep.conversion import Conversion
from mpifl.data.shard import Feature

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
PER_LABEL = 45


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are and how to share them out."""
    parser.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder of the IDX files")
    sharing.add_arguments(parser, default="equal-labels")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find and check the files."""
    if options.partition == "equal-labels" and options.per_label is None:
        options = argparse.Namespace(**vars(options) | {"per_label": PER_LABEL})
    train, test = (idx.rows(options.source, part, MIRROR, range(10)) for part in ("train", "t10k"))
    return Conversion(
        features={
            "x": Feature("uint8", (idx.SIDE, idx.SIDE), mean=0.0, std=255.0),
            "y": Feature("uint8", (), classes=10),
        },
        splits=corpus.splits(options, train, {"test": test}),
        provenance={
            "source": "MNIST, Y. LeCun, C. Cortes and C. Burges: handwritten digits from NIST, four IDX files",
            "made": f"training images: {sharing.describe(options)}; pixels 0 to 255 unchanged",
            "licence": "CC BY-SA 3.0",
        },
    )
