"""The HDF5 files of TensorFlow Federated, /examples/<client id>/<feature>: found, and read a client at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from data_prep.conversion import Conversion, Split, ranges
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

FILES = "TensorFlow Federated's HDF5 files"
BUCKET = "https://storage.googleapis.com/tff-datasets-public/"
MIRROR = "https://fedml.s3-us-west-1.amazonaws.com/"
TEXT = "text"

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Features to read, with the dtype (or TEXT) and shape of a row."""
Convert = Callable[[str, dict[str, Any], Path], Columns]
"""Makes columns of what a file has for a client: (client, its features, the file)."""


class Content(NamedTuple):
    """What the files of a dataset hold, in whatever format, and what becomes of it.

    most: of a client's rows only the first so many are read. The others are as in Conversion and its provenance.
    """

    layout: Layout
    features: dict[str, Feature]
    convert: Convert
    source: str
    made: str
    licence: str
    standardize: str | None = None
    most: int | None = None

    def conversion(self, splits: tuple[Split, ...], files: str) -> Conversion:
        """Convert these splits, which `files` hold."""
        provenance = {"source": f"{self.source}; from {files}", "made": self.made, "licence": self.licence}
        return Conversion(self.features, splits, provenance, self.standardize)


def find(source: Path, name: str, archive: str) -> Path:
    """Path of the file `name` in the folder `source`; UserError says where its archive is to be had."""
    path = source / name
    if not path.is_file():
        what = f"there is no file {path}" if source.is_dir() else f"--source {source} is no folder"
        fetch = f"fetch {BUCKET}{archive} (mirror: {MIRROR}{archive})"
        raise UserError(f"{what}; {fetch}, unpack it, and give the folder of {name} as --source")
    return path


def splits(paths: dict[str, Path], content: Content, shard_mb: float, aligned: bool = False) -> tuple[Split, ...]:
    """Cut each file into pieces, tuples of client ids in order.

    aligned: the files hold the same clients, and every split gets them all, with 0 rows where a file has none.
    """
    ids = {split: client_ids(path) for split, path in paths.items()}
    if aligned:
        ids = dict.fromkeys(paths, sorted(set().union(*ids.values())))
    found = []
    for split, path in paths.items():
        read = partial(_converted, path, content.layout, content.convert, content.most)
        found.append(Split(split, pieces(ids[split], path, shard_mb), read, clients=len(ids[split])))
    return tuple(found)


def client_ids(path: Path) -> list[str]:
    """Ids of a file's clients, sorted; UserError for one that is not UTF-8."""
    with _examples(path) as examples:
        ids = list(examples)
    if unreadable := [id for id in ids if isinstance(id, bytes)]:
        raise UserError(f"{path}: client id {unreadable[0]} is not UTF-8 text; fetch the file again")
    if not ids:
        raise UserError(f"{path}: there is no client in it; fetch it again")
    return sorted(ids)


def pieces(ids: Sequence[str], path: Path, shard_mb: float = math.inf) -> list[tuple[str, ...]]:
    """Cut the ids of a file's clients into parts to be read independently, by its size: all count alike."""
    sizes = np.full(len(ids), path.stat().st_size // len(ids))
    return [tuple(ids[part.start : part.stop]) for part in ranges(sizes, shard_mb)]


def clients(
    path: Path, ids: Iterable[str], layout: Layout, most: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read clients one by one: arrays (n, *shape) of the layout's dtypes, a list of n str where it says TEXT.

    A client that the file lacks has 0 rows; of others at most the first `most` are read. Raises UserError naming
    file, client and feature, and the row of text that is not UTF-8.
    """
    with _examples(path) as examples:
        for client in ids:
            where = f"{path}: client {client!r}"
            if client not in examples:
                yield client, nothing(layout)
                continue
            group = examples[client]
            columns = {name: _read(group, name, *row, most, where) for name, row in layout.items()}
            rows = {name: len(column) for name, column in columns.items()}
            if len(set(rows.values())) > 1:
                raise UserError(f"{where} has features of unequal length, {rows}; fetch the file again")
            yield client, columns


def labels(column: np.ndarray, classes: int, path: Path, client: str) -> np.ndarray:
    """Bring labels to uint8, (n,); UserError naming client and row unless they are 0 to classes - 1."""
    wrong = (column < 0) | (column >= classes)
    if wrong.any():
        row = int(np.argmax(wrong))
        allowed = f"labels are 0 to {classes - 1}"
        raise UserError(f"{path}: client {client!r}, row {row} has label {column[row]}; {allowed}")
    return column.astype(np.uint8)


def is_as(found: np.dtype, is_text: bool, dtype: str) -> bool:
    """Whether values of dtype `found`, or text, become `dtype` (or TEXT) without wrapping around or losing digits."""
    if is_text or dtype == TEXT:
        return is_text and dtype == TEXT
    return np.can_cast(found, dtype) or found.kind == np.dtype(dtype).kind == "f"


def decoded(rows: np.ndarray, name: str, where: str) -> list[str]:
    """Decode text, n bytes objects, to n str; UserError names the row that is not UTF-8."""
    texts: list[str] = []
    try:
        texts.extend(row.decode() for row in rows)
    except (UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{where}: row {len(texts)} of '{name}' is not UTF-8 text ({error})") from None
    return texts


def nothing(layout: Layout) -> dict[str, Any]:
    """0 rows of every feature."""
    return {name: [] if dtype == TEXT else np.empty((0, *shape), dtype) for name, (dtype, shape) in layout.items()}


@contextmanager
def _examples(path: Path) -> Iterator[h5py.Group]:
    try:
        with h5py.File(path, "r", locking=False) as file:
            if not isinstance(file.get("examples"), h5py.Group):
                raise UserError(f"{path}: there is no group 'examples' in it, so it is none of TFF's files")
            yield file["examples"]
    except (OSError, KeyError, RuntimeError) as error:
        if code := getattr(error, "errno", None):
            raise UserError(f"{path} cannot be read: {os.strerror(code)}") from None
        raise UserError(f"{path}: truncated or damaged ({error}); fetch it again") from None


def _read(
    group: h5py.Group, name: str, dtype: str, shape: tuple[int, ...], most: int | None, where: str
) -> np.ndarray | list[str]:
    if not isinstance(group, h5py.Group) or name not in group:
        raise UserError(f"{where} has no feature '{name}'; is this the file of another dataset?")
    column = group[name]
    is_text = h5py.check_string_dtype(column.dtype) is not None
    if not is_as(column.dtype, is_text, dtype) or column.ndim != 1 + len(shape) or column.shape[1:] != shape:
        found = f"{TEXT if is_text else column.dtype} {column.shape}"
        raise UserError(f"{where}: '{name}' is {found}, must be {dtype} {('n', *shape)}".replace("'n'", "n"))
    rows = column[:most]
    return decoded(rows, name, where) if dtype == TEXT else rows.astype(dtype, copy=False)


def _converted(
    path: Path, layout: Layout, convert: Convert, most: int | None, ids: Iterable[str]
) -> Iterator[tuple[str, Columns]]:
    for client, found in clients(path, ids, layout, most):
        yield client, convert(client, found, path)
