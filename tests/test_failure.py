"""Whatever one rank does, the whole job ends soon, non-zero, and says once who, where and why."""

import json
import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpifl.config import to_toml
from mpifl.data.shard import Feature
from mpifl.data.writer import ShardWriter
from mpifl.engine.clock import Whereabouts

TESTS = Path(__file__).parent
ENV = {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
pytestmark = pytest.mark.launches


def write_job(tmp_path, **changes):
    table = {
        "rounds": 4,
        "cohort": 0,
        "data": {"path": "parts:awkward_dataset"},
        "model": {"name": "parts:net_with_dropout"},
        "algorithm": {"name": "fedavg", "batches": {"size": 4}},
        "run": {"out": str(tmp_path / "out")},
    } | changes
    path = tmp_path / "job.toml"
    path.write_text(to_toml(table))
    return path


def misbehaving(tmp_path, how):
    return write_job(tmp_path, algorithm={"name": "parts:misbehaving", "how": how, "client": 2, "round": 1})


def seconds_after_start(tmp_path, done):
    """How long a job that is `done` went on after its ranks had written their first status."""
    began = min(path.stat().st_ctime for path in (tmp_path / "out" / "config.toml",))
    return time.time() - began


@pytest.mark.parametrize(
    "how, status, says", [("raise", 1, "RuntimeError: planted failure"), ("exit", 1, "SystemExit: 3")]
)
def test_exception_or_exit_on_a_host_ends_the_job_and_is_reported_once(launch, tmp_path, how, status, says):
    done = launch(4, "-m", "mpifl.train", misbehaving(tmp_path, how), timeout=60, env=ENV)
    assert done.returncode != 0
    assert done.stderr.count(says) == 1
    assert done.stderr.count("Traceback") == 1
    assert re.search(r"rank [123], phase train, round 2, client 2:", done.stderr)
    assert seconds_after_start(tmp_path, done) < 5
    assert not (tmp_path / "out" / "summary.json").exists()
    [report] = (tmp_path / "out").glob("failure-*.txt")
    assert says in report.read_text()


def test_exit_with_status_0_is_a_failure_too(launch, tmp_path):
    done = launch(3, "-m", "mpifl.train", misbehaving(tmp_path, "exit 0"), env=ENV)
    assert done.returncode != 0
    assert "SystemExit: 0" in done.stderr


def test_exception_in_a_thread_ends_the_job(launch, tmp_path):
    done = launch(3, "-m", "mpifl.train", misbehaving(tmp_path, "thread"), timeout=30, env=ENV)
    assert done.returncode != 0
    assert done.stderr.count("ZeroDivisionError") == 1


def test_killed_rank_ends_the_job_and_its_last_place_can_be_read(launch, tmp_path):
    done = launch(3, "-m", "mpifl.train", misbehaving(tmp_path, "kill"), timeout=30, env=ENV)
    assert done.returncode != 0
    assert seconds_after_start(tmp_path, done) < 5
    places = [Whereabouts.read(path) for path in sorted((tmp_path / "out" / "status").glob("rank-*"))]
    assert [place.phase for place in places].count("train") == 1
    [dead] = [place for place in places if place.phase == "train"]
    assert (dead.round, dead.client) == (1, 2)
    assert dead.pid > 0 and dead.host


def test_failure_everywhere_at_once_is_reported_once(launch, tmp_path):
    job = write_job(tmp_path, model={"name": "parts:net_that_raises_in_training"})
    done = launch(5, "-m", "mpifl.train", job, env=ENV)
    assert done.returncode != 0
    assert done.stderr.count("Traceback") == 1


def test_nonfinite_update_stops_the_job_naming_client_and_round(launch, tmp_path):
    done = launch(3, "-m", "mpifl.train", misbehaving(tmp_path, "nan"), env=ENV)
    assert done.returncode == 1
    assert "mpifl: round 2: pseudo_grad of client 2 is NaN or infinite" in done.stderr
    assert "Traceback" not in done.stderr


def test_failure_does_not_wait_for_a_checkpoint_that_is_being_written(launch, tmp_path):
    job = misbehaving(tmp_path, "nan")
    done = launch(3, "-m", "mpifl.train", job, "data.path=parts:dataset_on_a_slow_disk", "run.save_every=1", env=ENV)
    assert done.returncode == 1
    assert "pseudo_grad of client 2 is NaN or infinite" in done.stderr
    assert seconds_after_start(tmp_path, done) < 10
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == [".round-00000001.part"]


@pytest.mark.parametrize("ranks", [None, 3])
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_ends_the_job_cleanly(launch, tmp_path, ranks, number, status):
    job = misbehaving(tmp_path, "sleep")
    stop = threading.Thread(target=_signal_when_training, args=(tmp_path / "out", number, ranks is None))
    stop.start()
    done = launch(ranks, "-m", "mpifl.train", job, timeout=60, env=ENV)
    stop.join()
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    if ranks is None:
        assert done.returncode == status
        assert done.stderr.count("mpifl: ") == 1
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1


def _signal_when_training(out, number, alone):
    """Send a signal to the launcher (the parent of a rank's parent) or, without one, to the only rank."""
    deadline = time.monotonic() + 25
    while time.monotonic() < deadline:
        for path in out.glob("status/rank-*"):
            place = Whereabouts.read(path)
            if (place.round, place.client, place.phase) == (1, 2, "train"):
                target = place.pid if alone else _launcher_of(place.pid)
                os.kill(target, number)
                if number == signal.SIGTERM:  # the first one asks for the end of the round, which never comes
                    time.sleep(2.2)
                    with suppress(ProcessLookupError):  # Open MPI's launcher ends at the first one
                        os.kill(target, number)
                return
        time.sleep(0.05)


def _launcher_of(pid):
    """The mpirun above a rank: its highest ancestor that is one."""
    found = None
    while pid > 1:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(Path(os.fsdecode(word)).name in ("mpirun", "mpiexec", "mpiexec.hydra", "prterun") for word in words[:2]):
            found = pid
        pid = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    assert found, "no launcher above the rank"
    return found


@pytest.mark.parametrize(  # what else is refused: test_command_line.py
    "argument, says", [("algorithm.mu=-1", "mu is -1"), ("--frobnicate", "--frobnicate")]
)
def test_refusal_is_one_line_from_rank_0_and_status_2(launch, tmp_path, argument, says):
    done = launch(5, "-m", "mpifl.train", write_job(tmp_path), argument, env=ENV)
    lines = [line for line in done.stderr.splitlines() if line.startswith("mpifl: ")]
    assert len(lines) == 1 and says in lines[0]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_launcher_is_an_error_that_says_so(launch, tmp_path):
    done = launch(None, "-m", "mpifl.train", env=ENV | {"PMI_SIZE": None, "OMPI_COMM_WORLD_SIZE": "9"}, cwd=tmp_path)
    assert done.returncode == 2
    assert "started 9 ranks, but MPI sees each of them alone" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    features = {"x": Feature("float32", (6,)), "y": Feature("uint8", (), classes=3)}
    with ShardWriter(tmp_path / "data", features) as writer:
        clients = (
            (
                f"writer-{i}",
                {"x": rng.normal(size=(9, 6)).astype(np.float32), "y": rng.integers(0, 3, 9).astype(np.uint8)},
            )
            for i in range(8)
        )
        writer.write("train", clients)
    return tmp_path / "data"


def test_altered_shard_is_refused_at_first_touch_naming_file_column_and_client(launch, tmp_path, shards):
    file = shards / "train-00000.h5"
    with h5py.File(file, "r+") as opened:
        opened["x"][9 * 5 + 2, 3] += 1
    done = launch(3, "-m", "mpifl.train", write_job(tmp_path, data={"path": str(shards)}), env=ENV)
    assert done.returncode != 0
    assert "train-00000.h5" in done.stderr and "'x'" in done.stderr and "writer-5" in done.stderr


def test_truncated_shard_is_refused_before_training(launch, tmp_path, shards):
    file = shards / "train-00000.h5"
    os.truncate(file, file.stat().st_size - 1)
    done = launch(3, "-m", "mpifl.train", write_job(tmp_path, data={"path": str(shards)}), env=ENV)
    assert done.returncode == 2
    assert "train-00000.h5" in done.stderr
    assert not (tmp_path / "out").exists()


def test_success_exits_0_and_writes_the_summary(launch, tmp_path):
    done = launch(3, "-m", "mpifl.train", write_job(tmp_path), env=ENV)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["ranks"] == 3


def test_rank_that_is_stopped_before_training_ends_the_job(launch, tmp_path):
    job = write_job(tmp_path, data={"path": "parts:dataset_that_stops_rank_1"})
    done = launch(3, "-m", "mpifl.train", job, timeout=40, env=ENV)
    assert done.returncode != 0
    assert "mpifl: terminated" in done.stderr
    assert not (tmp_path / "out").exists()


def test_ranks_with_different_data_are_refused(launch, tmp_path):
    job = write_job(tmp_path, data={"path": "parts:dataset_of_the_process"})
    done = launch(3, "-m", "mpifl.train", job, env=ENV)
    assert done.returncode == 2
    assert done.stderr.count("mpifl: ranks have different datasets") == 1
    assert not (tmp_path / "out").exists()
