"""What ranks find out only together: memory left when all have begun, a folder that all see, how far clocks differ."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mpifl.comm import Alone, World
from mpifl.config import Job
from mpifl.doctor.facts import Rank
from mpifl.doctor.probes import in_time, memory, nearest, note

ROUND_TRIPS = 6
"""Between rank 0 and all others: the fastest ones tell most about the clocks."""
UNSEEN_SECONDS = 3.0
"""A file of another node may appear so much later on this one."""


def meet(rank: Rank, comm: World | Alone, job: Job, seconds: float) -> list[Rank]:
    """Complete what this rank knows; returns what all know, on rank 0. All ranks at once."""
    comm.arrive()
    note(rank, "memory", lambda: memory(rank))
    try_run_folder(rank, comm, job.run.out or "runs", seconds)
    ahead = clocks(comm)
    mine = np.frombuffer(json.dumps(rank.table()).encode() + b"\n", np.uint8)
    gathered = comm.gather(mine)
    if gathered is None:
        return []
    ranks = [Rank.of(json.loads(line)) for line in gathered.tobytes().splitlines()]
    for one, bounds in zip(ranks, ahead):
        one.clock = tuple(bounds.tolist())
    return ranks


def try_run_folder(rank: Rank, comm: World | Alone, folder: str | Path, seconds: float) -> None:
    """Rank 0 makes a file in the folder, or the nearest one above it, and the others look for it: Rank.run_folder."""
    made: list[Any] = []
    if comm.rank == 0:
        rank.run_folder = "no answer"
        in_time(lambda: _make(rank, folder, made), seconds)
    path = comm.share(made[0].name if made else "")
    if path and comm.rank > 0:
        rank.run_folder = "no answer"
        in_time(lambda: _find(rank, Path(path)), seconds)
    comm.arrive()
    for file in made:
        file.close()


def _make(rank: Rank, folder: str | Path, made: list[Any]) -> None:
    try:
        made.append(tempfile.NamedTemporaryFile(dir=nearest(folder), prefix=".mpifl-doctor-"))  # noqa: SIM115
        rank.run_folder = ""
    except OSError as error:
        rank.run_folder = f"not written: {error.strerror}"


def _find(rank: Rank, path: Path) -> None:
    last = time.monotonic() + UNSEEN_SECONDS
    while not path.exists() and time.monotonic() < last:
        time.sleep(0.1)
    try:
        path.open("r+b").close()  # for writing, as every rank will
        rank.run_folder = ""
    except FileNotFoundError:
        rank.run_folder = "missing"
    except OSError as error:
        rank.run_folder = f"not written: {error.strerror}"


def clocks(comm: World | Alone) -> np.ndarray:
    """On rank 0: seconds that each rank's clock is ahead of its own, at least and at most, (ranks, 2) float64.

    A rank looks at its clock between two looks of rank 0, so that their distance bounds the error.
    """
    least, most = -np.inf, np.inf
    for _ in range(ROUND_TRIPS):
        before = time.time()
        comm.announce(np.zeros(8, np.uint8))
        there = comm.gather(np.asarray([time.time()]).view(np.uint8))
        after = time.time()
        if there is not None:
            stamps = there.view(np.float64)
            least, most = np.maximum(least, stamps - after), np.minimum(most, stamps - before)
    return np.stack(np.broadcast_arrays(least, most), axis=-1)
