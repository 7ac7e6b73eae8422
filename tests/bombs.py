"""A dataset whose job has ranks that die at a place of one's choice, once each, however often it is started again.

The variable BOMBS holds one or more "rank phase round signal", separated by commas: the phase or what its time is
booked under, rounds counted from 0. BOMBS_USED is a folder that remembers which went off.
"""

import os
import signal
from pathlib import Path

import parts

from mpifl.engine.clock import Clock


def dataset():
    plant()
    return parts.awkward_dataset()


def plant():
    bombs = [bomb.split() for bomb in os.environ["BOMBS"].split(",")]
    enter = Clock.enter

    def enter_and_perhaps_die(clock, phase):
        left = enter(clock, phase)
        for number, (rank, where, round, name) in enumerate(bombs):
            here = (rank, round) == (str(clock.rank), str(clock.round)) and where in (phase, clock.account)
            if here and clock._map and unused(number):
                os.kill(os.getpid(), getattr(signal, name))
        return left

    Clock.enter = enter_and_perhaps_die


def unused(number):
    try:
        (Path(os.environ["BOMBS_USED"]) / str(number)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
