"""Writing a dataset: clients in, a folder of shards out, or nothing that looks finished.

Shards are written into a temporary sibling of the target, in pieces: independent parts of a split, by any process.
The index is then made from what the shards say of themselves, and the folder gets its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpifl.config import UserError
from mpifl.data.clients import derived_features, given_twice
from mpifl.data.format import (
    FORMAT,
    INDEX,
    VERSION,
    Columns,
    Feature,
    content_digest,
    features_json,
    shard_tables,
    tables_digest,
)
from mpifl.data.newfile import cannot_be_written, new_file, sync
from mpifl.data.pieces import Storage, done_mark, shard_file, write_piece

OURS = re.compile(r"lock|key|index\.h5(\.tmp)?|\w+[.-]\d{5,}(\.\d{5,})?\.(done|h5|h5\.tmp)")
"""Names in the folder of an unfinished dataset: nothing else is ever removed."""


class ShardWriter:
    """Context manager that writes a dataset folder; it appears whole at a successful exit, or not at all.

    features: None takes dtypes and shapes from the first client's arrays. provenance: JSON; source, made,
    command, licence. The rest: see Storage. Memory: one shard, and the ids. Raises UserError naming split, client
    and column.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        features: dict[str, Feature] | None = None,
        provenance: dict | None = None,
        shard_bytes: int = 256 << 20,
        compression: str = "",
        standardize: str = "",
    ) -> None:
        """Refuse a bad target before any data is read."""
        self.folder, self.provenance = Unfinished(path), provenance_json(provenance)
        self._how = (shard_bytes, compression, standardize)
        self.storage = None if features is None else Storage(features, *self._how)
        self._splits: dict[str, bool] = {}
        self._complete = True

    def __enter__(self) -> ShardWriter:
        """Begin in a temporary sibling of the target."""
        self.folder.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Finish, unless an exception is on its way; either way the temporary folder goes."""
        try:
            if kind is None and not self._complete:
                raise UserError(f"split '{[*self._splits][-1]}' was not written to its end; {self.folder} is not made")
            if kind is None:
                splits = {split: (1, central) for split, central in self._splits.items()}
                self.folder.finish(splits, self.storage, self.provenance)
        finally:
            self.folder.__exit__()

    def write(self, split: str, clients: Iterable[tuple[str, Columns]]) -> None:
        """Write a whole split from (client id, columns); columns are (n, *shape), 0 rows allowed."""
        self._add(split, clients, central=False)

    def central(self, split: str, columns: Columns | Iterable[Columns]) -> None:
        """Write a whole split whose rows belong to no client: all at once, or in parts of any length."""
        parts = [columns] if isinstance(columns, Mapping) else columns
        self._add(split, (("", part) for part in parts), central=True)

    def _add(self, split: str, clients: Iterable[tuple[str, Columns]], central: bool) -> None:
        if split in self._splits:
            raise UserError(f"split '{split}' was written before; write each split with one call")
        self._splits[split], self._complete = central, False
        clients = iter(clients)
        if self.storage is None:
            first = next(clients, None)
            if first is None:
                raise _nothing_in(split, central)
            clients = chain([first], clients)
            self.storage = Storage(derived_features(split, *first), *self._how)
        write_piece(self.folder.folder, split, 0, clients, self.storage, central)
        self._complete = True


class Unfinished:
    """The temporary sibling NAME.partial of a dataset's folder: shards of pieces, and which pieces are complete.

    key: what the conversion was asked for. Pieces that an interrupted conversion with the same key left there are kept;
    without a key nothing is. Entered, it belongs to this process alone. Raises UserError naming file or folder.
    """

    def __init__(self, path: str | os.PathLike, key: str = "") -> None:
        """Refuse a target that exists."""
        self.path, self.key = Path(path).resolve(), key
        _refuse_existing(self.path)
        self.folder = self.path.with_name(f"{self.path.name}.partial")
        self._lock = -1

    def __str__(self) -> str:
        return str(self.path)

    def __enter__(self) -> Unfinished:
        """Make the folder, or take over what an interrupted conversion left; UserError if that one still runs."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if others := [file.name for file in self.folder.iterdir() if not OURS.fullmatch(file.name)]:
                raise UserError(f"{self.folder} is where unfinished shards go, but holds '{others[0]}'; move it away")
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
            self._take_lock()
            self._make_ready()
        except BaseException as error:
            self._let_go()
            if isinstance(error, OSError):
                raise cannot_be_written(self.folder, error) from None
            raise
        return self

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some file systems have no locks
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{self.path} is being made by another process; wait for it, or end it") from None

    def _make_ready(self) -> None:
        key = self.folder / "key"
        if self.key and key.is_file() and key.read_text() == self.key:
            return
        key.unlink(missing_ok=True)  # first: while pieces go, nothing may say that they can be kept
        for old in self.folder.iterdir():
            if old.name != "lock":
                old.unlink()
        key.write_text(self.key)

    def __exit__(self, *exception: object) -> None:
        """Remove the folder unless it has complete pieces that can be kept, then let go of it."""
        if self._lock >= 0 and not self.keeps():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def keeps(self) -> bool:
        """Whether there are complete pieces that the same conversion can go on from."""
        return bool(self.key) and any(self.folder.glob("*.done"))

    def has(self, split: str, piece: int) -> bool:
        """Whether this piece is complete."""
        return done_mark(self.folder, split, piece).is_file()

    def finish(self, splits: Mapping[str, tuple[int, bool]], storage: Storage | None, provenance: str) -> None:
        """Number the shards, write the index and give the folder its name.

        splits: name -> number of pieces, and whether it is central.
        """
        if storage is None or not splits:
            raise UserError(f"nothing was written to {self.path}; a dataset needs at least one client")
        tables = {split: self._collect(split, *kind, storage) for split, kind in sorted(splits.items())}
        features = features_json(_standardized(storage, tables))
        with new_file(self.folder / INDEX) as index:
            index.attrs["format"], index.attrs["version"] = _fixed(FORMAT), VERSION
            index["features"], index["provenance"] = _fixed(features), _fixed(provenance)
            for split, table in tables.items():
                table.write(index.create_group(f"splits/{split}"))
            index.attrs["digest"] = _fixed(content_digest(features, {s: t.digests for s, t in tables.items()}))
        try:
            self._give_name(tables)
        except OSError as error:
            raise cannot_be_written(self.path, error) from None

    def _give_name(self, tables: Mapping[str, _Tables]) -> None:
        for leftover in [self.folder / "key", *self.folder.glob("*.done")]:
            leftover.unlink()  # from here on an interrupted conversion starts again
        for table in tables.values():
            table.rename_shards(self.folder)
        sync(self.folder)
        _refuse_existing(self.path)
        self.folder.rename(self.path)
        (self.path / "lock").unlink()
        self._let_go()
        sync(self.path.parent)

    def _collect(self, split: str, pieces: int, central: bool, storage: Storage) -> _Tables:
        tables = _Tables(split, central)
        for piece in range(pieces):
            try:
                shards = int(done_mark(self.folder, split, piece).read_text())
                for number in range(shards):
                    tables.add(shard_file(self.folder, split, piece, number), storage.features)
            except (OSError, ValueError, KeyError) as error:
                found = f"piece {piece} of split '{split}' cannot be read again ({error})"
                raise UserError(f"{self.folder}: {found}; remove the folder and convert again") from None
        if not tables.paths:
            raise _nothing_in(split, central)
        tables.refuse_repeated_ids()
        return tables


class _Tables:
    """What the index says of a split, gathered from its shards."""

    def __init__(self, split: str, central: bool) -> None:
        self.split, self.central = split, central
        self.clients = 0
        self.paths: list[Path] = []
        self.shards: list[dict[str, Any]] = []
        self._sizes: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []
        self._crc32: dict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, path: Path, features: Mapping[str, Feature]) -> None:
        with h5py.File(path, "r") as shard:
            digest = tables_digest(shard_tables(shard, features))
            self._sizes.append(np.diff(shard["offsets"][:]))
            self._ids.append(shard["ids"][:])
            for name in features:
                self._crc32[name].append(shard[f"crc32/{name}"][:])
        name = f"{self.split}-{len(self.shards):05d}.h5"
        self.shards.append({"file": name, "bytes": path.stat().st_size, "first": self.clients, "digest": digest})
        self.paths.append(path)
        self.clients += len(self._ids[-1])

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate(self._ids)  # as long as the longest

    @cached_property
    def digests(self) -> dict[str, Any]:
        crc32 = {name: tables_digest(parts) for name, parts in self._crc32.items()}
        ids, sizes = "" if self.central else tables_digest([self.ids]), tables_digest(self._sizes)
        return {"central": self.central, "sizes": sizes, "ids": ids, "crc32": crc32}

    def refuse_repeated_ids(self) -> None:
        ids = self.ids
        if (ids[1:] > ids[:-1]).all():
            return
        order = np.sort(ids)
        if (again := np.flatnonzero(order[1:] == order[:-1])).size:
            raise given_twice(self.split, order[again[0]])

    def rename_shards(self, folder: Path) -> None:
        for path, entry in zip(self.paths, self.shards):
            path.rename(folder / entry["file"])

    def write(self, group: h5py.Group) -> None:
        ids = self.ids
        group["shards"], group["digests"] = _fixed(json.dumps(self.shards)), _fixed(json.dumps(self.digests))
        group["sizes"] = np.concatenate(self._sizes)
        group["ids"] = ids.astype(h5py.string_dtype("utf-8", ids.dtype.itemsize))


def _fixed(text: str) -> np.ndarray:
    """A text of fixed length: where HDF5 keeps those of any length, a few zeroed bytes have it search for ever."""
    encoded = text.encode()
    return np.array(encoded, h5py.string_dtype("utf-8", len(encoded)))


def provenance_json(provenance: dict | None) -> str:
    """Provenance as JSON text; UserError for what JSON cannot hold."""
    try:
        return json.dumps(provenance or {}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"provenance must be text, finite numbers, lists, dicts: {error}") from None


def _standardized(storage: Storage, tables: Mapping[str, _Tables]) -> dict[str, Feature]:
    if not storage.standardize or "train" not in tables:
        return storage.features
    table = f"moments/{storage.standardize}"
    moments = 0
    for path in tables["train"].paths:
        with h5py.File(path, "r") as shard:
            moments = moments + shard[table][:]
    scales = [
        (total / count, math.sqrt(count * squares - total * total) / count or 1.0)
        for count, total, squares in np.maximum(moments, [1, 0, 0]).tolist()
    ]
    mean, std = scales[0] if len(scales) == 1 else zip(*scales)
    feature = replace(storage.features[storage.standardize], mean=mean, std=std)
    return {**storage.features, storage.standardize: feature}


def _nothing_in(split: str, central: bool) -> UserError:
    return UserError(f"split '{split}' has no {'rows' if central else 'clients'}; give at least one")


def _refuse_existing(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f"{path} exists and is not an empty folder; remove it or choose another path (of data_prep: --out)"
        )
