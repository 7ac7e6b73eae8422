"""MNIST: 70,000 images 28x28 of handwritten digits, from its four IDX files.

What to put where: into --source, gzipped or not,
    train-images-idx3-ubyte.gz  train-labels-idx1-ubyte.gz
    t10k-images-idx3-ubyte.gz   t10k-labels-idx1-ubyte.gz
from https://ossci-datasets.s3.amazonaws.com/mnist/ (a mirror). Every client gets the same number of each
label's training images (100 clients x 10 labels x 45 unless told otherwise); the test images are the central
split "test".
"""

from __future__ import annotations

import argparse
import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from data_prep.partition import equal_labels
from mpifl.config import UserError
from mpifl.data.shard import Feature
from mpifl.data.writer import ShardWriter

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FEATURES = {"x": Feature("uint8", (28, 28), mean=0.0, std=255.0), "y": Feature("uint8", (), classes=10)}
UBYTE = 0x08  # the IDX code of unsigned bytes; a magic number is this code, then the number of dimensions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are and how to share them out."""
    parser.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder of the IDX files")
    parser.add_argument("--clients", type=int, default=100, help="number of clients (default: 100)")
    parser.add_argument("--per-label", type=int, default=45, help="a client's images per label (default: 45)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the partition (default: 0)")


def convert(options: argparse.Namespace) -> None:
    """Write the dataset to `options.out`."""
    clients, per_label, seed = options.clients, options.per_label, options.seed
    if clients < 1 or per_label < 1 or not 0 <= seed < 2**32:
        given = f"--clients {clients} --per-label {per_label} --seed {seed}"
        raise UserError(f"{given}: clients and images must be at least 1, the seed 0 to {2**32 - 1}")
    provenance = {
        "source": "MNIST, Y. LeCun, C. Cortes and C. Burges: handwritten digits from NIST, four IDX files",
        "made": f"{clients} clients, each with {per_label} training images of every label, seed {seed}; "
        "the test images are split test; pixels 0 to 255 unchanged",
        "command": f"python -m data_prep mnist --clients {clients} --per-label {per_label} --seed {seed}",
        "licence": "CC BY-SA 3.0",
    }
    with ShardWriter(options.out, FEATURES, provenance) as writer:
        train, test = _load(options.source, "train"), _load(options.source, "t10k")
        parts = equal_labels(train["y"], clients, per_label, seed)
        digits = max(3, len(str(clients - 1)))
        rows = ({name: column[part] for name, column in train.items()} for part in parts)
        writer.write("train", ((f"client-{i:0{digits}d}", columns) for i, columns in enumerate(rows)))
        writer.central("test", test)


def _load(source: Path, part: str) -> dict[str, np.ndarray]:
    image_file = _find(source, f"{part}-images-idx3-ubyte")
    label_file = _find(source, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(image_file, dimensions=3), read_idx(label_file, dimensions=1)
    if images.shape[1:] != (28, 28):
        raise UserError(f"{image_file}: images of {images.shape[1:]} pixels, MNIST's are (28, 28)")
    if len(labels) != len(images):
        raise UserError(f"{label_file}: {len(labels)} labels, but {image_file.name} has {len(images)} images")
    if (labels > 9).any():
        row = int(np.argmax(labels > 9))
        raise UserError(f"{label_file}: label {row} is {labels[row]}, MNIST's are 0 to 9")
    return {"x": images, "y": labels}


def _find(source: Path, name: str) -> Path:
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; make it and put the files of {MIRROR} there")
    for variant in (name, name.replace("-idx", ".idx")):
        for path in (source / variant, source / f"{variant}.gz"):
            if path.is_file():
                return path
    raise UserError(f"{source} has no {name} or {name}.gz; fetch {MIRROR}{name}.gz and put it there")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not; UserError unless whole and of those dimensions."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: truncated or damaged gzip ({error}); fetch it again") from None
    magic, header = bytes([0, 0, UBYTE, dimensions]), 4 + 4 * dimensions
    if raw[:4] != magic or len(raw) < header:
        start = raw[:4].hex() or "nothing"
        raise UserError(f"{path}: starts with {start} where IDX has {magic.hex()}; fetch it again")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        problem = f"its header says {math.prod(shape)} bytes of data, it has {len(raw) - header}"
        raise UserError(f"{path}: {problem}; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
