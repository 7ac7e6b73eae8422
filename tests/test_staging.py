"""Copies of a dataset on a node's own disk: made once, whole or not at all, known by their content."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from shard_files import clients, plant

import mpifl
from mpifl.comm import connect
from mpifl.config import UserError
from mpifl.data import staging
from mpifl.data.shard import Dataset, embedded
from mpifl.data.staging import stage


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def plant_one(folder, rows):
    folder.parent.mkdir()
    return plant(folder, {"train": (clients((rows, 1)), (0, 2), False)})


def test_a_staged_dataset_is_a_copy_found_again_by_its_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    copy = stage(embedded("digits"), "$SCRATCH/shards")
    assert copy.parent == tmp_path / "scratch" / "shards"
    original, copied = Dataset(embedded("digits")), Dataset(copy)
    assert copied.digest == original.digest == copied.recomputed_digest()
    original.close()
    copied.close()
    monkeypatch.setattr(staging, "_copy", lambda *_: pytest.fail("copied again"))
    assert stage(embedded("digits"), "$SCRATCH/shards") == copy


def test_ranks_of_a_node_copy_once(tmp_path, monkeypatch):
    copies, copy = [], staging._copy

    def slowly(*paths):
        time.sleep(0.05)  # time enough for the others to want one too
        copies.append(paths)
        copy(*paths)

    monkeypatch.setattr(staging, "_copy", slowly)
    ranks = [threading.Thread(target=stage, args=(embedded("digits"), str(tmp_path))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(copies) == 1


@pytest.mark.mpi(ranks=3)
def test_ranks_under_mpirun_copy_once(tmp_path, monkeypatch):
    copy = staging._copy

    def noted(*paths):
        (tmp_path / f"copied by {os.getpid()}").touch()
        time.sleep(0.05)
        copy(*paths)

    monkeypatch.setattr(staging, "_copy", noted)
    comm, where = connect(), str(tmp_path / "scratch")
    assert stage(embedded("digits"), where).is_dir()
    comm.arrive()
    assert len(list(tmp_path.glob("copied by *"))) == 1


TOO_SMALL = """
import resource, signal, sys
from pathlib import Path
from mpifl.config import UserError
from mpifl.data.staging import stage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    stage(Path(sys.argv[1]), sys.argv[2])
except UserError as error:
    print(error)
"""


def test_a_disk_that_is_too_small_is_one_line_and_leaves_nothing_that_looks_like_a_copy(tmp_path):
    """The index fits, neither shard does."""
    words = [sys.executable, "-c", TOO_SMALL, str(embedded("digits")), str(tmp_path)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"data.stage is '{tmp_path}'") and said.count("\n") == 1
    assert said.count("File too large") == 1 and "choose another" in said
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_what_an_interrupted_copy_left_is_replaced(tmp_path):
    copy = stage(embedded("digits"), str(tmp_path))
    unfinished = copy.rename(f"{copy}.partial")
    (unfinished / "index.h5").write_bytes(b"half")
    assert stage(embedded("digits"), str(tmp_path)) == copy
    assert contents(copy) == contents(embedded("digits")) and not unfinished.exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)])
@pytest.mark.parametrize("name", ["train-00000.h5", "index.h5"])
def test_a_copy_that_lost_something_since_is_made_anew(tmp_path, name, damage):
    copy = stage(embedded("digits"), str(tmp_path))
    damage(copy / name)
    assert stage(embedded("digits"), str(tmp_path)) == copy
    assert contents(copy) == contents(embedded("digits"))


def test_another_dataset_of_the_same_name_has_a_copy_of_its_own(tmp_path):
    older = plant_one(tmp_path / "older" / "data", 3)
    newer = plant_one(tmp_path / "newer" / "data", 4)
    copies = [stage(path, str(tmp_path / "scratch")) for path in (older, newer, older)]
    assert copies[0] == copies[2] != copies[1]
    for path, copy in zip((older, newer), copies):
        assert contents(copy) == contents(path)


def test_a_variable_that_is_not_set_is_no_name_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    with pytest.raises(UserError, match=r"data.stage is '\$NO_SUCH_DISK/x', and there is no such variable"):
        stage(embedded("digits"), "$NO_SUCH_DISK/x")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be copied there.*choose another"):
        stage(embedded("digits"), str(tmp_path / "file"))


def test_a_job_with_staged_data_has_the_same_digest(tmp_path):
    algorithm = {"name": "fedavg", "client_opt": {"name": "sgd", "lr": 0.1}, "batches": {"size": 10}}
    data = {"path": str(embedded("digits"))}
    job = {"rounds": 2, "cohort": 3, "model": {"name": "mlp"}, "algorithm": algorithm, "data": data}
    plain = mpifl.run(job | {"run": {"out": str(tmp_path / "plain")}})
    staged = job | {
        "data": job["data"] | {"stage": str(tmp_path / "scratch")},
        "run": {"out": str(tmp_path / "staged")},
    }
    staged_run = mpifl.run(staged)
    assert staged_run["digest"] == plain["digest"]
    assert len(list((tmp_path / "scratch").glob("digits-*"))) == 1


def test_nothing_is_copied_for_a_job_that_is_refused(tmp_path):
    data = {"path": str(embedded("digits")), "stage": str(tmp_path / "scratch")}
    job = {"rounds": 1, "model": {"name": "mlp"}, "algorithm": {"name": "fedavg"}, "data": data}
    with pytest.raises(UserError, match="there is no metric"):
        mpifl.run(job | {"run": {"metrics": ["no"]}})
    assert not (tmp_path / "scratch").exists()
