"""One job per run folder: a lock that holds on network file systems too, and that a dead job does not keep.

RUN/lock has numbered files; whoever made the file with the highest number has the lock, and its time of change is the
holder's heartbeat. Making a file that must not exist yet is what NFS does in one piece. Numbers only grow: a lock is
taken over by making the next one, so that of several who find a dead holder one succeeds, and one who comes late, or
wakes up after a long sleep, finds a higher number than his own.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mpifl.config import UserError
from mpifl.process import Process

HEARTBEAT, STALE = 5.0, 60.0
"""Seconds between heartbeats, and after which a holder on another machine is dead, by the file system's clock."""
LOOK = 1.0
_FREE = 0.0
"""The time of change of a lock that was given back."""


@dataclass(frozen=True)
class Holder:
    """Who has, or had, a run folder's lock. job: of a batch system, "" for none; restart: how often that restarted it.

    heartbeat: unix time by the file system's clock. path: the lock's file.
    """

    process: Process | None
    job: str
    restart: int
    heartbeat: float
    path: Path

    @staticmethod
    def of(folder: Path) -> Holder | None:
        """Who has or had the lock of the run in `folder`; None where nobody ever had."""
        while files := _files(folder / "lock"):
            path = files[-1]
            try:
                with path.open(encoding="utf-8", errors="replace") as file:  # which has NFS ask the server
                    text, heartbeat = file.read(), os.fstat(file.fileno()).st_mtime
            except FileNotFoundError:
                continue  # somebody has just taken it over
            try:
                told = json.loads(text)
                return Holder(Process(**told["process"]), told["job"], told["restart"], heartbeat, path)
            except (ValueError, KeyError, TypeError):
                return Holder(None, "", 0, heartbeat, path)  # just being written
        return None

    def alive(self) -> bool:
        """Whether it runs, as far as one can tell at once: on another machine, whether its heartbeat is recent."""
        if self.heartbeat == _FREE:
            return False
        job, restart = _batch_job()
        if job and self.job == job and self.restart < restart:
            return False  # a batch system starts a job again when the one before is no more
        if self.process is not None and self.process.here:
            return bool(self.process.alive)
        return _now(self.path.parent) - self.heartbeat <= STALE

    def __str__(self) -> str:
        who = str(self.process) if self.process else "another job"
        return f"{who} ({self.job})" if self.job else who


class Lock:
    """The lock of a run folder, held from `take` to `release`."""

    def __init__(self, path: Path, lost: Callable[[str], None]) -> None:
        self.path, self._lost = path, lost
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    @staticmethod
    def take(folder: Path, lost: Callable[[str], None], say: Callable[[str], None] = print) -> Lock:
        """Take the lock of `folder`, which exists; raises UserError when a job that has it is running.

        lost: called with a line for people, from a thread, if another job takes it over, which must end this one.
        say: told in one line when it has to wait until a job on another machine is certainly dead.
        """
        place = folder / "lock"
        try:
            place.mkdir(exist_ok=True)
            while True:
                last = _highest(place)
                _wait_until_free(folder, say)
                mine = _file(place, last + 1)
                if _make(mine):
                    if _highest(place) == last + 1:
                        break
                    mine.unlink(missing_ok=True)  # a file server's listing was out of date
            for path in _files(place):
                if path != mine:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"run.out is '{folder}', where no lock can be made: {error.strerror or error}") from None
        return Lock(mine, lost)

    def require(self) -> None:
        """Raise UserError if another job has taken the lock over: for moments when two would do harm."""
        if not self._mine():
            raise UserError(self._taken())

    def release(self) -> None:
        """Give it back."""
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            os.utime(self.path, (_FREE, _FREE))

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            with suppress(OSError):  # of a file server that is away for a while
                os.utime(self.path)
            if not self._mine():
                self._lost(self._taken())
                return

    def _mine(self) -> bool:
        try:
            return _files(self.path.parent)[-1:] == [self.path]
        except OSError:  # the file server is away
            return True

    def _taken(self) -> str:
        folder = self.path.parent.parent
        return (
            f"another job has taken over '{folder}' while this one was suspended: {Holder.of(folder) or 'it is gone'}"
        )


@contextmanager
def locked(folder: Path, lost: Callable[[str], None], say: Callable[[str], None] = print) -> Iterator[Lock]:
    """Have the lock of `folder` within the block, as `Lock.take`."""
    lock = Lock.take(folder, lost, say)
    try:
        yield lock
    finally:
        lock.release()


def _wait_until_free(folder: Path, say: Callable[[str], None]) -> None:
    """Return when the lock's holder is dead; UserError if it is not."""
    first, began = None, time.monotonic()
    while (holder := Holder.of(folder)) is not None and holder.alive() and time.monotonic() - began <= STALE:
        here = holder.process is not None and holder.process.here
        if here or (first is not None and holder.heartbeat != first.heartbeat):
            raise UserError(
                f"run.out is '{folder}', where another job is running: {holder}; wait for its end, or choose another "
                f"run.out"
            )
        if first is None:
            first = holder
            say(f"'{folder}' is locked by {holder}; waiting up to {STALE:.0f} s for a sign of life from there")
        time.sleep(LOOK)


def _make(path: Path) -> bool:
    """Make a lock's file with what says whose it is, unless there is one: whole and at once, by a link."""
    job, restart = _batch_job()
    text = json.dumps({"process": asdict(Process.current()), "job": job, "restart": restart}) + "\n"
    mine = _own(path.parent, "new")
    mine.write_text(text, encoding="utf-8")
    try:
        os.link(mine, path)
        return True
    except FileExistsError:
        return mine.stat().st_nlink == 2  # NFS may repeat a call that succeeded
    except OSError:  # a file system without links
        if mine.stat().st_nlink == 2:
            return True
        with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(text)
            return True
        return False
    finally:
        mine.unlink(missing_ok=True)


def _now(place: Path) -> float:
    """The time by the file system's clock."""
    file = _own(place, "now")
    try:
        with file.open("w") as opened:
            os.utime(opened.fileno())
            return os.fstat(opened.fileno()).st_mtime
    finally:
        file.unlink(missing_ok=True)


def _own(place: Path, what: str) -> Path:
    """A file's name that no other process or thread uses."""
    me = Process.current()
    return place / f".{what}-{me.host}-{me.pid}-{me.started}-{threading.get_ident()}"


def _files(place: Path) -> list[Path]:
    """The lock's files, the one that counts last."""
    return sorted(place.glob("[0-9]*"), key=lambda path: int(path.name)) if place.is_dir() else []


def _highest(place: Path) -> int:
    files = _files(place)
    return int(files[-1].name) if files else 0


def _file(place: Path, number: int) -> Path:
    return place / f"{number:08d}"


def _batch_job() -> tuple[str, int]:
    """This process's batch job, and how often it was restarted."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"Slurm job {job}" if job else "", int(os.environ.get("SLURM_RESTART_COUNT") or 0)
