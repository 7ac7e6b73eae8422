"""CIFAR-10: 60,000 images 32x32 in colour, 10 classes.

What to put where: --source is one of the archives, or the folder it unpacks to:
    https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
    https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz
The 50,000 training images go to clients as --partition says, the test images are the central split "test".
"""

from __future__ import annotations

import argparse

from data_prep import cifar
from data_prep.cifar import add_arguments
from data_prep.conversion import Conversion

__all__ = ["add_arguments", "prepare"]

EDITION = cifar.Edition(
    title="CIFAR-10",
    archives=(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    classes=10,
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test=("test_batch",),
    labels="labels",
    names=("batches.meta", "label_names"),
    names_text="batches.meta.txt",
)


def prepare(options: argparse.Namespace) -> Conversion:
    """Read the labels; workers read the images."""
    return cifar.prepare(options, EDITION)
