"""CelebA by LEAF: faces 84x84 in colour by celebrity, smiling or not.

What to put where: --source is the folder data/celeba/data that data/celeba/preprocess.sh of
https://github.com/TalwalkarLab/leaf fills, e.g. with `./preprocess.sh -s niid --sf 1.0 -k 5 -t sample`; in it
    train/*.json  test/*.json
or one folder of all_data.json, which becomes the split "train". --images is the folder img_align_celeba of
https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (by default, where LEAF wants it: raw/img_align_celeba in --source).
A client is a celebrity. Images are resized to 84x84 (bicubic) as LEAF does, and stored channels first.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import leaf
from data_prep.conversion import Conversion
from data_prep.corpus import installed
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

SIDE = 84


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files and the images are."""
    leaf.add_source(parser)
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the JPEGs (raw/img_align_celeba)")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files and list their users."""
    files = leaf.find(options.source, "celeba")
    images = options.images or options.source / "raw" / "img_align_celeba"
    if not images.is_dir():
        fetch = "fetch img_align_celeba from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
        raise UserError(f"there is no folder {images}; {fetch} and give it as --images")
    installed("PIL.Image")
    return Conversion(
        features={"x": Feature("uint8", (3, SIDE, SIDE)), "y": Feature("uint8", (), classes=2)},
        splits=leaf.splits(
            files,
            partial(to_columns, images=images),
            sample_bytes=3 * SIDE * SIDE + 1,
            shard_mb=options.shard_mb,
        ),
        provenance={
            "source": "CelebA, Z. Liu et al. (2015), by celebrity as in LEAF, JSON: S. Caldas et al. (2018)",
            "made": f"aligned images resized to {SIDE}x{SIDE} (bicubic), RGB, channels first, values 0 to 255; "
            "y is LEAF's attribute (Smiling unless its TARGET_NAME was changed)",
            "licence": "CelebA is for non-commercial research only; LEAF is BSD 2-Clause",
        },
        standardize="x",
    )


def to_columns(x: list, y: list, path: Path, user: str, images: Path) -> Columns:
    """Turn the names of images into x uint8 (n, 3, 84, 84), y uint8 (n,)."""
    pillow = installed("PIL.Image")
    pixels = np.empty((len(x), SIDE, SIDE, 3), np.uint8)
    for row, name in enumerate(x):
        if not isinstance(name, str):
            raise leaf.wrong(path, user, row, f"is {name!r:.60}, must be the name of an image")
        file = images / name
        try:
            with pillow.open(file) as image:
                pixels[row] = image.convert("RGB").resize((SIDE, SIDE), pillow.Resampling.BICUBIC)
        except FileNotFoundError:
            raise leaf.wrong(path, user, row, f"is {name!r:.60}, of which there is no file {file}") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{file}: truncated or damaged ({error}); fetch it again") from None
    channels_first = np.ascontiguousarray(np.moveaxis(pixels, -1, 1))
    return {"x": channels_first, "y": leaf.labels(y, 2, path, user)}
