"""What a host reads: clients and blocks of the dataset, kept in memory when all of it fits, fetched ahead when not."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from mpifl.config import UserError
from mpifl.data.batches import Columns, as_columns, blank_columns
from mpifl.data.format import wrong_value
from mpifl.work import Batching

CPU = torch.device("cpu")
Key = tuple[str, str, int, int]
"""Whose rows, which split, which id, rows of a block."""

Kind = tuple[str, str, int]
"""Whose rows, which split, rows of a block."""

OBJECT_BYTES = 1 << 10
"""What a fetched column of an id costs beside its rows: measured 1.1 kB, array, tensor and entries of dicts."""
INDEX_BYTES = 9
"""What an id of a resident split costs beside its rows: where they start, and whether they are there."""


class Resident:
    """A split that stays: each column one tensor, of which only what was read takes memory on a CPU.

    No objects are kept for each id: they would lie between the large tensors that training frees, and tear the
    memory that is free into pieces too small for the next ones. rows: of each id, (ids,) int64.
    """

    def __init__(self, rows: np.ndarray, features: dict[str, Any], device: torch.device) -> None:
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        self._there = np.zeros(len(rows), dtype=bool)
        total, one = int(self._starts[-1]), blank_columns(features, rows=1)
        self._columns = {
            name: torch.empty((total, *c.shape[1:]), dtype=c.dtype, device=device) for name, c in one.items()
        }

    def has(self, id: int) -> bool:
        """Whether the rows of `id` were put here."""
        return bool(self._there[id])

    def put(self, id: int, columns: Columns) -> None:
        """Keep the rows of `id`."""
        for name, kept in self.rows(id).items():
            kept.copy_(columns[name])
        self._there[id] = True

    def rows(self, id: int) -> Columns:
        """The rows of `id`: views."""
        start, stop = int(self._starts[id]), int(self._starts[id + 1])
        return {name: column[start:stop] for name, column in self._columns.items()}


class Source:
    """Reads the rows behind an id of a Batching, and fetches those of coming visits in a thread of its own.

    budget: bytes. A split that fits in what is left of it stays resident, on `device`, once read: as stored, so that a
    uint8 is one byte there too. Of a larger split nothing is kept but what was fetched ahead, in what is left.
    """

    def __init__(self, dataset: Any, budget: int, device: torch.device) -> None:
        self.dataset, self.budget, self.device = dataset, budget, device
        self.row_bytes = sum(column.nbytes for column in blank_columns(dataset.features, rows=1).values())
        self._resident: dict[Kind, Resident | None] = {}
        self._left = budget
        self._coming: OrderedDict[Key, int] = OrderedDict()
        self._ahead: dict[Key, tuple[Future[dict[str, np.ndarray]], int]] = {}
        self._ahead_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def examples(self, batching: Batching) -> np.ndarray:
        """Number of examples behind each id that may be asked with this Batching, (ids,) int64."""
        if batching.of == "client":
            return self.dataset.sizes(batching.split)
        total = self.dataset.total(batching.split)
        if batching.of == "all":
            return np.asarray([total], dtype=np.int64)
        starts = np.arange(0, total, batching.size)
        return np.minimum(batching.size, total - starts)

    def columns(self, batching: Batching, id: int) -> Columns:
        """Find resident, await or read the rows behind `id`."""
        key, resident = _key(batching, id), self.resident(batching)
        id = key[2]
        if resident and resident.has(id):
            return resident.rows(id)
        self._coming.pop(key, None)
        fetched = self._take(key)
        if 2 * self._ahead_bytes <= self._left:  # many at a time: waking the thread costs more than a small client
            self._fetch_on()
        arrays = self._read(key) if fetched is None or fetched.cancel() else fetched.result()
        if resident is None:
            return as_columns(arrays, self.device)
        resident.put(id, as_columns(arrays, CPU))
        return resident.rows(id)

    def prefetch(self, batching: Batching, ids: np.ndarray) -> None:
        """Read what is behind these ids in this order, as room comes free; what was fetched for others is dropped."""
        resident, rows = self.resident(batching), self.examples(batching)[ids]
        sizes = [0 if resident else self.bytes_of(n, 1) for n in rows.tolist()]  # what stays has its place already
        coming = [(_key(batching, id), size) for id, size in zip(ids.tolist(), sizes)]
        self._coming = OrderedDict((key, size) for key, size in coming if not (resident and resident.has(key[2])))
        for key in self._ahead.keys() - self._coming.keys():
            self._take(key).cancel()
        self._fetch_on()

    def _fetch_on(self) -> None:
        """Give the thread those to read next that there is room for."""
        while self._coming:
            key, size = next(iter(self._coming.items()))
            if key not in self._ahead:
                if self._ahead_bytes + size > self._left:
                    return
                self._ahead[key] = self._thread.submit(self._read, key), size
                self._ahead_bytes += size
            del self._coming[key]

    def _take(self, key: Key) -> Future[dict[str, np.ndarray]] | None:
        fetched, size = self._ahead.pop(key, (None, 0))
        self._ahead_bytes -= size
        return fetched

    def resident(self, batching: Batching) -> Resident | None:
        """Where what is read this way stays, None if it does not; decided when first asked, which takes its place."""
        kind = (batching.of, batching.split, batching.size if batching.of == "block" else 0)
        if kind not in self._resident:
            rows = self.examples(batching)
            needed = self.kept_bytes(int(rows.sum()), len(rows))
            fits = needed <= self._left
            self._left -= needed if fits else 0
            self._resident[kind] = Resident(rows, self.dataset.features, self.device) if fits else None
        return self._resident[kind]

    def kept_bytes(self, rows: int, ids: int) -> int:
        """What rows of so many ids take in a split that stays."""
        return rows * self.row_bytes + ids * INDEX_BYTES

    def bytes_of(self, rows: int, ids: int) -> int:
        """What holding the fetched rows of so many ids takes."""
        return rows * self.row_bytes + ids * len(self.dataset.features) * OBJECT_BYTES

    def close(self) -> None:
        """End the thread; to be called before the dataset is closed."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, key: Key) -> dict[str, np.ndarray]:
        of, split, id, size = key
        if of == "client":
            read, start = self.dataset.client(split, id), 0
        else:
            total = self.dataset.total(split)
            start, stop = (0, total) if of == "all" else (id * size, min((id + 1) * size, total))
            read = self.dataset.rows(split, start, stop)
        for name, rows in read.items():
            feature = self.dataset.features[name]
            # Labels out of range crash what indexes by them; a number that is not finite is its client's failure.
            if feature.classes and (wrong := wrong_value(rows, feature)):
                whose = f", client {self.dataset.client_id(split, id)!r}" if of == "client" else ""
                raise UserError(f"split '{split}'{whose}, column '{name}': row {start + wrong[0]} {wrong[1]}")
        return read


def _key(batching: Batching, id: int) -> Key:
    of = batching.of
    return of, batching.split, 0 if of == "all" else id, batching.size if of == "block" else 0
