"""The clock: every second is in one phase, and what others read of it, in its status file or as a listener, is so."""

import os
import signal
import socket
import subprocess
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from mpifl.engine.clock import Clock, Whereabouts
from mpifl.process import Process, _stat


def heard(clock):
    """What the clock tells from now on: a list of (phase, account, begin, end, round, client)."""
    stretches = []
    clock.listener = lambda *stretch: stretches.append(stretch)
    return stretches


def test_stretches_leave_no_gap_and_add_up_to_the_seconds():
    clock = Clock()
    before, stretches = time.time(), heard(clock)
    clock.enter("receive")
    for client in (4, 2):
        clock.visit(client)
        with clock.during("load"):
            time.sleep(0.002)
        with clock.booked("evaluate"), clock.during("train"):
            time.sleep(0.001)
    seconds = clock.lap()
    assert all(one[3] == pytest.approx(next[2], abs=2e-6) for one, next in pairwise(stretches))
    for account in seconds:
        told = sum(end - begin for _, of, begin, end, *_ in stretches if of == account)
        assert told == pytest.approx(seconds[account], abs=1e-5)
    assert set(seconds) == {"start", "receive", "load", "evaluate"}
    assert seconds["load"] >= 0.004 and seconds["evaluate"] >= 0.002
    assert stretches[-1][3] - stretches[0][2] == pytest.approx(sum(seconds.values()), abs=1e-4)
    assert before - 0.1 < stretches[0][2] <= stretches[-1][3] < time.time() + 0.1
    assert {phase for phase, account, *_ in stretches if account == "evaluate"} >= {"train"}


def test_bookings_within_bookings_end_where_they_began():
    clock = Clock()
    with clock.booked("outer"):
        with clock.booked("inner"):
            pass
        assert clock.account == "outer"
    assert clock.account == ""


def test_a_phase_ends_where_it_began_unless_something_was_raised():
    clock = Clock()
    clock.enter("receive")
    with clock.during("train"), clock.during("sum"):
        assert clock.phase == "sum"
    assert clock.phase == "receive"
    with pytest.raises(ValueError), clock.during("train"):
        raise ValueError
    assert clock.where() == "rank 0, phase train"


def test_a_status_file_says_where_the_rank_is_at_every_change_of_phase(tmp_path):
    clock = Clock(3)
    clock.enter("sample")
    clock.attach(tmp_path / "rank-00003")
    read = lambda: Whereabouts.read(tmp_path / "rank-00003")  # noqa: E731
    first = read()
    assert (first.pid, first.host, first.phase, first.round, first.client) == (
        os.getpid(),
        socket.gethostname(),
        "sample",
        -1,
        -1,
    )
    clock.round = 7
    clock.visit(1_000_000_007)
    with clock.booked("evaluate"):
        with clock.during("train"):
            assert read().phase == "evaluate/train"
        assert read().phase == "evaluate/sample"
    assert read().phase == "sample"
    with clock.during("a phase with a name too long"):
        now = read()
        assert (now.phase, now.round, now.client) == ("a phase with a n", 7, 1_000_000_007)
        assert (now.pid, now.host) == (first.pid, first.host)
        assert first.changed <= now.changed and abs(now.changed - time.time()) < 1
    assert read().phase == "sample"


def test_a_status_file_tells_batches_signs_of_life_and_whose_they_are(tmp_path):
    clock, file = Clock(3), tmp_path / "rank-00003"
    clock.beat()  # nobody looks yet
    clock.attach(file, ranks=5)
    read = lambda: Whereabouts.read(file)  # noqa: E731
    first = read()
    assert (first.rank, first.ranks, first.steps) == (3, 5, 0)
    assert first.process == Process.current() and first.process.alive
    seen = []
    for batch in clock.beating("abc"):
        seen.append((batch, read().steps, read().beat))
    assert [one[:2] for one in seen] == [("a", 1), ("b", 2), ("c", 3)]
    assert first.beat < seen[0][2] < seen[1][2] < seen[2][2]
    assert read().changed == first.changed and read().pulse == first.pulse
    for sign, other, give in (("beat", "pulse", clock.beat), ("pulse", "beat", clock.pulse)):
        before = read()
        give()
        assert getattr(read(), sign) > getattr(before, sign) and getattr(read(), other) == getattr(before, other)
        assert read().last_sign == getattr(read(), sign)
    before = read()
    clock.enter("wait")
    assert read().beat >= before.beat and read().steps == 3


def test_the_whereabouts_of_a_run_are_those_that_can_be_read_in_order_of_rank(tmp_path):
    (tmp_path / "status").mkdir()
    for rank in (10, 2, 0):
        Clock(rank).attach(tmp_path / "status" / f"rank-{rank:05d}", ranks=11)
    (tmp_path / "status" / "rank-00001").write_bytes(b"an older release's")
    (tmp_path / "status" / "stacks-00003.txt").touch()
    assert [place.rank for place in Whereabouts.of_run(tmp_path)] == [0, 2, 10]
    assert Whereabouts.of_run(tmp_path / "nothing") == []
    with pytest.raises(ValueError, match="rank-00001 is not a rank's status"):
        Whereabouts.read(tmp_path / "status" / "rank-00001")


def test_whereabouts_are_told_with_rank_host_pid_phase_and_rounds_from_one(tmp_path):
    clock = Clock(2)
    clock.round, clock.client = 6, 41
    clock.enter("train")
    clock.attach(tmp_path / "rank")
    told = f"rank 2 on {socket.gethostname()} (pid {os.getpid()}), phase train, round 7, client 41"
    assert str(Whereabouts.read(tmp_path / "rank")) == told


def test_a_process_is_known_by_more_than_its_pid():
    me = Process.current()
    assert me.here and me.alive and me.state == "R" and me.trouble == ""
    assert replace(me, started=me.started - 1).alive is False  # the pid was used again
    assert replace(me, machine=me.machine + 1).alive is None
    with subprocess.Popen(["sleep", "60"]) as child:
        other = replace(me, pid=child.pid, started=_stat(child.pid)[1])
        assert other.alive
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        assert other.alive and other.trouble == "stopped"
        child.kill()
        until = time.monotonic() + 5
        while other.state != "Z" and time.monotonic() < until:
            time.sleep(0.001)
        assert other.alive is False  # dead, though nobody has asked yet how it ended
    assert other.alive is False and other.state == ""
