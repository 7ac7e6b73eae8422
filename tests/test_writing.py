"""Converting with many processes or ranks, interrupted for real: the same bytes, or nothing that looks finished."""

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import Job
from noise import PIECES

from data_prep.__main__ import main
from data_prep.conversion import MOST_PIECES, PIECE_BYTES, Split, ranges
from data_prep.reshard import cut
from data_prep.writing import Progress, key_of
from mpifl import run
from mpifl.data.shard import Dataset, embedded

TESTS = Path(__file__).parent
ENV = {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
CODE = "import noise; noise.run()"


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".h5"}


def words(out, *options, jobs=2):
    return ["-c", CODE, "--out", str(out), "--shard-mb", "1", "--jobs", str(jobs), *map(str, options)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What an undisturbed conversion writes: name -> bytes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(None, words(folder / "out", jobs=1), folder, ENV)
    assert job.wait(60) and job.process.returncode == 0, job.text("stderr")
    job.end()
    found = bytes_of(folder / "out")
    assert len(found) == 2 * PIECES + 2  # two shards of each piece, one of the central split, and the index
    return found


@contextmanager
def held(tmp_path, *options, jobs=2, first=3):
    """A conversion whose pieces from `first` on wait half done; all before are complete."""
    hold = tmp_path / "hold"
    hold.touch()
    (tmp_path / "log").mkdir(exist_ok=True)
    environment = ENV | {"NOISE_HOLD": str(hold), "NOISE_FROM": str(first)}
    job = Job(None, words(tmp_path / "out", *options, jobs=jobs), tmp_path / "log", environment)
    try:
        while len(waiting(tmp_path)) < min(jobs, PIECES - first):
            assert job.process.poll() is None and job.seconds < 60, job.text("stderr")
            time.sleep(0.01)
        yield job
    finally:
        hold.unlink(missing_ok=True)
        job.end()
        for file in tmp_path.glob("hold.*"):
            file.unlink()


def waiting(tmp_path):
    """Process -> the piece that it waits in."""
    return {int(path.read_text() or 0): path.suffix for path in tmp_path.glob("hold.*")}


def gone(job, seconds=5.0):
    """Whether no process of the job is left, soon."""
    end = time.monotonic() + seconds
    while job.processes() and time.monotonic() < end:
        job.process.poll()
        time.sleep(0.01)
    return not job.processes()


def converted(launch, tmp_path, *options, jobs=2, ranks=None):
    done = launch(ranks, *words(tmp_path / "out", *options, jobs=jobs), env=ENV)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
    assert not {"lock", "key"} & {path.name for path in (tmp_path / "out").iterdir()}
    return done


def speaks_once(stderr, line):
    """Whether the line is all that mpifl says; Open MPI's launcher adds words of its own."""
    return stderr.startswith(line) and stderr.count("mpifl: ") == 1


def kept_pieces(tmp_path):
    """Shards of complete pieces in the unfinished folder: by inode, as they will have other names."""
    partial = tmp_path / "out.partial"
    marks = [path.stem for path in partial.glob("*.done")]
    return len(marks), {path.stat().st_ino for mark in marks for path in partial.glob(f"{mark}.*.h5")}


def shards_of(tmp_path):
    return {path.stat().st_ino for path in (tmp_path / "out").glob("*-*.h5")}


def nothing_looks_finished(tmp_path):
    return not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / "index.h5").exists()


@pytest.mark.launches
@pytest.mark.parametrize(("ranks", "jobs"), [(None, 2), (3, 1)])
def test_processes_and_ranks_write_the_same_bytes(launch, tmp_path, undisturbed, ranks, jobs):
    converted(launch, tmp_path, jobs=jobs, ranks=ranks)
    assert bytes_of(tmp_path / "out") == undisturbed


@pytest.mark.launches
def test_killed_conversion_goes_on_from_its_complete_pieces(launch, tmp_path, undisturbed):
    with held(tmp_path) as job:
        os.kill(job.process.pid, signal.SIGKILL)
        assert gone(job)  # no worker writes on, though both wait in a piece
        assert nothing_looks_finished(tmp_path)
    count, shards = kept_pieces(tmp_path)
    assert (count, len(shards)) == (3, 6)
    assert len(list((tmp_path / "out.partial").glob("train.0000[34].*.h5"))) == 2  # half of two more
    done = converted(launch, tmp_path)
    assert done.stderr.startswith("3 pieces of an interrupted conversion are kept\n")
    assert shards < shards_of(tmp_path)
    assert bytes_of(tmp_path / "out") == undisturbed


@pytest.mark.launches
def test_killed_worker_ends_the_conversion_with_a_message_and_keeps_pieces(launch, tmp_path, undisturbed):
    with held(tmp_path) as job:
        os.kill(min(waiting(tmp_path)), signal.SIGKILL)
        assert job.wait(10) and job.process.returncode == 2
        said = job.text("stderr")
        assert "a process was killed while it converted" in said and "--jobs" in said and said.count("\n") == 1
        assert gone(job) and nothing_looks_finished(tmp_path)
    count, shards = kept_pieces(tmp_path)
    assert count == 3
    converted(launch, tmp_path, jobs=1)  # in another number of processes
    assert shards < shards_of(tmp_path) and bytes_of(tmp_path / "out") == undisturbed


@pytest.mark.launches
@pytest.mark.parametrize(
    ("number", "jobs", "first", "status", "says"),
    [
        (signal.SIGTERM, 2, 3, 143, "terminated"),
        (signal.SIGINT, 2, 3, 130, "interrupted"),
        (signal.SIGTERM, 1, 0, 143, "terminated"),
    ],
)
def test_signal_ends_the_conversion_in_one_line(tmp_path, number, jobs, first, status, says):
    with held(tmp_path, jobs=jobs, first=first) as job:
        # Ctrl-C goes to all processes of the terminal.
        os.killpg(job.process.pid, number) if number == signal.SIGINT else os.kill(job.process.pid, number)
        assert job.wait(10) and job.process.returncode == status
        said = job.text("stderr")
        assert said.startswith(f"mpifl: {says}") and said.count("\n") == 1
        assert gone(job) and nothing_looks_finished(tmp_path)
    assert kept_pieces(tmp_path)[0] == first
    assert (f"the same command goes on from what is in {tmp_path / 'out.partial'}" in said) == (first > 0)
    assert (tmp_path / "out.partial").exists() == (first > 0)  # with no complete piece there is nothing to keep


@pytest.mark.launches
def test_second_conversion_into_the_same_folder_is_refused(launch, tmp_path, undisturbed):
    with held(tmp_path) as job:
        before = sorted((path.name, path.stat().st_size) for path in (tmp_path / "out.partial").iterdir())
        for ranks in (None, 2):
            second = launch(ranks, *words(tmp_path / "out", "--seed", 1), env=ENV)
            said = f"mpifl: {tmp_path / 'out'} is being made by another process; wait for it, or end it\n"
            assert second.returncode == 2 and speaks_once(second.stderr, said)
        assert before == sorted((path.name, path.stat().st_size) for path in (tmp_path / "out.partial").iterdir())
        (tmp_path / "hold").unlink()
        assert job.wait(30) and job.process.returncode == 0
    assert bytes_of(tmp_path / "out") == undisturbed


@pytest.mark.launches
@pytest.mark.parametrize(("ranks", "jobs"), [(None, 2), (2, 1)])
def test_bad_value_in_a_piece_is_one_line_and_other_pieces_are_kept(launch, tmp_path, ranks, jobs):
    done = launch(ranks, *words(tmp_path / "out", "--fail", 4, jobs=jobs), env=ENV)
    said = "mpifl: split 'train', client 'client-4-2', column 'y': row 1 holds 10, labels must be 0 to 9\n"
    assert done.returncode == 2 and speaks_once(done.stderr, said)
    # Of the four before it, another process may have been in the middle of one.
    assert nothing_looks_finished(tmp_path) and 3 <= kept_pieces(tmp_path)[0] < PIECES


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
import noise; noise.run()
"""


@pytest.mark.launches
@pytest.mark.parametrize(
    ("limit", "compression", "jobs"),
    [(5000, "", 1), (500_000, "", 2), (500_000, "gzip", 1)],  # full from the start; in the middle of the first shard
)
def test_full_disk_is_one_line_that_names_the_file(tmp_path, limit, compression, jobs):
    (tmp_path / "log").mkdir()
    argv = ["-c", FULL.format(limit=limit), *words(tmp_path / "out", jobs=jobs)[2:], "--compression", compression]
    job = Job(None, argv, tmp_path / "log", ENV)
    assert job.wait(30) and gone(job)
    job.end()
    said = job.text("stderr")
    assert (job.process.returncode, said.count("\n")) == (2, 1)
    assert f"{tmp_path / 'out.partial' / 'train.0000'}" in said and "cannot be written: File too large" in said
    assert list(tmp_path.glob("out*")) == []


# ---- pieces


@pytest.mark.parametrize("shard_mb", [1, 4, 256])
@pytest.mark.parametrize(
    "sizes", [[0] * 5, [3000] * 2003, [1 << 21] * 300, [1 << 23, 5, 0, 70, 1 << 20, 1 << 20, 9] * 9]
)
def test_pieces_fill_shards_or_leave_work_for_all_cores(sizes, shard_mb):
    parts, total = ranges(np.array(sizes), shard_mb), sum(sizes)
    assert [client for part in parts for client in part] == list(range(len(sizes)))
    held = [sum(sizes[part.start : part.stop]) for part in parts]
    shard, share = shard_mb << 20, max(PIECE_BYTES, total / MOST_PIECES)
    assert all(len(part) and (size <= shard or len(part) == 1) for part, size in zip(parts, held))
    # The next client would not fit into the shard, or there is enough.
    assert all(size + sizes[part.stop] > min(shard, share) for part, size in zip(parts[:-1], held))
    assert all(size <= 2 * share + max(sizes) for size in held)


def test_pieces_are_alike_where_clients_are():
    assert [len(part) for part in ranges(np.full(999, PIECE_BYTES // 240))] == [250, 250, 250, 249]
    assert ranges(np.array([], int)) == [range(0)]


# ---- what makes it the same conversion


def test_a_conversion_is_the_same_if_asked_for_alike_of_the_same_files(tmp_path):
    source, unfinished = tmp_path / "in", tmp_path / "in" / "out.partial"
    (source / "b").mkdir(parents=True)
    (source / "b" / "1.csv").write_text("1")
    first = key_of(["table"], [source], unfinished)
    unfinished.mkdir()
    (unfinished / "train.00000.done").write_text("1")  # an interrupted one left this, in its own source
    assert key_of(["table"], [source], unfinished) == first
    assert key_of(["table", "--seed", "1"], [source], unfinished) != first
    assert key_of(["table"], [source], tmp_path / "out.partial") != first
    (source / "b" / "1.csv").write_text("12")
    second = key_of(["table"], [source], unfinished)
    os.utime(source / "b" / "1.csv", ns=(0, 0))
    third = key_of(["table"], [source], unfinished)
    (source / "b" / "2.csv").write_text("")
    assert len({first, second, third, key_of(["table"], [source], unfinished)}) == 4
    assert key_of(["table"], [source / "b" / "1.csv"], unfinished) != key_of(["table"], [source / "b"], unfinished)


def test_progress_is_of_the_clients_that_this_process_has_left(capsys):
    splits = Split("train", range(4), iter, clients=100), Split("test", [0], iter, central=True)
    progress = Progress([(splits[0], 2), (splits[0], 3), (splits[1], 0)], kept=2, rank=0)
    progress.shown = -100.0
    progress.add(20)
    assert "2 pieces of an interrupted" in (said := capsys.readouterr().err) and "20 of 50 clients" in said


# ---- reshard


@pytest.mark.parametrize("shards", [1, 3, 20])
def test_reshard_keeps_clients_their_order_and_the_digest(tmp_path, shards, capsys):
    arguments = [str(embedded("digits")), "--out", str(tmp_path / "d"), "--shards", str(shards), "--jobs", "1"]
    assert main(["reshard", *arguments, "--compression", "gzip"]) == 0
    said = capsys.readouterr().out
    assert f"train {shards})" in said and f"python -m data_prep report {tmp_path / 'd'} --png FILE draws it" in said
    source, made = Dataset(embedded("digits")), Dataset(tmp_path / "d")
    assert made.digest == source.digest == made.recomputed_digest()
    assert (len(made.shards("train")), made.provenance) == (shards, source.provenance)
    assert made.ids("train").tolist() == source.ids("train").tolist()
    for index in range(100):
        expected = source.client("train", index)
        assert all((made.client("train", index)[name] == rows).all() for name, rows in expected.items())
    sizes = [sum(made.sizes("train")[clients]) for _, clients in made.shards("train")]
    assert all(abs(size - 1437 / shards) <= 15 for size in sizes)  # the largest client
    source.close()
    made.close()


def test_training_gives_the_same_digest_on_other_shards(tmp_path):
    arguments = [str(embedded("digits")), "--out", str(tmp_path / "d"), "--shards", "4", "--jobs", "1"]
    assert main(["reshard", *arguments]) == 0
    digests = set()
    for name, path in (("a", "digits"), ("b", str(tmp_path / "d"))):
        job = {
            "rounds": 3,
            "cohort": 10,
            "data": {"path": path},
            "model": {"name": "mlp"},
            "algorithm": {"name": "fedavg", "batches": {"size": 4}},
            "run": {"out": str(tmp_path / name), "eval_every": 3},
        }
        digests.add(run(job)["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--shards", "0"], "both must be at least 1"),
        (["--shards", "2", "--jobs", "0"], "both must be at least 1"),
        (["--shards", "2", "--compression", "zip"], "zip"),
        ([], "--shards"),
    ],
)
def test_reshard_refuses_the_impossible(tmp_path, capsys, options, problem):
    assert main(["reshard", str(embedded("digits")), "--out", str(tmp_path / "d"), *options]) == 2
    said = capsys.readouterr().err
    assert problem in said and said.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_shards_that_memory_would_not_hold_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.reshard.LARGEST_SHARD", 1437 * 65 / 3.5)
    arguments = ["reshard", str(embedded("digits")), "--out", str(tmp_path / "d"), "--jobs", "1", "--shards"]
    assert main([*arguments, "2"]) == 2
    assert "ask for at least 4" in capsys.readouterr().err
    assert main([*arguments, "4"]) == 0


@pytest.mark.parametrize("sizes", [[3], [0, 0, 0, 0], [5, 1, 1, 1, 9, 0, 0, 2], [1] * 50])
@pytest.mark.parametrize("shards", [1, 2, 3, 8, 60])
def test_cut_gives_every_client_once_in_order(sizes, shards):
    parts = cut(np.array(sizes), shards)
    assert [client for part in parts for client in part] == list(range(len(sizes)))
    assert len(parts) == min(shards, len(sizes)) and all(parts)
