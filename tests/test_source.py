"""What a host reads: whose rows, what stays in memory and on which rank, what is fetched ahead."""

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import flip

import mpifl
from mpifl.comm import Alone, connect
from mpifl.config import UserError, load
from mpifl.data import shard
from mpifl.data.batches import batches
from mpifl.data.format import Feature
from mpifl.data.memory import MemoryDataset
from mpifl.data.shard import Dataset, embedded
from mpifl.data.source import INDEX_BYTES, OBJECT_BYTES, Resident, Source
from mpifl.engine.clock import Clock
from mpifl.fleet import Fleet
from mpifl.rand import fold, sample
from mpifl.session import Session
from mpifl.work import Batching


class Counting(MemoryDataset):
    """Notes which clients are read, and by which thread."""

    def client(self, split, index):
        self.reads.append((index, threading.current_thread().name))
        if index == getattr(self, "broken", None):
            raise UserError(f"client {index} is damaged")
        return super().client(split, index)


def small_dataset():
    rows = [np.arange(a, b, dtype=np.float32) for a, b in ((0, 4), (4, 4), (4, 11))]
    data = Counting([{"x": r} for r in rows], test={"x": np.arange(100, 105, dtype=np.float32)})
    data.reads = []
    return data


def holding(rows, ids):
    """Bytes that hold so many rows of small_dataset behind so many ids, and not one more."""
    return 4 * rows + OBJECT_BYTES * ids


@pytest.fixture
def source_of(monkeypatch):
    """Makes Sources; an id of a resident split costs as much as a fetched one, so that `holding` says both."""
    monkeypatch.setattr("mpifl.data.source.INDEX_BYTES", OBJECT_BYTES)
    made = []

    def source_of(data, budget=1 << 20):
        made.append(Source(data, budget, torch.device("cpu")))
        return made[-1]

    yield source_of
    for source in made:
        source.close()


def wait_for(source):
    """Let the thread read all that it was given."""
    for future, _ in list(source._ahead.values()):
        future.exception()


def by_prefetch(reads):
    return [index for index, thread in reads if thread.startswith("prefetch")]


def test_blocks_cut_a_split_across_clients_and_cover_it_once(source_of):
    source = source_of(small_dataset())
    blocks = Batching(size=3, of="block", shuffle=False)
    assert source.examples(blocks).tolist() == [3, 3, 3, 2]
    found = [source.columns(blocks, i)["x"].tolist() for i in range(4)]
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    central = Batching(size=3, of="block", split="test")
    assert [source.columns(central, i)["x"].tolist() for i in range(2)] == [[100, 101, 102], [103, 104]]


def test_all_is_the_whole_split_for_every_id_and_client_its_own(source_of):
    source = source_of(small_dataset())
    everything = Batching(size=3, of="all")
    assert source.examples(everything).tolist() == [11]
    assert source.columns(everything, 5)["x"].tolist() == list(range(11))
    assert source.examples(Batching()).tolist() == [4, 0, 7]
    assert source.columns(Batching(), 2)["x"].tolist() == list(range(4, 11))


@pytest.mark.parametrize(("budget", "reads"), [(1 << 20, 2), (holding(11, 3), 2), (holding(11, 3) - 1, 6), (0, 6)])
def test_a_split_stays_resident_if_all_of_it_fits(source_of, budget, reads):
    data = small_dataset()  # 11 rows
    source = source_of(data, budget)
    for _ in range(3):
        assert source.columns(Batching(), 2)["x"].tolist() == list(range(4, 11))
        assert source.columns(Batching(size=9), 0)["x"].tolist() == [0, 1, 2, 3]
    assert len(data.reads) == reads


def test_what_stays_costs_its_rows_and_an_index_and_nothing_else_for_each_client():
    features = {"x": Feature("uint8", (3,)), "y": Feature("uint16", ())}
    split = Resident(np.array([2, 0, 3]), features, torch.device("cpu"))
    assert split._starts.nbytes + split._there.nbytes == 3 * INDEX_BYTES + 8
    columns = [{"x": torch.full((n, 3), n, dtype=torch.uint8), "y": torch.arange(n).int()} for n in (2, 0, 3)]
    for id in (2, 0):
        assert not split.has(id)
        split.put(id, columns[id])
    assert [split.has(id) for id in range(3)] == [True, False, True]
    for id in (0, 2):
        assert all(torch.equal(split.rows(id)[name], columns[id][name]) for name in "xy")
    whole = split.rows(0)["x"]._base
    assert whole.nbytes == 15 and split.rows(2)["x"]._base is whole


def test_splits_share_one_budget(source_of):
    data = small_dataset()
    source = source_of(data, holding(11, 3) + holding(5, 2) - 1)  # the test split has 5 rows in 2 blocks of 3
    central = Batching(size=3, of="block", split="test")
    for batching in (Batching(), central) * 2:
        source.columns(batching, 0)
    assert source.resident(Batching()) and not source.resident(central)


def test_clients_fetched_ahead_are_read_once_and_by_another_thread(source_of):
    data = small_dataset()
    source = source_of(data, holding(11, 3) - 1)
    source.prefetch(Batching(), np.array([2, 0]))
    source.prefetch(Batching(), np.array([2, 0]))  # a second ask of the same round
    assert source.columns(Batching(), 0)["x"].tolist() == [0, 1, 2, 3]
    assert source.columns(Batching(), 2)["x"].tolist() == list(range(4, 11))
    assert sorted(index for index, _ in data.reads) == [0, 2]
    assert 2 in by_prefetch(data.reads)


def test_what_is_fetched_ahead_never_exceeds_the_budget_and_goes_on_as_it_is_used(source_of):
    data = Counting([{"x": np.full(n, n, np.float32)} for n in (5, 5, 5, 500, 5, 5)])
    data.reads = []
    source = source_of(data, holding(10, 2))  # two clients; client 3 alone is too large
    source.prefetch(Batching(), np.arange(6))
    for id in range(6):
        wait_for(source)
        assert len(source._ahead) <= 2 and source._ahead_bytes == holding(5, 1) * len(source._ahead)
        assert source.columns(Batching(), id)["x"].tolist() == [data.sizes("train")[id]] * data.sizes("train")[id]
    assert [index for index, _ in data.reads] == [0, 1, 2, 3, 4, 5]
    assert by_prefetch(data.reads) == [0, 1, 2, 4, 5]
    assert source._ahead_bytes == 0 and not source._coming


def test_a_resident_split_leaves_no_more_than_the_rest_of_the_budget_to_others(source_of):
    data = small_dataset()
    central = Batching(size=3, of="block", split="test")
    source = source_of(data, holding(5, 2) + holding(4, 1))
    source.columns(central, 0)
    source.prefetch(Batching(), np.array([0, 2]))
    assert [id for _, _, id, _ in source._ahead] == [0]


def test_a_split_that_stays_is_fetched_whole_and_read_once(source_of):
    data = small_dataset()
    source = source_of(data, holding(11, 3))
    for _ in range(3):
        source.prefetch(Batching(), np.array([2, 0]))
        wait_for(source)
        assert [source.columns(Batching(), id)["x"].tolist()[0] for id in (2, 0)] == [4, 0]
    assert by_prefetch(data.reads) == [2, 0]


def test_what_was_fetched_for_others_is_dropped_and_what_is_still_wanted_kept(source_of):
    data = small_dataset()
    source = source_of(data, holding(11, 3) - 1)
    for ids in ([0, 1], [1, 2]):
        source.prefetch(Batching(), np.array(ids))
        wait_for(source)
    assert {id for _, _, id, _ in source._ahead} == {1, 2} and by_prefetch(data.reads) == [0, 1, 2]
    assert source._ahead_bytes == source.bytes_of(0 + 7, 2)


def test_wide_integers_count_as_they_lie_in_memory(source_of):
    data = MemoryDataset([{"x": np.zeros((4, 3), np.uint16), "y": np.zeros(4, np.uint8)}])
    source = source_of(data)
    columns = source.columns(Batching(), 0)
    assert columns["y"].dtype == torch.uint8
    assert 4 * source.row_bytes == sum(column.nbytes for column in columns.values())


def test_on_another_device_rows_stay_as_stored_and_become_inputs_there(source_of):
    features = {"x": Feature("uint8", (2, 4), mean=(1.0, 2.0), std=(1.0, 4.0)), "y": Feature("uint8", (), classes=3)}
    data = MemoryDataset([{"x": np.zeros((5, 2, 4), np.uint8), "y": np.zeros(5, np.uint8)}], features=features)
    source = Source(data, 1 << 20, torch.device("meta"))  # it has no numbers: whatever looks at them on the host fails
    columns = source.columns(Batching(), 0)
    again = source.columns(Batching(), 0)
    assert all(again[name]._base is columns[name]._base for name in columns) and {
        c.dtype for c in columns.values()
    } == {torch.uint8}
    for shuffle in (True, False):
        for batch in batches(columns, features, Batching(size=2, shuffle=shuffle), 0):
            assert {leaf.device.type for leaf in batch.values()} == {"meta"}
            assert (batch["x"].dtype, batch["y"].dtype) == (torch.float32, torch.int64)
    source.close()


@pytest.mark.parametrize(
    ("value", "problem"), [(3, "holds 3, labels must be 0 to 2"), (-1, "holds -1, labels must be")]
)
def test_a_label_that_there_is_not_is_named_with_its_client(source_of, value, problem):
    data = MemoryDataset([{"y": np.zeros(4, np.int32)} for _ in "ab"], features={"y": Feature("int32", (), classes=3)})
    data._clients["train"][1]["y"][2] = value  # as in a file that somebody else's program wrote
    source = source_of(data)
    source.columns(Batching(size=2), 0)
    with pytest.raises(UserError, match=f"split 'train', client '1', column 'y': row 2 {problem}"):
        source.columns(Batching(size=2), 1)


def test_a_label_of_a_block_that_there_is_not_is_named_with_its_place_in_the_split(source_of):
    labels = {"y": np.zeros(5, np.int32)}
    data = MemoryDataset([labels], test=labels, features={"y": Feature("int32", (), classes=3)})
    labels["y"][4] = 3
    source, blocks = source_of(data), Batching(size=3, of="block", split="test", shuffle=False)
    source.columns(blocks, 0)
    with pytest.raises(UserError, match="split 'test', column 'y': row 4 holds 3, labels must be 0 to 2"):
        source.columns(blocks, 1)


def test_closing_ends_the_thread_though_much_was_still_to_be_read():
    data = small_dataset()
    begun = []
    data.client = lambda split, index: begun.append(index) or time.sleep(0.05) or {}
    source, before = Source(data, 1 << 20, torch.device("cpu")), threading.active_count()
    source.prefetch(Batching(), np.array([0, 1, 2]))
    assert threading.active_count() == before + 1
    source.close()
    assert threading.active_count() == before and len(begun) < 3


def test_a_client_that_cannot_be_read_ahead_is_an_error_when_it_is_needed_and_only_then(source_of):
    data = small_dataset()
    data.broken = 2
    source = source_of(data, holding(11, 3) - 1)
    source.prefetch(Batching(), np.array([2, 0]))
    assert source.columns(Batching(), 0)["x"].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="client 2 is damaged"):
        source.columns(Batching(), 2)


# ---- a job's rounds


def job(out, data, **changes):
    algorithm = {"name": "fedavg", "batches": {"size": 4}}
    table = {"rounds": 4, "cohort": 7, "data": data, "model": {"name": "mlp"}, "algorithm": algorithm}
    return table | {"run": {"out": str(out), "eval_every": 2}} | changes


@pytest.fixture
def nothing_stays(monkeypatch):
    """Clients so large that 1 MiB is for a cohort, not for a split."""
    for cost in ("OBJECT_BYTES", "INDEX_BYTES"):
        monkeypatch.setattr(f"mpifl.data.source.{cost}", 40 << 10)
    return {"cache_mb": 1}


def test_clients_of_a_round_are_read_once_and_while_the_round_before_trains(tmp_path, nothing_stays, monkeypatch):
    reads, client = [], MemoryDataset.client
    note = lambda of: reads.append((of, threading.current_thread().name.startswith("prefetch")))  # noqa: E731
    monkeypatch.setattr(MemoryDataset, "client", lambda self, split, of: note(of) or client(self, split, of))
    session = Session.open(load(job(tmp_path, data={"path": "parts:many_clients"} | nothing_stays)), Alone(), Clock())
    algorithm, state = session.parts.algorithm, session.parts.algorithm.init(session.theta)
    fleet = Fleet(Alone(), session.host, of_a_round=algorithm.works)
    cohorts = [set(session.sampled(round).tolist()) for round in range(5)]
    for round in range(4):
        reads.clear()
        fleet.begin(round, session.sampled(round + 1))
        state = algorithm.round(state, session.cohort(round, fleet))
        wait_for(session.host.source)
        first = cohorts[round] & cohorts[round - 1] if round else cohorts[0]  # nothing is kept for a round after
        assert sorted(of for of, _ in reads) == sorted([*first, *(cohorts[round + 1] - cohorts[round])])
        assert {of for of, by_thread in reads if not by_thread} <= first
    session.close()


@pytest.mark.mpi(ranks=3)
@pytest.mark.parametrize("algorithm", ["fedavg", "mime"])
def test_prefetch_and_residence_change_no_bit(algorithm, tmp_path, nothing_stays):
    def results(name, cache_mb, comm):
        data, batches = {"path": "digits", "cache_mb": cache_mb}, {"size": 4, "max_steps": 3}
        table = job(tmp_path / name, data, rounds=3, algorithm={"name": algorithm, "batches": batches})
        summary = mpifl.run(table, comm=comm)
        return summary and (summary["digest"], summary["loss"])

    found = [results(f"world {cache_mb}", cache_mb, connect()) for cache_mb in (0, 1, 512)]
    if found[0] is not None:
        assert {*found} == {results(f"alone {cache_mb}", cache_mb, Alone()) for cache_mb in (0, 1)}


@pytest.mark.launches
def test_a_client_that_cannot_be_read_ahead_ends_all_ranks_with_one_line_in_the_round_that_needs_it(launch, tmp_path):
    path = Path(shutil.copytree(embedded("digits"), tmp_path / "digits"))
    first, second = (sample(fold(0, "cohort", round), 100, 3).tolist() for round in range(2))
    client = next(client for client in second if client not in first)
    dataset = Dataset(path)
    row, name = int(dataset.sizes("train")[:client].sum()), dataset.client_id("train", client)
    dataset.close()
    flip(path / "train-00000.h5", "x", row)
    words = [f"data.path={path}", "rounds=3", "cohort=3", "data.cache_mb=1", f"run.out={tmp_path / 'out'}"]
    done = launch(3, "-m", "mpifl.train", *words, timeout=30)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("mpifl: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"train-00000.h5: column 'x' of client '{name}' does not match its checksum" in line
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1


def bytes_there(split):
    """Bytes of the rows that were put into a Resident."""
    held = [split.rows(id) for id in np.flatnonzero(split._there).tolist()]
    return sum(column.nbytes for columns in held for column in columns.values())


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(ranks=n), id=f"{n} ranks") for n in (3, 5)])
def test_each_host_reads_and_holds_its_share_through_files_opened_once_and_the_server_none(
    ranks, tmp_path, monkeypatch
):
    """Traps 22 and 23 of the peers: files opened for each client, and every process holding the whole dataset."""
    opened, open_, reads, held = [], shard._open, [], []
    client, close = Dataset.client, Source.close
    monkeypatch.setattr(shard, "_open", lambda path: opened.append(path.name) or open_(path))
    monkeypatch.setattr(Dataset, "client", lambda self, *which: reads.append(which[1]) or client(self, *which))
    monkeypatch.setattr(Source, "close", lambda self: held.append(self._resident) or close(self))
    comm = connect()
    mpifl.run(job(tmp_path, data={"path": "digits"}, cohort=0), comm=comm)
    assert opened.count("index.h5") == 1 and len(opened) == len(set(opened))
    mine = sum(bytes_there(split) for (of, *_), split in held[0].items() if of == "client")
    everyone = comm.gather(np.array(reads, np.int64))
    all_rows = comm.gather(np.array([mine], np.int64))
    if comm.rank == 0:
        assert opened == ["index.h5"]
        assert sorted(everyone.view(np.int64).tolist()) == list(range(100))  # over four rounds
        whole = 1437 * (64 + 1)
        shares = all_rows.view(np.int64)
        assert shares[0] == 0 and shares.sum() == whole
        assert shares[1:].max() < 1.1 * whole / (ranks - 1)
