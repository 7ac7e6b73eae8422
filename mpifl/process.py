"""Who a process is, so that others can tell, also after its death, whether it still runs."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk or a network file", "Z": "dead"}


@dataclass(frozen=True)
class Process:
    """A process of some machine. started: in ticks since that machine's boot, so that a reused pid is told apart."""

    host: str
    machine: int
    pid: int
    started: int

    @staticmethod
    def current() -> Process:
        """This one."""
        _, started = _stat("self") or ("", 0)
        return Process(socket.gethostname(), this_machine(), os.getpid(), started)

    @property
    def here(self) -> bool:
        """Whether it is, or was, of this machine."""
        return self.machine == this_machine()

    @property
    def state(self) -> str:
        """One letter as ps prints it: R running, S sleeping, T stopped, D in a disk ...; "" if it is gone."""
        letter, started = _stat(self.pid) or ("", 0)
        return letter if started == self.started else ""

    @property
    def alive(self) -> bool | None:
        """Whether it runs, or is stopped; None: it is of another machine."""
        return self.state not in ("", "Z", "X") if self.here else None

    @property
    def trouble(self) -> str:
        """What its state says for people, "" if that is nothing special."""
        return _STATES.get(self.state, "") if self.here else ""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


@cache
def this_machine() -> int:
    """A number, below 2^63, of this boot of this machine, and of the pids seen from here.

    Names do not tell machines apart: containers may share a host's name and not its pids.
    """
    try:
        seen = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        seen = socket.gethostname()
    return int(hashlib.sha256(seen.encode()).hexdigest()[:15], 16)


def _stat(pid: int | str) -> tuple[str, int] | None:
    """State and start time of a process on this machine."""
    try:
        rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return rest[0], int(rest[19])
