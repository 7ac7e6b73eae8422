"""What family comm measures on the ranks of an mpirun: `python -m mpifl.bench.exchange PARAMETERS REPEATS WAY ...`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from mpifl.comm import Alone, World, connect

TURNS = 3
"""Times that each way of exchanging is set up anew, in turn (A B A B A B)."""

Figures = dict[str, float]


def exchanged(comm: World | Alone, parameters: int, repeats: int, ways: Sequence[str]) -> dict[str, Figures]:
    """Median ms on rank 0 of a round's payload, by comm.reduce: float32 parameters down, float64 sums up; of a copy.

    Down ends when all ranks have the parameters. Up begins with every host adding an upload to zeroed memory, and ends
    when rank 0 has the sum. The first trip of each turn does not count: it makes the memory.
    """
    theta, spent = np.ones(parameters, np.float32), {way: [] for way in ways}
    for _ in range(TURNS):
        for way in ways:
            trip = _sharded_trip if way == "sharded" else _trip
            with comm.using(way):
                trips = [trip(comm, theta) for _ in range(-(-repeats // TURNS) + 1)]
            spent[way] += trips[1:]
    copies = [(np.empty_like(buffer), buffer) for buffer in (theta, np.ones(parameters, np.float64))]
    copying = [_copied(copies) for _ in range(repeats)] if comm.rank == 0 else [0.0]
    each = {way: [1e3 * median(times) for times in zip(*trips)] for way, trips in spent.items()}
    return {way: {"down": down, "up": up, "copy": 1e3 * median(copying)} for way, (down, up) in each.items()}


def _trip(comm: World | Alone, theta: np.ndarray) -> tuple[float, float]:
    """Seconds down and up. A time begins when all ranks are there."""
    comm.arrive()
    began = time.perf_counter()
    comm.publish(theta.nbytes, lambda room: np.copyto(room, theta.view(np.uint8)))
    comm.arrive()
    middle = time.perf_counter()
    sums = comm.room(8 * len(theta)).view(np.float64)
    if comm.rank:
        sums += 1.0
    comm.arrive()
    comm.reduce(sums)
    ended = time.perf_counter()
    if comm.rank == 0 and not (sums == comm.size - 1).all():
        raise AssertionError(f"the sum over {comm.size} ranks is not {comm.size - 1}")
    return middle - began, ended - middle


def _sharded_trip(comm: World | Alone, theta: np.ndarray) -> tuple[float, float]:
    """As `_trip`, where every rank has a slice of the parameters before and of the sum after."""
    mine = theta[None, : -(-len(theta) // comm.size)]
    comm.arrive()
    began = time.perf_counter()
    comm.join(mine, len(theta), [0], theta.nbytes)
    comm.arrive()
    middle = time.perf_counter()
    sums = comm.room(8 * len(theta)).view(np.float64)
    if comm.rank:
        sums += 1.0
    comm.arrive()
    own = comm.sum_slices([sums])[0]
    ended = time.perf_counter()
    if comm.rank == 0 and not (own == comm.size - 1).all():
        raise AssertionError(f"the sum over {comm.size} ranks is not {comm.size - 1}")
    return middle - began, ended - middle


def _copied(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    began = time.perf_counter()
    for target, source in pairs:
        np.copyto(target, source)
    return time.perf_counter() - began


if __name__ == "__main__":
    world, (parameters, repeats, *ways) = connect(), sys.argv[1:]
    figures = exchanged(world, int(parameters), int(repeats), ways)
    if world.rank == 0:
        print(json.dumps(figures))
