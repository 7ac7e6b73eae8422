"""When a run stops before its last round: it was asked to by a signal, or its time is over.

It finishes the round, writes a checkpoint and exits with status 75 (EX_TEMPFAIL of sysexits.h): the same command goes
on. SIGUSR1 is the signal that every launcher passes on to the ranks: of Open MPI's mpirun, SIGTERM kills them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STATUS = 75
_ECHO = 2.0
"""Seconds within which a signal that comes again is the same one: sent to a group, and passed on by the launcher."""
_LOOK = 20.0
"""Seconds between looks at Slurm's own limit."""
_MARGIN = 10.0
"""Seconds before Slurm's limit by which a run has ended."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, or a second signal, handled like Ctrl-C."""


class Stopped(Exception):
    """A run ended early, as it was asked to; the same command goes on with it. requeue: under Slurm, by itself."""

    def __init__(self, requeue: bool) -> None:
        super().__init__("stopped early, with a checkpoint")
        self.requeue = requeue


class Signals:
    """What this process was asked for. A signal belongs to the process, so there is one of these, `ASKED`."""

    def __init__(self) -> None:
        self.name = ""
        """Of the first signal that asked the run to stop."""
        self.training = False
        """Whether there are rounds to be finished first."""
        self._first = 0.0

    def listen(self) -> None:
        """Handle SIGUSR1 and SIGTERM from now on."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note)

    @contextmanager
    def while_training(self) -> Iterator[None]:
        """Within the block there are rounds to be finished first."""
        self.training = True
        try:
            yield
        finally:
            self.training = False

    def _note(self, number: int, frame: Any) -> None:
        if self.name and time.monotonic() - self._first < _ECHO:
            return
        if self.name or (number == signal.SIGTERM and not self.training):
            raise Terminated
        self.name, self._first = signal.Signals(number).name, time.monotonic()


ASKED = Signals()


class TimeLimit:
    """When a run has to end: `limit` seconds after `began` (perf_counter), and when Slurm ends the job."""

    def __init__(self, limit: float, began: float) -> None:
        self.end = began + limit if limit else float("inf")
        self._job = os.environ.get("SLURM_JOB_ID", "") if shutil.which("squeue") else ""
        self._slurm, self._looked = float("inf"), -float("inf")

    def reason(self, seconds: float) -> str:
        """Why what takes so many seconds would take too long, "" if it would not."""
        then = time.perf_counter() + seconds
        if then > self.end:
            return "run.time_limit"
        if self._job and time.perf_counter() - self._looked > _LOOK:
            self._looked = time.perf_counter()
            self._slurm = self._looked + slurm_seconds_left(self._job) - _MARGIN
        return "Slurm's time limit" if then > self._slurm else ""


def slurm_seconds_left(job: str) -> float:
    """Seconds until Slurm ends a job; infinite if it does not, or does not say."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", _squeue(job, "%L"))
    if not found:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def requeue() -> str:
    """Have Slurm start this batch job again; returns what it says against it, "" for nothing."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        said = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if said.returncode == 0 else said.stderr.strip() or f"status {said.returncode}"


def may_requeue() -> bool:
    """Whether this is a batch job of Slurm's, which can be started again."""
    if not os.environ.get("SLURM_JOB_ID") or shutil.which("scontrol") is None:
        return False
    return _squeue(os.environ["SLURM_JOB_ID"], "%T") == "RUNNING"


def _squeue(job: str, what: str) -> str:
    """A field that Slurm shows of a job, "" if it does not answer."""
    try:
        said = subprocess.run(["squeue", "-h", "-j", job, "-o", what], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip()
