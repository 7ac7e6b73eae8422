"""`python -m mpifl.status`: what a run is doing, where it died, and what its ranks are doing right now."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from mpifl import status
from mpifl.config import UserError
from mpifl.engine.clock import Clock
from mpifl.lock import locked
from mpifl.process import Process
from mpifl.status import Status, last_words, main, newest_checkpoint

ROOT = Path(__file__).parent.parent
HOST = socket.gethostname()
RANK = """
import sys
from contextlib import ExitStack
from pathlib import Path
from mpifl.comm import Alone
from mpifl.engine.clock import Clock
from mpifl.lock import locked
from mpifl.watchdog import watched

folder, rank, phase, last = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], 0
comm, clock = Alone(), Clock(rank)
comm.rank, comm.size, clock.round, clock.client = rank, 3, 11, 40 + rank

def await_orders():
    return sys.stdin.readline()

with ExitStack() as stack:
    if rank == 0:
        stack.enter_context(locked(folder, print))
    stack.enter_context(watched(comm, clock, folder))
    clock.enter(phase)
    print("ready", flush=True)
    await_orders()
"""


@pytest.fixture
def folder(tmp_path):
    """Of a run of 50 rounds, of which 12 are done: 2 seconds and 30 clients each in the last ones."""
    (tmp_path / "status").mkdir()
    (tmp_path / "config.toml").write_text("rounds = 50\n[run]\nstall_timeout = 0.0\n")
    rounds = [{"round": n + 1, "clients": 30, "seconds": {"total": 100.0 if n < 2 else 2.0}} for n in range(12)]
    rounds[9]["scores"] = {"test_loss": 0.75, "accuracy": 0.5, "per_domain": [0.25, 0.75]}
    lines = [json.dumps(record) for record in rounds] + ['{"round": 13, "cli']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    for name, complete in (("round-00000005", True), ("round-00000010", True), ("round-00000012", False)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / ("COMPLETE" if complete else "server.safetensors")).touch()
    return tmp_path


@pytest.fixture
def start(folder):
    """Start ranks of the run that wait in these phases."""
    started = []

    def start(*phases):
        for rank, phase in enumerate(phases):
            command = [sys.executable, "-c", RANK, str(folder), str(rank), phase]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True))
            if rank == 0:
                assert started[-1].stdout.readline() == "ready\n"  # it removes what an earlier start has left
        for process in started[1 - len(phases) :] if len(phases) > 1 else ():
            assert process.stdout.readline() == "ready\n"
        return started

    yield start
    for process in started:
        process.kill()
        with suppress(OSError, ValueError):
            process.communicate()


def shown(capsys, *arguments):
    code = main([str(word) for word in arguments])
    return code, capsys.readouterr().out


def test_of_a_running_job_it_says_round_speed_time_left_scores_checkpoint_and_where_ranks_are(folder, start, capsys):
    processes = start("wait", "train", "load")
    code, text = shown(capsys, folder)
    assert code == 0
    for name, value in (
        ("state", "running: 12 of 50 rounds"),
        ("speed", "0.5 rounds/s, 15 clients/s"),
        ("time", "0:01:16 left"),
        ("test_loss, round 10", "0.7500"),
        ("accuracy, round 10", "0.5000"),
    ):
        assert re.search(rf"^{name} +{value}$", text, re.MULTILINE), name
    line = "running: 12 of 50 rounds  0.5 rounds/s, 15 clients/s  0:01:16 left  test_loss 0.7500  accuracy 0.5000"
    assert Status.of(folder).line() == line
    assert "per_domain, round 10  0.2500, 0.7500" in text
    assert "checkpoint            after round 10\n" in text
    rows = [line.split() for line in text.splitlines()[-3:]]
    assert [row[:6] for row in rows] == [
        [str(rank), HOST, str(process.pid), phase, "12", str(40 + rank)]
        for rank, (process, phase) in enumerate(zip(processes, ("wait", "train", "load")))
    ]
    assert all(row[6:] == [row[6], "s", "alive"] and 0 <= float(row[6]) < 30 for row in rows)


def test_a_run_that_ended_in_order_is_finished_with_a_summary_and_else_stopped_early(folder, start, capsys):
    for process in start("wait", "train", "load"):
        process.communicate("\n")
    assert Status.of(folder).state == "stopped early"
    code, text = shown(capsys, folder)
    assert code == 0
    assert "after round 10; the same command goes on" in text
    (folder / "summary.json").write_text("{}")
    code, text = shown(capsys, folder)
    assert (code, Status.of(folder).state) == (0, "finished")
    assert "checkpoint" not in text and "pid" not in text


@pytest.mark.parametrize("victim", [0, 2])
def test_of_a_run_that_died_the_rank_that_fell_silent_first_comes_first(folder, start, capsys, victim):
    processes = start("server", "train", "load")
    processes[victim].kill()
    processes[victim].wait()
    time.sleep(0.2)  # of which others give signs
    others = [process for process in processes if process is not processes[victim]]
    for other in others:
        other.kill()
        other.wait()
    (folder / "failure-20260101-000000.txt").write_text("mpifl: a rank is dead")
    code, text = shown(capsys, folder)
    assert code == 1
    lines = text.splitlines()
    told = lines[lines.index("the first to fall silent comes first:") + 1 :]
    phase = ("server", "train", "load")[victim]
    place = f"  rank {victim} on {HOST} (pid {processes[victim].pid}), phase {phase}, round 12, client {40 + victim}"
    assert told[0].startswith(f"{place}: silent since ")
    assert all(float(line.rsplit("+ ")[1].removesuffix(" s")) > 0.1 for line in told[1:3])
    assert told[3].startswith("see ") and told[3].endswith("failure-20260101-000000.txt")
    assert last_words(folder, time.time()) == []


def test_a_job_of_which_one_rank_was_killed_has_died_though_others_are_still_there(folder, start):
    processes = start("server", "train", "wait")
    processes[2].communicate("\n")  # left in order
    assert Status.of(folder).state == "running"
    processes[1].kill()
    processes[1].wait()
    assert Status.of(folder).state == "died"
    words = last_words(folder)
    assert len(words) == 3 and words[1].startswith("  rank 1 ") and words[2].endswith("still runs")


def test_a_job_whose_start_has_just_begun_is_running_whatever_an_earlier_one_left(folder, start):
    processes = start("server", "train")
    left = {file: file.read_bytes() for file in (folder / "status").glob("rank-*")}
    for process in processes:
        process.kill()
        process.wait()
    assert Status.of(folder).state == "died"
    start("start")
    for file, content in left.items():
        file.write_bytes(content)
    found = Status.of(folder)
    assert (found.state, found.ranks) == ("running", [])


def test_a_stopped_rank_is_stuck_and_so_is_one_that_is_silent_beyond_the_stall_timeout(folder, start, capsys):
    processes = start("wait", "train", "load")
    os.kill(processes[2].pid, signal.SIGSTOP)
    os.waitpid(processes[2].pid, os.WUNTRACED)
    code, text = shown(capsys, folder)
    assert code == 1
    assert [line.split()[0] for line in text.splitlines() if "STUCK" in line] == ["2"]
    assert "stopped, STUCK" in text
    os.kill(processes[2].pid, signal.SIGCONT)
    (folder / "config.toml").write_text("rounds = 50\n[run]\nstall_timeout = 0.01\n")
    time.sleep(0.05)
    assert [rank.rank for rank in Status.of(folder).stuck] == [0, 1, 2]  # they wait for orders


def test_ranks_of_other_machines_are_judged_by_their_signs_and_the_job_by_its_lock(folder, monkeypatch):
    me = Process.current()
    elsewhere = replace(me, machine=me.machine + 1)
    monkeypatch.setattr(Process, "current", staticmethod(lambda: elsewhere))
    clocks = [Clock(rank) for rank in range(3)]
    for rank, clock in enumerate(clocks):
        clock.attach(folder / "status" / f"rank-{rank:05d}", 3)
    with locked(folder, print):
        assert Status.of(folder).state == "running"
        clocks[2].enter("ended")
        monkeypatch.setattr(status, "SILENT", 0.05)
        time.sleep(0.1)
        clocks[0].pulse()
        assert [rank.rank for rank in Status.of(folder).stuck] == [1]
        monkeypatch.setattr(status, "SILENT", 60)
    assert Status.of(folder).state == "died"


def test_stacks_are_those_of_the_ranks_that_live_here(folder, start, capsys):
    processes = start("wait", "train", "load")
    os.kill(processes[1].pid, signal.SIGSTOP)
    os.waitpid(processes[1].pid, os.WUNTRACED)
    code, text = shown(capsys, folder, "--stacks")
    assert code == 1
    assert "  ranks 0, 2:\n" in text and 'File "<string>", line 15 in await_orders' in text
    assert "  rank 1: no answer" in text
    assert processes[0].poll() is processes[2].poll() is None


def test_following_ends_with_the_run_and_tells_each_round_once(folder, start, capsys):
    processes = start("wait")
    code = "import sys; from mpifl import status; status._REFRESH = 0.02; sys.exit(status.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder), "--follow"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout.readline().startswith("running: 12 of 50 rounds")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('\n{"round": 13, "clients": 30, "seconds": {"total": 2.0}}\n')
        assert following.stdout.readline().startswith("running: 13 of 50 rounds")
        time.sleep(0.2)
        processes[0].communicate("\n")
        rest = following.stdout.read()
    assert "stopped early: 13 of 50 rounds" in rest and "running" not in rest
    assert following.returncode == 0


@pytest.mark.parametrize("text", [None, "rounds = ", "rounds = 5", "[run]", "rounds = 'many'\n[run]"])
def test_what_is_no_run_folder_is_refused_in_one_line(tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "config.toml").write_text(text)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"mpifl: '{tmp_path}' is no run folder") and said.err.count("\n") == 1 and not said.out
    with pytest.raises(UserError):
        Status.of(tmp_path)


def test_a_checkpoint_counts_when_it_is_complete(folder, tmp_path_factory):
    assert newest_checkpoint(folder) == 10
    assert newest_checkpoint(tmp_path_factory.mktemp("empty")) is None


def test_status_needs_neither_torch_nor_mpi():
    code = "import sys, mpifl.status, mpifl.supervise; print(*{'torch', 'mpi4py'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "\n"
