"""From a Conversion to a dataset: pieces written by all cores, or by all ranks under mpirun, and resumed."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import workers
from data_prep.conversion import Conversion, Split
from mpifl.comm import Alone, World
from mpifl.data.pieces import COMPRESSIONS, Storage, write_piece
from mpifl.data.writer import Unfinished, provenance_json
from mpifl.launch import agree

Task = tuple[Split, int]
"""A split and the number of one of its pieces."""


def write(
    conversion: Conversion, out: Path, storage: Storage, jobs: int, key: str, comm: World | Alone | None = None
) -> None:
    """Write the dataset folder `out`, which appears whole or not at all.

    jobs: processes that write pieces. key: what was asked for, in words: complete pieces that an interrupted conversion
    with the same key left in `out`.partial are kept. Under mpirun each rank writes its share of the pieces.
    """
    comm = comm or Alone()
    provenance = provenance_json(conversion.provenance)
    folder = agree(comm, lambda: Unfinished(out, key))
    pieces = [(split, number) for split in conversion.splits for number in range(len(split.pieces))]
    agree(comm, lambda: folder.__enter__() if comm.rank == 0 else None)
    try:
        kept = np.array([comm.rank == 0 and folder.has(split.name, number) for split, number in pieces], np.uint8)
        comm.bcast(kept)  # all ranks share out the same pieces, though some are ahead
        todo = [piece for piece, done in zip(pieces, kept) if not done]
        mine = todo[comm.rank :: comm.size]
        progress = Progress(mine, int(kept.sum()), comm.rank)
        agree(comm, lambda: _write_all(folder.folder, mine, storage, jobs, progress))
        splits = {split.name: (len(split.pieces), split.central) for split in conversion.splits}
        agree(comm, lambda: folder.finish(splits, storage, provenance) if comm.rank == 0 else None)
    except KeyboardInterrupt as stop:
        kept = f"; the same command goes on from what is in {folder.folder}" if folder.keeps() else ""
        raise type(stop)(kept) from None
    finally:
        folder.__exit__()


def add_compression(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Declare --compression."""
    named = f"{', '.join(COMPRESSIONS)}: smaller files, slower reading (default: none)"
    parser.add_argument("--compression", choices=("", *COMPRESSIONS), default="", metavar="NAME", help=named)


def key_of(arguments: Sequence[str], sources: Sequence[Path], unfinished: Path) -> str:
    """What a conversion was asked for: a digest of its arguments, and of size and age of every file of its sources.

    unfinished: the folder that it writes to, which may lie in a source and is no part of it.
    """
    sha = hashlib.sha256(json.dumps([*arguments]).encode())
    for source in sources:
        for file in _files(source, unfinished):
            if file.is_file():
                stat = file.stat()
                sha.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()


def _files(source: Path, unfinished: Path) -> Iterator[Path]:
    """Yield a file, or all that a folder holds, in order of name."""
    if not source.is_dir():
        yield source
    for folder, inner, names in os.walk(source, followlinks=True):
        inner[:] = sorted(name for name in inner if Path(folder, name).resolve() != unfinished)
        yield from (Path(folder, name) for name in sorted(names))


def _write_all(folder: Path, tasks: list[Task], storage: Storage, jobs: int, progress: Progress) -> None:
    """Write these pieces: in a pool, or here if one process is asked for or all splits are small: a piece each."""
    if jobs == 1 or all(len(split.pieces) == 1 for split, _ in tasks):
        for split, piece in tasks:
            _write_one(folder, split, piece, split.pieces[piece], storage, progress.add)
    else:
        _write_in_pool(folder, tasks, storage, min(jobs, len(tasks)), progress)
    progress.end()


def _write_one(folder: Path, split: Split, number: int, piece: Any, storage: Storage, tell: Any) -> None:
    write_piece(folder, split.name, number, split.read(piece), storage, split.central, tell)


def _write_in_pool(folder: Path, tasks: list[Task], storage: Storage, jobs: int, progress: Progress) -> None:
    count = workers.SPAWN.Value("q", 0)
    with workers.workers(jobs, count) as pool:
        with workers.ctrl_c_blocked():
            futures = [
                pool.submit(_work, folder, replace(split, pieces=()), number, split.pieces[number], storage)
                for split, number in tasks
            ]
        while (left := wait(futures, 0.2, FIRST_EXCEPTION)).not_done and not _failed(left.done):
            progress.show(count.value)
        for future in left.done:
            future.result()


def _failed(futures: set[Future]) -> bool:
    return any(future.exception() for future in futures)


def _work(folder: Path, split: Split, number: int, piece: Any, storage: Storage) -> None:
    def tell(clients: int) -> None:
        with workers.shared.get_lock():
            workers.shared.value += clients

    _write_one(folder, split, number, piece, storage, tell)


class Progress:
    """Clients so far, on stderr: a line that changes on a terminal, elsewhere one every ten seconds."""

    def __init__(self, tasks: Sequence[Task], kept: int, rank: int) -> None:
        self.total = round(sum(split.clients / len(split.pieces) for split, _ in tasks))  # pieces are alike
        self.terminal, self.silent = sys.stderr.isatty(), rank > 0
        self.clients = 0
        self.began = self.shown = time.monotonic()
        if kept and not self.silent:
            print(f"{kept} pieces of an interrupted conversion are kept", file=sys.stderr)

    def add(self, clients: int) -> None:
        """Count clients just written."""
        self.show(self.clients + clients)

    def show(self, clients: int) -> None:
        """Tell of so many clients in all, unless it was done a moment ago."""
        self.clients = clients
        now = time.monotonic()
        if self.silent or now - self.shown < (0.2 if self.terminal else 10.0):
            return
        self.shown = now
        of = f" of {self.total:,}" if self.total else ""
        text = f"{clients:,}{of} clients, {now - self.began:.0f} s"
        print(
            f"\r{text}\033[K" if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )

    def end(self) -> None:
        """Remove the line."""
        if self.terminal and not self.silent:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
