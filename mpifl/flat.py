"""`comm.reduce = "flat"`: one of MPI's own collectives over all ranks for each exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

LINE = 64
"""Bytes of a cache line, and of the alignment of all memory that is handed out."""
PIECE = 1 << 30
"""Bytes per call: every MPI counts below 2^31, also those without large-count calls."""


class Flat:
    """Exchanges of all ranks of a communicator. MPI: the module. wait: (done, meanwhile) polls until done()."""

    def __init__(self, MPI: Any, world: Any, wait: Callable[..., None], reduce_piece: int = PIECE) -> None:
        self._MPI, self._world, self._wait, self._reduce_piece = MPI, world, wait, reduce_piece

    def announce(self, header: np.ndarray) -> None:
        """As World's."""
        self._wait(self._world.Ibcast(header, root=0).Test)

    def publish(self, nbytes: int, fill: Callable[[np.ndarray], object] | None) -> np.ndarray:
        """As World's."""
        buffer = zeroed(nbytes)
        if fill:
            fill(buffer)
        self.bcast(buffer)
        return buffer

    def bcast(self, buffer: np.ndarray) -> None:
        """As World's."""
        for piece in pieces(buffer, PIECE):
            self._world.Bcast(piece, root=0)

    def scatter(self, table: np.ndarray | None, row: np.ndarray) -> None:
        """As World's."""
        width = PIECE // self._world.size
        for start in range(0, len(row), width):
            part = np.empty_like(row[start : start + width])
            columns = None if table is None else np.ascontiguousarray(table[:, start : start + width])
            self._world.Scatter(columns, part, root=0)
            row[start : start + width] = part

    def room(self, nbytes: int) -> np.ndarray:
        """As World's."""
        return zeroed(nbytes)

    def arrive(self, meanwhile: Callable[[], bool]) -> None:
        """As World's."""
        self._wait(self._world.Ibarrier().Test, meanwhile)

    def reduce(self, buffer: np.ndarray) -> None:
        """As World's."""
        for piece in pieces(buffer, self._reduce_piece):
            add_to_root(self._MPI, self._world, piece)

    @property
    def slice(self) -> int:
        """As World's."""
        return self._world.rank

    def sum_slices(self, vectors: list[np.ndarray]) -> list[np.ndarray]:
        """As World's."""
        return [sum_of_slices(self._MPI, self._world, vector, width_of(vector, self._world.size)) for vector in vectors]

    def join(self, slices: np.ndarray, count: int, starts: list[int], nbytes: int) -> np.ndarray:
        """As World's."""
        memory = zeroed(nbytes)
        put(memory, joined(self._world, slices).swapaxes(0, 1).reshape(len(slices), -1)[:, :count], starts)
        return memory

    def close(self) -> None:
        """Give back what the exchanges held; all ranks at once."""


def add_to_root(MPI: Any, comm: Any, buffer: np.ndarray) -> None:
    """Rank 0's buffer becomes the sum over the ranks of a communicator."""
    if comm.rank == 0:
        comm.Reduce(MPI.IN_PLACE, buffer, op=MPI.SUM, root=0)
    else:
        comm.Reduce(buffer, None, op=MPI.SUM, root=0)


def width_of(vector: np.ndarray, ranks: int) -> int:
    """W, the numbers in a slice of a vector (P,)."""
    return -(-len(vector) // ranks)


def sum_of_slices(MPI: Any, comm: Any, vector: np.ndarray, width: int) -> np.ndarray:
    """This rank's slice, (width,), of the sum over a communicator's ranks of a vector, (at most size * width,)."""
    rows = np.zeros((comm.size, width), vector.dtype)
    rows.reshape(-1)[: len(vector)] = vector
    mine = np.empty(width, vector.dtype)
    step = max(1, PIECE // rows[:, :1].nbytes)
    for start in range(0, width, step):
        part = np.ascontiguousarray(rows[:, start : start + step])
        comm.Reduce_scatter_block(part, mine[start : start + step], op=MPI.SUM)
    return mine


def joined(comm: Any, slices: np.ndarray) -> np.ndarray:
    """The slices, (n, W), of all ranks of a communicator, (size, n, W)."""
    whole = np.empty((comm.size, *slices.shape), slices.dtype)
    flat, mine = whole.reshape(comm.size, -1), np.ascontiguousarray(slices).reshape(-1)
    step = max(1, PIECE // flat[:, :1].nbytes)
    if step >= len(mine):
        comm.Allgather(mine, flat)
        return whole
    for start in range(0, len(mine), step):
        part = np.empty((comm.size, len(mine[start : start + step])), slices.dtype)
        comm.Allgather(mine[start : start + step], part)
        flat[:, start : start + step] = part
    return whole


def put(memory: np.ndarray, rows: np.ndarray, starts: list[int]) -> None:
    """Copy rows, (n, width), into memory, uint8, each to its first byte."""
    for row, start in zip(rows, starts):
        memory[start : start + row.nbytes].view(row.dtype)[:] = row


def zeroed(nbytes: int) -> np.ndarray:
    """Memory of this process alone, (nbytes,) uint8, that starts on a cache line."""
    return from_line(np.zeros(nbytes + LINE, np.uint8), nbytes)


def from_line(memory: np.ndarray, nbytes: int) -> np.ndarray:
    """The first nbytes of `memory`, (more,) uint8, that start on a cache line."""
    start = -memory.ctypes.data % LINE
    return memory[start : start + nbytes]


def pieces(buffer: np.ndarray, nbytes: int) -> list[np.ndarray]:
    """Cut a contiguous buffer into views of at most so many bytes."""
    flat = buffer.reshape(-1)
    count = max(1, nbytes // flat.itemsize)
    return [flat[start : start + count] for start in range(0, len(flat), count)]
