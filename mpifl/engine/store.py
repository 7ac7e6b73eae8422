"""Client memory: one row per visited client, kept on the rank that hosts it.

A visit *stages* a row; it becomes current when the round was accepted. A repeated ask, an excluded client or
a checkpoint therefore never sees half a round.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpifl.tree import Layout, Tree, unflatten

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
        self.bytes = 0
        """Bytes of all chunks, in memory or mapped."""
        self._slots: dict[int, int] = {}
        self._visits: dict[int, int] = {}
        self._staged: dict[int, int] = {}
        self._free: list[int] = []
        self._frozen = False
        self._replaced: list[int] = []

    @property
    def kept(self) -> bool:
        """Whether clients keep anything at all."""
        return self.layout.bytes > 0

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
        if client not in self._staged:
            self._staged[client] = self._take()
        self.layout.pack(memory, self._row(self._staged[client]))

    def unstage(self, client: int) -> None:
        """Forget the client's staged row, if it has one."""
        if client in self._staged:
            self._free.append(self._staged.pop(client))

    def commit(self) -> None:
        """Make staged rows current."""
        for client, slot in self._staged.items():
            if client in self._slots:
                (self._replaced if self._frozen else self._free).append(self._slots[client])
            self._slots[client] = slot
            self._visits[client] = self._visits.get(client, 0) + 1
        self._staged.clear()

    def discard(self) -> None:
        """Forget staged rows: the round was not accepted."""
        self._free += self._staged.values()
        self._staged.clear()

    def put(self, client: int, row: Tensor, visits: int) -> None:
        """Make a packed row, (bytes,) uint8, current: from a checkpoint or another rank."""
        if client not in self._slots:
            self._slots[client] = self._take()
        self._row(self._slots[client]).copy_(row)
        self._visits[client] = visits

    def freeze(self) -> list[tuple[int, int, Tensor]]:
        """Return `snapshot`, whose rows keep their values until `thaw`, whatever later rounds do."""
        self._frozen = True
        return list(self.snapshot())

    def thaw(self) -> None:
        """Let go of what `freeze` returned."""
        self._frozen = False
        self._free += self._replaced
        self._replaced.clear()

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

    def _take(self) -> int:
        """A slot that holds nothing."""
        if not self._free:
            first = len(self._chunks) * self._rows_per_chunk
            self._chunks.append(self._new_chunk())
            self._free = list(range(first + self._rows_per_chunk - 1, first - 1, -1))
        return self._free.pop()

    def _row(self, slot: int) -> Tensor:
        return self._chunks[slot // self._rows_per_chunk][slot % self._rows_per_chunk]

    def _new_chunk(self) -> Tensor:
        shape = (self._rows_per_chunk, self.layout.bytes)
        size = shape[0] * shape[1]
        self.bytes += size
        if self.bytes <= self.budget:
            return torch.zeros(shape, dtype=torch.uint8)
        with tempfile.NamedTemporaryFile(prefix="mpifl-memory-") as file:  # the mapping outlives the name
            return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8).view(shape)
