"""What a host reads: whose rows, what stays in memory, what is fetched ahead; and copies on a node's own disk."""

import threading

import numpy as np
import pytest
import torch

from mpifl.config import UserError
from mpifl.data import staging
from mpifl.data.memory import MemoryDataset
from mpifl.data.shard import Dataset, embedded
from mpifl.data.source import OBJECT_BYTES, Source
from mpifl.data.staging import stage
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
def source_of():
    made = []

    def source_of(data, budget=1 << 20):
        made.append(Source(data, budget, torch.device("cpu")))
        return made[-1]

    yield source_of
    for source in made:
        source.close()


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


def test_splits_share_one_budget(source_of):
    data = small_dataset()
    source = source_of(data, holding(11, 3) + holding(5, 2) - 1)  # the test split has 5 rows in 2 blocks of 3
    central = Batching(size=3, of="block", split="test")
    found = [source.columns(batching, 0) for batching in (Batching(), central, Batching(), central)]
    assert found[0] is found[2] and found[1] is not found[3]


def test_clients_fetched_ahead_are_read_once_and_by_another_thread(source_of):
    data = small_dataset()
    source = source_of(data, holding(11, 3) - 1)
    source.prefetch(Batching(), np.array([2, 0]))
    source.prefetch(Batching(), np.array([2, 0]))  # a second ask of the same round
    assert source.columns(Batching(), 0)["x"].tolist() == [0, 1, 2, 3]
    assert source.columns(Batching(), 2)["x"].tolist() == list(range(4, 11))
    assert sorted(index for index, _ in data.reads) == [0, 2]
    assert 2 in by_prefetch(data.reads)


def test_no_more_is_fetched_ahead_than_the_budget_holds(source_of):
    data = small_dataset()
    source = source_of(data, holding(4 + 7, 2) - 1)  # of clients 0 and 2
    source.prefetch(Batching(), np.array([0, 2]))
    source.close()
    assert by_prefetch(data.reads) == [0]


def test_what_was_fetched_for_others_is_dropped(source_of):
    data = small_dataset()
    source = source_of(data, holding(11, 3) - 1)
    source.prefetch(Batching(), np.array([0]))
    source.prefetch(Batching(), np.array([2]))
    assert [id for _, _, id, _ in source._ahead] == [2]


def test_a_client_that_cannot_be_read_ahead_is_an_error_when_it_is_needed_and_only_then(source_of):
    data = small_dataset()
    data.broken = 2
    source = source_of(data, holding(11, 3) - 1)
    source.prefetch(Batching(), np.array([2, 0]))
    assert source.columns(Batching(), 0)["x"].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="client 2 is damaged"):
        source.columns(Batching(), 2)


# ---- copies on a node's own disk


def test_a_staged_dataset_is_a_copy_found_again_by_its_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    copy = stage(embedded("digits"), "$SCRATCH/shards")
    assert copy.parent == tmp_path / "scratch" / "shards"
    original, copied = Dataset(embedded("digits")), Dataset(copy)
    assert copied.digest == original.digest == copied.recomputed_digest()
    original.close(), copied.close()
    monkeypatch.setattr(staging, "_copy", lambda *_: pytest.fail("copied again"))
    assert stage(embedded("digits"), "$SCRATCH/shards") == copy


def test_ranks_of_a_node_copy_once(tmp_path, monkeypatch):
    copies, copy = [], staging._copy
    monkeypatch.setattr(staging, "_copy", lambda *paths: (copies.append(paths), copy(*paths)))
    ranks = [threading.Thread(target=stage, args=(embedded("digits"), str(tmp_path))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(copies) == 1


def test_a_copy_that_fails_leaves_nothing_that_looks_like_one(tmp_path, monkeypatch):
    def full(source, target):
        target.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging.shutil, "copytree", full)
    with pytest.raises(UserError, match=r"data.stage is '.*No space left"):
        stage(embedded("digits"), str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_job_with_staged_data_has_the_same_digest(tmp_path):
    from mpifl.train import run

    algorithm = {"name": "fedavg", "client_opt": {"name": "sgd", "lr": 0.1}, "batches": {"size": 10}}
    data = {"path": str(embedded("digits"))}
    job = {"rounds": 2, "cohort": 3, "model": {"name": "mlp"}, "algorithm": algorithm, "data": data}
    plain = run(job | {"run": {"out": str(tmp_path / "plain")}})
    staged = job | {
        "data": job["data"] | {"stage": str(tmp_path / "scratch")},
        "run": {"out": str(tmp_path / "staged")},
    }
    assert run(staged)["digest"] == plain["digest"]
    assert (tmp_path / "scratch").is_dir()
