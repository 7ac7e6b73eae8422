"""Runs that end early: by a signal to any rank or to the launcher, or because their time is over."""

import os
import signal
import subprocess
import threading
import time

import pytest
from test_failure import _launcher_of

import mpifl
from mpifl import stopping
from mpifl.checkpoint import complete
from mpifl.config import UserError, seconds_of
from mpifl.engine.clock import Whereabouts
from mpifl.stopping import STATUS, Signals, Stopped, Terminated, TimeLimit, slurm_seconds_left

ENDLESS = ("rounds=1000000", "baselines=false", "cohort=5")


def signal_after_two_rounds(out, number, target):
    """Send a signal to the rank of that number, to all ranks, or to what started them, once it has rounds behind it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = out / "metrics.jsonl"
        if records.exists() and len(records.read_text().splitlines()) > 1:
            ranks = Whereabouts.of_run(out)
            chosen = ranks if target == "all" else [ranks[0 if target == "launcher" else target]]
            for place in chosen:
                os.kill(_launcher_of(place.pid) if target == "launcher" else place.pid, number)
            return
        time.sleep(0.05)


@pytest.mark.launches
@pytest.mark.parametrize(
    "ranks, number, target",
    [(3, signal.SIGUSR1, "launcher"), (3, signal.SIGTERM, 2), (4, signal.SIGUSR1, "all"), (None, signal.SIGTERM, 0)],
)
def test_a_signal_finishes_the_round_and_the_same_command_goes_on(launch, tmp_path, ranks, number, target):
    words = ("-m", "mpifl.train", *ENDLESS, f"run.out={tmp_path / 'out'}")
    sender = threading.Thread(target=signal_after_two_rounds, args=(tmp_path / "out", number, target))
    sender.start()
    done = launch(ranks, *words, timeout=60)
    sender.join()
    assert done.returncode == STATUS
    [rounds] = [found.rounds for found in complete(tmp_path / "out" / "checkpoints")]
    assert f"{rounds} of 1000000 rounds are done; the same command goes on after round {rounds}" in done.stdout
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == rounds
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.launches
def test_a_time_limit_is_kept_and_the_run_goes_on_until_it_is_done(launch, tmp_path):
    words = ("-m", "mpifl.train", "baselines=false", f"run.out={tmp_path / 'out'}")
    done = launch(3, *words, *ENDLESS[:1], "run.time_limit=3s", timeout=60)
    assert done.returncode == STATUS and "stopped by run.time_limit" in done.stdout
    [rounds] = [found.rounds for found in complete(tmp_path / "out" / "checkpoints")]
    done = launch(None, *words, f"rounds={rounds + 2}", timeout=60)
    assert done.returncode == 0 and f"going on after round {rounds} " in done.stdout


def test_a_second_signal_ends_at_once_and_an_echo_does_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    signals = Signals()
    with signals.while_training():
        signals._note(signal.SIGUSR1, None)
        now[0] += 0.5
        signals._note(signal.SIGUSR1, None)  # passed on by the launcher, too
        assert signals.name == "SIGUSR1"
        now[0] += 5
        with pytest.raises(Terminated):
            signals._note(signal.SIGTERM, None)


def test_before_training_only_sigterm_ends_at_once():
    signals = Signals()
    signals._note(signal.SIGUSR1, None)
    assert signals.name == "SIGUSR1"
    with pytest.raises(Terminated):
        Signals()._note(signal.SIGTERM, None)


def test_in_python_a_stop_is_an_exception_and_signals_are_left_alone(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    words = ["rounds=100000", "baselines=false", f"run.out={tmp_path / 'out'}", "run.time_limit=1"]
    with pytest.raises(Stopped):
        mpifl.run(mpifl.train.DEFAULT_JOB, words)
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("text, seconds", [("", 0), (90, 90), ("90", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400)])
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["0", -1, "2 weeks", "h", "nan", "1e3"])
def test_what_is_no_duration_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"run\.time_limit is"):
        mpifl.run({"model": {"name": "mlp"}, "algorithm": {"name": "fedavg"}, "rounds": 1, "run": {"time_limit": text}})


@pytest.mark.parametrize(
    "said, left",
    [("1:30\n", 90), ("2:00:00", 7200), ("1-00:00:10", 86410), ("UNLIMITED", float("inf")), ("", float("inf"))],
)
def test_what_slurm_says_of_the_time_that_is_left(said, left, monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout=said)
    monkeypatch.setattr(stopping.subprocess, "run", lambda *words, **options: answer)
    assert slurm_seconds_left("7") == left


def test_slurms_end_counts_as_it_is_now_and_leaves_a_margin(monkeypatch):
    left = [1000.0]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(stopping.shutil, "which", lambda name: name)
    monkeypatch.setattr(stopping, "slurm_seconds_left", lambda job: left[0])
    monkeypatch.setattr(stopping, "_LOOK", 0.0)
    limit = TimeLimit(0.0, time.perf_counter())
    assert limit.reason(980) == "" and limit.reason(995) == "Slurm's time limit"
    left[0] = 20.0  # scontrol update TimeLimit
    assert limit.reason(30) == "Slurm's time limit" and limit.reason(1) == ""
