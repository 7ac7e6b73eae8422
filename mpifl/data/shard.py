"""The dataset on disk: a folder of HDF5 shards and one small index; the same input gives the same bytes.

    index.h5                     attributes: format, version, features and provenance (JSON)
      splits/<split>             attributes: central; shards (JSON; file, bytes, first client, digest)
        sizes    int64 (C,)      rows of each client; a client's index in its split is its position here
        ids      utf-8 (C,)      fixed length: one read for millions
    <split>-00000.h5, ...        a contiguous range of the split's clients
      <column>                   (rows, *shape), one contiguous dataset, all rows of a client adjacent
      offsets    int64 (c + 1,)  client i of the shard owns rows offsets[i]:offsets[i + 1]
      crc32/<column> uint32 (c,)

A split is `central` when its rows belong to no client: its "clients" are then blocks of 512 rows. A shard's
digest is the sha256 of its offsets and checksums, so that the index vouches for every byte of data.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from mpifl.config import UserError, choice

FORMAT, VERSION, INDEX = "mpifl-shards", 1, "index.h5"

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Feature:
    """One column: dtype and shape of a row, how models see it, and which labels it may hold.

    Models are fed (x - mean) / std in float32 where mean and std are given (both or neither). `classes`
    limits an integer column to 0 .. classes - 1. Raises UserError for what cannot be stored.
    """

    dtype: str
    shape: tuple[int, ...]
    mean: float | None = None
    std: float | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        """Bring dtype and shape to one spelling."""
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            raise UserError(f"there is no dtype '{self.dtype}'; use NumPy's names, e.g. uint8") from None
        if not plain_dtype(dtype) or min(self.shape, default=1) < 1:
            raise UserError(f"rows of {dtype} {self.shape} cannot be stored; use numbers, sides at least 1")
        scale = (self.mean, self.std)
        if scale != (None, None) and (None in scale or not np.isfinite(scale).all() or self.std <= 0):
            raise UserError(f"mean {self.mean} and std {self.std}: give both or neither, std above 0")
        if self.classes is not None and (dtype.kind not in "iu" or self.classes < 1):
            raise UserError(f"classes {self.classes} of {dtype}: only integers have classes, at least 1")
        object.__setattr__(self, "dtype", dtype.name)
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))


def plain_dtype(dtype: np.dtype) -> bool:
    """Whether HDF5, torch and every MPI know this dtype: booleans, integers and floats of at most 8 bytes."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8


def tables_digest(offsets: np.ndarray, crc32: dict[str, np.ndarray]) -> str:
    """sha256 (hex) of a shard's offsets and checksums, columns in order of name."""
    tables = [offsets, *(crc32[name] for name in sorted(crc32))]
    return hashlib.sha256(b"".join(table.tobytes() for table in tables)).hexdigest()


class Dataset:
    """A dataset folder open for reading: `path`, `features`, `provenance` (dict), `splits` (names).

    Opening finds every shard with its recorded size. A shard's tables are checked when it is first touched,
    a client's checksums when the client is. Raises UserError naming the file. Files stay open until `close`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Read the index's header; the tables of clients are read when asked for."""
        self.path = Path(path).absolute()
        if not (self.path / INDEX).is_file():
            what = f"the folder has no {INDEX}" if self.path.is_dir() else "there is no such folder"
            raise UserError(f"{path} is not a dataset: {what}; see `python -m data_prep --help`")
        self._index = _open(self.path / INDEX)
        header = dict(self._index.attrs)
        found = f"{header.get('format')} {header.get('version')}"
        if found != f"{FORMAT} {VERSION}":
            raise UserError(f"{path} is {found}, not {FORMAT} {VERSION}; update mpifl or convert again")
        try:
            self.features = {name: Feature(**spec) for name, spec in json.loads(header["features"]).items()}
            self.provenance = json.loads(header["provenance"])
            groups = self._index["splits"]
            self._splits = {name: _Split(self.path, groups[name], self.features) for name in groups}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise _damaged(self.path / INDEX, f"its header cannot be read ({error})") from None
        self.splits = tuple(self._splits)

    @property
    def clients(self) -> int:
        """Number of clients of split "train"."""
        return int(self._split("train").first[-1])

    @cached_property
    def digest(self) -> str:
        """Sha256 (hex) of the index, sizes of files aside: HDF5 versions may differ in those."""
        header = [self._index.attrs["features"], self._index.attrs["provenance"]]
        for name, split in self._splits.items():
            shards = [(shard["file"], shard["first"], shard["digest"]) for shard in split.shards]
            header.append([name, split.central, shards])
        sha = hashlib.sha256(json.dumps(header).encode())
        for split in self._splits.values():
            sha.update(split.sizes.tobytes())
            sha.update(split.ids[:].tobytes())
        return sha.hexdigest()

    def sizes(self, split: str) -> np.ndarray:
        """Rows of each client, (C,) int64, read-only; touches no shard."""
        return self._split(split).sizes

    def client_id(self, split: str, index: int) -> str:
        """Id of the client at `index`."""
        return self._split(split).client_id(index)

    def central(self, split: str) -> bool:
        """Whether the split's rows belong to no client."""
        return self._split(split).central

    def aligned(self, split: str) -> bool:
        """Whether the split has the clients of "train": the same ids in the same order."""
        mine = self._split(split)
        if split == "train" or mine.central or "train" not in self.splits:
            return split == "train"
        return np.array_equal(mine.ids[:], self._split("train").ids[:])

    def total(self, split: str) -> int:
        """Number of rows of the split."""
        return int(self._split(split).bounds[-1])

    def client(self, split: str, index: int) -> Columns:
        """Columns of one client, (n, *shape) each."""
        table = self._split(split)
        if not 0 <= index < table.first[-1]:
            raise IndexError(f"split '{split}' has clients 0 to {table.first[-1] - 1}, not {index}")
        number = int(np.searchsorted(table.first, index, "right")) - 1
        return table.shard(number).client(index - table.first[number])

    def rows(self, split: str, start: int, stop: int) -> Columns:
        """Rows [start, stop) of the split, its clients one after another, across the borders of shards."""
        table = self._split(split)
        if not 0 <= start <= stop <= table.bounds[-1]:
            raise IndexError(f"split '{split}' has rows 0 to {table.bounds[-1]}, not [{start}, {stop})")
        parts = []
        for number, (first, last) in enumerate(zip(table.bounds[:-1], table.bounds[1:])):
            if max(start, first) < min(stop, last):
                parts.append(table.shard(number).rows(max(start, first) - first, min(stop, last) - first))
        if len(parts) == 1:
            return parts[0]
        empty = {name: np.empty((0, *feature.shape), feature.dtype) for name, feature in self.features.items()}
        return {name: np.concatenate([none, *(part[name] for part in parts)]) for name, none in empty.items()}

    def close(self) -> None:
        """Close every file."""
        for split in self._splits.values():
            for shard in split.opened.values():
                shard.file.close()
        self._index.close()

    def _split(self, name: str) -> _Split:
        if name not in self._splits:
            choice(name, self.splits, f"split of {self.path.name}")
        return self._splits[name]


class _Split:
    """One split of an open dataset: its tables in the index, and its shards, opened when first touched."""

    def __init__(self, folder: Path, group: h5py.Group, features: dict[str, Feature]) -> None:
        self.folder, self.features = folder, features
        self.central, self.shards = bool(group.attrs["central"]), json.loads(group.attrs["shards"])
        self.ids, self._sizes = group["ids"], group["sizes"]
        self.first = np.array([*(shard["first"] for shard in self.shards), len(self._sizes)])
        self.opened: dict[int, _Shard] = {}
        for shard in self.shards:
            path = folder / shard["file"]
            found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
            if found != f"{shard['bytes']} bytes":
                raise _damaged(path, f"this shard is {found}, it was written with {shard['bytes']} bytes")

    @cached_property
    def sizes(self) -> np.ndarray:
        sizes = self._sizes[:]
        sizes.flags.writeable = False
        return sizes

    @cached_property
    def bounds(self) -> np.ndarray:
        """First row of each shard, then the number of rows."""
        return np.cumsum([0, *np.add.reduceat(self.sizes, self.first[:-1])])

    def client_id(self, index: int) -> str:
        return self.ids[index].decode()

    def shard(self, number: int) -> _Shard:
        if number not in self.opened:
            self.opened[number] = _Shard(self, number)
        return self.opened[number]


class _Shard:
    """One open shard: its tables in memory, its columns on disk."""

    def __init__(self, split: _Split, number: int) -> None:
        entry = split.shards[number]
        self.path, self.split, self.first = split.folder / entry["file"], split, entry["first"]
        self.file = _open(self.path)
        try:
            self.offsets = self.file["offsets"][:]
            self.columns = {name: self.file[name] for name in split.features}
            self.crc32 = {name: self.file[f"crc32/{name}"][:] for name in split.features}
        except KeyError as error:
            raise _damaged(self.path, f"a table is missing ({error})") from None
        self._check(split.sizes[self.first : split.first[number + 1]], entry["digest"])
        self.verified = np.zeros(len(self.offsets) - 1, bool)

    def _check(self, sizes: np.ndarray, digest: str) -> None:
        # h5py clips slices and answers reversed ones with empty arrays: nothing later would notice.
        if not len(self.offsets) or self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            raise _damaged(self.path, "offsets must start at 0 and never decrease")
        if not np.array_equal(np.diff(self.offsets), sizes):
            raise _damaged(self.path, "offsets do not give the sizes of clients that the index has")
        for name, feature in self.split.features.items():
            column, shape = self.columns[name], (int(self.offsets[-1]), *feature.shape)
            if column.shape != shape or column.dtype != feature.dtype:
                found = f"{column.dtype} {column.shape}, not {feature.dtype} {shape}"
                raise _damaged(self.path, f"column '{name}' is {found}")
        if tables_digest(self.offsets, self.crc32) != digest:
            raise _damaged(self.path, "offsets and checksums are not those that the index was written with")

    def client(self, position: int) -> Columns:
        return self.rows(self.offsets[position], self.offsets[position + 1])

    def rows(self, start: int, stop: int) -> Columns:
        first = int(np.searchsorted(self.offsets, start, "right")) - 1
        last = int(np.searchsorted(self.offsets, stop, "left"))
        if self.verified[first:last].all():
            return self._read(start, stop)
        base, end = self.offsets[first], self.offsets[last]
        whole = self._read(base, end)
        self._verify(range(first, last), whole)
        if (base, end) == (start, stop):
            return whole
        return {name: rows[start - base : stop - base].copy() for name, rows in whole.items()}

    def _read(self, start: int, stop: int) -> Columns:
        return {name: column[start:stop] for name, column in self.columns.items()}

    def _verify(self, clients: range, columns: Columns) -> None:
        bounds = self.offsets[clients.start : clients.stop + 1] - self.offsets[clients.start]
        for client, start, stop in zip(clients, bounds[:-1], bounds[1:]):
            for name, rows in columns.items():
                if not self.verified[client] and zlib.crc32(rows[start:stop]) != self.crc32[name][client]:
                    owner = self.split.client_id(self.first + client)
                    problem = f"column '{name}' of client {owner!r} does not match its checksum"
                    raise _damaged(self.path, problem)
        self.verified[clients.start : clients.stop] = True


def embedded(name: str) -> Path:
    """Folder of a dataset shipped inside the package."""
    here = Path(__file__).parent
    return here / choice(name, (index.parent.name for index in here.glob(f"*/{INDEX}")), "embedded dataset")


def _open(path: Path) -> h5py.File:
    # A finished dataset never changes and needs no lock, which read-only or parallel file systems may refuse.
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error})") from None


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; copy it again from where it was made, or convert the dataset again")
