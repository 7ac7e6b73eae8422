"""The run folder's lock: one job has it, a dead one does not keep it, and whoever lost it notices."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpifl import lock
from mpifl.config import UserError
from mpifl.lock import Holder, Lock, locked

ROOT = Path(__file__).parent.parent
TAKE = """
import sys, time
from pathlib import Path
from mpifl import lock
lock.HEARTBEAT = 0.05
lock.Lock.take(Path(sys.argv[1]), lambda text: print("lost", text, flush=True))
print("taken", flush=True)
sys.stdin.read()
"""
RACE = """
import sys, time
from pathlib import Path
from mpifl.config import UserError
from mpifl.lock import Lock
folder, start, trials = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
held = []
for trial in range(trials):
    while time.time() < start + 0.01 * trial:
        pass
    try:
        held.append(Lock.take(folder / str(trial), print))
        print(trial)
    except UserError:
        pass
print("done", flush=True)
sys.stdin.read()
"""


def nobody(text):
    raise AssertionError(text)


def start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


@contextmanager
def job(folder):
    """Another process that has the lock."""
    with start(TAKE, folder) as process:
        try:
            assert process.stdout.readline() == "taken\n"
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def of_another_machine(folder, **changes):
    """Make the lock's file say that its holder is elsewhere; a heartbeat of its own goes on."""
    path = Holder.of(folder).path
    told, heartbeat = json.loads(path.read_text()), path.stat().st_mtime
    told["process"]["machine"] += 1
    path.write_text(json.dumps(told | changes))
    os.utime(path, (heartbeat, heartbeat))
    return path


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_second_job_is_refused_while_the_first_runs_and_not_after_it(tmp_path):
    with job(tmp_path) as first:
        with pytest.raises(UserError, match=f"another job is running: pid {first.pid} on .*run.out"):
            Lock.take(tmp_path, nobody)
        assert Holder.of(tmp_path).alive()
    with locked(tmp_path, nobody), pytest.raises(UserError, match=f"pid {os.getpid()}"):
        Lock.take(tmp_path, nobody)
    assert not Holder.of(tmp_path).alive()
    with locked(tmp_path, nobody):
        assert Holder.of(tmp_path).alive()
        assert len(list((tmp_path / "lock").iterdir())) == 1


def test_a_killed_holder_and_a_reused_pid_do_not_keep_the_lock(tmp_path):
    with job(tmp_path) as first:
        first.kill()
        first.wait()
    with locked(tmp_path, nobody) as mine:
        pass
    told = json.loads(mine.path.read_text())
    told["process"]["started"] -= 1  # this process's pid, but it is another process
    mine.path.write_text(json.dumps(told))
    with locked(tmp_path, nobody, nobody):
        pass


def test_a_stopped_holder_on_this_machine_keeps_it(tmp_path):
    with job(tmp_path) as first:
        first.send_signal(signal.SIGSTOP)
        age(Holder.of(tmp_path).path, 1000)
        with pytest.raises(UserError, match="another job is running"):
            Lock.take(tmp_path, nobody)


def test_a_holder_elsewhere_keeps_it_as_long_as_its_heart_beats(tmp_path):
    said = []
    with job(tmp_path):
        of_another_machine(tmp_path)
        began = time.monotonic()
        with pytest.raises(UserError, match="another job is running"):
            Lock.take(tmp_path, nobody, said.append)
        assert time.monotonic() - began < 5
    assert len(said) == 1 and "waiting up to 60 s" in said[0]


def test_a_silent_holder_elsewhere_loses_it_after_a_minute_of_the_file_systems_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOOK", 0.01)
    real = time.time
    said = []
    with locked(tmp_path, nobody) as gone:
        pass
    for silent, waits in ((lock.STALE + 1, False), (lock.STALE - 0.6, True)):
        path = of_another_machine(tmp_path)
        age(path, silent)
        monkeypatch.setattr(time, "time", lambda: real() + 3600)  # this machine's clock is wrong
        began = time.monotonic()
        with locked(tmp_path, nobody, said.append) as gone:
            assert bool(said) == waits and (not waits or time.monotonic() - began > 0.02)
            assert not path.exists() and gone.path.name > path.name
        monkeypatch.setattr(time, "time", real)


def test_a_holder_whose_clock_is_ahead_is_waited_for_no_longer_than_that(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOOK", 0.01)
    monkeypatch.setattr(lock, "STALE", 0.2)
    with locked(tmp_path, nobody):
        pass
    age(of_another_machine(tmp_path), -3600)
    with locked(tmp_path, nobody, print):
        pass


def test_a_requeued_slurm_job_need_not_wait_for_itself(tmp_path, monkeypatch):
    with locked(tmp_path, nobody):
        pass
    fresh = of_another_machine(tmp_path, job="Slurm job 7", restart=1)
    os.utime(fresh)
    for id, restart, alive in (("7", "2", False), ("7", "1", True), ("8", "2", True), ("7", "", True)):
        monkeypatch.setenv("SLURM_JOB_ID", id)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        assert Holder.of(tmp_path).alive() == alive, (id, restart)


def test_a_lock_being_written_counts_as_held(tmp_path):
    (tmp_path / "lock").mkdir()
    for text in (b"{", b"\xff"):
        (tmp_path / "lock" / "00000001").write_bytes(text)
        assert Holder.of(tmp_path).alive()
    assert Holder.of(tmp_path / "nothing") is None


def test_whoever_lost_the_lock_in_a_long_sleep_notices_when_he_wakes(tmp_path, monkeypatch):
    with job(tmp_path) as first:
        first.send_signal(signal.SIGSTOP)
        age(of_another_machine(tmp_path), lock.STALE + 1)
        with locked(tmp_path, nobody) as mine:
            first.send_signal(signal.SIGCONT)
            line = first.stdout.readline()
            assert line.startswith("lost") and "taken over" in line and f"pid {os.getpid()}" in line
            mine.require()
            (tmp_path / "lock" / f"{int(mine.path.name) + 1:08d}").touch()
            with pytest.raises(UserError, match="taken over"):
                mine.require()


def test_a_lock_is_made_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with locked(tmp_path, nobody), pytest.raises(UserError, match="another job is running"):
        Lock.take(tmp_path, nobody)


def test_an_outdated_listing_of_a_file_server_gives_nobody_a_second_lock(tmp_path, monkeypatch):
    for _ in range(3):
        with locked(tmp_path, nobody):
            pass
    with job(tmp_path):
        listed, outdated = lock._files, [[], []]
        monkeypatch.setattr(lock, "_files", lambda place: outdated.pop() if outdated else listed(place))
        with pytest.raises(UserError, match="another job is running"):
            Lock.take(tmp_path, nobody)
        assert [path.name for path in (tmp_path / "lock").iterdir()] == ["00000004"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "lock").write_text("")
    with pytest.raises(UserError, match="no lock can be made"):
        Lock.take(tmp_path, nobody)


def test_of_eight_processes_that_race_for_it_exactly_one_gets_it(tmp_path):
    trials = 90
    for trial in range(trials):
        folder = tmp_path / str(trial)
        folder.mkdir()
        before = ("nobody", "dead here", "silent elsewhere")[trial % 3]
        with locked(folder, nobody) as gone:
            pass
        age(gone.path, lock.STALE + 1)
        if before == "silent elsewhere":
            of_another_machine(folder)
        elif before == "dead here":
            told = json.loads(gone.path.read_text())
            told["process"]["started"] -= 1
            gone.path.write_text(json.dumps(told))
        else:
            gone.path.unlink()
    racers = [start(RACE, tmp_path, time.time() + 0.7, trials) for _ in range(8)]
    won = [int(line) for racer in racers for line in iter(racer.stdout.readline, "done\n")]  # while all are alive
    for racer in racers:
        racer.communicate()
    assert sorted(won) == list(range(trials))
