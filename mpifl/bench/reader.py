"""What is measured in a process of its own: `python -m mpifl.bench.reader open PATH` or `read PATH SEED COHORT PASSES`.

It imports no torch, so that nine of them start quickly and little is in memory before.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from mpifl.data.shard import Dataset


def opening(path: Path) -> dict[str, float]:
    """Seconds and resident MB that it takes to open a dataset, then to touch every shard for the first time."""
    before, began = _resident_mb(), time.perf_counter()
    dataset = Dataset(path)
    clients, digest = len(dataset.sizes("train")), dataset.digest
    opened, opened_mb = time.perf_counter(), _resident_mb()
    for number in range(len(dataset.shards("train"))):
        dataset.check("train", number)
    touched, touched_mb = time.perf_counter(), _resident_mb()
    dataset.close()
    assert clients and digest
    return {
        "s_open": opened - began,
        "MB_open": opened_mb - before,
        "s_all_shards": touched - opened,
        "MB_all_shards": touched_mb - before,
    }


def reading(path: Path, seed: int, cohort: int, passes: int) -> dict[str, float]:
    """Read a cohort once, say so, wait for a line on stdin, and read it again so many times."""
    dataset = Dataset(path)
    ids = np.random.RandomState(seed).choice(dataset.clients, min(cohort, dataset.clients), replace=False).tolist()

    def read() -> int:
        return sum(column.nbytes for id in ids for column in dataset.client("train", id).values())

    read()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    size = sum(read() for _ in range(passes))
    ended = time.monotonic()
    dataset.close()
    return {"bytes": size, "began": began, "ended": ended}


def _resident_mb() -> float:
    """The most memory this process ever had resident, in MB."""
    # Not resource.getrusage: it also counts the process that this one was started from.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    what, path, *numbers = sys.argv[1:]
    measure = {"open": opening, "read": reading}[what]
    print(json.dumps(measure(Path(path), *map(int, numbers))))
