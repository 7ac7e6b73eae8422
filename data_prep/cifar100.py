"""CIFAR-100: 60,000 images 32x32 in colour, 100 classes, or the 20 that these are grouped in.

What to put where: --source is one of the archives, or the folder it unpacks to:
    https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz
    https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz
The 50,000 training images go to clients as --partition says, the test images are the central split "test".
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from data_prep import cifar
from data_prep.conversion import Conversion

FINE = cifar.Edition(
    title="CIFAR-100",
    archives=(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
    classes=100,
    train=("train",),
    test=("test",),
    labels="fine_labels",
    names=("meta", "fine_label_names"),
    names_text="fine_label_names.txt",
    label_bytes=2,
    label_byte=1,
)
COARSE = replace(
    FINE,
    title="CIFAR-100, coarse labels",
    classes=20,
    labels="coarse_labels",
    names=("meta", "coarse_label_names"),
    names_text="coarse_label_names.txt",
    label_byte=0,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are, which labels to take, and how to share them out."""
    cifar.add_arguments(parser)
    parser.add_argument("--coarse", action="store_true", help="take the 20 coarse labels (default: the 100 fine ones)")


def prepare(options: argparse.Namespace) -> Conversion:
    """Read the labels; workers read the images."""
    return cifar.prepare(options, COARSE if options.coarse else FINE)
