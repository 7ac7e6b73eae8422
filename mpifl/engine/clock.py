"""Where a rank is and where its time went: one phase at a time, mirrored into a small mapped file.

Because a clock is always in exactly one phase, the seconds of all phases add up to the wall time. Whoever is
left after a rank was killed reads its mapped file and can name rank, host, phase, round and client.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, time

_RECORD = struct.Struct("<qqqd16s64s")  # pid, round, client, unix time of the last change, phase, host


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
        pid, round, client, changed, phase, host = _RECORD.unpack(path.read_bytes()[: _RECORD.size])
        names = [text.rstrip(b"\0").decode(errors="replace") for text in (phase, host)]
        return Whereabouts(pid, names[1], names[0], round, client, changed)


class Clock:
    """Accumulates seconds by phase and remembers round and client for error messages."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.phase, self.round, self.client = rank, "start", -1, -1
        self.seconds: dict[str, float] = {}
        self.account = ""
        """When set, all time is booked under this name, whatever the phase."""
        self._since = perf_counter()
        self._map: mmap.mmap | None = None

    def attach(self, path: Path) -> None:
        """Mirror every change into the file at `path` from now on."""
        unfinished = path.with_name(f".{path.name}")  # a file that is there can be read
        unfinished.write_bytes(bytes(_RECORD.size))
        with unfinished.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _RECORD.size)
        self._host = socket.gethostname().encode()[:64]
        self._mirror()
        unfinished.rename(path)

    def enter(self, phase: str) -> str:
        """Leave the current phase for `phase`; returns the one left."""
        now = perf_counter()
        account = self.account or self.phase
        self.seconds[account] = self.seconds.get(account, 0.0) + now - self._since
        self._since, left, self.phase = now, self.phase, phase
        self._mirror()
        return left

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in `phase` within the block; an exception leaves the clock where it happened, to be reported."""
        left = self.enter(phase)
        yield
        self.enter(left)

    @contextmanager
    def booked(self, account: str) -> Iterator[None]:
        """Book all time within the block under `account`, whatever the phase."""
        self.enter(self.phase)
        self.account = account
        yield
        self.enter(self.phase)
        self.account = ""

    def visit(self, client: int) -> None:
        """Note the client at work."""
        self.client = client
        self._mirror()

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

    def _mirror(self) -> None:
        if self._map is not None:
            phase = self.phase.encode()[:16]
            _RECORD.pack_into(self._map, 0, os.getpid(), self.round, self.client, time(), phase, self._host)
