"""The dataset on disk: a folder of HDF5 shards and one small index; the same input gives the same bytes.

    index.h5                     attributes: format, version, digest; features and provenance (JSON texts); all texts
                                 are of fixed length
      splits/<split>             shards (JSON text: file, bytes, first client, digest)
        digests  (JSON text)     central; sha256 of sizes, of ids, and of crc32 of each column, all shards together
        sizes    int64 (C,)      rows of each client; a client's index in its split is its position here
        ids      utf-8 (C,)      fixed length: one read for millions
    <split>-00000.h5, ...        a contiguous range of the split's clients
      <column>                   (rows, *shape), all rows of a client adjacent; contiguous, or chunks when compressed
      offsets    int64 (c + 1,)  client i of the shard owns rows offsets[i]:offsets[i + 1]
      ids        utf-8 (c,)      the index is derived from its shards
      crc32/<column> uint32 (c,) of a client's bytes, uncompressed
      moments/<column>           only where the writer found mean and std: count, sum, sum of squares of each channel

A column of sequences is stored without padding: <column> then holds the items of all rows, (items, *shape[1:]),
lengths/<column> unsigned (rows,) how many each row has, and items/<column> int64 (c + 1,) where a client's items
start; its checksum covers lengths, then items. Read, it is dense again.

A split is `central` when its rows belong to no client: its "clients" are then blocks of 512 rows. A shard's
digest is the sha256 of its tables, so that the index vouches for every byte of data. The dataset's digest is that of
its content, features and `digests` of every split: it does not change with the number of shards, compression or
provenance, and what of the index it covers cannot be altered unnoticed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from mpifl.config import UserError

FORMAT, VERSION, INDEX = "mpifl-shards", 2, "index.h5"
LARGEST_ROW = 2**31 - 1

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Feature:
    """One column: dtype and shape of a row, how models see it, and which labels it may hold.

    Models are fed (x - mean) / std in float32 where mean and std are given (both or neither; a number, or one per
    channel, the first axis). classes: an integer column holds 0 .. classes - 1 (labels, or a vocabulary). names: what
    these stand for. pad: the column holds sequences, and what follows a row's last value other than `pad` is not
    stored. Raises UserError for what cannot be stored.
    """

    dtype: str
    shape: tuple[int, ...]
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    classes: int | None = None
    names: tuple[str, ...] | None = None
    pad: int | None = None

    def __post_init__(self) -> None:
        """Bring dtype, shape and sequences to one spelling."""
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            raise UserError(f"there is no dtype '{self.dtype}'; use NumPy's names, e.g. uint8") from None
        sides = all(isinstance(side, Integral) and side >= 1 for side in self.shape)
        if not plain_dtype(dtype) or not sides or math.prod(self.shape) > LARGEST_ROW:
            allowed = f"use numbers, sides at least 1, at most {LARGEST_ROW} numbers in a row"
            raise UserError(f"rows of {dtype} {self.shape} cannot be stored; {allowed}")
        object.__setattr__(self, "dtype", dtype.name)
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        for name in ("mean", "std", "names"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_scale()
        if self.classes is not None and not (_fits(self.classes, dtype) and self.classes >= 1):
            raise UserError(f"classes {self.classes} of {dtype}: only integers have classes, at least 1")
        if self.names is not None and len(self.names) != self.classes:
            raise UserError(f"{len(self.names)} names for {self.classes} classes; give one each")
        if self.pad is not None and not (_fits(self.pad, dtype) and self.shape):
            raise UserError(f"pad {self.pad} of {dtype} {self.shape}: only sequences of integers are padded")

    def _check_scale(self) -> None:
        scale = (self.mean, self.std)
        if scale == (None, None):
            return
        channels = np.shape(self.mean) in ((), self.shape[:1]) and np.shape(self.mean) == np.shape(self.std)
        if None in scale or not channels or not np.isfinite(scale).all() or np.min(self.std) <= 0:
            allowed = "give both or neither, a number or one per channel, std above 0"
            raise UserError(f"mean {self.mean} and std {self.std}: {allowed}")


def _fits(value: Any, dtype: np.dtype) -> bool:
    """Whether it is an integer of this dtype, or the number that comes after its largest."""
    if dtype.kind not in "iu" or not isinstance(value, Integral) or isinstance(value, bool):
        return False
    return np.iinfo(dtype).min <= value <= np.iinfo(dtype).max + 1


def plain_dtype(dtype: np.dtype) -> bool:
    """Whether HDF5, torch and every MPI know this dtype: booleans, integers and floats of at most 8 bytes."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8


def features_json(features: Mapping[str, Feature]) -> str:
    """Features as JSON text, in order of name, without what is not set."""
    specs = {name: {k: v for k, v in asdict(f).items() if v is not None} for name, f in features.items()}
    return json.dumps(specs, sort_keys=True)


def tables_digest(tables: Iterable[np.ndarray]) -> str:
    """sha256 (hex) of the bytes of these arrays, one after another."""
    sha = hashlib.sha256()
    for table in tables:
        sha.update(np.ascontiguousarray(table).view(np.uint8))
    return sha.hexdigest()


def content_digest(features: str, splits: Mapping[str, dict[str, Any]]) -> str:
    """sha256 (hex) of a dataset's content: features as JSON, and by split: central, and digests of its tables."""
    return hashlib.sha256(json.dumps([features, splits], sort_keys=True).encode()).hexdigest()


def shard_tables(shard: Mapping[str, Any], features: Iterable[str], at_once: int = 1 << 20) -> Iterator[np.ndarray]:
    """The tables of a shard that its digest covers, in order and in parts: of millions of clients they are large."""
    names = sorted(features)
    items = [f"items/{name}" for name in names if f"items/{name}" in shard]
    for name in ("offsets", "ids", *items, *(f"crc32/{name}" for name in names)):
        for start in range(0, len(shard[name]), at_once):
            yield shard[name][start : start + at_once]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose first byte lies on a 64-byte line, so that torch may compute on it uncopied."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + 63, np.uint8)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))  # four times faster than memory.ctypes.data
    return np.ndarray(shape, dtype, memory, -address % 64)


def length_dtype(feature: Feature) -> np.dtype:
    """The smallest unsigned dtype for the lengths of sequences."""
    return np.min_scalar_type(feature.shape[0])


def unpadded(rows: np.ndarray, feature: Feature) -> tuple[np.ndarray, np.ndarray]:
    """Items of all rows one after another, and how many each has: what is left without the pads at its end."""
    real = (rows != feature.pad).any(axis=tuple(range(2, rows.ndim)))
    lengths = np.where(real.any(axis=1), feature.shape[0] - np.argmax(real[:, ::-1], axis=1), 0)
    kept = np.arange(feature.shape[0]) < lengths[:, None]
    return rows[kept], lengths.astype(length_dtype(feature))


def padded(items: np.ndarray, lengths: np.ndarray, feature: Feature) -> np.ndarray:
    """Rows of sequences, (rows, *shape), from their items one after another and how many each row has."""
    rows = aligned_empty((len(lengths), *feature.shape), np.dtype(feature.dtype))
    rows.fill(feature.pad)
    rows[np.arange(feature.shape[0]) < lengths[:, None]] = items
    return rows


def wrong_value(rows: np.ndarray, feature: Feature) -> tuple[int, str] | None:
    """The first row with a value that the column may not hold, and what is wrong with it."""
    if rows.dtype.kind == "f":
        if not (wrong := ~np.isfinite(rows)).any():
            return None
        problem = "is not finite"
    else:
        if feature.classes is None or not rows.size or 0 <= rows.min() <= rows.max() < feature.classes:
            return None
        wrong = (rows < 0) | (rows >= feature.classes)
        problem = f"holds {rows[wrong][0]}, labels must be 0 to {feature.classes - 1}"
    return int(np.argwhere(wrong)[0, 0]), problem


def damaged(path: Path, problem: str) -> UserError:
    """The error for a file that is not as it was written."""
    return UserError(f"{path}: {problem}; copy it again from where it was made, or convert the dataset again")
