"""Where a rank is and where its time went: one phase at a time, mirrored into a small mapped file.

Because a clock is always in exactly one phase, the seconds of all phases add up to the wall time. Whoever is
left after a rank was killed reads its mapped file and can name rank, host, phase, round and client. There are two
signs of life in it: the beat of the work itself, at every change of phase, every batch and every look of one who
waits, and the pulse of the process, which goes on through a long batch.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, time
from typing import TypeVar

from mpifl.process import Process

T = TypeVar("T")

# rank, ranks, pid, start of the process, machine, host | round, client, change of phase, phase | beat, steps | pulse
_RECORD = struct.Struct("<5q64sqqd16sdqd")
_CHANGING, _CHANGING_AT = struct.Struct("<qqd16sd"), struct.calcsize("<5q64s")
_BEAT, _BEAT_AT = struct.Struct("<dq"), struct.calcsize("<5q64sqqd16s")
_PULSE, _PULSE_AT = struct.Struct("<d"), struct.calcsize("<5q64sqqd16sdq")

ENDED = "ended"
"""The phase of a rank that has left in order."""

Listener = Callable[[str, str, float, float, int, int], None]
"""Told of a stretch of time when it ends: phase, account, begin and end in unix seconds, round, client."""


@dataclass(frozen=True)
class Whereabouts:
    """What a rank's status file says: phase, 0-based round (-1: none), client index (-1: none), batches done so far.

    changed, beat, pulse: unix times, by the rank's own clock, of the last change of phase and of both signs of life.
    """

    rank: int
    ranks: int
    process: Process
    phase: str
    round: int
    client: int
    steps: int
    changed: float
    beat: float
    pulse: float

    @staticmethod
    def read(path: Path) -> Whereabouts:
        """Read a status file, also one of a rank that is dead. Raises ValueError for another file, OSError."""
        record = path.read_bytes()
        if len(record) != _RECORD.size:
            raise ValueError(f"{path} is not a rank's status")
        rank, ranks, pid, started, machine, host, round, client, changed, phase, beat, steps, pulse = _RECORD.unpack(
            record
        )
        names = [text.rstrip(b"\0").decode(errors="replace") for text in (host, phase)]
        process = Process(names[0], machine, pid, started)
        return Whereabouts(rank, ranks, process, names[1], round, client, steps, changed, beat, pulse)

    @staticmethod
    def of_run(folder: Path) -> list[Whereabouts]:
        """Of all ranks of the run in `folder`, in order of rank, as far as they can be read."""
        found = []
        for path in sorted((folder / "status").glob("rank-*")):
            try:
                found.append(Whereabouts.read(path))
            except (OSError, ValueError):
                continue  # removed meanwhile, or of an older release
        return found

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.process.pid

    @property
    def host(self) -> str:
        """Of its process."""
        return self.process.host

    @property
    def last_sign(self) -> float:
        """Unix time of the last sign of life, of whatever kind."""
        return max(self.beat, self.pulse)

    def __str__(self) -> str:
        place = _place(self.phase, self.round, self.client)
        return f"rank {self.rank} on {self.host} (pid {self.pid}), {place}"


class Clock:
    """Accumulates seconds by phase and remembers round and client for error messages."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.phase, self.round, self.client = rank, "start", -1, -1
        self.seconds: dict[str, float] = {}
        self.account = ""
        """When set, all time is booked under this name, whatever the phase."""
        self.listener: Listener | None = None
        self._since = perf_counter()
        self._epoch = time() - self._since
        self._map: mmap.mmap | None = None
        self._steps = 0

    def attach(self, path: Path, ranks: int = 1) -> None:
        """Mirror every change into the file at `path` from now on."""
        unfinished = path.with_name(f".{path.name}")  # a file that is there can be read
        me, now = Process.current(), time()
        fixed = (self.rank, ranks, me.pid, me.started, me.machine, me.host.encode())
        unfinished.write_bytes(_RECORD.pack(*fixed, -1, -1, now, b"", now, 0, now))
        with unfinished.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _RECORD.size)
        self.enter(self.phase)
        unfinished.rename(path)

    def enter(self, phase: str) -> str:
        """Leave the current phase for `phase`; returns the one left."""
        now = perf_counter()
        left, since = self.phase, self._since
        account = self.account or left
        self.seconds[account] = self.seconds.get(account, 0.0) + now - since
        if self.listener is not None:
            self.listener(left, account, since + self._epoch, now + self._epoch, self.round, self.client)
        self._since, self.phase = now, phase
        self._mirror(now + self._epoch)
        return left

    def _mirror(self, at: float) -> None:
        if self._map is not None:
            where = f"{self.account}/{self.phase}" if self.account else self.phase
            _CHANGING.pack_into(self._map, _CHANGING_AT, self.round, self.client, at, where.encode(), at)

    def beat(self) -> None:
        """Give a sign of life: the work goes on."""
        if self._map is not None:
            _BEAT.pack_into(self._map, _BEAT_AT, time(), self._steps)

    def beating(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield what `batches` does, each a step and a sign of life."""
        for batch in batches:
            self._steps += 1
            self.beat()
            yield batch

    def pulse(self) -> None:
        """Give the other sign of life, from a thread of its own: the process runs, whatever its work does."""
        if self._map is not None:
            _PULSE.pack_into(self._map, _PULSE_AT, time())

    def during(self, phase: str) -> _During:
        """Be in `phase` within a `with` block; an exception leaves the clock where it happened, to be reported."""
        return _During(self, phase)

    @contextmanager
    def booked(self, account: str) -> Iterator[None]:
        """Book all time within the block under `account`, whatever the phase."""
        self.enter(self.phase)
        outer, self.account = self.account, account
        yield
        self.enter(self.phase)
        self.account = outer
        self._mirror(time())

    def visit(self, client: int) -> None:
        """Note the client at work; it is mirrored with the phase that comes next."""
        self.client = client

    def lap(self) -> dict[str, float]:
        """Return seconds by phase since the last lap, and start again from zero."""
        self.enter(self.phase)
        seconds, self.seconds = self.seconds, {}
        return seconds

    def where(self) -> str:
        """Say where this rank is, for people; rounds are counted from 1 there."""
        return f"rank {self.rank}, {_place(self.phase, self.round, self.client)}"


def _place(phase: str, round: int, client: int) -> str:
    """Phase, round and client for people, who count rounds from 1."""
    parts = [f"phase {phase}"]
    if round >= 0:
        parts.append(f"round {round + 1}")
    if client >= 0:
        parts.append(f"client {client}")
    return ", ".join(parts)


class _During:
    """What `Clock.during` returns; contextlib's would take as long as all that is done within it."""

    __slots__ = ("clock", "left", "phase")

    def __init__(self, clock: Clock, phase: str) -> None:
        self.clock, self.phase = clock, phase

    def __enter__(self) -> None:
        self.left = self.clock.enter(self.phase)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.clock.enter(self.left)
