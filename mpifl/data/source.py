"""What a host reads: clients and blocks of the dataset, kept in memory when all of it fits, fetched ahead when not."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from mpifl.data.batches import Columns, as_columns, blank_columns
from mpifl.work import Batching

Key = tuple[str, str, int, int]
"""Whose rows, which split, which id, rows of a block."""

OBJECT_BYTES = 1 << 10
"""What holding a column of an id costs beside its rows: measured 1.1 kB, array, tensor and entries of dicts."""


class Source:
    """Reads the rows behind an id of a Batching, and fetches those of coming visits in a thread of its own.

    budget: bytes. A split that fits in what is left of it stays resident, on `device`, once read: as stored, so that a
    uint8 is one byte there too. Of a larger split nothing is kept but what was fetched ahead, in what is left.
    """

    def __init__(self, dataset: Any, budget: int, device: torch.device) -> None:
        self.dataset, self.budget, self.device = dataset, budget, device
        self.row_bytes = sum(column.nbytes for column in blank_columns(dataset.features, rows=1).values())
        self._resident: dict[Key, Columns] = {}
        self._reserved: dict[tuple[str, str, int], bool] = {}
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
        key = _key(batching, id)
        found = self._resident.get(key)
        if found is not None:
            return found
        self._coming.pop(key, None)
        fetched = self._take(key)
        if 2 * self._ahead_bytes <= self._left:  # many at a time: waking the thread costs more than a small client
            self._fetch_on()
        arrays = self._read(key) if fetched is None or fetched.cancel() else fetched.result()
        columns = as_columns(arrays, self.device)
        if self.stays(batching):
            self._resident[key] = columns
        return columns

    def prefetch(self, batching: Batching, ids: np.ndarray) -> None:
        """Read what is behind these ids in this order, as room comes free; what was fetched for others is dropped."""
        stays, rows = self.stays(batching), self.examples(batching)[ids]
        sizes = [0 if stays else self.bytes_of(n, 1) for n in rows.tolist()]  # what stays has its place already
        self._coming = OrderedDict((_key(batching, id), size) for id, size in zip(ids.tolist(), sizes))
        for key in self._ahead.keys() - self._coming.keys():
            self._take(key).cancel()
        self._fetch_on()

    def _fetch_on(self) -> None:
        """Give the thread those to read next that there is room for."""
        while self._coming:
            key, size = next(iter(self._coming.items()))
            if key not in self._resident and key not in self._ahead:
                if self._ahead_bytes + size > self._left:
                    return
                self._ahead[key] = self._thread.submit(self._read, key), size
                self._ahead_bytes += size
            del self._coming[key]

    def _take(self, key: Key) -> Future[dict[str, np.ndarray]] | None:
        fetched, size = self._ahead.pop(key, (None, 0))
        self._ahead_bytes -= size
        return fetched

    def stays(self, batching: Batching) -> bool:
        """Whether what is read this way stays resident; decided when first asked, which reserves its place."""
        kind = (batching.of, batching.split, batching.size if batching.of == "block" else 0)
        if kind not in self._reserved:
            needed = self.bytes_of(self.dataset.total(batching.split), len(self.examples(batching)))
            self._reserved[kind] = needed <= self._left
            self._left -= needed if self._reserved[kind] else 0
        return self._reserved[kind]

    def bytes_of(self, rows: int, ids: int) -> int:
        """What holding the rows of so many ids takes."""
        return rows * self.row_bytes + ids * len(self.dataset.features) * OBJECT_BYTES

    def close(self) -> None:
        """End the thread; to be called before the dataset is closed."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, key: Key) -> dict[str, np.ndarray]:
        of, split, id, size = key
        if of == "client":
            return self.dataset.client(split, id)
        total = self.dataset.total(split)
        start, stop = (0, total) if of == "all" else (id * size, min((id + 1) * size, total))
        return self.dataset.rows(split, start, stop)


def _key(batching: Batching, id: int) -> Key:
    of = batching.of
    return of, batching.split, 0 if of == "all" else id, batching.size if of == "block" else 0
