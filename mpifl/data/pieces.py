"""Writing shards: a stream of clients in, files out; a piece of a split at a time, by any process."""

from __future__ import annotations

import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpifl.config import UserError, choice
from mpifl.data.clients import Expected, check_client, encoded_id, given_twice
from mpifl.data.column import PLUGINS, load_plugins
from mpifl.data.format import Columns, Feature, length_dtype, unpadded, wrong_value
from mpifl.data.newfile import cannot_be_written, new_file

CENTRAL_ROWS = 512
SMALLEST_CHUNK, LARGEST_CHUNK = 4 << 10, 1 << 20
COMPRESSIONS = ("gzip", "lzf", *PLUGINS)
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
TELL_EVERY = 64
RESERVED = ("offsets", "ids", "lengths", "items", "moments", "crc32", "mask", "index", "key")
"""Tables of a shard, and leaves that batches add."""


@dataclass(frozen=True)
class Storage:
    """How clients become shards.

    shard_bytes: a shard is closed before its columns exceed this; a client is never cut in two. compression: of
    columns, "" or one of COMPRESSIONS. standardize: a uint8 column that is given the mean and std of split "train",
    per channel (the first axis of three), or over all pixels.
    """

    features: dict[str, Feature]
    shard_bytes: int = 256 << 20
    compression: str = ""
    standardize: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be written before any data is read."""
        for name in self.features:
            if not NAME.fullmatch(name) or name in RESERVED:
                rule = f"use letters, digits and _, first a letter, none of {', '.join(RESERVED)}"
                raise UserError(f"'{name}' cannot name a column; {rule}")
        object.__setattr__(self, "features", dict(sorted(self.features.items())))
        if self.compression:
            choice(self.compression, COMPRESSIONS, "compression")
        if self.compression in PLUGINS:
            load_plugins()
        if self.standardize:
            choice(self.standardize, self.features, "column to standardize")
            if self.features[self.standardize].dtype != "uint8":
                raise UserError(f"column '{self.standardize}' is not uint8: its mean and std must be given")

    @cached_property
    def expected(self) -> Expected:
        """Name, dtype and shape of the rows of every column."""
        return [(name, np.dtype(feature.dtype), feature.shape) for name, feature in self.features.items()]


def write_piece(
    folder: Path,
    split: str,
    piece: int,
    clients: Iterable[tuple[str, Columns]],
    storage: Storage,
    central: bool = False,
    tell: Callable[[int], None] = lambda clients: None,
) -> None:
    """Write one piece of a split into shards of its own, and mark it complete.

    clients: (client id, columns); if central, ("", columns of any number of rows). tell: called now and then with the
    number of clients since the last call. Raises UserError naming split, client and column, or the file.
    """
    check_split_name(split)
    for unfinished in folder.glob(f"{split}.{piece:05d}.*"):
        unfinished.unlink()
    if central:
        clients = _blocks(split, piece, clients, storage)
    shards = 0
    for shard in _filled(split, _told(clients, tell), storage):
        with new_file(shard_file(folder, split, piece, shards)) as file:
            shard.fill(file)
        shards += 1
    try:
        done_mark(folder, split, piece).write_text(str(shards))
    except OSError as error:
        raise cannot_be_written(done_mark(folder, split, piece), error) from None


def check_split_name(split: str) -> None:
    """Raise UserError unless a split may have this name."""
    if not NAME.fullmatch(split):
        raise UserError(f"'{split}' cannot name a split; use letters, digits and _, first a letter")


def shard_file(folder: Path, split: str, piece: int, number: int) -> Path:
    """A shard of a piece, before the dataset is finished."""
    return folder / f"{split}.{piece:05d}.{number:05d}.h5"


def done_mark(folder: Path, split: str, piece: int) -> Path:
    """The file that says that a piece is complete, and how many shards it has."""
    return folder / f"{split}.{piece:05d}.done"


def _filled(split: str, clients: Iterable[tuple[str, Columns]], storage: Storage) -> Iterator[_Shard]:
    """Yield shards, each as soon as the next client has no place in it."""
    shard = _Shard(split, storage)
    for client, columns in clients:
        encoded = encoded_id(split, client)
        if encoded in shard.ids:
            raise given_twice(split, encoded)
        check_client(split, client, columns, storage.features, storage.expected)
        size = sum(rows.nbytes for rows in columns.values())
        if shard.bytes + size > storage.shard_bytes and shard.ids:
            yield shard
            shard = _Shard(split, storage)
        shard.add(encoded, columns)
    if shard.ids:
        yield shard


def _told(clients: Iterable[tuple[str, Columns]], tell: Callable[[int], None]) -> Iterator[tuple[str, Columns]]:
    """Pass clients on, and tell of them now and then."""
    number = 0
    for number, client in enumerate(clients, 1):
        yield client
        if number % TELL_EVERY == 0:
            tell(TELL_EVERY)
    tell(number % TELL_EVERY)


class _Shard:
    """A shard being filled, in memory."""

    def __init__(self, split: str, storage: Storage) -> None:
        self.split, self.storage, self.bytes = split, storage, 0
        self.ids: dict[bytes, None] = {}
        self.sizes = array("q")
        self.columns: dict[str, bytearray] = defaultdict(bytearray)
        self.lengths: dict[str, bytearray] = defaultdict(bytearray)
        self.items: dict[str, array] = defaultdict(lambda: array("q"))
        self.crc32: dict[str, array] = defaultdict(lambda: array("I"))
        self.moments: np.ndarray | int = 0

    def add(self, client: bytes, columns: Columns) -> None:
        for name, dtype, _ in self.storage.expected:
            feature, rows, crc32 = self.storage.features[name], columns[name], 0
            if name == self.storage.standardize:
                self.moments = self.moments + _moments(rows)
            if feature.pad is not None:
                rows, lengths = unpadded(rows, feature)
                self.lengths[name] += lengths.tobytes()
                self.items[name].append(len(rows))
                crc32 = zlib.crc32(lengths)
            raw = (rows if rows.dtype == dtype else rows.astype(dtype)).tobytes()  # byte-swapped becomes native
            self.crc32[name].append(zlib.crc32(raw, crc32))
            self.columns[name] += raw
            self.bytes += len(raw)
        self.ids[client] = None
        self.sizes.append(len(columns[name]))

    def fill(self, file: h5py.File) -> None:
        """Write everything into an empty file; UserError for a value that a column may not hold."""
        offsets, longest = _offsets(self.sizes), max(map(len, self.ids))
        file["offsets"] = offsets
        file["ids"] = np.array([*self.ids], h5py.string_dtype("utf-8", longest))
        for name, dtype, shape in self.storage.expected:
            feature, starts, whole = self.storage.features[name], offsets, (offsets[-1], *shape)
            if feature.pad is not None:
                starts = file[f"items/{name}"] = _offsets(self.items[name])
                lengths = np.ndarray(offsets[-1], length_dtype(feature), self.lengths[name])
                self._column(file, f"lengths/{name}", lengths)
                whole = (starts[-1], *shape[1:])
            values = np.ndarray(whole, dtype, self.columns[name])
            self._check_values(name, values, starts)
            self._column(file, name, values)
            file[f"crc32/{name}"] = np.frombuffer(self.crc32[name], np.uint32)
        if self.storage.standardize:
            file[f"moments/{self.storage.standardize}"] = self.moments

    def _check_values(self, name: str, values: np.ndarray, starts: np.ndarray) -> None:
        if found := wrong_value(values, self.storage.features[name]):
            position, problem = found
            client = int(np.searchsorted(starts, position, "right")) - 1
            owner, place = [*self.ids][client].decode(), "item" if name in self.items else "row"
            where = f"split '{self.split}', client {owner!r}, column '{name}'"
            raise UserError(f"{where}: {place} {position - starts[client]} {problem}")

    def _column(self, file: h5py.File, name: str, values: np.ndarray) -> None:
        """Contiguous, or compressed in chunks of about one client, of 4 KiB to 1 MiB."""
        if not self.storage.compression or not values.size:
            file[name] = values
            return
        row, client = values.nbytes // len(values), -(-len(values) // len(self.sizes))
        rows = min(max(client, SMALLEST_CHUNK // row), max(1, LARGEST_CHUNK // row), len(values))
        filters = _filters(self.storage.compression, values.itemsize)
        file.create_dataset(name, data=values, chunks=(rows, *values.shape[1:]), **filters)


def _offsets(counts: array) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _filters(compression: str, itemsize: int) -> dict[str, Any]:
    if compression in PLUGINS:
        import hdf5plugin

        plugin = hdf5plugin.Zstd(clevel=3) if compression == "zstd" else hdf5plugin.Blosc2(cname="lz4")
        return dict(plugin) | {"shuffle": compression == "zstd" and itemsize > 1}
    level = {"compression_opts": 1} if compression == "gzip" else {}
    return {"compression": compression, "shuffle": itemsize > 1} | level


def _blocks(
    split: str, piece: int, parts: Iterable[tuple[str, Columns]], storage: Storage
) -> Iterator[tuple[str, Columns]]:
    """Cut parts of any length into blocks of 512 rows, the last one shorter."""
    number, held = 0, None
    for _, part in parts:
        check_client(split, "(central)", part, storage.features, storage.expected)
        held = part if held is None else {name: np.concatenate([held[name], part[name]]) for name in part}
        rows = len(next(iter(held.values())))
        for start in range(0, rows - rows % CENTRAL_ROWS, CENTRAL_ROWS):
            yield f"block-{piece:05d}-{number:06d}", _cut(held, start, start + CENTRAL_ROWS)
            number += 1
        held = _cut(held, rows - rows % CENTRAL_ROWS, rows)
    if held is not None and len(next(iter(held.values()))):
        yield f"block-{piece:05d}-{number:06d}", held


def _cut(columns: Columns, start: int, stop: int) -> Columns:
    return {name: rows[start:stop] for name, rows in columns.items()}


def _moments(rows: np.ndarray) -> np.ndarray:
    """Count, sum and sum of squares of each channel of uint8 rows, (channels, 3) int64: exact, in any order."""
    planes = np.moveaxis(rows, 1, 0) if rows.ndim == 4 else rows[None]
    histograms = np.stack([np.bincount(plane.reshape(-1), minlength=256) for plane in planes])
    return histograms @ np.stack([np.arange(256) ** power for power in range(3)], axis=1)
