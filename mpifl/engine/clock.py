"""Where a rank is and where its time went: one phase at a time, mirrored into a small mapped file.

Because a clock is always in exactly one phase, the seconds of all phases add up to the wall time. Whoever is
left after a rank was killed reads its mapped file and can name rank, host, phase, round and client.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, time

_RECORD = struct.Struct("<q64sqqd16s")  # pid, host; round, client, unix time of the last change, phase
_CHANGING, _CHANGING_AT = struct.Struct("<qqd16s"), struct.calcsize("<q64s")

Listener = Callable[[str, str, float, float, int, int], None]
"""Told of a stretch of time when it ends: phase, account, begin and end in unix seconds, round, client."""


@dataclass(frozen=True)
class Whereabouts:
    """What a rank's status file says: pid, host, phase, 0-based round (-1: none), client index (-1: none)."""

    pid: int
    host: str
    phase: str
    round: int
    client: int
    changed: float

    @staticmethod
    def read(path: Path) -> Whereabouts:
        """Read a status file, also one of a rank that is dead."""
        pid, host, round, client, changed, phase = _RECORD.unpack(path.read_bytes()[: _RECORD.size])
        names = [text.rstrip(b"\0").decode(errors="replace") for text in (phase, host)]
        return Whereabouts(pid, names[1], names[0], round, client, changed)


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

    def attach(self, path: Path) -> None:
        """Mirror every change into the file at `path` from now on."""
        unfinished = path.with_name(f".{path.name}")  # a file that is there can be read
        unfinished.write_bytes(_RECORD.pack(os.getpid(), socket.gethostname().encode(), -1, -1, 0.0, b""))
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
        if self._map is not None:
            _CHANGING.pack_into(self._map, _CHANGING_AT, self.round, self.client, now + self._epoch, phase.encode())
        return left

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
        parts = [f"rank {self.rank}", f"phase {self.phase}"]
        if self.round >= 0:
            parts.append(f"round {self.round + 1}")
        if self.client >= 0:
            parts.append(f"client {self.client}")
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
