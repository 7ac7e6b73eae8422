"""Client memory: one row per visited client, kept on the rank that hosts it.

A visit *stages* a row; it becomes current when the round was accepted. A repeated ask, an excluded client or
a checkpoint therefore never sees half a round.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mpifl.tree import Layout, Tree, leaves, unflatten

_CHUNK_BYTES = 64 << 20


class ClientMemory:
    """Rows of one fixed layout, in chunks that go to mapped temporary files beyond `budget` bytes.

    blank: the memory of a client before its first visit; {} when the algorithm keeps none.
    """

    def __init__(self, blank: Tree, budget: int = 4 << 30) -> None:
        self.layout = Layout.of(blank)
        self.blank = self.layout.pack(blank, self.layout.empty())
        self.budget = budget
        self._rows_per_chunk = max(1, min(256, _CHUNK_BYTES // max(1, self.layout.bytes)))
        self._chunks: list[Tensor] = []
        self._files: list[tempfile._TemporaryFileWrapper] = []
        self._slots: dict[int, int] = {}
        self._visits: dict[int, int] = {}
        self._staged: dict[int, Tensor] = {}

    @property
    def kept(self) -> bool:
        """Whether clients keep anything at all."""
        return self.layout.bytes > 0

    @property
    def bytes(self) -> int:
        """Bytes of all chunks, in memory or mapped."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def visits(self, client: int) -> int:
        """How often the client's memory was written: 0 before its first accepted visit."""
        return self._visits.get(client, 0)

    def read(self, clients: Sequence[int]) -> Tree:
        """Return current rows as a tree with a leading axis (K, ...); a copy, blank where never visited."""
        rows = torch.empty((len(clients), self.layout.bytes), dtype=torch.uint8)
        for row, client in zip(rows, clients):
            slot = self._slots.get(client)
            row.copy_(self.blank if slot is None else self._row(slot))
        named = {
            leaf.name: rows[:, leaf.start : leaf.start + leaf.bytes]
            .contiguous()
            .view(leaf.dtype)
            .view(len(clients), *leaf.shape)
            for leaf in self.layout.leaves
        }
        return unflatten(named)

    def stage(self, client: int, memory: Tree) -> None:
        """Keep what a visit returned until `commit` or `discard`; staging again replaces it."""
        self._staged[client] = self.layout.pack(memory, self.layout.empty())

    def commit(self) -> None:
        """Make staged rows current."""
        for client, row in self._staged.items():
            self._row(self._slot(client)).copy_(row)
            self._visits[client] = self._visits.get(client, 0) + 1
        self._staged.clear()

    def discard(self) -> None:
        """Forget staged rows: the round was not accepted."""
        self._staged.clear()

    def write(self, clients: Sequence[int], rows: Tree, visits: Sequence[int]) -> None:
        """Put rows with a leading axis (K, ...) in place directly: from a checkpoint or another rank."""
        for k, client in enumerate(clients):
            row = unflatten({name: value[k] for name, value in leaves(rows)})
            self.layout.pack(row, self._row(self._slot(client)))
            self._visits[client] = visits[k]

    def snapshot(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (client, visits, packed row) of each current row in client order, staged ones left out."""
        for client in sorted(self._slots):
            yield client, self._visits[client], self._row(self._slots[client])

    def digests(self) -> list[tuple[int, bytes]]:
        """Return (client, sha256 of visits and row) in client order."""
        return [
            (client, hashlib.sha256(visits.to_bytes(8, "little") + row.numpy().tobytes()).digest())
            for client, visits, row in self.snapshot()
        ]

    def _slot(self, client: int) -> int:
        slot = self._slots.setdefault(client, len(self._slots))
        if slot == len(self._chunks) * self._rows_per_chunk:
            self._chunks.append(self._new_chunk())
        return slot

    def _row(self, slot: int) -> Tensor:
        return self._chunks[slot // self._rows_per_chunk][slot % self._rows_per_chunk]

    def _new_chunk(self) -> Tensor:
        shape = (self._rows_per_chunk, self.layout.bytes)
        if self.bytes + shape[0] * shape[1] <= self.budget:
            return torch.zeros(shape, dtype=torch.uint8)
        file = tempfile.NamedTemporaryFile(prefix="mpifl-memory-")  # noqa: SIM115 - lives as long as the store
        self._files.append(file)
        return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="w+", shape=shape))
