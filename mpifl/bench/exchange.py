"""What family comm measures on the ranks of an mpirun: `python -m mpifl.bench.exchange PARAMETERS REPEATS`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from mpifl.comm import Alone, World, connect


def exchanged(comm: World | Alone, parameters: int, repeats: int) -> dict[str, float]:
    """Median ms of a round's payload: parameters down as float32, their sum up as float64; and of copying both.

    The first time does not count. A time begins when all ranks are there, as clients do not end together.
    """
    down, up = np.ones(parameters, np.float32), np.ones(parameters, np.float64)
    copies = [(np.empty_like(buffer), buffer) for buffer in (down, up)]
    spent: dict[str, list[float]] = {"down": [], "up": [], "copy": []}
    for _ in range(repeats + 1):
        up[:] = 1.0
        for name, act in (("down", lambda: comm.bcast(down)), ("up", lambda: comm.reduce(up))):
            comm.arrive()
            spent[name].append(_seconds(act))
        if comm.rank == 0:  # the others wait, polling
            spent["copy"].append(_seconds(lambda: [np.copyto(*pair) for pair in copies]))
    if comm.rank == 0 and not (up == comm.size).all():
        raise AssertionError(f"the sum over {comm.size} ranks is not {comm.size}")
    return {name: 1e3 * median(seconds[1:]) for name, seconds in spent.items() if seconds}


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    world = connect()
    figures = exchanged(world, *map(int, sys.argv[1:]))
    if world.rank == 0:
        print(json.dumps(figures))
