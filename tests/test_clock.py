"""The clock: every second is in one phase, and what others read of it, in its status file or as a listener, is so."""

import os
import socket
import time
from itertools import pairwise

import pytest

from mpifl.engine.clock import Clock, Whereabouts


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
    with clock.during("a phase with a name too long"):
        now = read()
        assert (now.phase, now.round, now.client) == ("a phase with a n", 7, 1_000_000_007)
        assert (now.pid, now.host) == (first.pid, first.host)
        assert first.changed <= now.changed and abs(now.changed - time.time()) < 1
    assert read().phase == "sample"
