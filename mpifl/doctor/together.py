"""What ranks find out only together: memory left when all have begun, locks that all see, how far clocks differ."""

from __future__ import annotations

import fcntl
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mpifl.comm import Alone, World
from mpifl.config import Job
from mpifl.doctor.facts import Rank
from mpifl.doctor.probes import in_time, memory, nearest, note, refusal

ROUND_TRIPS = 6
"""Between rank 0 and all others: the fastest ones tell most about the clocks."""
UNSEEN_SECONDS = 3.0
"""A file of another node may appear so much later on this one."""


def meet(rank: Rank, comm: World | Alone, job: Job, seconds: float) -> list[Rank]:
    """Complete what this rank knows; returns what all know, on rank 0. All ranks at once."""
    comm.arrive()
    note(rank, "memory", lambda: memory(rank))
    lock(rank, comm, nearest(job.run.out or "runs"), seconds)
    ahead = clocks(comm)
    mine = np.frombuffer(json.dumps(rank.table()).encode() + b"\n", np.uint8)
    gathered = comm.gather(mine)
    if gathered is None:
        return []
    ranks = [Rank.of(json.loads(line)) for line in gathered.tobytes().splitlines()]
    for one, bounds in zip(ranks, ahead):
        one.clock = tuple(bounds.tolist())
    return ranks


def lock(rank: Rank, comm: World | Alone, folder: Path, seconds: float) -> None:
    """Rank 0 locks a file in the folder, and the others try to: see Rank.lock."""
    held: list[Any] = []
    if comm.rank == 0:
        rank.lock = "no answer"
        in_time(lambda: _lock_first(rank, folder, held), seconds)
    path = comm.share(held[0].name if held else "")
    if path and comm.rank > 0:
        rank.lock = "no answer"
        in_time(lambda: _lock_too(rank, Path(path)), seconds)
    comm.arrive()
    for file in held:
        file.close()


def _lock_first(rank: Rank, folder: Path, held: list[Any]) -> None:
    try:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".mpifl-doctor-")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        rank.lock = f"not written: {error.strerror}"
        return
    refused = refusal(file.fileno(), fcntl.LOCK_EX)
    if refused:
        rank.lock = f"not locked: {refused}"
        file.close()
    else:
        rank.lock = "held"
        held.append(file)


def _lock_too(rank: Rank, path: Path) -> None:
    last = time.monotonic() + UNSEEN_SECONDS
    while True:
        try:
            with open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            rank.lock = "free"
        except BlockingIOError:
            rank.lock = "held"
        except FileNotFoundError:
            if time.monotonic() < last:
                time.sleep(0.1)
                continue
            rank.lock = "missing"
        except OSError as error:
            rank.lock = f"not locked: {error}"
        return


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
