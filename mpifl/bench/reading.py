"""Ways to read the clients of a cohort: Dataset's own, h5py's, numpy.memmap's, and the bare system call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import h5py
import numpy as np

from mpifl.data.shard import Dataset

Read = Callable[[], list[np.ndarray]]
"""Reads all columns of all clients of a cohort: client by client, the columns in order of name."""

Part = tuple[h5py.Dataset, int, int]
"""A column of a shard, and a client's rows [start, stop) in it."""


@contextmanager
def ways_to_read(path: Path, ids: Sequence[int], first_touches: int) -> Iterator[dict[str, Read]]:
    """By name, ways to read clients `ids`, ascending, of split "train"; "first touch" can be used so many times.

    raw: one os.preadv for each column of each client into memory of its own from np.empty, the places in the files
    known beforehand. raw, one buffer: into the same memory again and again, which is all that is returned. memmap:
    a copy of that part of numpy.memmap at the column's place in the file. h5py: column[start:stop]. first touch:
    Dataset.client where it compares checksums; verified: where it did so before. A compressed column has no place
    in its file, hence neither raw nor memmap.
    """
    with ExitStack() as closing:

        def opened() -> Dataset:
            dataset = Dataset(path)
            closing.callback(dataset.close)
            for number in range(len(dataset.shards("train"))):
                dataset.check("train", number)
            return dataset

        fresh, known = [opened() for _ in range(first_touches)], opened()
        _clients(known, ids)
        parts = _parts(known, ids, closing)
        ways: dict[str, Read] = {}
        if all(column.chunks is None for column, _, _ in parts):
            places = [_place(*part) for part in parts]
            buffer = memoryview(bytearray(max(size for _, _, size in places)))
            mapped = _mapped(parts)
            ways["raw"] = lambda: _raw(places)
            ways["raw, one buffer"] = lambda: _raw_again(places, buffer)
            ways["memmap"] = lambda: [np.array(column[start:stop]) for column, start, stop in mapped]
        ways["h5py"] = lambda: [column[start:stop] for column, start, stop in parts]
        ways["first touch"] = lambda: _clients(fresh.pop(), ids)
        ways["verified"] = lambda: _clients(known, ids)
        yield ways


def _clients(dataset: Dataset, ids: Sequence[int]) -> list[np.ndarray]:
    return [column for id in ids for column in dataset.client("train", id).values()]


def _raw(places: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
    arrays = []
    for file, first, size in places:
        array = np.empty(size, np.uint8)
        os.preadv(file, [array], first)
        arrays.append(array)
    return arrays


def _raw_again(places: Sequence[tuple[int, int, int]], buffer: memoryview) -> list[np.ndarray]:
    for file, first, size in places:
        os.preadv(file, [buffer[:size]], first)
    return [np.frombuffer(buffer, np.uint8)]


def _parts(dataset: Dataset, ids: Sequence[int], closing: ExitStack) -> list[Part]:
    """What holds the columns of these clients, found without Dataset's help but for the files."""
    parts = []
    for path, clients in dataset.shards("train"):
        file = closing.enter_context(h5py.File(path, "r", locking=False))
        offsets, columns = file["offsets"][:], [file[name] for name in sorted(dataset.features)]
        for position in (id - clients.start for id in ids if id in clients):
            parts += [(column, *offsets[position : position + 2].tolist()) for column in columns]
    return parts


def _place(column: h5py.Dataset, start: int, stop: int) -> tuple[int, int, int]:
    """File descriptor, first byte and number of bytes."""
    row = column.dtype.itemsize * int(np.prod(column.shape[1:]))
    return column.file.id.get_vfd_handle(), column.id.get_offset() + start * row, (stop - start) * row


def _mapped(parts: Sequence[Part]) -> list[tuple[np.memmap, int, int]]:
    maps: dict[h5py.Dataset, np.memmap] = {}
    for column, _, _ in parts:
        if column not in maps:
            place = {"offset": column.id.get_offset(), "shape": column.shape}
            maps[column] = np.memmap(column.file.filename, column.dtype, "r", **place)
    return [(maps[column], start, stop) for column, start, stop in parts]
