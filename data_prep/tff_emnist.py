"""EMNIST by TensorFlow Federated: images 28x28 of characters written by 3,400 people, 62 classes or 10.

What to put where: into --source, unpacked from
https://storage.googleapis.com/tff-datasets-public/fed_emnist.tar.bz2
(mirror: https://fedml.s3-us-west-1.amazonaws.com/fed_emnist.tar.bz2),
    fed_emnist_train.h5  fed_emnist_test.h5
or, with --only-digits, unpacked from fed_emnist_digitsonly.tar.bz2 there (3,383 writers, 10 classes),
    fed_emnist_digitsonly_train.h5  fed_emnist_digitsonly_test.h5
A client is a writer. The pixels, k/255 with 255 the white background, are stored as k, and models see [0, 1]
again; --invert stores 255 - k, which is what FedJAX trains on. Column domain_id is 0 for writers of a high
school (f2100 to f2599) and 1 for others. Splits train and test have the same clients in the same order.
"""

from __future__ import annotations

import argparse
import re
import string
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import tff
from data_prep.conversion import Conversion
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

# NIST's classes as LEAF and TFF number them.
NAMES = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
DOMAINS = ("high school", "census bureau")
HIGH_SCHOOL = range(2100, 2600)
WRITER = re.compile(r"(?:.*:)?f(\d{4})_\d{2}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are, which of them to read, and whether to invert the pixels."""
    parser.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder of the HDF5 files")
    parser.add_argument("--only-digits", action="store_true", help="the ten digits (default: all 62 classes)")
    parser.add_argument("--invert", action="store_true", help="store 1 - x: a black background, as FedJAX has it")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files and list their clients."""
    stem = "fed_emnist_digitsonly" if options.only_digits else "fed_emnist"
    paths = {name: tff.find(options.source, f"{stem}_{name}.h5", f"{stem}.tar.bz2") for name in ("train", "test")}
    content = characters(options.only_digits, options.invert)
    return content.conversion(tff.splits(paths, content, options.shard_mb, aligned=True), tff.FILES)


def characters(only_digits: bool, invert: bool) -> tff.Content:
    """What becomes of Federated EMNIST."""
    classes = 10 if only_digits else 62
    background = "inverted: 255 - k stored, background 0" if invert else "k stored, background 255"
    return tff.Content(
        layout={"pixels": ("float32", (28, 28)), "label": ("int64", ())},
        features={
            "x": Feature("uint8", (28, 28), mean=0.0, std=255.0),
            "y": Feature("uint8", (), classes=classes, names=NAMES[:classes]),
            "domain_id": Feature("uint8", (), classes=len(DOMAINS), names=DOMAINS),
        },
        convert=partial(to_columns, classes=classes, invert=invert),
        source="Federated EMNIST: G. Cohen et al. (2017), NIST Special Database 19 by writer",
        made=f"{classes} classes; pixels k/255, {background}; domain_id 0: writers f2100 to f2599, else 1",
        licence="NIST Special Database 19 is in the public domain",
    )


def to_columns(client: str, found: dict[str, Any], path: Path, classes: int, invert: bool) -> Columns:
    """Bring a writer's images to x uint8 (n, 28, 28), y and domain_id uint8 (n,)."""
    x = levels(found["pixels"], path, client)
    y = tff.labels(found["label"], classes, path, client)
    domain = np.full(len(y), domain_of(client, path), np.uint8)
    return {"x": 255 - x if invert else x, "y": y, "domain_id": domain}


def levels(pixels: np.ndarray, path: Path, client: str) -> np.ndarray:
    """Bring pixels k/255 to k, uint8; UserError naming client and row if one is anything else (by 1e-6)."""
    rounded = np.rint(pixels * 255)
    wrong = ~((np.abs(pixels - rounded / 255) <= 1e-6) & (rounded >= 0) & (rounded <= 255))
    if wrong.any():
        where = np.argwhere(wrong)[0]
        found = f"pixel {pixels[tuple(where)]:.7g}"
        raise UserError(f"{path}: client {client!r}, row {where[0]} has {found}; pixels are 0/255 to 255/255")
    return rounded.astype(np.uint8)


def domain_of(client: str, path: Path) -> int:
    """0 for a writer of the high school, 1 for one of the census bureau; UserError for an id like no writer's."""
    writer = WRITER.fullmatch(client)
    if not writer:
        raise UserError(f"{path}: client {client!r} is not named like a writer, e.g. f2100_45")
    return 0 if int(writer[1]) in HIGH_SCHOOL else 1
