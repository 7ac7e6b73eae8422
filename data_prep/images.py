"""Images in a folder per class, or a .tar, .tar.gz, .tar.bz2 or .tar.xz of such folders.

What to put where: --source holds
    train/CLASS/NAME.jpg  test/CLASS/NAME.jpg
or only CLASS/NAME.jpg, all of it for training; PNG and whatever else Pillow reads will do. Classes are numbered in
order of name. Images of train/ go to clients as --partition says; any folder beside it is a central split of its
name. Pixels are stored as decoded, uint8, channels first; images of different sizes need --size. A compressed tar is
unpacked once per process, into TMPDIR.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import posixpath
import struct
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from data_prep import archive, corpus, sharing
from data_prep.conversion import Conversion
from data_prep.labels import class_column
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
GREY, COLOUR = ("1", "L", "LA"), ("P", "RGB", "RGBA", "CMYK", "YCbCr")
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error)  # what Pillow raises for broken images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the images are, what becomes of them, and how to share them out."""
    parser.add_argument("--source", required=True, type=Path, metavar="PATH", help="folder or tar of the images")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="resize every image (bilinear)")
    parser.add_argument("--colour", choices=("rgb", "grey"), help="what every image becomes (default: as the first is)")
    corpus.add_arguments(parser)
    sharing.add_arguments(parser, default="iid")


def prepare(options: argparse.Namespace) -> Conversion:
    """List the images, and look at the first one for the shape of all."""
    if options.size and min(options.size) < 1:
        raise UserError(f"--size {options.size[0]} {options.size[1]}: both must be at least 1")
    entries, classes = _listed(options.source)
    train = entries.pop("train")
    first = _decoded(options.source, train[0])
    grey = first.mode in GREY if options.colour is None else options.colour == "grey"
    height, width = options.size or (first.height, first.width)
    shape = (height, width) if grey else (3, height, width)
    read = partial(_read, options.source, shape, bool(options.size), options.colour is not None)
    rows = partial(corpus.Rows, read=read, row_bytes=math.prod(shape) + train["label"].itemsize)
    pixels = f"{'resized to' if options.size else 'of'} {height} x {width} pixels, {'grey' if grey else 'RGB'}"
    return Conversion(
        features={"x": Feature("uint8", shape), "y": classes},
        splits=corpus.splits(
            options, rows(train, labels=train["label"]), {split: rows(where) for split, where in entries.items()}
        ),
        provenance=corpus.provenance(options, f"images {pixels}"),
        standardize="x",
    )


def _read(source: Path, shape: tuple[int, ...], resize: bool, recolour: bool, entries: np.ndarray) -> Columns:
    pixels = np.empty((len(entries), *shape), np.uint8)
    for row, entry in zip(pixels, entries):
        image = _decoded(source, entry)
        if len(shape) == 2 and image.mode not in GREY and not recolour:
            raise UserError(f"{_name(source, entry)}: is in colour, the first image is grey; choose with --colour")
        image = image.convert("L" if len(shape) == 2 else "RGB")
        if resize:
            image = image.resize((shape[-1], shape[-2]), corpus.installed("PIL.Image").Resampling.BILINEAR)
        elif (image.height, image.width) != shape[-2:]:
            found, first = f"{image.height} x {image.width}", f"{shape[-2]} x {shape[-1]}"
            raise UserError(f"{_name(source, entry)}: is {found} pixels, the first image {first}; choose with --size")
        row[...] = np.asarray(image) if len(shape) == 2 else np.moveaxis(np.asarray(image), -1, 0)
    if not source.is_dir():
        archive.forget(archive.content(source))
    return {"x": pixels, "y": entries["label"].copy()}


def _decoded(source: Path, entry: np.void) -> Image:
    pillow, raw = corpus.installed("PIL.Image"), io.BytesIO(_bytes(source, entry))
    try:
        image = pillow.open(raw)
        image.load()
    except (*BROKEN, pillow.DecompressionBombError) as error:
        problem = f"cannot be decoded ({error}); replace or remove it"
        raise UserError(f"{_name(source, entry)}: {problem}") from None
    if image.mode not in (*GREY, *COLOUR):
        raise UserError(f"{_name(source, entry)}: has pixels of kind {image.mode}; make them 8 bits per channel")
    return image


def _bytes(source: Path, entry: np.void) -> bytes:
    if source.is_dir():
        try:
            return (source / os.fsdecode(entry["name"])).read_bytes()
        except OSError as error:
            problem = f"cannot be read ({error.strerror}); mend or remove it"
            raise UserError(f"{_name(source, entry)}: {problem}") from None
    return archive.content(source)[entry["offset"] : entry["offset"] + entry["size"]]


def _name(source: Path, entry: np.void) -> str:
    return f"{source / os.fsdecode(entry['name'])}"


def _listed(source: Path) -> tuple[dict[str, np.ndarray], Feature]:
    """Return per split where its images are, (n,) of (name, offset, size, label) in order of name, and the labels."""
    if not source.exists():
        raise UserError(f"there is no {source}; give --source a folder or a tar with train/CLASS/NAME.jpg in it")
    found = sorted(_in_folder(source) if source.is_dir() else _in_tar(source))
    places = _split_and_class(source, [name for name, *_ in found])
    labels = class_column(tuple(sorted({place[1] for place in places})))
    number = {name: index for index, name in enumerate(labels.names)}
    names = [name.encode() for name, *_ in found]
    kind = [("name", f"S{max(map(len, names))}"), ("offset", "i8"), ("size", "i8"), ("label", labels.dtype)]
    rows = [(name, *at, number[place[1]]) for name, (_, *at), place in zip(names, found, places)]
    entries, splits = np.array(rows, kind), np.array([place[0] for place in places])
    return {str(split): entries[splits == split] for split in np.unique(splits)}, labels


def _split_and_class(source: Path, names: list[str]) -> list[tuple[str, str]]:
    if not names:
        tars = sorted(path for path in source.glob("*.t*") if path.suffix == ".tgz" or ".tar" in path.suffixes)
        hint = f", or name the tar in it: --source {tars[0]}" if tars else ""
        raise UserError(f"{source}: holds no images ({' '.join(SUFFIXES)}); it must hold train/CLASS/NAME.jpg{hint}")
    paths = [("", *name.split("/")) for name in names]  # a tar may have a folder before train/: the same for all
    depth = 3 if any(path[-3:-2] == ("train",) for path in paths) else 2
    leads = Counter(path[:-depth] for path in paths if len(path) > depth)
    usual = max(leads, key=leads.__getitem__, default=None)
    for path, before in zip(paths, [(), *paths]):
        if path == before:
            raise UserError(f"{source}: {'/'.join(path[1:])} is in it twice")
        if len(path) <= depth or path[:-depth] != usual:
            where = "train/CLASS/ or the like" if depth == 3 else "CLASS/ (there is no train/)"
            raise UserError(f"{source}: {'/'.join(path[1:])} is not in a folder {where}, as other images are")
    return [(path[-3] if depth == 3 else "train", path[-2]) for path in paths]


def _in_folder(source: Path) -> Iterator[tuple[str, int, int]]:
    for folder, _, names in os.walk(source, onerror=_refuse_unread, followlinks=True):
        for name in filter(_is_image, names):
            yield _utf8(source, (Path(folder) / name).relative_to(source).as_posix()), 0, 0


def _refuse_unread(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None


def _in_tar(source: Path) -> Iterator[tuple[str, int, int]]:
    for member in archive.members(source):
        if _is_image(member.name) and not member.isdir():
            if not member.isreg():
                raise UserError(f"{source}: {member.name} is a link; make the tar with -h and --hard-dereference")
            yield _utf8(source, posixpath.normpath(member.name)), member.offset_data, member.size


def _is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.lower().endswith(SUFFIXES) and not base.startswith(".")  # macOS adds ._NAME.jpg, not an image


def _utf8(source: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{source}: the file name {name!r} is not UTF-8; rename it") from None
    return name
