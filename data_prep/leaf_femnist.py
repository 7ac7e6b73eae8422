"""FEMNIST by LEAF: images 28x28 of characters by writer, 62 classes.

What to put where: --source is the folder data/femnist/data that data/femnist/preprocess.sh of
https://github.com/TalwalkarLab/leaf fills, e.g. with `./preprocess.sh -s niid --sf 1.0 -k 0 -t sample`; in it
    train/*.json  test/*.json
or one folder of all_data_*.json, which becomes the split "train".
A client is a writer. The pixels, k/255 with 255 the white background, are stored as k, and models see [0, 1]
again; --invert stores 255 - k. With -t sample, splits train and test have the same clients in the same order.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from data_prep import leaf
from data_prep.conversion import Conversion
from data_prep.tff_emnist import NAMES, levels
from mpifl.data.shard import Columns, Feature


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are and whether to invert the pixels."""
    leaf.add_source(parser)
    parser.add_argument("--invert", action="store_true", help="store 1 - x: a black background, as MNIST has it")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files and list their users."""
    files = leaf.find(options.source, "femnist")
    background = "inverted: 255 - k stored, background 0" if options.invert else "k stored, background 255"
    return Conversion(
        features={
            "x": Feature("uint8", (28, 28), mean=0.0, std=255.0),
            "y": Feature("uint8", (), classes=len(NAMES), names=NAMES),
        },
        splits=leaf.splits(files, partial(to_columns, invert=options.invert)),
        provenance={
            "source": "FEMNIST, LEAF, JSON: S. Caldas et al. (2018), NIST Special Database 19 by writer",
            "made": f"{len(NAMES)} classes; pixels k/255, {background}",
            "licence": "NIST Special Database 19 is in the public domain; LEAF is BSD 2-Clause",
        },
    )


def to_columns(x: list, y: list, path: Path, user: str, invert: bool) -> Columns:
    """Turn vectors of 784 pixels into x uint8 (n, 28, 28), y uint8 (n,)."""
    pixels = levels(leaf.numbers(x, 784, path, user).reshape(-1, 28, 28), path, user)
    return {"x": 255 - pixels if invert else pixels, "y": leaf.labels(y, len(NAMES), path, user)}
