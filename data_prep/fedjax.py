"""The SQLite files of FedJAX, found, and read a client at a time.

    CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, data BLOB NOT NULL, num_examples INTEGER NOT NULL)

data is zlib of msgpack of {feature: array}. An array is an extension type of msgpack, itself msgpack: 1 for numbers,
(shape, name of dtype, bytes in C order), and 4 for texts, (shape, list of bytes) (fedjax/core/serialization.py).
"""

from __future__ import annotations

import math
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.conversion import Split, ranges
from data_prep.corpus import installed
from data_prep.tff import TEXT, Content, Convert, Layout, decoded, is_as, nothing
from mpifl.config import UserError
from mpifl.data.shard import Columns

FILES = "FedJAX's SQLite files"
BUCKET = "https://storage.googleapis.com/gresearch/fedjax/"
NUMBERS, TEXTS = 1, 4
"""Codes of msgpack extension types; 2 and 3 are single numbers, never columns."""

Rows = dict[str, int]
"""Where clients are: id to rowid, in order of ids."""
Piece = tuple[tuple[str, int | None], ...]
"""Clients and their rowids, None for one that the file lacks."""


def splits(paths: dict[str, Path], content: Content, shard_mb: float) -> tuple[Split, ...]:
    """Cut each file into pieces of its clients, in order of ids.

    A split with no clients but those of "train" gets them all, with 0 rows where its file has none.
    """
    rows = {split: rows_of_clients(path) for split, path in paths.items()}
    made = []
    for split, path in paths.items():
        everyone = rows["train"] if rows[split].keys() <= rows["train"].keys() else rows[split]
        where = [(client, rows[split].get(client)) for client in everyone]
        read = partial(_converted, path, content.layout, content.convert, content.most)
        made.append(Split(split, pieces(where, path, shard_mb), read, clients=len(where)))
    return tuple(made)


def pieces(where: Sequence[tuple[str, int | None]], path: Path, shard_mb: float = math.inf) -> list[Piece]:
    """Cut clients of a file into parts to be read independently, by its size: all count alike."""
    sizes = np.full(len(where), path.stat().st_size // len(where))
    return [tuple(where[part.start : part.stop]) for part in ranges(sizes, shard_mb)]


def rows_of_clients(path: Path) -> Rows:
    """Find the clients of a file; reads no data. UserError for one twice, and for an id that is not UTF-8."""
    rows: Rows = {}
    with _connection(path) as connection:
        for row, id in connection.execute("SELECT rowid, client_id FROM federated_data"):
            try:
                client = id.decode() if isinstance(id, bytes) else str(id)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: the client_id of row {row} is not UTF-8 text ({error})") from None
            if client in rows:
                raise UserError(
                    f"{path}: client {client!r} is in rows {min(row, rows[client])} and {max(row, rows[client])}"
                )
            rows[client] = row
    if not rows:
        raise UserError(f"{path}: there is no client in it; fetch it again")
    return dict(sorted(rows.items()))


def clients(path: Path, piece: Piece, layout: Layout, most: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read clients one by one: arrays (n, *shape) of the layout's dtypes, a list of n str where it says TEXT.

    A client that the file lacks has 0 rows; of others at most the first `most` are returned. Raises UserError
    naming file, client and feature, and the row of text that is not UTF-8.
    """
    with _connection(path) as connection:
        for client, row in piece:
            if row is None:
                yield client, nothing(layout)
                continue
            where = f"{path}: client {client!r}"
            found = _features(connection, row, where)
            yield client, {name: _column(found, name, *kind, where)[:most] for name, kind in layout.items()}


def layout_of(path: Path, row: int) -> Layout:
    """Dtypes and shapes of the features of the client in that row."""
    with _connection(path) as connection:
        found = _features(connection, row, f"{path}: row {row}")
    return {name: (TEXT if a.dtype.hasobject else a.dtype.name, a.shape[1:]) for name, a in found.items()}


@contextmanager
def _connection(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a file without locking it, so that any number of processes may, on a read-only file system too."""
    log = path.with_name(f"{path.name}-wal")
    if log.is_file() and log.stat().st_size:
        raise UserError(f"{path}: its writer left part of it in {log.name}; open and close it once with sqlite3")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise UserError(f"{path}: truncated, damaged or no file of FedJAX ({error}); fetch it again") from None


def _features(connection: sqlite3.Connection, row: int, where: str) -> dict[str, np.ndarray]:
    """All features of the client in that row, of as many rows each as num_examples says."""
    query = "SELECT data, num_examples FROM federated_data WHERE rowid = ?"
    data, examples = connection.execute(query, [row]).fetchone()
    msgpack = installed("msgpack")
    try:
        found = msgpack.unpackb(zlib.decompress(data), ext_hook=_array)
    except (zlib.error, ValueError, TypeError) as error:
        raise UserError(f"{where} is damaged ({error}); fetch the file again") from None
    if not isinstance(found, dict) or not all(isinstance(a, np.ndarray) and a.ndim for a in found.values()):
        raise UserError(f"{where} is not stored as arrays by feature, so this is no file of FedJAX")
    for name, array in found.items():
        if len(array) != examples:
            raise UserError(f"{where} has {len(array)} rows of '{name}', num_examples says {examples}")
    return found


def _array(code: int, data: bytes) -> np.ndarray:
    unpacked = installed("msgpack").unpackb(data)
    if code == NUMBERS:
        shape, dtype, raw = unpacked
        return np.frombuffer(raw, np.dtype(dtype)).reshape(shape)
    if code == TEXTS:
        shape, texts = unpacked
        array = np.empty(len(texts), object)
        array[:] = texts
        return array.reshape(shape)
    raise ValueError(f"extension type {code}")


def _column(
    found: dict[str, np.ndarray], name: str, dtype: str, shape: tuple[int, ...], where: str
) -> np.ndarray | list[str]:
    if name not in found:
        has = ", ".join(map(str, found))
        raise UserError(f"{where} has no feature '{name}', but {has}; is this the file of another --kind?")
    rows = found[name]
    is_text = rows.dtype.hasobject
    if not is_as(rows.dtype, is_text, dtype) or rows.shape[1:] != shape:
        is_ = TEXT if is_text else rows.dtype
        raise UserError(f"{where}: rows of '{name}' are {is_} {rows.shape[1:]}, must be {dtype} {shape}")
    return decoded(rows, name, where) if is_text else rows.astype(dtype, copy=False)


def _converted(
    path: Path, layout: Layout, convert: Convert, most: int | None, piece: Piece
) -> Iterator[tuple[str, Columns]]:
    for client, found in clients(path, piece, layout, most):
        yield client, convert(client, found, path)
