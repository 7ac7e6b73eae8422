"""What a host reads: clients and blocks of the dataset, kept in memory when all of it fits, fetched ahead when not."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from mpifl.data.batches import Columns, as_columns
from mpifl.work import Batching

Key = tuple[str, str, int, int]
"""Whose rows, which split, which id, rows of a block."""

OBJECT_BYTES = 1 << 10
"""What holding a column of an id costs beside its rows: measured 1.1 kB, array, tensor and entries of dicts."""


class Source:
    """Reads the rows behind an id of a Batching, and fetches those of coming visits in a thread of its own.

    budget: bytes. A split that fits in what is left of it stays resident, on `device`, once read: as stored, so that a
    uint8 is one byte there too. Of a larger split nothing is kept but what was fetched ahead, at most `budget`.
    """

    def __init__(self, dataset: Any, budget: int, device: torch.device) -> None:
        self.dataset, self.budget, self.device = dataset, budget, device
        self.row_bytes = sum(
            np.dtype(feature.dtype).itemsize * int(np.prod(feature.shape)) for feature in dataset.features.values()
        )
        self._resident: dict[Key, Columns] = {}
        self._reserved: dict[tuple[str, str, int], bool] = {}
        self._left = budget
        self._ahead: dict[Key, Future[dict[str, np.ndarray]]] = {}
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
        fetched = self._ahead.pop(key, None)
        arrays = self._read(key) if fetched is None or fetched.cancel() else fetched.result()
        columns = as_columns(arrays, self.device)
        if self._stays(batching):
            self._resident[key] = columns
        return columns

    def prefetch(self, batching: Batching, ids: np.ndarray) -> None:
        """Begin to read what is behind these ids, in this order; what was fetched for others is dropped."""
        wanted = {_key(batching, id): id for id in ids.tolist()}
        for key in [key for key in self._ahead if key not in wanted]:
            self._ahead.pop(key).cancel()
        room, examples = self.budget, self.examples(batching) if wanted else ()
        for key, id in wanted.items():
            room -= self._bytes(int(examples[id]), 1)
            if room < 0:
                return
            if key not in self._resident and key not in self._ahead:
                self._ahead[key] = self._thread.submit(self._read, key)

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

    def _stays(self, batching: Batching) -> bool:
        """Whether what is read this way stays resident; decided at first touch."""
        kind = (batching.of, batching.split, batching.size if batching.of == "block" else 0)
        if kind not in self._reserved:
            needed = self._bytes(self.dataset.total(batching.split), len(self.examples(batching)))
            self._reserved[kind] = needed <= self._left
            self._left -= needed if self._reserved[kind] else 0
        return self._reserved[kind]

    def _bytes(self, rows: int, ids: int) -> int:
        """What holding the rows of so many ids takes."""
        return rows * self.row_bytes + ids * len(self.dataset.features) * OBJECT_BYTES


def _key(batching: Batching, id: int) -> Key:
    of = batching.of
    return of, batching.split, 0 if of == "all" else id, batching.size if of == "block" else 0
