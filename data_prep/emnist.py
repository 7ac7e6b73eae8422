"""EMNIST: images 28x28 of handwritten digits and letters, from its IDX files; without their writers.

What to put where: into --source, gzipped or not, the four files of one of its six parts (--part),
    emnist-PART-train-images-idx3-ubyte.gz  emnist-PART-train-labels-idx1-ubyte.gz
    emnist-PART-test-images-idx3-ubyte.gz   emnist-PART-test-labels-idx1-ubyte.gz
which https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip holds. The training images go to clients as --partition
says, the test images are the central split "test". The files have images on their side; they are stored upright.
Writers as clients need the federated files: converter tff-emnist.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

from data_prep import corpus, idx, sharing
from data_prep.conversion import Conversion
from data_prep.labels import class_column
from mpifl.data.shard import Feature

ORIGIN = "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"
MERGED = digits + ascii_uppercase + "abdefghnqrt"  # the other small letters look like their capitals
PARTS = {  # the labels' names in order, and the first label
    "byclass": (digits + ascii_uppercase + ascii_lowercase, 0),
    "bymerge": (MERGED, 0),
    "balanced": (MERGED, 0),
    "letters": (ascii_lowercase, 1),
    "digits": (digits, 0),
    "mnist": (digits, 0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are, which of them to take, and how to share them out."""
    parser.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder of the IDX files")
    parser.add_argument("--part", choices=PARTS, default="byclass", help="which four files (default: byclass)")
    sharing.add_arguments(parser, default="iid")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find and check the files."""
    names, first = PARTS[options.part]
    labels = range(first, first + len(names))
    train, test = (
        idx.rows(options.source, f"emnist-{options.part}-{split}", ORIGIN, labels, transposed=True)
        for split in ("train", "test")
    )
    return Conversion(
        features={
            "x": Feature("uint8", (idx.SIDE, idx.SIDE), mean=0.0, std=255.0),
            "y": class_column(tuple(names)),
        },
        splits=corpus.splits(options, train, {"test": test}),
        provenance={
            "source": f"EMNIST {options.part}, G. Cohen et al. (2017), from NIST Special Database 19, four IDX files",
            "made": f"training images: {sharing.describe(options)}; transposed to be upright, pixels 0 to 255",
            "licence": "none is stated by its authors",
        },
    )
