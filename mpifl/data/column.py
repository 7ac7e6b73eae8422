"""One column of a shard on disk: ranges of rows, read around HDF5 where that is possible, sequences padded."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import h5py
import numpy as np

from mpifl.config import UserError
from mpifl.data.format import Feature, aligned_empty, damaged, padded

PLUGINS = ("zstd", "blosc")
"""Compressions that need the package hdf5plugin, to write and to read."""

Stored = tuple[np.ndarray, np.ndarray | None]
"""What is on disk of some rows: values, and the lengths of sequences."""


def load_plugins() -> None:
    """Make HDF5 know zstd and blosc; UserError if hdf5plugin is not installed."""
    try:
        import hdf5plugin  # noqa: F401 - importing is registering
    except ImportError:
        message = f"compressions {', '.join(PLUGINS)} need the package hdf5plugin, which is missing"
        raise UserError(f'{message}: pip install -e ".[prep]"') from None


class Values:
    """A dataset of a shard, read in ranges of its first axis: around HDF5 where the bytes lie as they are in memory."""

    def __init__(self, dataset: h5py.Dataset, file: int, path: Path) -> None:
        filters = dataset.id.get_create_plist()
        if not all(h5py.h5z.filter_avail(filters.get_filter(i)[0]) for i in range(filters.get_nfilters())):
            load_plugins()
        self.dataset, self.file, self.path = dataset, file, path
        self.shape, self.dtype = dataset.shape, dataset.dtype
        self.start = dataset.id.get_offset() if dataset.chunks is None else None
        self.row_shape, self.row_bytes = self.shape[1:], int(np.prod(self.shape[1:])) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), in memory of their own on 64-byte lines; UserError if the file does not give them."""
        rows = aligned_empty((stop - start, *self.row_shape), self.dtype)
        if self.start is None:
            self._read_through_hdf5(rows, start, stop)
        else:
            first = self.start + start * self.row_bytes
            try:
                done = os.preadv(self.file, [rows], first)
                if done < rows.nbytes:  # one call reads at most 2 GiB
                    self._read_on(memoryview(rows).cast("B"), first, done)
            except OSError as error:
                raise damaged(self.path, f"rows of '{self.dataset.name[1:]}' cannot be read ({error})") from None
        return rows

    def _read_on(self, buffer: memoryview, first: int, done: int) -> None:
        while done < len(buffer):
            count = os.preadv(self.file, [buffer[done:]], first + done)
            if not count:
                raise damaged(self.path, "it ends before its last row")
            done += count

    def _read_through_hdf5(self, rows: np.ndarray, start: int, stop: int) -> None:
        try:
            if len(rows):
                self.dataset.read_direct(rows, np.s_[start:stop])
        except OSError as error:
            name = self.dataset.name[1:]
            raise damaged(self.path, f"rows {start} to {stop} of '{name}' cannot be unpacked ({error})") from None


class Column:
    """A column of a shard: rows, or for sequences the items of all rows, with a length each.

    Raises KeyError or TypeError if the file lacks its tables.
    """

    def __init__(self, file: h5py.File, name: str, feature: Feature, offsets: np.ndarray, path: Path) -> None:
        handle = file.id.get_vfd_handle()
        self.name, self.feature, self.offsets, self.path = name, feature, offsets, path
        self.values = Values(file[name], handle, path)
        self.crc32 = Values(file[f"crc32/{name}"], handle, path)
        self.lengths = self.items = None
        if feature.pad is not None:
            self.lengths = Values(file[f"lengths/{name}"], handle, path)
            self.items = file[f"items/{name}"][:]

    def check(self) -> None:
        """Raise UserError unless dtypes and shapes are those of the rows and clients that the offsets tell of."""
        rows, clients = int(self.offsets[-1]), len(self.offsets) - 1
        shape = (rows, *self.feature.shape)
        if self.lengths is not None:
            check_offsets(self.path, f"items/{self.name}", self.items)
            shape = (int(self.items[-1]), *self.feature.shape[1:])
            if len(self.items) != clients + 1 or self.lengths.shape != (rows,) or self.lengths.dtype.kind != "u":
                found = f"{len(self.items) - 1} and {self.lengths.shape} {self.lengths.dtype}"
                problem = f"items and lengths of '{self.name}' are for {found}, not {clients} and {rows}"
                raise damaged(self.path, problem)
        if self.crc32.shape != (clients,) or self.crc32.dtype != np.uint32:
            found = f"{self.crc32.dtype} {self.crc32.shape}"
            raise damaged(self.path, f"it has {found} checksums of '{self.name}' for {clients} clients")
        if self.values.shape != shape or self.values.dtype != self.feature.dtype:
            found = f"{self.values.dtype} {self.values.shape}, not {self.feature.dtype} {shape}"
            raise damaged(self.path, f"column '{self.name}' is {found}")

    def rows(self, first: int, last: int, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of clients [first, last)."""
        if self.lengths is None:
            return self.values.read(start, stop)
        return self._dense(self._stored(first, last), first, start, stop)

    def checked_rows(self, first: int, last: int, start: int, stop: int) -> tuple[np.ndarray, int | None]:
        """Rows as `rows` gives them, and the first client whose checksum does not match, if any."""
        stored, crc32 = self._stored(first, last), self.crc32.read(first, last)
        for client in range(first, last):
            if self._crc32(stored, first, client) != crc32[client - first]:
                return np.empty(0), client
        return self._dense(stored, first, start, stop), None

    def all_crc32(self) -> np.ndarray:
        """Checksums of all clients of the shard, (c,) uint32."""
        return self.crc32.read(0, len(self.offsets) - 1)

    def _stored(self, first: int, last: int) -> Stored:
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        if self.lengths is None:
            return self.values.read(start, stop), None
        return self.values.read(int(self.items[first]), int(self.items[last])), self.lengths.read(start, stop)

    def _crc32(self, stored: Stored, first: int, client: int) -> int:
        """Checksum of one client, from what is stored of client `first` and those after it."""
        values, lengths = stored
        offsets, items = self.offsets, self.items
        start, stop = offsets[client] - offsets[first], offsets[client + 1] - offsets[first]
        if lengths is None:
            return zlib.crc32(values[start:stop])
        values = values[items[client] - items[first] : items[client + 1] - items[first]]
        return zlib.crc32(values, zlib.crc32(lengths[start:stop]))

    def _dense(self, stored: Stored, first: int, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), padded where they are sequences, from what is stored of client `first` and after it."""
        values, lengths = stored
        start, stop = start - int(self.offsets[first]), stop - int(self.offsets[first])
        if lengths is None:
            return values if (start, stop) == (0, len(values)) else values[start:stop].copy()
        longest = int(lengths.max(initial=0))
        if longest > self.feature.shape[0] or int(lengths.sum(dtype=np.int64)) != len(values):
            raise damaged(self.path, f"lengths of '{self.name}' are not those of its sequences")
        return padded(values, lengths, self.feature)[start:stop]


def check_offsets(path: Path, name: str, offsets: np.ndarray) -> None:
    """Raise UserError unless offsets are integers that start at 0 and never decrease."""
    # h5py clips slices and answers reversed ones with empty arrays: nothing later would notice.
    whole = offsets.ndim == 1 and offsets.dtype == np.int64
    if not whole or not len(offsets) or offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
        raise damaged(path, f"{name} must start at 0 and never decrease")
