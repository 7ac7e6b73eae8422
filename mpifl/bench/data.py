"""Datasets at scale: writing, opening, sampling, training on millions of clients, reading, prefetching.

people: --clients clients of 1 to 4 rows of 16 bytes and a label. images: 3,400 clients of 100 images, 28x28 bytes and
a label. MB are 10^6 bytes; speeds of reading are of CPU time, files warm, medians over --repeats in turn, and
"of raw" compares with bare preadv calls for the same bytes. See mpifl/bench/reading.py for what each way does.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import count as numbers
from pathlib import Path

from mpifl.bench.cases import Case, count, kept, medians
from mpifl.bench.datasets import evict, images, people, stored_bytes
from mpifl.bench.reading import ways_to_read
from mpifl.bench.training import Trained, job, trained
from mpifl.config import UserError
from mpifl.engine.serial import keep_freed_memory
from mpifl.rand import fold, sample

IMAGE_CLIENTS, IMAGES_EACH, COHORT = 3400, 100, 1000
WRITER_CLIENTS, WRITER_IMAGES, WRITER_MODEL = 340, 198, "emnist_conv"
PEOPLE_COHORT = 10_000
READERS, PASSES = 9, 20
COMPRESSIONS = ("gzip", "lzf", "zstd", "blosc")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options: how many people, and where datasets are kept."""
    parser.add_argument("--clients", type=count, default=1_000_000, help="clients of people (default 1000000)")
    parser.add_argument("--folder", type=Path, help="make datasets here and keep them for the next time")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield all cases."""
    keep_freed_memory()
    with kept(options.folder) as folder:
        crowd = folder / f"people-{options.clients}"
        yield from people(crowd, options.clients)
        yield from opening(crowd)
        yield sampling(options.clients, options.repeats)
        yield from crowd_training(crowd, options.clients)
        plain = folder / f"images-{IMAGE_CLIENTS}"
        yield from images(plain, IMAGE_CLIENTS, IMAGES_EACH)
        yield from reading(plain, options.repeats)
        yield from compressed(folder, options.repeats)
        yield from at_once(plain)
        writers = folder / f"writers-{WRITER_CLIENTS}"
        yield from images(writers, WRITER_CLIENTS, WRITER_IMAGES)
        yield from prefetching(writers)


def opening(path: Path) -> Iterator[Case]:
    """Open a dataset in a new process, its index from the disk or in memory already."""
    for what, prepare in (("files cold", evict), ("files warm", lambda path: None)):
        prepare(path)
        yield {"case": f"open {path.name}, {what}"} | _finished(_reader("open", path))


def sampling(clients: int, repeats: int, draws: int = 20) -> Case:
    """Draw a cohort, as a session does each round."""
    rounds = numbers()

    def several() -> None:
        for _ in range(draws):
            sample(fold(0, "cohort", next(rounds)), clients, COHORT)

    (seconds,) = medians(repeats, several)
    return {"case": f"sample {COHORT:,} of {clients:,}", "ms": 1e3 * seconds / draws}


def crowd_training(path: Path, clients: int) -> Iterator[Case]:
    """Train logistic regression on a cohort of thousands: memory of each rank, and where a round's time goes."""
    cohort = min(PEOPLE_COHORT, clients)
    run = trained(job(path, {"name": "logistic"}, cohort, rounds=3, batch=4))
    case = f"train, cohort {cohort:,} of {clients:,}"
    yield {"case": case} | {f"MB_rank_{rank}": size / 1e6 for rank, size in enumerate(run.summary["resident_bytes"])}
    yield {
        "case": case,
        "s_before_and_after": run.summary["seconds"] - sum(record["seconds"]["total"] for record in run.rounds),
        "s_first_round": run.rounds[0]["seconds"]["total"],
        "s_round": run.round_seconds,
        **{f"s_hosts_{phase}": run.host_seconds(phase) for phase in ("load", "train", "sum")},
    }


def reading(path: Path, repeats: int) -> Iterator[Case]:
    """Read a cohort in every way, in turn."""
    seconds, size = _read_in_turn(path, repeats)
    for way, spent in seconds.items():
        yield {
            "case": f"read, {way}",
            "MB_per_s": size / 1e6 / spent,
            "us_per_client": 1e6 * spent / COHORT,
            "of_raw": seconds["raw"] / spent,
            "of_raw_one_buffer": seconds["raw, one buffer"] / spent,
        }


def compressed(folder: Path, repeats: int) -> Iterator[Case]:
    """Write and read the same images with each compression."""
    for compression in COMPRESSIONS:
        path = folder / f"images-{IMAGE_CLIENTS}-{compression}"
        yield from images(path, IMAGE_CLIENTS, IMAGES_EACH, compression)
        seconds, size = _read_in_turn(path, repeats)
        yield {
            "case": f"read {compression}",
            "MB_on_disk": stored_bytes(path) / 1e6,
            "first_touch_MB_per_s": size / 1e6 / seconds["first touch"],
            "verified_MB_per_s": size / 1e6 / seconds["verified"],
        }


def at_once(path: Path) -> Iterator[Case]:
    """Nine processes read the same files, each a cohort of its own; then in a read-only folder, the files locked."""
    for what, condition in (("", nullcontext), (", read-only and locked", _read_only_and_locked)):
        with condition(path):
            yield {"case": f"{READERS} readers{what}", "MB_per_s_by_the_clock": _together(path)}


def prefetching(path: Path) -> Iterator[Case]:
    """Train EMNIST's conv net with and without prefetch: the share of hosts' time in which they waited for data."""
    budget = max(1, (stored_bytes(path) >> 20) // 2)  # too little for the dataset, enough for two cohorts
    for files, prepare in (("warm", lambda path: None), ("cold", evict)):
        for what, cache_mb in (("prefetch", budget), ("no prefetch", 0)):
            prepare(path)
            run = trained(job(path, {"name": WRITER_MODEL}, 10, rounds=6, batch=20, cache_mb=cache_mb))
            yield {"case": f"conv net, files {files}, {what}"} | _waited(run)


def _waited(run: Trained) -> Case:
    spent = {phase: run.host_seconds(phase) for phase in ("load", "train", "sum")}
    hosts = max(1, len(run.summary["resident_bytes"]) - 1)
    return {
        "s_round": run.round_seconds,
        "ms_load_per_host": 1e3 * spent["load"] / hosts,
        "percent_load": 100 * spent["load"] / sum(spent.values()),
    }


def _read_in_turn(path: Path, repeats: int) -> tuple[dict[str, float], int]:
    """Median seconds of each way to read a cohort, and the bytes that it reads."""
    ids = sample(fold(0, "cohort", 0), IMAGE_CLIENTS, COHORT).tolist()
    with ways_to_read(path, ids, repeats + 1) as ways:
        size = sum(array.nbytes for array in ways["verified"]())
        return dict(zip(ways, medians(repeats, *ways.values()))), size


def _together(path: Path) -> float:
    """MB/s of all readers, from the first one's start to the last one's end."""
    with ExitStack() as running:
        readers = [running.enter_context(_reader("read", path, seed, COHORT, PASSES)) for seed in range(READERS)]
        for reader in readers:
            reader.stdout.readline()
        for reader in readers:
            reader.stdin.write("go\n")
            reader.stdin.flush()
        spans = [_finished(reader) for reader in readers]
    wall = max(span["ended"] for span in spans) - min(span["began"] for span in spans)
    return sum(span["bytes"] for span in spans) / 1e6 / wall


def _reader(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "mpifl.bench.reader", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finished(reader: subprocess.Popen) -> dict[str, float]:
    out, err = reader.communicate()
    if reader.returncode:
        raise UserError(f"{' '.join(reader.args)} failed: {err.strip()}")
    return json.loads(out)


@contextmanager
def _read_only_and_locked(path: Path) -> Iterator[None]:
    with ExitStack() as held:
        for file in [*path.iterdir(), path]:
            mode = file.stat().st_mode
            file.chmod(mode & ~0o222)
            held.callback(file.chmod, mode)
            handle = os.open(file, os.O_RDONLY)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
