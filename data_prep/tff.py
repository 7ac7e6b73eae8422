"""The HDF5 files of TensorFlow Federated, /examples/<client id>/<feature>: found, and read a client at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_prep.conversion import Split, ranges
from mpifl.config import UserError

BUCKET = "https://storage.googleapis.com/tff-datasets-public/"
MIRROR = "https://fedml.s3-us-west-1.amazonaws.com/"
TEXT = "text"

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Features to read, with the dtype (or TEXT) and shape of a row."""


def find(source: Path, name: str, archive: str) -> Path:
    """Path of the file `name` in the folder `source`; UserError says where its archive is to be had."""
    path = source / name
    if not path.is_file():
        what = "there is no file" if source.is_dir() else "there is no folder for"
        fetch = f"fetch {BUCKET}{archive} (mirror: {MIRROR}{archive})"
        raise UserError(f"{what} {path}; {fetch}, unpack it, and give its folder as --source")
    return path


def splits(paths: dict[str, Path], read: Callable[..., Iterable], aligned: bool = False) -> tuple[Split, ...]:
    """Cut each file into pieces, tuples of client ids in order, for `read(piece, path=...)`.

    aligned: the files hold the same clients, and every split gets them all, with 0 rows where a file has none.
    """
    ids = {split: client_ids(path) for split, path in paths.items()}
    if aligned:
        ids = dict.fromkeys(paths, sorted(set().union(*ids.values())))
    return tuple(
        Split(split, pieces(ids[split], path), partial(read, path=path), clients=len(ids[split]))
        for split, path in paths.items()
    )


def client_ids(path: Path) -> list[str]:
    """Ids of a file's clients, sorted."""
    with _examples(path) as examples:
        ids = sorted(examples)
    if not ids:
        raise UserError(f"{path}: there is no client in it; fetch it again")
    return ids


def pieces(ids: Sequence[str], path: Path) -> list[tuple[str, ...]]:
    """Cut the ids of a file's clients into parts to be read independently."""
    return [tuple(ids[part.start : part.stop]) for part in ranges(len(ids), path.stat().st_size)]


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
                yield client, {name: _nothing(*row) for name, row in layout.items()}
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


@contextmanager
def _examples(path: Path) -> Iterator[h5py.Group]:
    try:
        with h5py.File(path, "r", locking=False) as file:
            if not isinstance(file.get("examples"), h5py.Group):
                raise UserError(f"{path}: there is no group 'examples' in it, so it is none of TFF's files")
            yield file["examples"]
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: truncated or damaged ({error}); fetch it again") from None


def _nothing(dtype: str, shape: tuple[int, ...]) -> np.ndarray | list[str]:
    return [] if dtype == TEXT else np.empty((0, *shape), dtype)


def _read(
    group: h5py.Group, name: str, dtype: str, shape: tuple[int, ...], most: int | None, where: str
) -> np.ndarray | list[str]:
    if not isinstance(group, h5py.Group) or name not in group:
        raise UserError(f"{where} has no feature '{name}'; is this the file of another dataset?")
    column = group[name]
    is_text = h5py.check_string_dtype(column.dtype) is not None
    fits = is_text if dtype == TEXT else not is_text and np.can_cast(column.dtype, dtype, "same_kind")
    if not fits or column.ndim != 1 + len(shape) or column.shape[1:] != shape:
        found = f"{TEXT if is_text else column.dtype} {column.shape}"
        raise UserError(f"{where}: '{name}' is {found}, must be {dtype} {('n', *shape)}".replace("'n'", "n"))
    rows = column[:most]
    return _decoded(rows, name, where) if dtype == TEXT else rows.astype(dtype, copy=False)


def _decoded(rows: np.ndarray, name: str, where: str) -> list[str]:
    decoded: list[str] = []
    try:
        decoded.extend(row.decode() for row in rows)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: row {len(decoded)} of '{name}' is not UTF-8 text ({error})") from None
    return decoded
