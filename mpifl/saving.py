"""Writing checkpoints: what `checkpoint` describes, in the background of the next round.

Ranks write into a folder of another name. What one writes is durable (fsync) before rank 0 gives the folder its name
and then the mark, so that a full disk or a kill leaves the checkpoint before usable.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpifl.checkpoint import MARK, complete
from mpifl.data.newfile import sync
from mpifl.engine.store import ClientMemory
from mpifl.fleet import Fleet
from mpifl.messages import SAVE, SAVED, Header
from mpifl.tree import Tree, leaves

_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ROWS_AT_ONCE = 256
UNASKED = 900.0
"""Seconds between checkpoints of a job that does not say how often."""


@dataclass
class Column:
    """A tensor on its way to a file: dtype, shape, and its bytes in pieces."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Any]

    @staticmethod
    def of(tensor: Tensor) -> Column:
        """Take a tensor whole."""
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return Column(tensor.dtype, tuple(tensor.shape), [flat])


@dataclass(frozen=True)
class Written:
    """What became of a rank's file: bytes and crc32, or not `ok`. No file at all is ok, with 0 bytes."""

    ok: bool = True
    bytes: int = 0
    crc: int = 0

    def pack(self) -> np.ndarray:
        """Bytes, for a gather."""
        return np.asarray([self.ok, self.bytes, self.crc], np.int64).view(np.uint8)


def write_tensors(path: Path, columns: dict[str, Column]) -> Written:
    """Write a safetensors file of columns, each piece as it comes, and wait until it is durable."""
    header, start = {}, 0
    for name, column in columns.items():
        end = start + torch.Size(column.shape).numel() * column.dtype.itemsize
        header[name] = {"dtype": _KINDS[column.dtype], "shape": column.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = [len(text).to_bytes(8, "little"), text]
    crc = size = 0
    with path.open("wb") as file:
        for piece in chain(head, *(column.pieces for column in columns.values())):
            size += file.write(piece)
            crc = zlib.crc32(piece, crc)
        _make_durable(file.fileno())
    return Written(bytes=size, crc=crc)


def _write_text(path: Path, text: str) -> Written:
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        _make_durable(file.fileno())
    return Written(bytes=len(data), crc=zlib.crc32(data))


def _make_durable(descriptor: int) -> None:
    os.fsync(descriptor)


class Writer:
    """Writes one rank's part of a checkpoint in a thread. folder: RUN/checkpoints."""

    def __init__(self, folder: Path, rank: int, memory: ClientMemory) -> None:
        self.folder, self.rank, self.memory = folder, rank, memory
        self._thread: threading.Thread | None = None
        self.written: dict[str, Written] = {}
        self.error: OSError | None = None

    def begin(self, rounds: int, server: Tree | None = None, about: dict[str, Any] | None = None) -> None:
        """Start to write what is current: client memory kept here and, on rank 0, the server's state."""
        self.written, self.error = {}, None
        rows = self.memory.freeze() if self.memory.kept else None
        self._thread = threading.Thread(target=self._write, args=(rounds, rows, server, about), name="checkpoint")
        self._thread.start()

    def finish(self) -> Written:
        """Wait until it is written; returns what became of the file of client memory."""
        self._thread.join()
        self._thread = None
        self.memory.thaw()
        if self.error is None:
            return self.written.get(memory_file(self.rank), Written())
        print(f"mpifl: rank {self.rank} cannot write its checkpoint: {self.error}", file=sys.stderr, flush=True)
        return Written(ok=False)

    def close(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def _write(
        self, rounds: int, rows: list[tuple[int, int, Tensor]] | None, server: Tree | None, about: dict[str, Any] | None
    ) -> None:
        part = self.folder / part_name(rounds)
        try:
            part.mkdir(parents=True, exist_ok=True)
            if server is not None:
                columns = {name: Column.of(leaf) for name, leaf in leaves(server)}
                self.written["server.safetensors"] = write_tensors(part / "server.safetensors", columns)
                self.written["run.json"] = _write_text(part / "run.json", json.dumps(about, indent=2) + "\n")
            if rows:
                self.written[memory_file(self.rank)] = write_tensors(part / memory_file(self.rank), _columns(rows))
        except OSError as error:
            self.error = error


def _columns(rows: list[tuple[int, int, Tensor]]) -> dict[str, Column]:
    count, width = len(rows), len(rows[0][2])

    def packed() -> Iterator[np.ndarray]:
        for start in range(0, count, _ROWS_AT_ONCE):
            yield torch.stack([row for _, _, row in rows[start : start + _ROWS_AT_ONCE]]).numpy().reshape(-1)

    return {
        "client": Column.of(torch.tensor([client for client, _, _ in rows])),
        "visits": Column.of(torch.tensor([visits for _, visits, _ in rows])),
        "rows": Column(torch.uint8, (count, width), packed()),
    }


def memory_file(rank: int) -> str:
    """Name of the file of client memory that a rank kept."""
    return f"memory-{rank:05d}.safetensors"


def folder_name(rounds: int) -> str:
    """Name of the checkpoint after so many rounds."""
    return f"round-{rounds:08d}"


def part_name(rounds: int) -> str:
    """Name of its folder while it is written."""
    return f".{folder_name(rounds)}.part"


class Checkpoints:
    """Rank 0's side: has all ranks write, and completes what they wrote.

    say: told in a line when a checkpoint could not be written; the run goes on, and the last one stays.
    """

    def __init__(self, writer: Writer, fleet: Fleet, every: int, keep: int) -> None:
        self.writer, self.fleet, self.every, self.keep = writer, fleet, every, keep
        self.saved = 0
        """Rounds in the last one of this start that is complete."""
        self._rounds: int | None = None
        self._begun, self._any = time.monotonic(), False

    def due(self, rounds: int, last: bool) -> bool:
        """Whether to write one after so many rounds: also after the last, which others may be added to."""
        if last:
            return self.every > 0 or self._any
        return rounds % self.every == 0 if self.every else time.monotonic() - self._begun > UNASKED

    def begin(self, rounds: int, state: Tree, about: dict[str, Any]) -> None:
        """Start to write the checkpoint after so many rounds, whose state and memory are current."""
        self.finish()
        fleet = self.fleet
        if self.writer.memory.kept:
            Header(SAVE, fleet.round, fleet.accepted, clients=rounds).announce(fleet.comm)
            fleet.host.settle(fleet.round, fleet.accepted)
        layout = self.writer.memory.layout.to_json().decode()
        more = {"rounds": rounds, "limits": fleet.limits, "row": layout, "branches": empty_branches(state)}
        self.writer.begin(rounds, state, about | more)
        self._rounds, self._begun, self._any = rounds, time.monotonic(), True

    def finish(self) -> None:
        """Complete what was begun: wait for all ranks, name the folder, mark it, remove older ones."""
        if self._rounds is None:
            return
        rounds, self._rounds = self._rounds, None
        own = self.writer.finish()
        ranks = [own]
        if self.writer.memory.kept:
            Header(SAVED, self.fleet.round, self.fleet.accepted).announce(self.fleet.comm)
            packed = self.fleet.comm.gather(own.pack()).view(np.int64).reshape(-1, 3).tolist()
            ranks = [Written(bool(ok), size, crc) for ok, size, crc in packed]
        try:
            if not all(written.ok for written in ranks):
                raise OSError(f"rank {[written.ok for written in ranks].index(False)} could not write its part")
            files = dict(self.writer.written) | {memory_file(r): written for r, written in enumerate(ranks)}
            self._complete(rounds, {name: written for name, written in files.items() if written.bytes})
            self.saved = rounds
        except OSError as error:
            shutil.rmtree(self.writer.folder / part_name(rounds), ignore_errors=True)
            left = complete(self.writer.folder)
            last = f"the last one is of round {left[0].rounds}" if left else "there is none before it"
            self.fleet.say(f"the checkpoint of round {rounds} could not be written ({error}); {last}")

    @contextmanager
    def rescued(self, on_record: Callable[[], tuple[int, Tree, dict[str, Any], dict[str, Any]]]) -> Iterator[None]:
        """Within the block, if another rank dies, rank 0 saves what it has, where no rank keeps memory of clients.

        on_record: returns rounds that are done, the state and limits of sums after them, and as `begin` about.
        """
        try:
            yield
        except self.fleet.comm.losses:
            if not self.writer.memory.kept:
                rounds, state, limits, about = on_record()
                if rounds > self.saved:
                    self.fleet.limits = limits
                    self.begin(rounds, self.fleet.fetch(state), about)
                    self.finish()
            raise

    def _complete(self, rounds: int, files: dict[str, Written]) -> None:
        folder = self.writer.folder
        part, final = folder / part_name(rounds), folder / folder_name(rounds)
        _remove(final)  # of the same name: not complete, or damaged
        sync(part)
        part.rename(final)
        sync(folder)
        unfinished = final / f".{MARK}"
        _write_text(unfinished, json.dumps({name: [w.bytes, w.crc] for name, w in files.items()}, indent=2) + "\n")
        unfinished.rename(final / MARK)
        sync(final)
        kept = {checkpoint.path for checkpoint in complete(folder)[: self.keep]} | {final}
        for other in folder.iterdir():
            if other not in kept:
                _remove(other)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its mark first, so that what a kill leaves of it is none."""
    with suppress(OSError):
        (checkpoint / MARK).unlink()
    shutil.rmtree(checkpoint, ignore_errors=True)


def empty_branches(tree: Tree, prefix: str = "") -> list[str]:
    """Dotted names of a tree's branches that hold nothing, which no leaf would tell of."""
    found = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += empty_branches(value, f"{prefix}{name}.") if value else [prefix + name]
    return found
