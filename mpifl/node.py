"""`comm.reduce = "node"`: ranks of a node exchange through memory that all of them map; leaders speak for their nodes.

Three MPI shared-memory windows on each node:

counters   a cache line per rank: how many exchanges it has come to
messages   what goes down lies here once, one message after the other, until all ranks have arrived
slabs      what goes up: the sums of each host; every rank adds its share of all of them, so that nothing is copied

Whoever waits polls counters, as patiently as it would poll MPI. Rank 0 hosts no client and has no slab: the sum over
all nodes ends up in memory of its own, which later asks leave alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from mpifl.flat import (
    LINE,
    PIECE,
    Flat,
    add_to_root,
    from_line,
    joined,
    pieces,
    put,
    sum_of_slices,
    width_of,
    zeroed,
)

SHARED_MEMORY = "/dev/shm"
BLOCK = 1 << 18
"""Bytes of a sum that stay in a core's cache while all slabs are added to them."""
ALONE = 8 << 20
"""Bytes of slabs that a leader adds sooner than the other ranks of its node would wake up to help."""
_LEAST = 1 << 16
"""Bytes of the smallest window of messages or slabs."""
_LEADERS_PIECE = 1 << 20
"""Bytes per call of the leaders' Reduce: MPI is slow on a window's memory, so they are copied first."""


class NoSpace(Exception):
    """A node has too little shared memory: raised by all ranks alike, in an exchange that has not begun."""


class Window:
    """Memory, (nbytes,) uint8, that all ranks of a node map; `sync` keeps what is before it before what is after it."""

    def __init__(self, MPI: Any, node: Any, nbytes: int) -> None:
        self._window = MPI.Win.Allocate_shared(nbytes + LINE if node.rank == 0 else 0, 1, comm=node)
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self.bytes = from_line(np.frombuffer(self._window.Shared_query(0)[0], np.uint8), nbytes)
        self.sync = self._window.Sync

    def free(self) -> None:
        """Give the memory back; all ranks of the node at once."""
        self._window.Unlock_all()
        self._window.Free()


class Node(Flat):
    """Exchanges through the windows of this rank's node. Raises NoSpace, as `publish`, `scatter` and `room` do.

    The variable MPIFL_NODE_RANKS=n makes nodes of n ranks out of a larger one, so that tests need one machine.
    """

    def __init__(self, MPI: Any, world: Any, wait: Callable[..., None]) -> None:
        super().__init__(MPI, world, wait)
        self._node = _node_of(MPI, world)
        self._rank, self._is_leader = self._node.rank, self._node.rank == 0
        self._leaders = world.Split(0 if self._is_leader else MPI.UNDEFINED, world.rank)
        with_rank_0 = np.asarray([world.rank == 0], np.int64)
        self._node.Bcast(with_rank_0, root=0)
        self._first_host = int(with_rank_0[0])
        self._one_node = self._lowest(self._node.size) == world.size
        even = self._lowest(self._node.size) == -self._lowest(-self._node.size)
        self._rail = world.Split(self._rank, world.rank) if even else None  # ranks that have this place on their nodes
        self._windows: dict[str, Window] = {}
        self._exchanges = self._used = self._slab_bytes = 0
        self._room = zeroed(0)
        self._counters = self._window("counters", LINE * self._node.size).view(np.int64)[:: LINE // 8]
        self._counters[self._rank] = 0
        self._node.Barrier()
        self._messages = self._window("messages", _LEAST)

    def announce(self, header: np.ndarray) -> None:
        """As World's."""

        def receive(room: np.ndarray) -> None:
            if not self._one_node:
                self._wait(self._leaders.Ibcast(header, root=0).Test)
            room[:] = header.view(np.uint8)

        header.view(np.uint8)[:] = self._message(header.nbytes, receive)

    def publish(self, nbytes: int, fill: Callable[[np.ndarray], object] | None) -> np.ndarray:
        """As World's; the ranks of a node get the same memory."""

        def receive(room: np.ndarray) -> None:
            if fill:
                fill(room)
            if not self._one_node:
                for piece in pieces(room, PIECE):
                    self._leaders.Bcast(piece, root=0)

        return self._message(nbytes, receive)

    def scatter(self, table: np.ndarray | None, row: np.ndarray) -> None:
        """As World's."""
        if self._one_node:
            shape = (self._node.size, len(row))
            rows = self._message(shape[0] * shape[1], lambda room: np.copyto(room.reshape(shape), table))
            row[:] = rows.reshape(shape)[self._rank]
        else:
            super().scatter(table, row)

    def room(self, nbytes: int) -> np.ndarray:
        """As World's; this rank's slab."""
        hosts = self._node.size - self._first_host
        if nbytes > self._slab_bytes:
            self._slab_bytes = _whole_pages(nbytes)
            self._slabs = self._window("slabs", hosts * self._slab_bytes).reshape(hosts, self._slab_bytes)
        if self._rank < self._first_host:
            self._room = zeroed(nbytes)
        else:
            self._room = self._slabs[self._rank - self._first_host, :nbytes]
            self._room[:] = 0
        return self._room

    def arrive(self, meanwhile: Callable[[], bool]) -> None:
        """As World's."""
        self._post()
        if self._one_node:
            self._await(self._node.size, meanwhile)
        else:
            if self._is_leader:
                self._await(self._node.size, meanwhile)
                self._wait(self._leaders.Ibarrier().Test, meanwhile)
            self._post()
            self._await(1, meanwhile)
        self._used = 0

    def reduce(self, buffer: np.ndarray) -> None:
        """As World's; raises ValueError for a buffer that is not of the latest `room`."""
        if not buffer.nbytes:
            return  # it may lie anywhere
        start = buffer.ctypes.data - self._room.ctypes.data
        if not 0 <= start <= self._room.nbytes - buffer.nbytes:
            raise ValueError("only what lies in the memory that `room` gave last is summed over ranks")
        slabs = self._slabs[:, start : start + buffer.nbytes].view(buffer.dtype)
        shares = self._node.size if slabs.nbytes > ALONE else 1
        if self._rank < shares:
            add_share(slabs, self._rank, shares)
        self._post()
        if not self._is_leader:
            return  # slabs are written again after rank 0's next header, and rank 0 has waited for all leaders
        self._await(shares)
        on_root = self._world.rank == 0
        if on_root and len(slabs):
            np.add(buffer, slabs[0], out=buffer)
        if not self._one_node:
            for piece in pieces(buffer if on_root else slabs[0], _LEADERS_PIECE):
                add_to_root(self._MPI, self._leaders, piece if on_root else piece.copy())

    @property
    def slice(self) -> int:
        """As World's: slices of ranks that have the same place on their nodes lie side by side."""
        return super().slice if self._rail is None else self._rank * self._rail.size + self._rail.rank

    def sum_slices(self, vectors: list[np.ndarray]) -> list[np.ndarray]:
        """As World's: a rank adds its part of all slabs of its node, and then of all nodes its slice of that."""
        if self._rail is None:
            return super().sum_slices(vectors)
        slices = [self._sum_slice(vector, width_of(vector, self._world.size)) for vector in vectors]
        self._post()
        self._await(self._node.size)  # slabs may be written again
        return slices

    def join(self, slices: np.ndarray, count: int, starts: list[int], nbytes: int) -> np.ndarray:
        """As World's; the ranks of a node get the same memory, each brings its part of all slices there."""
        if self._rail is None:
            return super().join(slices, count, starts, nbytes)
        memory = self._space(nbytes)
        part = joined(self._rail, slices).swapaxes(0, 1).reshape(len(slices), -1)
        first = self._rank * part.shape[1]
        put(memory, part[:, : max(0, count - first)], [start + first * part.itemsize for start in starts])
        self._post()
        self._await(self._node.size)
        return memory

    def _sum_slice(self, vector: np.ndarray, width: int) -> np.ndarray:
        nodes = self._rail.size
        first = vector.ctypes.data - self._room.ctypes.data
        start, stop = (min(len(vector), place * nodes * width) for place in (self._rank, self._rank + 1))
        mine = np.zeros(nodes * width, vector.dtype)
        slabs = self._slabs[:, first : first + vector.nbytes].view(vector.dtype)[:, start:stop]
        for begin in range(0, stop - start, BLOCK // vector.itemsize):
            block = slice(begin, begin + BLOCK // vector.itemsize)
            for slab in slabs:
                mine[: stop - start][block] += slab[block]
        return sum_of_slices(self._MPI, self._rail, mine, width)

    def close(self) -> None:
        """As Flat's."""
        self._wait(self._world.Ibarrier().Test)
        for window in self._windows.values():
            window.free()
        self._windows.clear()
        self._node.Free()
        if self._rail is not None:
            self._rail.Free()
        if self._is_leader:
            self._leaders.Free()

    def _message(self, nbytes: int, receive: Callable[[np.ndarray], object]) -> np.ndarray:
        """The next bytes of the window, which the leader fills and its node reads, until all arrive."""
        room = self._space(nbytes)
        if self._is_leader:
            receive(room)
        self._post()
        self._await(1)
        return room

    def _space(self, nbytes: int) -> np.ndarray:
        """The next bytes of the window of messages; in place of what was there, if it has to grow."""
        if self._used + nbytes > len(self._messages):
            self._messages = self._window("messages", _whole_pages((self._used + nbytes) * 5 // 4))
            self._used = 0
        room = self._messages[self._used : self._used + nbytes]
        self._used += -(-nbytes // LINE) * LINE
        return room

    def _post(self) -> None:
        """Let the node know that this rank has come to its next exchange, and has written what belongs to it."""
        self._sync()
        self._exchanges += 1
        self._counters[self._rank] = self._exchanges

    def _await(self, ranks: int, meanwhile: Callable[[], bool] = lambda: False) -> None:
        """Wait until the first so many ranks of the node have come to this rank's exchange."""
        counters, sync = self._counters[:ranks], self._windows["counters"].sync

        def have_come() -> bool:
            sync()
            return bool((counters >= self._exchanges).all())

        self._wait(have_come, meanwhile)
        self._sync()

    def _sync(self) -> None:
        for window in self._windows.values():
            window.sync()

    def _window(self, name: str, nbytes: int) -> np.ndarray:
        """Memory of so many bytes on this node, in place of the window of that name; all ranks at once."""
        self._wait(self._world.Ibarrier().Test)
        if name in self._windows:
            self._windows.pop(name).free()
        lacking = -self._lowest(free_bytes() - nbytes)
        if lacking > 0:
            raise NoSpace(f"{SHARED_MEMORY} of a node is {lacking / 1e6:.1f} MB too small; docker run --shm-size=2g")
        try:
            window = Window(self._MPI, self._node, nbytes)
        except self._MPI.Exception:
            window = None
        if not self._lowest(window is not None):
            raise NoSpace("MPI_Win_allocate_shared fails on a node")
        self._windows[name] = window
        return window.bytes

    def _lowest(self, value: int) -> int:
        lowest = np.asarray([value], np.int64)
        self._world.Allreduce(self._MPI.IN_PLACE, lowest, op=self._MPI.MIN)
        return int(lowest[0])


def add_share(slabs: np.ndarray, share: int, shares: int) -> None:
    """Add one of `shares` parts of all rows of `slabs`, (hosts, n), to that part of the first row."""
    count = slabs.shape[1]
    start, stop = count * share // shares, count * (share + 1) // shares
    for first in range(start, stop, BLOCK // slabs.itemsize):
        block = slabs[:, first : min(first + BLOCK // slabs.itemsize, stop)]
        for row in block[1:]:
            np.add(block[0], row, out=block[0])


def free_bytes() -> int:
    """Bytes that windows may still take on this node."""
    try:
        space = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 1 << 62  # another system, which has it elsewhere
    return space.f_bavail * space.f_frsize


def _node_of(MPI: Any, world: Any) -> Any:
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    ranks = int(os.environ.get("MPIFL_NODE_RANKS", 0))
    if not ranks:
        return node
    part = node.Split(node.rank // ranks)
    node.Free()
    return part


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // 4096) * 4096
