"""Collectives on real ranks, by MPI alone and through a node's memory: values, counters, sizes, and what is refused."""

import os
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_same_everywhere import job, results

import mpifl
from mpifl import node
from mpifl.comm import Alone, World, connect
from mpifl.engine.host import resident_bytes
from mpifl.node import Node, add_share
from mpifl.work import Algorithm, Batching, ClientWork, Upload

WAYS = {"flat": ("flat", 0), "node": ("node", 0)} | {f"nodes of {n}": ("node", n) for n in (1, 2, 3)}
WAYS |= {"sharded": ("sharded", 0)} | {f"sharded, nodes of {n}": ("sharded", n) for n in (1, 2, 3)}
"""Name: comm.reduce, and how many ranks a pretended node has."""


@pytest.fixture
def world():
    world = connect()
    assert isinstance(world, World)
    return world


@pytest.fixture(params=["flat", "node", "nodes of 1", "nodes of 2"])
def exchanging(request, world, monkeypatch):
    """The world, exchanging in one of the ways."""
    way, ranks = WAYS[request.param]
    monkeypatch.setenv("MPIFL_NODE_RANKS", str(ranks))
    monkeypatch.setattr(node, "ALONE", 200_000)  # bytes: smaller sums are a leader's, larger ones everybody's
    with world.using(way):
        yield world


def filled(world, nbytes, value):
    """What rank 0 publishes, as every rank gets it."""
    return world.publish(nbytes, (lambda room: room.fill(value)) if world.rank == 0 else None)


def summed(world, count, value, dtype=np.float64):
    """The sum over ranks of so many values, on rank 0; rank 0's own value is 1."""
    mine = world.room(count * np.dtype(dtype).itemsize).view(dtype)
    assert not mine.any()
    mine += value if world.rank else 1
    world.arrive()
    world.reduce(mine)
    return mine


@pytest.mark.mpi(ranks=5)
def test_what_goes_down_and_up_and_its_byte_counters(exchanging):
    world, before = exchanging, (exchanging.bytes_down, exchanging.bytes_up)
    header = np.arange(16) if world.rank == 0 else np.zeros(16, np.int64)
    world.announce(header)
    assert (header == np.arange(16)).all()
    table = np.arange(5 * 40, dtype=np.uint8).reshape(5, 40) if world.rank == 0 else None
    row = np.zeros(40, dtype=np.uint8)
    world.scatter(table, row)
    assert (row == np.arange(40) + 40 * world.rank).all()
    assert (filled(world, 56, 5) == 5).all()
    total = summed(world, 11, 10.0**world.rank)
    if world.rank == 0:
        assert (total == 11111.0).all()
    counted = world.bytes_down - before[0], world.bytes_up - before[1]
    assert counted == (16 * 8 + 5 * 40 + 56, 11 * 8)
    buffer = np.full(7, 5.0 if world.rank == 0 else 0.0)
    world.bcast(buffer)
    assert (buffer == 5.0).all() and world.bytes_down - before[0] == counted[0] + 7 * 8


@pytest.mark.mpi(ranks=5)
def test_asks_of_growing_and_shrinking_sizes_reach_ranks_that_come_late(exchanging):
    world = exchanging
    for ask, count in enumerate((10, 20_000, 10, 0, 100_000, 7, 100_001)):
        late = world.rank == 1 + ask % 4
        down = filled(world, 8 * count, ask + 1)
        up = world.room(8 * count).view(np.float64)
        time.sleep(0.02 * late)  # rank 0, and what it sends next, must wait
        assert (down == ask + 1).all() and not up.any()
        up += world.rank + ask
        world.arrive()
        time.sleep(0.01 * late)
        world.reduce(up)
        assert world.rank or (up == 10 + 5 * ask).all()


@pytest.mark.mpi(ranks=5)
def test_several_messages_before_an_arrival_stay_as_they_are(exchanging):
    world = exchanging
    messages = [filled(world, 30_000, value) for value in range(1, 9)]  # more than the first window holds
    world.share("x")
    last = messages[-1].copy()
    world.arrive()
    assert (last == 8).all()


@pytest.mark.mpi(ranks=5)
def test_two_dtypes_of_one_room_are_summed_each(exchanging):
    world = exchanging
    for _ in range(2):
        filled(world, 8, 1)  # rank 0's next message: only then may hosts write to their rooms again
        room = world.room(8 * 3 + 4 * 70_001)
        wide, narrow = room[:24].view(np.float64), room[24:].view(np.float32)
        wide += world.rank
        narrow += 1 + world.rank
        world.arrive()
        world.reduce(narrow)
        world.reduce(wide)
        assert world.rank or ((wide == 10).all() and (narrow == 15).all())


@pytest.mark.mpi(ranks=5)
def test_a_sum_stays_on_rank_0_whatever_comes_next(exchanging):
    first = summed(exchanging, 1000, 2.0)
    filled(exchanging, 9000, 3)
    second = summed(exchanging, 1000, 4.0)
    assert exchanging.rank or ((first == 9).all() and (second == 17).all())


@pytest.mark.mpi(ranks=5)
def test_memory_begins_on_a_cache_line(exchanging):
    for nbytes in (8, 72, 200_000):
        for memory in (filled(exchanging, nbytes, 1), exchanging.room(nbytes)):
            assert memory.nbytes == nbytes and memory.ctypes.data % 64 == 0
    exchanging.arrive()


@pytest.mark.mpi(ranks=5)
def test_gather_lowest_and_share_reach_every_rank(exchanging):
    world = exchanging
    for _ in range(3):
        assert world.lowest(10 - world.rank) == 6
        assert world.share("runs/größe" if world.rank == 0 else "") == "runs/größe"
        gathered = world.gather(np.full(world.rank * 2, world.rank, dtype=np.uint8))
        assert gathered is None if world.rank else gathered.tolist() == [1] * 2 + [2] * 4 + [3] * 6 + [4] * 8


@pytest.mark.mpi(ranks=5)
def test_other_work_is_done_while_a_rank_is_late(exchanging):
    world, pieces = exchanging, []
    if world.rank == 3:
        time.sleep(0.05)
    world.arrive(lambda: len(pieces) < 3 and not pieces.append(1))
    assert world.rank == 3 or len(pieces) == 3


@pytest.mark.mpi(ranks=3)
@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.int32, np.uint8])
def test_other_dtypes_are_never_summed(world, dtype):
    with pytest.raises(TypeError, match="only float64 and float32"):
        world.reduce(np.ones(4, dtype=dtype))


@pytest.mark.mpi(ranks=3)
@pytest.mark.parametrize("way", ["flat", "node"])
def test_waiting_ranks_leave_the_cores_to_the_one_that_works(world, way):
    """With more ranks than cores a waiting rank must use next to no CPU."""
    if not world.patient:
        pytest.skip("ranks do not exceed cores here")
    with world.using(way):
        world.arrive()
        began, used = time.perf_counter(), time.process_time()
        if world.rank == 1:
            while time.perf_counter() - began < 0.5:
                pass
        world.arrive()
        share = (time.process_time() - used) / (time.perf_counter() - began)
    assert share < 0.3 or world.rank == 1


@pytest.mark.mpi(ranks=2, timeout=240)
@pytest.mark.parametrize("way", ["flat", "node"])
def test_buffers_beyond_2gib_travel_both_ways(world, way):
    count = (1 << 28) + 1027  # float64: 2 GiB and a bit
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if world.lowest(min(available // 10, node.free_bytes() // 5)) < 1 << 30:
        pytest.skip("needs 10 GiB of free memory, 5 of them shared")

    def mark(room):
        room.view(np.float64)[[0, 1 << 27, -1]] = 1.0, 2.0, 3.0

    with world.using(way, pytest.fail):
        down = world.publish(8 * count, mark if world.rank == 0 else None).view(np.float64)
        assert down[[0, 1 << 27, -1]].tolist() == [1.0, 2.0, 3.0]
        up = world.room(8 * count).view(np.float64)
        up[[0, 1 << 27, -1]] = down[[0, 1 << 27, -1]]
        up[[5, -2]] = world.rank + 1.0
        world.arrive()
        world.reduce(up)
        if world.rank == 0:
            assert up[[0, 5, 1 << 27, -2, -1]].tolist() == [2.0, 3.0, 4.0, 3.0, 6.0]
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
    reduce = type(world._flat._world).Reduce
    flat = world._flat
    flat._world = _Watched(flat._world, lambda *buffers, **options: (sizes.append(1), reduce(*buffers, **options)))
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


# ---- a node's memory


@pytest.mark.parametrize("shape", [(1, 5), (3, 1), (3, 7), (4, 70_001), (2, 32_768), (0, 4)])
@pytest.mark.parametrize("shares", [1, 3, 4])
def test_shares_of_a_sum_are_the_sum_and_leave_the_other_rows_alone(shape, shares):
    slabs = np.random.default_rng(0).integers(0, 100, shape).astype(np.float64)
    expected = slabs.copy()
    expected[:1] = slabs.sum(axis=0)
    for share in range(shares):
        add_share(slabs, share, shares)
    assert (slabs == expected).all()


def test_a_share_is_a_part_of_its_own():
    for shares in (2, 5):
        for share in range(shares):
            slabs = np.ones((2, 83))
            add_share(slabs, share, shares)
            (mine,) = np.nonzero(slabs[0] == 2)
            assert mine.tolist() == [*range(83 * share // shares, 83 * (share + 1) // shares)]


@pytest.mark.mpi(ranks=5)
@pytest.mark.parametrize(("ranks", "neighbours"), [(0, [0, 1, 2, 3, 4]), (2, [2, 3]), (3, [3, 4])])
def test_ranks_of_a_node_have_what_goes_down_once(world, monkeypatch, ranks, neighbours):
    monkeypatch.setenv("MPIFL_NODE_RANKS", str(ranks))
    with world.using("node"):
        memory = filled(world, 100, 5)
        world.lowest(0)
        if world.rank == 3:
            memory[7] = 6  # which is forbidden, as others see it
        world.lowest(0)
        assert memory[7] == (6 if world.rank in neighbours else 5)


@pytest.mark.mpi(ranks=5)
def test_every_ask_has_the_same_memory(world):
    places = set()
    with world.using("node"):
        for _ in range(4):
            down, up = filled(world, 50_000, 1), world.room(80_000)
            places.add((down.ctypes.data, up.ctypes.data if world.rank else None))
            world.arrive()
    assert len(places) == 1


@pytest.mark.mpi(ranks=5)
def test_auto_exchanges_through_a_nodes_memory_which_is_given_back(world):
    mapped = len(_shared_mappings())
    for _ in range(3):
        with world.using("auto"):
            assert isinstance(world._way, Node)
            summed(world, 100_000, 1.0)
            assert len(_shared_mappings()) > mapped
        assert not isinstance(world._way, Node) and len(_shared_mappings()) == mapped
    with world.using("flat"):
        assert not isinstance(world._way, Node)


def _shared_mappings():
    with open("/proc/self/maps") as maps:
        return [line for line in maps if "/dev/shm" in line]


@pytest.mark.mpi(ranks=3)
def test_an_exception_leaves_without_waiting_for_the_other_ranks(world):
    """They may be anywhere; the job is going to be aborted."""
    with pytest.raises(ZeroDivisionError), world.using("node"):
        began = time.perf_counter()
        time.sleep(0.5 * (world.rank == 2))
        raise ZeroDivisionError
    assert time.perf_counter() - began < 0.3 or world.rank == 2
    world._way.close()
    world._way = world._flat


@pytest.mark.mpi(ranks=3)
def test_only_what_lies_in_the_latest_room_is_summed(world):
    with world.using("node"):
        before = world.room(80)
        world.arrive()
        world.room(1 << 20)
        for other in (np.ones(3), np.ones(1 << 18)):
            with pytest.raises(ValueError, match="`room` gave last"):
                world.reduce(other)
        del before


@pytest.mark.mpi(ranks=5)
@pytest.mark.parametrize("lacking", ["at the start", "messages", "slabs"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_where_shared_memory_is_too_small_all_go_on_without_and_say_so_once(world, monkeypatch, lacking, ranks):
    monkeypatch.setenv("MPIFL_NODE_RANKS", str(ranks))
    small = {"at the start": 1000, "messages": 100_000, "slabs": 600_000}[lacking]
    said = []
    if world.rank in (2, 3):
        monkeypatch.setattr(node, "free_bytes", lambda: small)
    with world.using("node", said.append):
        assert isinstance(world._way, Node) == (lacking != "at the start")
        for count in (10, 50_000, 60_000):
            assert (filled(world, 8 * count, 3) == 3).all()
            total = summed(world, count, 2.0)
            assert world.rank or (total == 9).all()
        assert not isinstance(world._way, Node)
    assert len(said) == 1
    assert "/dev/shm of a node is" in said[0] and "--shm-size" in said[0] and "comm.reduce=flat" in said[0]


@pytest.mark.mpi(ranks=5)
def test_where_mpi_has_no_shared_memory_all_go_on_without(world, monkeypatch):
    monkeypatch.setenv("MPIFL_NODE_RANKS", "2")
    said, window = [], node.Window

    def make(MPI, of, nbytes):
        if world.rank in (2, 3) and nbytes > 100_000:
            raise MPI.Exception
        return window(MPI, of, nbytes)

    monkeypatch.setattr(node, "Window", make)
    with world.using("node", said.append):
        for count in (10, 50_000):
            total = summed(world, count, 2.0)
            assert world.rank or (total == 9).all()
            filled(world, 8, 1)
    assert len(said) == 1 and "MPI_Win_allocate_shared fails on a node" in said[0]


# ---- whole jobs


@contextmanager
def pretended_nodes(ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPIFL_NODE_RANKS", str(ranks))
        yield


@pytest.mark.parametrize(
    ("algorithm", "ways"),
    [
        pytest.param(
            "mime", ["flat", "node", "sharded", "sharded, nodes of 1"], marks=pytest.mark.mpi(ranks=3, timeout=90)
        ),
        pytest.param(
            "scaffold",
            ["flat", "node", "nodes of 2", "sharded, nodes of 2"],
            marks=pytest.mark.mpi(ranks=5, timeout=90),
        ),
        pytest.param("hypcluster", ["nodes of 3", "sharded, nodes of 3"], marks=pytest.mark.mpi(ranks=9, timeout=90)),
        pytest.param("fedavg", ["sharded"], marks=pytest.mark.mpi(ranks=2, timeout=90)),
    ],
)
def test_same_bits_in_every_way(algorithm, ways, tmp_path):
    for name in ways:
        way, ranks = WAYS[name]
        with pretended_nodes(ranks):
            mpifl.run(job(algorithm, tmp_path / name, comm={"reduce": way}))
    if (tmp_path / ways[0]).exists():  # on rank 0, which compares
        mpifl.run(job(algorithm, tmp_path / "alone"), comm=Alone())
        assert all(results(tmp_path / name) == results(tmp_path / "alone") for name in ways)


@pytest.mark.mpi(ranks=5, timeout=90)
def test_float32_sums_differ_by_rounding_only(tmp_path):
    losses = []
    for name in ("flat", "node", "nodes of 2"):
        way, ranks = WAYS[name]
        with pretended_nodes(ranks):
            summary = mpifl.run(job("fedavg", tmp_path / name, comm={"reduce": way, "sum": "float32"}))
        losses.append(summary and summary["loss"])
    assert losses[0] is None or losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def keeps_what_was_shared(model):
    """Its first ask keeps the vector that all share, as scratch; its second sums it, though it is given another."""
    start, step = lambda shared, client: {}, lambda shared, client, carry, batch: carry

    def keep(shared, client, carry):
        return Upload({"one": torch.ones(())}, torch.ones(()), scratch={"theta": shared["theta"]})

    def use(shared, client, carry):
        return Upload({"theta": client.scratch["theta"]}, torch.ones(()))

    works = tuple(ClientWork(start, step, finish, Batching(size=4)) for finish in (keep, use))

    def one_round(state, cohort):
        cohort.sum(works[0], theta=state["theta"])
        return {"theta": cohort.mean(works[1], theta=state["theta"] + 1)["theta"]}

    return Algorithm(lambda theta: {"theta": theta}, one_round, works, lambda state: {"model": state["theta"]})


@pytest.mark.mpi(ranks=3, timeout=90)
def test_what_was_shared_may_be_kept_for_the_next_ask(tmp_path):
    changes = {"algorithm": {"name": "test_comm:keeps_what_was_shared"}, "comm": {"reduce": "node"}}
    summary = mpifl.run(job("fedavg", tmp_path / "world") | changes)
    if summary:
        alone = mpifl.run(job("fedavg", tmp_path / "alone") | changes, comm=Alone())
        assert summary["digest"] == alone["digest"]


@pytest.mark.mpi(ranks=3, timeout=30)
def test_hosts_keep_cores_to_themselves_only_where_there_are_just_enough(world, monkeypatch):
    everywhere = os.sched_getaffinity(0)
    for cores, threads, own in (([0, 1], 1, True), ([0, 1], 2, False), ([0], 1, False)):
        bound = []
        monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores, bound=bound: bound.append(list(cores)))
        monkeypatch.setattr(world, "_cores", cores)
        monkeypatch.setattr(world, "patient", True)
        monkeypatch.setattr("mpifl.comm.affinity", lambda cores=cores: set(cores))
        with world.on_own_cores(threads):
            assert bound == ([[world.rank - 1]] if own and world.rank else [])
        assert bound[1:] == ([cores] if own and world.rank else [])
    monkeypatch.undo()
    assert os.sched_getaffinity(0) == everywhere
    monkeypatch.setattr("mpifl.comm.affinity", lambda: {0})  # bound by a launcher
    with world.on_own_cores(1):
        assert os.sched_getaffinity(0) == everywhere
