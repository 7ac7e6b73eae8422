"""CIFAR-10 and CIFAR-100 as published: the binary or the Python version, unpacked or as .tar.gz.

A row of 3,072 pixels is 1,024 of red, then green, then blue, each 32 rows of 32: channels first as it stands. The
Python version is pickled, and a pickle may name any function to be called. The one reader here calls nothing but
`_Record`, which keeps its arguments, and `_latin1`: a file that names anything else is refused.
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import archive, corpus, sharing
from data_prep.conversion import Conversion
from data_prep.images import SUFFIXES
from data_prep.labels import class_column
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Edition:
    """Files, keys and sizes of CIFAR-10 or CIFAR-100; a file NAME of the Python version is NAME.bin in the binary one.

    labels: key of a pickle's labels. names: file and key of the classes' names; names_text: their file in the binary
    version, where `label_bytes` precede each row's pixels and the one at `label_byte` is its label.
    """

    title: str
    archives: tuple[str, ...]
    classes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    names: tuple[str, str]
    names_text: str
    label_bytes: int = 1
    label_byte: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are and how to share them out."""
    parser.add_argument(
        "--source", required=True, type=Path, metavar="PATH", help="folder of the files, or the .tar.gz"
    )
    sharing.add_arguments(parser, default="iid")


def prepare(options: argparse.Namespace, edition: Edition) -> Conversion:
    """Read the labels; workers read the images."""
    source = options.source
    if not source.exists():
        raise UserError(f"there is no {source}; fetch {' or '.join(edition.archives)} and give it as --source")
    train, test = (_rows(source, edition, files) for files in (edition.train, edition.test))
    return Conversion(
        features={"x": Feature("uint8", SHAPE), "y": class_column(_names(source, edition))},
        splits=corpus.splits(options, train, {"test": test}),
        provenance={
            "source": f"{edition.title}, A. Krizhevsky (2009), Learning multiple layers of features from tiny images",
            "made": f"training images: {sharing.describe(options)}; channels first, values 0 to 255",
            "licence": "none is stated by its author",
        },
        standardize="x",
    )


def _rows(source: Path, edition: Edition, files: tuple[str, ...]) -> corpus.Rows:
    labels = _load(source, edition, files)[1]
    read = partial(_read, source, edition, files)
    return corpus.Rows(np.arange(len(labels)), read, PIXELS + 1, labels=labels)


def _read(source: Path, edition: Edition, files: tuple[str, ...], where: np.ndarray) -> Columns:
    pixels, labels = _load(source, edition, files)
    return {"x": pixels[where].reshape(-1, *SHAPE), "y": labels[where]}


@lru_cache(maxsize=2)
def _load(source: Path, edition: Edition, files: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 3072) and labels (n,) of some files, uint8; once per process: they are all of 184 MB."""
    parts = []
    for name in files:
        if _find(source, f"{name}.bin") is not None:
            pixels, labels = _from_binary(source, f"{name}.bin", edition)
        else:
            pixels, labels = _from_pickle(source, name, edition)
        if pixels.shape != (len(labels), PIXELS):
            raise UserError(f"{source}: {name} has {len(labels)} labels and pixels {pixels.shape}; fetch it again")
        if (labels < 0).any() or (labels >= edition.classes).any():
            row = int(np.argmax((labels < 0) | (labels >= edition.classes)))
            problem = f"label {row} is {labels[row]}, it must be 0 to {edition.classes - 1}"
            raise UserError(f"{source}: {name}: {problem}; is this {edition.title}?")
        parts.append((pixels, labels.astype(np.uint8)))
    return np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts])


def _from_binary(source: Path, name: str, edition: Edition) -> tuple[np.ndarray, np.ndarray]:
    raw, row = _found(source, name, edition), edition.label_bytes + PIXELS
    if not raw or len(raw) % row:
        raise UserError(f"{source}: {name} has {len(raw)} bytes, not rows of {row}; fetch it again")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, row)
    return rows[:, edition.label_bytes :], rows[:, edition.label_byte]


def _from_pickle(source: Path, name: str, edition: Edition) -> tuple[np.ndarray, np.ndarray]:
    pixels = _unpickled(source, name, "data", edition)
    labels = _unpickled(source, name, edition.labels, edition)
    try:
        _, shape, dtype, fortran, raw = pixels.state
        if dtype.arguments[0] not in (b"u1", "u1") or not all(isinstance(label, int) for label in labels):
            raise ValueError("not bytes with integer labels")
        values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
        return values, np.array(labels, np.int64)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{source}: {name} does not hold {edition.title}'s images ({error}); fetch it again") from None


def _names(source: Path, edition: Edition) -> tuple[str, ...]:
    file, key = edition.names
    if _find(source, edition.names_text) is not None:
        names = bytes(_found(source, edition.names_text, edition)).split()
    else:
        names = _unpickled(source, file, key, edition)
    names = tuple(name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names)
    if len(names) != edition.classes:
        raise UserError(f"{source}: {len(names)} names of classes, {edition.title} has {edition.classes}")
    return names


def _unpickled(source: Path, name: str, key: str, edition: Edition) -> Any:
    raw = _found(source, name, edition)
    try:
        table = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        return table[key.encode()] if key.encode() in table else table[key]
    except pickle.UnpicklingError as error:
        raise UserError(f"{source}: {name} cannot be read: {error}; fetch it again") from None
    except (EOFError, LookupError, TypeError, ValueError, AttributeError, MemoryError) as error:
        problem = f"is truncated, damaged or has no '{key}' ({type(error).__name__}: {error})"
        raise UserError(f"{source}: {name} {problem}; fetch it again") from None


class _Record:
    """Stands for an array or a dtype: what the pickle would have called it with, and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _latin1(text: str, _: str) -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes for Python 2


class _Unpickler(pickle.Unpickler):
    KNOWN = {  # noqa: RUF012 - never changed
        ("numpy.core.multiarray", "_reconstruct"): _Record,
        ("numpy._core.multiarray", "_reconstruct"): _Record,
        ("numpy", "ndarray"): _Record,
        ("numpy", "dtype"): _Record,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which images do not need")
        return self.KNOWN[module, name]


def _found(source: Path, name: str, edition: Edition) -> Any:
    raw = _find(source, name)
    if raw is None:
        fetch = f"fetch {' or '.join(edition.archives)}, and give the archive or its folder as --source"
        hint = "; it holds images, which converter images reads" if _holds_images(source) else ""
        raise UserError(f"{source} has no {name}; {fetch}{hint}")
    return raw


def _holds_images(source: Path) -> bool:
    names = map(str, source.rglob("*")) if source.is_dir() else (member.name for member in archive.members(source))
    return any(name.lower().endswith(SUFFIXES) for name in names)


def _find(source: Path, name: str) -> Any:
    """Bytes of a file in a folder, a folder within, or a tar; None if there is none of that name."""
    if source.is_dir():
        paths: Sequence[Path] = [source / name, *sorted(source.glob(f"*/{name}"))]
        return next((archive.content(path) for path in paths if path.is_file()), None)
    for member in archive.members(source):
        if member.isreg() and member.name.rpartition("/")[2] == name:
            return archive.content(source)[member.offset_data : member.offset_data + member.size]
    return None
