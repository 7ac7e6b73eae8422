"""A dead or stuck rank ends the job, which says which one, where it was, and what the others were doing."""

import faulthandler
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mpifl import watchdog
from mpifl.comm import Alone
from mpifl.config import to_toml
from mpifl.engine.clock import ENDED, Clock, Whereabouts
from mpifl.watchdog import Silence, main_stack, spoken, stacks_file, told_together, watched, watches

TESTS = Path(__file__).parent
PLAY = TESTS / "play.py"
ENV = {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
LEAVE = """
import os, sys
from pathlib import Path
from mpifl.engine.clock import Clock
clock = Clock(1)
clock.round, clock.client = 4, 7
clock.enter(sys.argv[2])
clock.attach(Path(sys.argv[1]), 2)
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "status").mkdir()
    return tmp_path


class Two(Alone):
    """Rank 0 of two, as far as the watchdog asks; `ended` is set when it ends the job."""

    size = 2

    def __init__(self):
        self.ended, self.statuses = threading.Event(), []

    def abort(self, status):
        self.statuses.append(status)
        self.ended.set()


@pytest.fixture
def hasty(monkeypatch):
    """No patience, and nothing that ends this process."""
    for name, seconds in (("LOOK", 0.05), ("GRACE", 0.2), ("ANSWER", 0.1)):
        monkeypatch.setattr(watchdog, name, seconds)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)


def leave_rank_1(run, phase):
    """Whereabouts of a rank 1 that is gone."""
    file = run / "status" / "rank-00001"
    subprocess.run([sys.executable, "-c", LEAVE, file, phase], check=True, cwd=TESTS.parent)
    return file.read_bytes()


def record(beat, pulse=0.0):
    return Whereabouts(0, 1, None, "train", 0, 0, 0, 0.0, beat, pulse)


def test_silence_is_measured_by_the_own_clock_whatever_another_machine_says_the_time_is():
    silence, start = Silence(2, every=1.0), time.monotonic()
    silence.looked = start
    for second in range(1, 6):  # rank 0's clock runs an hour behind and slowly; rank 1 has stopped
        silence.look([record(second / 1e3 - 3600, 9.0), record(7.0, second)], start + second)
    assert silence.work == [0.0, 4.0]
    assert silence.process == [4.0, 0.0]
    silence.look([record(1.0), record(8.0)], start + 6)
    assert silence.work == [0.0, 0.0]


def test_who_was_suspended_with_all_others_does_not_complain_of_them():
    silence = Silence(1, every=1.0)
    for now in (1, 2, 3600):
        silence.look([record(7.0)], silence.looked + 1 if now < 3 else silence.looked + now)
    assert silence.work == [1.0 + 2.0]


def test_a_rank_that_has_not_started_is_silent_from_the_beginning():
    silence = Silence(1, every=1.0)
    for _ in range(3):
        silence.look([None], silence.looked + 1)
    assert silence.work == [3.0]


@pytest.mark.parametrize("ranks", [1, 2, 7, 8, 9, 12, 100, 1000])
def test_a_few_ranks_evenly_spread_look_after_all(ranks):
    who = [rank for rank in range(ranks) if watches(rank, ranks)]
    assert who[0] == 0 and len(who) == min(8, ranks)
    assert max(b - a for a, b in zip(who, [*who[1:], ranks])) <= -(-ranks // 8)


def test_a_rank_whose_process_is_gone_ends_the_job(run, hasty, capfd):
    comm, clock = Two(), Clock(0)
    left = leave_rank_1(run, "load")
    with watched(comm, clock, run):
        (run / "status" / "rank-00001").write_bytes(left)  # what an earlier start had left there was removed
        clock.enter("wait")
        assert comm.ended.wait(5)
    place = f"rank 1 on {socket.gethostname()} (pid {Whereabouts.read(run / 'status' / 'rank-00001').pid}), "
    place += "phase load, round 5, client 7: its process is gone"
    said = capfd.readouterr().err
    assert "mpifl: a rank is dead; the job ends:" in said and place in said
    assert "test_a_rank_whose_process_is_gone_ends_the_job" in said  # rank 0's own stack
    assert comm.statuses == [1]
    [report] = run.glob("failure-*.txt")
    assert place in report.read_text()


@pytest.mark.parametrize(("phase", "stall_timeout"), [(ENDED, 0.3), ("load", 0.0)])
def test_a_rank_that_left_in_order_or_has_not_been_gone_long_ends_nothing(
    run, hasty, monkeypatch, phase, stall_timeout
):
    if phase != ENDED:
        monkeypatch.setattr(watchdog, "GRACE", 60)
    comm, clock = Two(), Clock(0)
    left = leave_rank_1(run, phase)
    with watched(comm, clock, run, stall_timeout):
        (run / "status" / "rank-00001").write_bytes(left)
        for _ in clock.beating(range(20)):
            time.sleep(0.05)
    assert not comm.statuses


def test_within_the_block_a_rank_can_be_found_and_asked_for_stacks_and_afterwards_nothing_runs(run):
    (run / "status" / "rank-00008").touch()
    (run / "status" / "alarm").touch()
    clock, comm, threads = Clock(0), Alone(), threading.active_count()
    with watched(comm, clock, run):
        assert {path.name for path in (run / "status").iterdir()} == {"rank-00000", "stacks-00000.txt"}
        assert threading.active_count() == threads + 1
        [place] = Whereabouts.of_run(run)
        comm.beat()
        assert Whereabouts.of_run(run)[0].beat > place.beat
        os.kill(os.getpid(), signal.SIGUSR2)
        stack = main_stack(stacks_file(run / "status", 0))
        assert re.search(r"in test_within_the_block", stack[0]) and "test_watchdog.py" in stack[0]
        time.sleep(0.1)
        assert Whereabouts.of_run(run)[0].pulse > place.pulse
    assert threading.active_count() == threads
    assert Whereabouts.of_run(run)[0].phase == ENDED
    with pytest.raises(ZeroDivisionError), watched(comm, clock, run):
        clock.enter("train")
        1 / 0  # noqa: B018
    assert Whereabouts.of_run(run)[0].phase == "train"
    assert threading.active_count() == threads


def test_stacks_are_told_once_for_all_ranks_that_have_them():
    waiting, training = ["in wait", "in main"], ["in step", "in main"]
    stacks = {0: waiting, 1: waiting, 2: training, 3: waiting, 4: waiting, 5: [], 7: []}
    assert told_together(stacks) == [
        *("  rank 2:", "    in step", "    in main"),
        *("  ranks 0-1, 3-4:", "    in wait", "    in main"),
        "  ranks 5, 7: no answer",
    ]
    assert [spoken(ranks) for ranks in ([3], [1, 2, 3], [0, 2])] == ["rank 3", "ranks 1-3", "ranks 0, 2"]


def test_of_a_file_of_stacks_the_main_threads_last_one_counts(tmp_path):
    dump = """
2026-01-01 10:00:00 rank 1, phase wait
Current thread 0x00007f61 (most recent call first):
  File "watchdog.py", line 3 in run

Thread 0x00007f62 (most recent call first):
  File "%s", line 1 in step
  File "train.py", line 2 in main
"""
    file = tmp_path / "stacks"
    assert main_stack(file) == []
    file.write_text(dump % "first.py")
    assert main_stack(file) == ['File "first.py", line 1 in step', 'File "train.py", line 2 in main']
    size = file.stat().st_size
    assert main_stack(file, size) == []
    with file.open("a") as opened:
        opened.write(dump % "second.py")
    assert main_stack(file, size)[0] == 'File "second.py", line 1 in step' == main_stack(file)[0]


def play(launch, out, ranks, rank, phase, what, stall_timeout=1, way="auto"):
    done = launch(ranks, PLAY, out, stall_timeout, way, rank, phase, what, timeout=40, env=ENV)
    ended = time.time()
    return done, ended - (out / "acted").stat().st_mtime


@pytest.mark.launches
@pytest.mark.parametrize(
    ("rank", "phase", "what", "way", "why"),
    [
        (2, "train", "stop", "auto", "stopped"),
        (0, "wait", "stop", "flat", "stopped"),
        (1, "train", "hold", "auto", ""),
    ],
)
def test_a_stuck_rank_is_named_and_ends_the_job_with_the_stacks_of_all_that_answer(
    launch, tmp_path, rank, phase, what, way, why
):
    done, seconds = play(launch, tmp_path, 3, rank, phase, what, way=way)
    assert done.returncode != 0 and seconds < 10
    [where] = re.findall(r"^  (rank \d on .*)$", done.stderr, re.MULTILINE)
    place = f"rank {rank} on {socket.gethostname()} (pid {Whereabouts.of_run(tmp_path)[rank].pid}), phase {phase}"
    assert where.startswith(f"{place}, round 3{f', client {rank}' if rank else ''}: silent for ") and where.endswith(
        why
    )
    assert done.stderr.count("no sign of life for 1 s (run.stall_timeout)") == 1
    assert (f"  rank {rank}: no answer" in done.stderr) == (what == "stop")
    assert ("in hold_the_interpreter" in done.stderr) == (what == "hold")
    others = [other for other in range(3) if other != rank]
    for other in others:
        assert "in _wait" in "".join(main_stack(stacks_file(tmp_path / "status", other)))
    [report] = tmp_path.glob("failure-*.txt")
    assert where in report.read_text()


@pytest.mark.launches
def test_a_server_that_is_stopped_while_it_scores_ends_a_real_job(launch, tmp_path):
    table = {
        "rounds": 4,
        "data": {"path": "bombs:dataset"},
        "model": {"name": "parts:net_with_dropout"},
        "algorithm": {"name": "fedavg", "batches": {"size": 4}},
        "run": {"scored_by": "server", "stall_timeout": 1.5},
    }
    (tmp_path / "job.toml").write_text(to_toml(table))
    (tmp_path / "used").mkdir()
    bomb = {"BOMBS": "0 evaluate 2 SIGSTOP", "BOMBS_USED": str(tmp_path / "used")}
    done = launch(2, "-m", "mpifl.train", "job.toml", "run.out=out", cwd=tmp_path, env=ENV | bomb, timeout=60)
    assert done.returncode != 0 and time.time() - (tmp_path / "used" / "0").stat().st_mtime < 10
    assert re.search(r"rank 0 on .*, phase evaluate/load, round 3, client 0: silent for .*, stopped", done.stderr)


@pytest.mark.launches
def test_a_rank_alone_notices_that_its_work_is_stuck_and_a_long_visit_is_not(launch, tmp_path):
    done, _ = play(launch, tmp_path, None, 0, "train", "nothing", stall_timeout=0.25)
    assert (done.returncode, done.stderr) == (0, "")
    done, seconds = play(launch, tmp_path, None, 0, "train", "loop", stall_timeout=0.25)
    assert done.returncode == 1 and seconds < 5
    assert "client 0: silent for" in done.stderr and "its process runs" in done.stderr
    assert "in loop_for_ever" in done.stderr
