"""The IDX files of MNIST and EMNIST: arrays of unsigned bytes, found, checked, and read by row."""

from __future__ import annotations

import math
import struct
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import archive, corpus
from mpifl.config import UserError
from mpifl.data.shard import Columns

SIDE = 28
UBYTE = 0x08  # the IDX code of unsigned bytes; a magic number is this code, then the number of dimensions


def rows(source: Path, part: str, origin: str, classes: range, transposed: bool = False) -> corpus.Rows:
    """Images and labels of the files `part`-images-idx3-ubyte and `part`-labels-idx1-ubyte, gzipped or not.

    classes: the labels of the file, stored from 0 on. transposed: the file has the columns of an image where others
    have its rows. Raises UserError naming the file, and the row where it is one; `origin` says where to fetch it.
    """
    image_file = _find(source, f"{part}-images-idx3-ubyte", origin)
    label_file = _find(source, f"{part}-labels-idx1-ubyte", origin)
    images, labels = array(image_file, dimensions=3), array(label_file, dimensions=1)
    if images.shape[1:] != (SIDE, SIDE):
        raise UserError(f"{image_file}: images of {images.shape[1:]} pixels, these must be {(SIDE, SIDE)}")
    if len(labels) != len(images):
        raise UserError(f"{label_file}: {len(labels)} labels, but {image_file.name} has {len(images)} images")
    wrong = (labels < classes.start) | (labels >= classes.stop)
    if wrong.any():
        row = int(np.argmax(wrong))
        problem = f"label {row} is {labels[row]}, it must be {classes.start} to {classes.stop - 1}"
        raise UserError(f"{label_file}: {problem}; fetch it again")
    read = partial(_read, image_file, label_file, classes.start, transposed)
    return corpus.Rows(np.arange(len(labels)), read, SIDE * SIDE + 1, labels=labels)


def array(path: Path, dimensions: int) -> np.ndarray:
    """Map an IDX file of unsigned bytes, gzipped or not; UserError unless whole and of those dimensions."""
    raw = archive.content(path)
    magic, header = bytes([0, 0, UBYTE, dimensions]), 4 + 4 * dimensions
    if raw[:4] != magic or len(raw) < header:
        raise UserError(f"{path}: starts with {raw[:4].hex()} where IDX has {magic.hex()}; fetch it again")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        problem = f"its header says {math.prod(shape)} bytes of data, it has {len(raw) - header}"
        raise UserError(f"{path}: {problem}; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _read(image_file: Path, label_file: Path, first: int, transposed: bool, where: np.ndarray) -> Columns:
    x = array(image_file, dimensions=3)[where]
    if transposed:
        x = np.ascontiguousarray(x.swapaxes(1, 2))
    return {"x": x, "y": array(label_file, dimensions=1)[where] - np.uint8(first)}


def _find(source: Path, name: str, origin: str) -> Path:
    if source.is_file():
        raise UserError(f"{source} is a file; --source is the folder that holds the files of {origin}")
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; make it and put the files of {origin} there")
    for variant in (name, name.replace("-idx", ".idx")):
        for path in (source / variant, source / f"{variant}.gz"):
            if path.is_file():
                return path
    raise UserError(f"{source} has no {name} or {name}.gz; fetch it from {origin} and put it there")
