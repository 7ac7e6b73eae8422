"""`python -m mpifl.supervise`: a job that dies is started again, and goes on to the same end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MPI_SETTINGS, find_mpirun, what_is_missing

from mpifl import run
from mpifl.config import UserError, to_toml
from mpifl.process import _stat
from mpifl.status import Status
from mpifl.supervise import MARK, main, run_folder, shared_memory_of

TESTS = Path(__file__).parent
ENV = os.environ | MPI_SETTINGS | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
ATTEMPT = 'n=$(($(cat n || echo 0) + 1)); echo $n > n; eval "$(sed -n ${n}p plan)"'
CHECKPOINT = "mkdir -p out/checkpoints/round-0000000{0}; touch out/checkpoints/round-0000000{0}/COMPLETE"
HOLD = """
import mmap, sys, time
with open(sys.argv[1], "w+b") as file:
    file.write(bytes(4096))
    file.flush()
    mapped = mmap.mmap(file.fileno(), 4096)
    open(sys.argv[2], "w").close()
    time.sleep(1000)
"""


@pytest.fixture
def supervise(tmp_path, monkeypatch):
    """`main` in a working directory of its own; handlers of signals are put back afterwards."""
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    monkeypatch.chdir(tmp_path)
    yield main
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.fixture
def attempts(supervise, tmp_path, capfd):
    """Supervise a job of which each start does one line of shell; returns the exit status, starts and what was said."""
    (tmp_path / "out").mkdir()

    def attempts(*plan, restarts=3):
        (tmp_path / "plan").write_text("\n".join(plan))
        (tmp_path / "n").write_text("0")
        status = supervise(["--restarts", str(restarts), "sh", "-c", ATTEMPT, "run.out=out"])
        return status, int((tmp_path / "n").read_text()), capfd.readouterr().err

    return attempts


def test_success_is_a_summary_that_was_written_whatever_the_launcher_says(attempts, tmp_path):
    assert attempts("exit 9", "exit 0", "touch out/summary.json; exit 137")[:2] == (0, 3)
    os.utime(tmp_path / "out" / "summary.json", (1, 1))  # of an earlier run
    assert attempts("exit 0")[:2] == (0, 1)
    assert attempts("exit 1", "cut -d ' ' -f 6 /proc/$$/stat > session")[:2] == (0, 2)
    assert int((tmp_path / "session").read_text()) != os.getsid(0)  # Ctrl-C reaches it once


@pytest.mark.parametrize("status", [2, 75, 130, 143])
def test_what_was_refused_or_asked_for_is_not_started_again(attempts, status):
    assert attempts(f"exit {status}", "touch out/summary.json")[:2] == (status, 1)


def test_it_gives_up_when_restarts_bring_no_checkpoint_and_not_before(attempts):
    status, starts, said = attempts(*["exit 7"] * 9, restarts=2)
    assert (status, starts) == (7, 3)
    assert said.count("starting it again from the beginning") == 2
    assert "giving up: 2 restarts brought no new checkpoint" in said
    plan = ["exit 7", "exit 7", f"{CHECKPOINT.format(4)}; exit 7", "exit 7", "exit 7", "kill -9 $$", "touch never"]
    status, starts, said = attempts(*plan, restarts=2)
    assert (status, starts) == (137, 6)
    assert said.count("starting it again after round 4") == 3
    assert attempts("exit 0", "touch never", restarts=0)[:2] == (1, 1)


@pytest.mark.parametrize(
    ("traps", "sent", "status"),
    [
        ("trap 'exit 75' USR1", [signal.SIGTERM], 75),
        ("trap 'exit 75' USR1", [signal.SIGUSR1], 75),
        ("trap 'exit 1' USR1", [signal.SIGTERM], 1),  # a failure on the way out: stopping was asked for
        ("trap 'touch out/warned' USR1; trap 'exit 143' TERM", [signal.SIGTERM, signal.SIGTERM], 143),
        ("trap 'exit 130' INT", [signal.SIGINT], 130),
    ],
)
def test_signals_reach_the_job_sigterm_first_as_the_one_that_every_launcher_passes_on(tmp_path, traps, sent, status):
    (tmp_path / "out").mkdir()
    script = f"{traps}; echo >> started; for n in $(seq 500); do sleep 0.02; done"
    command = [sys.executable, "-m", "mpifl.supervise", "sh", "-c", script, "run.out=out"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENV) as process:
        try:
            await_(lambda: (tmp_path / "started").exists())
            for number, one in enumerate(sent):
                if number:
                    await_(lambda: (tmp_path / "out" / "warned").exists())
                process.send_signal(one)
            assert process.wait(10) == status
        finally:
            process.kill()
    assert (tmp_path / "started").read_text() == "\n"


def await_(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_launcher_leaves_behind_is_killed_and_its_shared_memory_removed(attempts, tmp_path):
    ours, others = (Path(f"/dev/shm/mpich_shm_test_{os.getpid()}_{who}") for who in ("ours", "others"))
    (tmp_path / "hold.py").write_text(HOLD)
    hold = f"setsid {sys.executable} hold.py"
    with subprocess.Popen([sys.executable, tmp_path / "hold.py", others, tmp_path / "held"]) as other:
        try:
            leave = f"{hold} {ours} left & while ! test -e left; do sleep 0.01; done; echo $! > pid; exit 1"
            assert attempts(leave, "touch out/summary.json")[:2] == (0, 2)
            assert (_stat((tmp_path / "pid").read_text().strip()) or "Z")[0] == "Z"
            await_(lambda: (tmp_path / "held").exists())
            assert shared_memory_of(other.pid) == [str(others)]
            assert other.poll() is None and others.exists() and not ours.exists()
        finally:
            other.kill()
            others.unlink(missing_ok=True)
            ours.unlink(missing_ok=True)


def test_the_run_folder_is_the_last_one_named_or_the_job_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text('[run]\nout = "there"\n')
    (tmp_path / "other.toml").write_text("rounds = 3\n")
    launcher = ["mpirun", "-n", "3", "python", "-m", "mpifl.train"]
    assert run_folder([*launcher, "job.toml"]) == Path("there")
    assert run_folder([*launcher, "job.toml", "run.out=a", 'run.out="b"']) == Path("b")
    for words in ([], ["other.toml"], ["missing.toml"], ["run.out="], ['run.out=""']):
        with pytest.raises(UserError, match=r"add run\.out=FOLDER"):
            run_folder([*launcher, *words])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "which command?"),
        (["--restarts", "-1", "true", "run.out=x"], "--restarts is -1"),
        (["true"], "add run.out=FOLDER"),
        (["no-such-command", "run.out=x"], "there is no command no-such-command"),
        (["--frobnicate", "true"], "--help"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(supervise, capsys, arguments, says):
    assert supervise(arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_job_that_is_to_be_started_again_is_refused_where_nobody_would(tmp_path, monkeypatch):
    job = {"rounds": 1, "model": {"name": "logistic"}, "algorithm": {"name": "fedavg", "batches": {"size": 10}}}
    job["run"] = {"on_rank_failure": "restart", "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"needs a supervisor: .*python -m mpifl\.supervise"):
        run(job)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv(MARK, "1")
    assert run(job)["rounds"] == 1


@pytest.mark.launches
def test_a_job_that_loses_a_host_and_then_its_server_ends_with_the_bits_of_an_undisturbed_one(launch, tmp_path):
    if missing := what_is_missing():
        pytest.skip(missing)
    table = {
        "rounds": 6,
        "data": {"path": "bombs:dataset"},
        "model": {"name": "parts:net_with_dropout"},
        "algorithm": {"name": "scaffold", "client_lr": 0.1, "batches": {"size": 4}},
        "run": {"save_every": 2, "on_rank_failure": "restart"},
    }
    (tmp_path / "job.toml").write_text(to_toml(table))
    (tmp_path / "used").mkdir()
    bombs = {"BOMBS": "1 train 3 SIGKILL, 0 checkpoint 5 SIGKILL", "BOMBS_USED": str(tmp_path / "used")}
    command = ["-m", "mpifl.supervise", find_mpirun(), "-n", "2", sys.executable, "-m", "mpifl.train", "job.toml"]
    done = launch(None, *command, "run.out=out", cwd=tmp_path, env=ENV | bombs, timeout=90)
    assert done.returncode == 0
    first = re.findall(r"comes first:\n  (rank .*): silent since", done.stderr)
    where = [("1", "train", "round 4, client"), ("0", "checkpoint", "round 6")]
    for (rank, phase, place), told in zip(where, first, strict=True):
        assert re.match(rf"rank {rank} on {socket.gethostname()} \(pid \d+\), phase {phase}, {place}", told)
    assert re.findall(r"starting it again after round (\d)", done.stderr) == ["2", "4"]
    assert Status.of(tmp_path / "out").state == "finished"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    plain = run(table | {"data": {"path": "parts:awkward_dataset"}, "run": {"out": str(tmp_path / "undisturbed")}})
    assert all(summary[name] == plain[name] for name in ("digest", "memory_digest", "scores"))
