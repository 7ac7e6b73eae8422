"""What a client given to a writer must be: arrays as the features say, under an id of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mpifl.config import UserError
from mpifl.data.format import Columns, Feature, plain_dtype

Expected = list[tuple[str, np.dtype, tuple[int, ...]]]
"""Name, dtype and shape of the rows of every column."""


def derived_features(split: str, client: str, columns: Columns) -> dict[str, Feature]:
    """Features that fit a first client."""
    _refuse_bad_arrays(split, client, columns)
    return {name: Feature(rows.dtype.name, rows.shape[1:]) for name, rows in columns.items()}


def check_client(
    split: str, client: str, columns: Columns, features: Mapping[str, Feature], expected: Expected
) -> None:
    """Raise UserError unless a client's arrays are as the features say; their values are checked shard by shard."""
    if _fits(columns, expected):
        return
    _refuse_bad_arrays(split, client, columns)
    where = f"split '{split}', client {client!r}"
    for name in sorted(features.keys() ^ columns.keys()):
        problem = "is missing" if name in features else "is one too many"
        raise UserError(f"{where}, column '{name}': {problem} (expected: {', '.join(features)})")
    length = len(next(iter(columns.values())))
    for name, feature in features.items():
        rows = columns[name]
        found = f"{where}, column '{name}': rows are {rows.dtype.name} {rows.shape[1:]}"
        if rows.dtype.name != feature.dtype or rows.shape[1:] != feature.shape:
            raise UserError(f"{found}, must be {feature.dtype} {feature.shape}")
        if len(rows) != length:
            raise UserError(f"{where}, column '{name}': has {len(rows)} rows, the client's first column has {length}")


def _fits(columns: Columns, expected: Expected) -> bool:
    """Whether arrays are exactly as expected: the quick answer for nearly every client."""
    if not isinstance(columns, Mapping) or len(columns) != len(expected):
        return False
    length = None
    for name, dtype, shape in expected:
        rows = columns.get(name)
        if not isinstance(rows, np.ndarray) or rows.dtype != dtype or rows.shape[1:] != shape or not rows.ndim:
            return False
        if len(rows) != length and length is not None:
            return False
        length = len(rows)
    return True


def _refuse_bad_arrays(split: str, client: str, columns: Columns) -> None:
    where = f"split '{split}', client {client!r}"
    if not isinstance(columns, Mapping) or not columns:
        raise UserError(f"{where}: its columns must be a dict of NumPy arrays, not {columns!r:.40}")
    for name, rows in columns.items():
        if not _is_column(rows):
            found = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise UserError(f"{where}, column '{name}': is {found}, not an array of numbers (rows, ...)")


def _is_column(rows: object) -> bool:
    return isinstance(rows, np.ndarray) and rows.ndim > 0 and 0 not in rows.shape[1:] and plain_dtype(rows.dtype)


def encoded_id(split: str, client: str) -> bytes:
    """A client's id as it is stored; UserError unless it is a short text."""
    # NUL ends a fixed-length text in HDF5, and the longest id sets the length of all.
    try:
        encoded = client.encode()
    except (AttributeError, UnicodeEncodeError):
        encoded = b""
    if not 1 <= len(encoded) <= 255 or 0 in encoded:
        where = f"split '{split}', client {client!r:.60}"
        raise UserError(f"{where}: an id must be text of 1 to 255 bytes, without NUL")
    return encoded


def given_twice(split: str, client: bytes) -> UserError:
    """The error for an id that came before."""
    return UserError(f"split '{split}', client {client.decode()!r}: this id came before; ids are unique within a split")
