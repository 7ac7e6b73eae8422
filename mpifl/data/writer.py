"""Writing a dataset: a stream of clients in, a folder of shards out, or nothing that looks finished."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np

from mpifl.config import UserError
from mpifl.data.shard import FORMAT, INDEX, VERSION, Columns, Feature, plain_dtype, tables_digest

CENTRAL_ROWS = 512
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
RESERVED = ("offsets", "crc32", "mask", "index", "key")  # tables of a shard, and leaves that batches add


class ShardWriter:
    """Context manager that writes a dataset folder; it appears whole at a successful exit, or not at all.

    features: None takes dtypes and shapes from the first client's arrays. provenance: JSON; source, made,
    command, licence. shard_bytes: a shard is closed before its columns exceed this; a client is never cut in
    two. Memory: one shard, and about 200 bytes per client. Raises UserError naming split, client and column.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        features: dict[str, Feature] | None = None,
        provenance: dict | None = None,
        shard_bytes: int = 256 << 20,
    ) -> None:
        """Refuse a bad target before any data is read."""
        self.path = Path(path).resolve()
        _refuse_existing(self.path)
        self.features = None if features is None else _checked_features(features)
        try:
            self.provenance = json.dumps(provenance or {}, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"provenance must be text, finite numbers, lists, dicts: {error}") from None
        self.shard_bytes = shard_bytes
        self._partial = self.path.with_name(f"{self.path.name}.partial-{secrets.token_hex(4)}")
        self._splits: dict[str, _SplitWriter] = {}

    def __enter__(self) -> ShardWriter:
        """Begin in a temporary sibling of the target."""
        self._partial.mkdir(parents=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Finish, unless an exception is on its way; either way the temporary folder goes."""
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, split: str, clients: Iterable[tuple[str, Columns]]) -> None:
        """Write a whole split from (client id, columns); columns are (n, *shape), 0 rows allowed."""
        self._add(split, clients, central=False)

    def central(self, split: str, columns: Columns) -> None:
        """Write a whole split whose rows belong to no client."""
        self._check(split, "(central)", columns)
        starts = range(0, len(next(iter(columns.values()))), CENTRAL_ROWS)
        blocks = ({name: rows[at : at + CENTRAL_ROWS] for name, rows in columns.items()} for at in starts)
        self._add(split, ((f"block-{i:06d}", block) for i, block in enumerate(blocks)), central=True)

    def _add(self, split: str, clients: Iterable[tuple[str, Columns]], central: bool) -> None:
        if not NAME.fullmatch(split):
            raise UserError(f"'{split}' cannot name a split; use letters, digits and _, first a letter")
        if split in self._splits:
            raise UserError(f"split '{split}' was written before; write each split with one call")
        writer = self._splits[split] = _SplitWriter(self._partial, split, central)
        for client, columns in clients:
            encoded = _encoded_id(f"split '{split}', client {client!r:.60}", client, writer.ids)
            self._check(split, client, columns)
            if writer.pending + sum(rows.nbytes for rows in columns.values()) > self.shard_bytes:
                writer.end_shard(self.features)
            writer.add(encoded, columns, self.features)
        if not writer.ids:
            raise UserError(f"split '{split}' has no {'rows' if central else 'clients'}; give at least one")
        writer.end_shard(self.features)
        writer.complete = True

    def _check(self, split: str, client: str, columns: Columns) -> None:
        where = f"split '{split}', client {client!r}"
        if not isinstance(columns, Mapping) or not columns:
            raise UserError(f"{where}: its columns must be a dict of NumPy arrays, not {columns!r:.40}")
        for name, rows in columns.items():
            if not _is_column(rows):
                found = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
                raise UserError(f"{where}, column '{name}': is {found}, not an array of numbers (rows, ...)")
        if self.features is None:
            derived = {name: Feature(rows.dtype.name, rows.shape[1:]) for name, rows in columns.items()}
            self.features = _checked_features(derived)
        for name in sorted(self.features.keys() ^ columns.keys()):
            problem = "is missing" if name in self.features else "is one too many"
            raise UserError(f"{where}, column '{name}': {problem} (expected: {', '.join(self.features)})")
        length = len(next(iter(columns.values())))
        for name, feature in self.features.items():
            if problem := _problem(columns[name], feature, length):
                raise UserError(f"{where}, column '{name}': {problem}")

    def _finish(self) -> None:
        if not self._splits:
            raise UserError(f"nothing was written to {self.path}; a dataset needs at least one client")
        with h5py.File(self._partial / INDEX, "w") as index:
            index.attrs["format"], index.attrs["version"] = FORMAT, VERSION
            features = {name: asdict(feature) for name, feature in self.features.items()}
            index.attrs["features"] = json.dumps(features, sort_keys=True)
            index.attrs["provenance"] = self.provenance
            for split, writer in sorted(self._splits.items()):
                if not writer.complete:
                    raise UserError(f"split '{split}' was not written to its end; {self.path} is not made")
                writer.write_tables(index.create_group(f"splits/{split}"))
        _sync(self._partial / INDEX)
        _sync(self._partial)
        _refuse_existing(self.path)
        self._partial.rename(self.path)
        _sync(self.path.parent)


class _SplitWriter:
    """A split being written: tables of all its clients, and the columns of the shard being filled."""

    def __init__(self, folder: Path, split: str, central: bool) -> None:
        self.folder, self.split, self.central, self.complete = folder, split, central, False
        self.ids: dict[bytes, None] = {}
        self.sizes = array("q")
        self.shards: list[dict] = []
        self._begin_shard()

    def _begin_shard(self) -> None:
        self.first, self.pending = len(self.sizes), 0
        self.columns: dict[str, bytearray] = defaultdict(bytearray)
        self.crc32: dict[str, list[int]] = defaultdict(list)

    def add(self, client: bytes, columns: Columns, features: dict[str, Feature]) -> None:
        for name, feature in features.items():
            raw = columns[name].astype(feature.dtype, copy=False).tobytes()  # byte-swapped becomes native
            self.crc32[name].append(zlib.crc32(raw))
            self.columns[name] += raw
            self.pending += len(raw)
        self.ids[client] = None
        self.sizes.append(len(columns[name]))

    def end_shard(self, features: dict[str, Feature]) -> None:
        if len(self.sizes) == self.first:
            return
        path = self.folder / f"{self.split}-{len(self.shards):05d}.h5"
        offsets = np.cumsum([0, *self.sizes[self.first :]], dtype=np.int64)
        crc32 = {name: np.array(values, np.uint32) for name, values in self.crc32.items()}
        with h5py.File(path, "w") as shard:
            shard["offsets"] = offsets
            for name, feature in features.items():
                shard[name] = np.ndarray((offsets[-1], *feature.shape), feature.dtype, self.columns[name])
                shard[f"crc32/{name}"] = crc32[name]
        _sync(path)
        entry = {"file": path.name, "bytes": path.stat().st_size, "first": self.first}
        self.shards.append(entry | {"digest": tables_digest(offsets, crc32)})
        self._begin_shard()

    def write_tables(self, group: h5py.Group) -> None:
        group.attrs["central"] = self.central
        group.attrs["shards"] = json.dumps(self.shards)
        group["sizes"] = np.array(self.sizes, np.int64)
        group["ids"] = np.array([*self.ids], h5py.string_dtype("utf-8", max(map(len, self.ids))))


def _refuse_existing(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder; remove it or choose another --out")


def _is_column(rows: object) -> bool:
    return isinstance(rows, np.ndarray) and rows.ndim > 0 and 0 not in rows.shape[1:] and plain_dtype(rows.dtype)


def _checked_features(features: dict[str, Feature]) -> dict[str, Feature]:
    for name in features:
        if not NAME.fullmatch(name) or name in RESERVED:
            rule = f"use letters, digits and _, first a letter, none of {', '.join(RESERVED)}"
            raise UserError(f"'{name}' cannot name a column; {rule}")
    return dict(sorted(features.items()))


def _encoded_id(where: str, client: str, taken: dict[bytes, None]) -> bytes:
    # NUL ends a fixed-length text in HDF5, and the longest id sets the length of all.
    try:
        encoded = client.encode()
    except (AttributeError, UnicodeEncodeError):
        encoded = b""
    if not 1 <= len(encoded) <= 255 or 0 in encoded:
        raise UserError(f"{where}: an id must be text of 1 to 255 bytes, without NUL")
    if encoded in taken:
        raise UserError(f"{where}: this id came before; ids are unique within a split")
    return encoded


def _problem(rows: np.ndarray, feature: Feature, length: int) -> str | None:
    if rows.dtype.name != feature.dtype or rows.shape[1:] != feature.shape:
        return f"rows are {rows.dtype.name} {rows.shape[1:]}, must be {feature.dtype} {feature.shape}"
    if len(rows) != length:
        return f"has {len(rows)} rows, the client's first column has {length}"
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        return f"row {np.argwhere(~np.isfinite(rows))[0, 0]} is not finite"
    if feature.classes is not None and rows.size and not 0 <= rows.min() <= rows.max() < feature.classes:
        return f"holds {rows.min()} to {rows.max()}, labels must be 0 to {feature.classes - 1}"
    return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
