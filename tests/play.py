"""A job without torch, for tests of what ends a job: rounds in which all ranks but 0 train, and all wait and reduce.

play.py OUT STALL_TIMEOUT WAY RANK PHASE WHAT: in round 3, that rank does something in that phase.
"""

import itertools
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from mpifl.comm import connect
from mpifl.engine.clock import Clock
from mpifl.launch import all_or_none
from mpifl.watchdog import watched

ROUND = 2


def loop_for_ever():
    while True:
        pass


def hold_the_interpreter():
    all(itertools.repeat(True))  # a loop in C that lets no other thread run


DO = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "loop": loop_for_ever,
    "hold": hold_the_interpreter,
    "nothing": lambda: None,
}


def main(out, stall_timeout, way, rank, phase, what):
    comm, out = connect(), Path(out)
    clock = Clock(comm.rank)

    def act(here):
        if (str(comm.rank), here, clock.round) == (rank, phase, ROUND):
            (out / "acted").touch()
            DO[what]()

    with suppress(FileExistsError):
        (out / "status").mkdir(parents=True)
    with all_or_none(comm, clock, out), watched(comm, clock, out, float(stall_timeout)), comm.using(way):
        for clock.round in range(4):
            with clock.during("wait"):
                act("wait")
                comm.arrive()
            if comm.rank or comm.size == 1:
                clock.visit(comm.rank)
                with clock.during("train"):
                    for _ in clock.beating(range(5)):
                        act("train")
                    if what == "nothing":  # a long visit: of clients or of blocks that are scored
                        for _ in clock.beating(range(20)):
                            time.sleep(0.02)
                clock.visit(-1)
            room = comm.room(1 << 12).view(np.float64)
            comm.arrive()
            with clock.during("reduce"):
                comm.reduce(room)


main(*sys.argv[1:])
