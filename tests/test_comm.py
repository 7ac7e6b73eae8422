"""Collectives on real ranks: values, counters, sizes beyond 2 GiB, and what must be refused."""

import os
import time

import numpy as np
import pytest

from mpifl.comm import World, connect
from mpifl.engine.host import resident_bytes


@pytest.fixture
def world():
    world = connect()
    assert isinstance(world, World)
    return world


@pytest.mark.mpi(ranks=3)
def test_scatter_bcast_reduce_and_their_byte_counters(world):
    table = np.arange(3 * 40, dtype=np.uint8).reshape(3, 40) if world.rank == 0 else None
    row = np.zeros(40, dtype=np.uint8)
    world.scatter(table, row)
    assert (row == np.arange(40) + 40 * world.rank).all()
    buffer = np.full(7, 5.0 if world.rank == 0 else 0.0)
    world.bcast(buffer)
    assert (buffer == 5.0).all()
    mine = np.full(11, 10.0**world.rank)
    world.arrive()
    world.reduce(mine)
    if world.rank == 0:
        assert (mine == 111.0).all()
    assert (world.bytes_down, world.bytes_up) == (3 * 40 + 7 * 8, 11 * 8)


@pytest.mark.mpi(ranks=3)
def test_gather_concatenates_unequal_parts_in_rank_order(world):
    gathered = world.gather(np.full(world.rank * 2, world.rank, dtype=np.uint8))
    if world.rank == 0:
        assert gathered.tolist() == [1, 1, 2, 2, 2, 2]
    else:
        assert gathered is None


@pytest.mark.mpi(ranks=5)
def test_lowest_and_share_reach_every_rank(world):
    assert world.lowest(10 - world.rank) == 6
    assert world.share("runs/größe" if world.rank == 0 else "") == "runs/größe"


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.int32, np.uint8])
def test_other_dtypes_are_never_summed(world, dtype):
    with pytest.raises(TypeError, match="only float64 and float32"):
        world.reduce(np.ones(4, dtype=dtype))


@pytest.mark.mpi(ranks=5)
def test_reduce_of_many_sizes_equals_the_sum(world):
    # 131,072 float64 are one piece of a megabyte: sizes around its borders, for MPIs that reduce in pieces.
    for size in (1, 131_071, 131_072, 131_073, 400_000):
        mine = np.arange(size, dtype=np.float64) * (world.rank + 1)
        world.arrive()
        world.reduce(mine)
        if world.rank == 0:
            assert (mine == np.arange(size) * 15.0).all()


@pytest.mark.mpi(ranks=3)
def test_waiting_ranks_leave_the_cores_to_the_one_that_works(world):
    """With more ranks than cores a waiting rank must use next to no CPU."""
    if not world.patient:
        pytest.skip("ranks do not exceed cores here")
    world.arrive()
    began, used = time.perf_counter(), time.process_time()
    if world.rank == 1:
        while time.perf_counter() - began < 1.0:
            pass
    world.arrive()
    share = (time.process_time() - used) / (time.perf_counter() - began)
    assert share < 0.3 or world.rank == 1


@pytest.mark.mpi(ranks=2, timeout=240)
def test_buffers_beyond_2gib_travel_both_ways(world):
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if world.lowest(available) < 10 << 30:
        pytest.skip("needs 10 GiB of free memory")
    count = (1 << 28) + 1027  # float64: 2 GiB and a bit
    buffer = np.zeros(count)
    if world.rank == 0:
        buffer[[0, 1 << 27, -1]] = 1.0, 2.0, 3.0
    world.bcast(buffer)
    assert buffer[[0, 1 << 27, -1]].tolist() == [1.0, 2.0, 3.0]
    buffer[[5, -2]] = world.rank + 1.0
    world.arrive()
    world.reduce(buffer)
    if world.rank == 0:
        assert buffer[[0, 5, 1 << 27, -2, -1]].tolist() == [2.0, 3.0, 4.0, 3.0, 6.0]
    assert resident_bytes() > 2 << 30


@pytest.mark.mpi(ranks=2, timeout=240)
def test_elements_beyond_2gib_travel_down(world):
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if world.lowest(available) < 8 << 30:
        pytest.skip("needs 8 GiB of free memory")
    buffer = np.zeros((1 << 31) + 77, dtype=np.uint8)  # more elements than a 32-bit count holds
    if world.rank == 0:
        buffer[[1 << 30, 1 << 31, -1]] = 1, 2, 3
    world.bcast(buffer)
    assert buffer[[1 << 30, 1 << 31, -1]].tolist() == [1, 2, 3]


@pytest.mark.mpi(ranks=3)
def test_open_mpi_reduces_in_pieces_of_a_megabyte(world):
    if "Open MPI" not in world.library:
        pytest.skip(f"needs Open MPI, runs on {world.library}")
    sizes = []
    reduce = type(world._world).Reduce
    world._world = _Watched(world._world, lambda *buffers, **options: (sizes.append(1), reduce(*buffers, **options)))
    mine = np.full(3 * 131_072 + 5, world.rank + 1.0)
    world.arrive()
    world.reduce(mine)
    assert len(sizes) == 4
    assert world.rank or (mine == 6.0).all()


class _Watched:
    """A communicator whose Reduce is another function."""

    def __init__(self, comm, reduce):
        self._comm, self._reduce = comm, reduce

    def Reduce(self, *buffers, **options):
        return self._reduce(self._comm, *buffers, **options)

    def __getattr__(self, name):
        return getattr(self._comm, name)
