"""Reading a dataset, whose layout format.py describes: open at once, checked when first touched."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import h5py
import numpy as np

from mpifl.config import UserError, choice
from mpifl.data.column import Column, check_offsets
from mpifl.data.format import (
    FORMAT,
    INDEX,
    VERSION,
    Columns,
    Feature,
    content_digest,
    damaged,
    shard_tables,
    tables_digest,
)


class Dataset:
    """A dataset folder open for reading: `path`, `features`, `provenance` (dict), `splits` (names), `digest`.

    Opening finds every shard with its recorded size. A shard's tables are checked when it is first touched,
    a client's checksums when the client is. Raises UserError naming the file. Files stay open until `close`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Read the index's header; the tables of clients are read when asked for."""
        self.path = Path(path).absolute()
        try:
            found = (self.path / INDEX).is_file()
        except PermissionError:
            raise UserError(f"{path} cannot be read: no permission to enter this folder; ask its owner") from None
        if not found:
            what = f"the folder has no {INDEX}" if self.path.is_dir() else "there is no such folder"
            raise UserError(f"{path} is not a dataset: {what}; see `python -m data_prep --help`")
        self._index = _open(self.path / INDEX)
        with _reading(self._index, self.path / INDEX):
            self._read_header()

    def _read_header(self) -> None:
        header = {name: _plain(value) for name, value in self._index.attrs.items()}
        found = f"{header.get('format')} {header.get('version')}"
        if found != f"{FORMAT} {VERSION}":
            raise UserError(f"{self.path} is {found}, not {FORMAT} {VERSION}; update mpifl or convert again")
        groups, features = self._index["splits"], _text(self._index["features"])
        self.digest, self.splits = str(header["digest"]), tuple(groups)
        digests = {name: json.loads(_text(groups[name]["digests"])) for name in self.splits}
        if content_digest(features, digests) != self.digest:
            raise damaged(self.path / INDEX, "its features or digests are not those that it was written with")
        self.features = {name: Feature(**spec) for name, spec in json.loads(features).items()}
        self.provenance = json.loads(_text(self._index["provenance"]))
        self._splits = {name: _Split(self.path, groups[name], digests[name], self.features) for name in self.splits}

    @property
    def clients(self) -> int:
        """Number of clients of split "train"."""
        return self._split("train").first[-1]

    def sizes(self, split: str) -> np.ndarray:
        """Rows of each client, (C,) int64, read-only; touches no shard."""
        return self._split(split).sizes

    def ids(self, split: str) -> np.ndarray:
        """Ids of all clients, (C,) bytes in UTF-8."""
        return self._split(split).checked("ids")

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
        return mine.digests["ids"] == self._split("train").digests["ids"]

    def total(self, split: str) -> int:
        """Number of rows of the split."""
        return self._split(split).bounds[-1]

    def shards(self, split: str) -> list[tuple[Path, range]]:
        """Files of the split and the clients in each."""
        table = self._split(split)
        paths = [self.path / shard["file"] for shard in table.shards]
        return [(path, range(*borders)) for path, *borders in zip(paths, table.first, table.first[1:])]

    def client(self, split: str, index: int) -> Columns:
        """Columns of one client, (n, *shape) each, on 64-byte lines."""
        table = self._split(split)
        if not 0 <= index < table.first[-1]:
            raise IndexError(f"split '{split}' has clients 0 to {table.first[-1] - 1}, not {index}")
        number = bisect_right(table.first, index) - 1
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

    def check(self, split: str, number: int) -> None:
        """Raise UserError unless the tables of this shard of the split are those that the index was written with."""
        self._split(split).shard(number)

    def recomputed_digest(self) -> str:
        """What `digest` must be, computed from the tables of index and shards; reads no column."""
        splits = {name: split.recomputed_digests() for name, split in self._splits.items()}
        return content_digest(_text(self._index["features"]), splits)

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

    def __init__(self, folder: Path, group: h5py.Group, digests: dict[str, Any], features: dict[str, Feature]) -> None:
        self.folder, self.features, self.group, self.digests = folder, features, group, digests
        self.name = group.name.rpartition("/")[2]
        self.central, self.shards = digests["central"], json.loads(_text(group["shards"]))
        self.first = [*(shard["first"] for shard in self.shards), len(group["sizes"])]
        if self.first[0] != 0 or any(last <= first for first, last in pairwise(self.first)):
            raise damaged(folder / INDEX, f"shards of split '{self.name}' do not follow one another")
        self.opened: dict[int, _Shard] = {}
        self.opening = Lock()
        for shard in self.shards:
            path = folder / shard["file"]
            found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
            if found != f"{shard['bytes']} bytes":
                raise damaged(path, f"this shard is {found}, it was written with {shard['bytes']} bytes")

    @cached_property
    def sizes(self) -> np.ndarray:
        sizes = self.checked("sizes")
        sizes.flags.writeable = False
        return sizes

    @cached_property
    def bounds(self) -> list[int]:
        """First row of each shard, then the number of rows."""
        return np.cumsum([0, *np.add.reduceat(self.sizes, self.first[:-1])]).tolist()

    def checked(self, table: str) -> np.ndarray:
        """Table "sizes" or "ids" of all clients, if it is the one that the index was written with."""
        with _blaming(self.folder / INDEX):
            values = self.group[table][:]
        if values.ndim != 1 or (table == "sizes" and values.dtype != np.int64):
            found = f"{values.dtype} {values.shape}"
            raise damaged(self.folder / INDEX, f"its {table} of split '{self.name}' are {found}")
        if self.digests[table] not in ("", tables_digest([values])):
            raise damaged(self.folder / INDEX, f"its {table} of split '{self.name}' are not those it was written with")
        return values

    def client_id(self, index: int) -> str:
        with _blaming(self.folder / INDEX):
            return self.group["ids"][index].decode()

    def shard(self, number: int) -> _Shard:
        if number not in self.opened:
            with self.opening:  # a thread that prefetches reads too
                if number not in self.opened:
                    self.opened[number] = _Shard(self, number)
        return self.opened[number]

    def recomputed_digests(self) -> dict[str, Any]:
        shards = [self.shard(number).columns for number in range(len(self.shards))]
        crc32 = {name: tables_digest(shard[name].all_crc32() for shard in shards) for name in self.features}
        sizes, ids = tables_digest([self.sizes]), "" if self.central else tables_digest([self.checked("ids")])
        return {"central": self.central, "sizes": sizes, "ids": ids, "crc32": crc32}


class _Shard:
    """One open shard: its offsets in memory, its columns on disk."""

    def __init__(self, split: _Split, number: int) -> None:
        self.path, self.first = split.folder / split.shards[number]["file"], split.first[number]
        self.split, self.file = split, _open(self.path)
        with _reading(self.file, self.path):
            self.offsets = self.file["offsets"][:]
            check_offsets(self.path, "offsets", self.offsets)
            self.columns = {
                name: Column(self.file, name, feature, self.offsets, self.path)
                for name, feature in split.features.items()
            }
            self._check(split.shards[number]["digest"], slice(*split.first[number : number + 2]))
        self.verified = np.zeros(len(self.offsets) - 1, bool)

    def _check(self, digest: str, clients: slice) -> None:
        if not np.array_equal(np.diff(self.offsets), self.split.sizes[clients]):
            raise damaged(self.path, "offsets do not give the sizes of clients that the index has")
        with _blaming(self.split.folder / INDEX):
            ids = self.split.group["ids"]
        if not _equal(self.file["ids"], ids, clients):
            raise damaged(self.path, "its clients are not those that the index has")
        for column in self.columns.values():
            column.check()
        if tables_digest(shard_tables(self.file, self.split.features)) != digest:
            raise damaged(self.path, "its tables are not those that the index was written with")

    def client(self, position: int) -> Columns:
        start, stop = self.offsets[position : position + 2].tolist()
        return self._read(position, position + 1, start, stop)

    def rows(self, start: int, stop: int) -> Columns:
        first = int(np.searchsorted(self.offsets, start, "right")) - 1
        last = int(np.searchsorted(self.offsets, stop, "left"))
        return self._read(first, last, start, stop)

    def _read(self, first: int, last: int, start: int, stop: int) -> Columns:
        """Rows [start, stop), which clients [first, last) of the shard own; checked if any of them is new."""
        if self.verified[first] if last == first + 1 else self.verified[first:last].all():
            return {name: column.rows(first, last, start, stop) for name, column in self.columns.items()}
        rows = {}
        for name, column in self.columns.items():
            rows[name], wrong = column.checked_rows(first, last, start, stop)
            if wrong is not None:
                owner = self.split.client_id(self.first + wrong)
                raise damaged(self.path, f"column '{name}' of client {owner!r} does not match its checksum")
        self.verified[first:last] = True
        return rows


def embedded(name: str) -> Path:
    """Folder of a dataset shipped inside the package."""
    here = Path(__file__).parent
    return here / choice(name, (index.parent.name for index in here.glob(f"*/{INDEX}")), "embedded dataset")


@contextmanager
def _reading(file: h5py.File, path: Path) -> Iterator[None]:
    """Close the file if a table is not what it should be; UserError naming it."""
    try:
        with _blaming(path):
            yield
    except UserError:
        file.close()
        raise


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Raise UserError naming the file for whatever h5py, NumPy or Python says of a table in it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = str(error) or type(error).__name__
        raise damaged(path, f"a table is missing or cannot be read ({said})") from None


def _equal(table: h5py.Dataset, other: h5py.Dataset, part: slice, at_once: int = 1 << 16) -> bool:
    """Whether a table is that part of another one, of which only so much is in memory at a time."""
    borders, first = [*range(part.start, part.stop, at_once), part.stop], part.start
    same = (np.array_equal(table[start - first : stop - first], other[start:stop]) for start, stop in pairwise(borders))
    return len(table) == part.stop - first and all(same)


def _plain(attribute: Any) -> Any:
    """An attribute's value; of a text of fixed length, as it is written, the text."""
    return attribute.decode(errors="replace") if isinstance(attribute, bytes) else attribute


def _text(dataset: h5py.Dataset) -> str:
    return dataset.asstr()[()]


def _open(path: Path) -> h5py.File:
    # A finished dataset never changes and needs no lock, which read-only or parallel file systems may refuse.
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error})") from None
