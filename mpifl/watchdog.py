"""Ends a job in which a rank is dead or stuck, and says which one, where it was, and what the others are doing.

A thread on every rank. It gives the pulse of its process; on a few ranks it reads the whereabouts of all, and
raises the alarm when one has gone, or its work has given no sign of life for run.stall_timeout. Then every rank that
can still do so writes its Python stacks into RUN/status, as after SIGUSR2; the one that raised the alarm reports.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from mpifl.comm import Alone, World
from mpifl.engine.clock import ENDED, Clock, Whereabouts
from mpifl.launch import agree

WATCHERS = 8
"""Ranks that look after all: if every one did, a thousand would read a million files."""
PULSE = 0.03
"""Seconds between pulses; a launcher takes longer to kill the others of a rank that died: that one is silent first."""
LOOK, FLUSH = 1.0, 10.0
"""Seconds between looks (more with hundreds of ranks), and between writes for those who read on other machines."""
GRACE = 3.0
"""Seconds in which a launcher ends the job of a dead rank by itself."""
ANSWER = 1.5
"""Seconds in which ranks write down their stacks."""
MOST_RANKS, MOST_LINES = 8, 60
"""How much of a report is printed; the file in the run folder has all of it."""
_FRAMES = 12
_THREAD = re.compile(r"^(?:Current t|T)hread 0x.*$", re.MULTILINE)
GONE = "its process is gone"


@contextmanager
def watched(
    comm: World | Alone, clock: Clock, folder: Path, stall_timeout: float = 0.0, ends_job: bool = True
) -> Iterator[None]:
    """Within the block RUN/status tells where this rank is, and a dead or stuck rank ends the job; all ranks at once.

    stall_timeout: seconds (0: none). folder: the run's, which has a folder `status`. ends_job: else the job outlives
    its ranks: MPI tells of dead ones, and stuck ones are killed.
    """
    status = folder / "status"
    agree(comm, lambda: _forget(status) if comm.rank == 0 else None)
    with stacks_file(status, comm.rank).open("a") as stacks:
        faulthandler.register(signal.SIGUSR2, stacks, all_threads=True, chain=False)
        clock.attach(_rank_file(status, comm.rank), comm.size)
        watchdog = Watchdog(comm, clock, folder, stall_timeout, stacks, ends_job)
        comm.beat = clock.beat
        watchdog.start()
        try:
            yield
            clock.enter(ENDED)
        finally:
            watchdog.stop()
            comm.beat = lambda: None
            faulthandler.unregister(signal.SIGUSR2)


def stacks_file(status: Path, rank: int) -> Path:
    """Where a rank writes its stacks. status: RUN/status."""
    return status / f"stacks-{rank:05d}.txt"


def _rank_file(status: Path, rank: int) -> Path:
    return status / f"rank-{rank:05d}"


def _forget(status: Path) -> None:
    """Remove what an earlier start, perhaps on more ranks, left of where its ranks were."""
    for path in (*status.glob("rank-*"), status / "alarm"):
        path.unlink(missing_ok=True)


class Watchdog(threading.Thread):
    """The thread; `stop` before the interpreter ends."""

    def __init__(
        self,
        comm: World | Alone,
        clock: Clock,
        folder: Path,
        stall_timeout: float,
        stacks: TextIO,
        ends_job: bool = True,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.ends_job = ends_job
        self.comm, self.clock, self.folder, self.stall_timeout, self.stacks = comm, clock, folder, stall_timeout, stacks
        self.status, self.alarm = folder / "status", folder / "status" / "alarm"
        self.watches = watches(comm.rank, comm.size)
        every = max(LOOK, comm.size / 100) if self.watches else LOOK
        self.every = min(every, stall_timeout / 4) if stall_timeout else every
        self._silence = Silence(comm.size, self.every)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self.join(5)

    def run(self) -> None:
        """Give the pulse, and look now and then, until stopped."""
        looked = flushed = time.monotonic()
        file = os.open(_rank_file(self.status, self.comm.rank), os.O_RDWR)
        try:
            while not self._stopped.wait(PULSE):
                self.clock.pulse()
                now = time.monotonic()
                if now - looked >= self.every:
                    looked = now
                    if self._look(now):
                        return
                if now - flushed >= FLUSH:
                    flushed = now
                    with suppress(OSError):
                        os.fsync(file)  # a mapped file reaches NFS half a minute later otherwise
        finally:
            os.close(file)

    def _look(self, now: float) -> bool:
        """See to the alarm that another rank raised, or raise it; returns whether there is one."""
        if self.alarm.exists():
            self._attend()
            return True
        if not self.watches:
            return False
        records = [_read(_rank_file(self.status, rank)) for rank in range(self.comm.size)]
        self._silence.look(records, now)
        lost = {rank: why for rank in range(self.comm.size) if (why := self._lost(rank, records[rank]))}
        if not lost or not self._raise(lost):
            return False
        self._report(lost, records)
        return True

    def _lost(self, rank: int, record: Whereabouts | None) -> str:
        """Why a rank is lost, "" if it is not."""
        silent = self._silence.work[rank]
        if record is not None and record.phase == ENDED:
            return ""
        if record is not None and record.process.alive is False:
            if not self.ends_job:
                return ""  # MPI tells of it
            if silent > GRACE:
                return GONE
        if not self.stall_timeout or silent < self.stall_timeout:
            return ""
        if record is None:
            return f"has not started within {silent:.1f} s"
        trouble = record.process.trouble or ("" if self._silence.process[rank] > self.every * 2 else "its process runs")
        return f"silent for {silent:.1f} s" + (f", {trouble}" if trouble else "")

    def _raise(self, lost: dict[int, str]) -> bool:
        """Raise the alarm unless another rank does so."""
        try:
            file = os.open(self.alarm, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except OSError:
            return False
        os.write(file, " ".join(map(str, lost)).encode())
        os.close(file)
        return True

    def _attend(self) -> None:
        """Write down this rank's stacks, let them be read, and kill what a launcher would wait for."""
        self._dump()
        if self._stopped.wait(ANSWER + GRACE):
            return
        for word in self.alarm.read_text().split():
            record = _read(_rank_file(self.status, int(word)))
            if record is not None and record.rank != self.comm.rank:
                _send(record, signal.SIGKILL)

    def _report(self, lost: dict[int, str], records: Sequence[Whereabouts | None]) -> None:
        files = {rank: stacks_file(self.status, rank) for rank in range(self.comm.size)}
        before = {rank: _size(file) for rank, file in files.items()}
        stuck = [record for record in records if record is not None and record.rank in lost]
        for record in stuck:
            if record.rank != self.comm.rank:  # two dumps at once into one file would be mixed up
                _send(record, signal.SIGUSR2)  # it answers in C, also where its Python is held up
        self._dump()
        if self._stopped.wait(ANSWER):
            return  # the work went on after all, and has ended
        what = "the job ends" if self.ends_job else "it is killed"
        head = [f"mpifl: {self._why(lost)}; {what}:"]
        for rank in sorted(lost, key=lambda rank: (-self._silence.work[rank], rank)):
            head.append(f"  {records[rank] or f'rank {rank}'}: {lost[rank]}")
        tail = ["what ranks were doing, the innermost call first:"]
        tail += told_together({rank: main_stack(file, before[rank]) for rank, file in files.items()})
        tail.append(f"stacks of all threads are in {self.status}/stacks-*.txt")
        printed = [*_cut(head, 1 + MOST_RANKS), *_cut(tail, MOST_LINES)]
        if self.ends_job:
            end_job(self.comm, self.folder, "\n".join([*head, *tail]), "\n".join(printed), stuck)
            return
        print("\n".join(printed), file=sys.stderr, flush=True)
        for record in stuck:
            _send(record, signal.SIGKILL)

    def _why(self, lost: dict[int, str]) -> str:
        if GONE in lost.values():
            return "a rank is dead"
        return f"no sign of life for {self.stall_timeout:g} s (run.stall_timeout)"

    def _dump(self) -> None:
        self.stacks.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {self.clock.where()}\n")
        self.stacks.flush()
        faulthandler.dump_traceback(self.stacks, all_threads=True)


def watches(rank: int, ranks: int) -> bool:
    """Whether a rank looks after all: at most WATCHERS do, evenly spread, rank 0 among them."""
    watchers = min(WATCHERS, ranks)
    return rank * watchers % ranks < watchers


class Silence:
    """How long each rank has given no sign of life, in seconds of this process's clock: other machines' may differ.

    work, process: seconds without a beat, without a pulse, by rank. Between two looks at most twice `every` count:
    whoever was suspended himself must not complain of others who were suspended with him.
    """

    def __init__(self, ranks: int, every: float) -> None:
        self.every, self.looked = every, time.monotonic()
        self.work, self.process = [0.0] * ranks, [0.0] * ranks
        self._beats, self._pulses = [0.0] * ranks, [0.0] * ranks

    def look(self, records: Sequence[Whereabouts | None], now: float) -> None:
        """Take in what all ranks' files say, None for one that is not there (yet)."""
        passed, self.looked = min(now - self.looked, 2 * self.every), now
        for rank, record in enumerate(records):
            beat, pulse = (record.beat, record.pulse) if record else (self._beats[rank], self._pulses[rank])
            self.work[rank] = self.work[rank] + passed if beat == self._beats[rank] else 0.0
            self.process[rank] = self.process[rank] + passed if pulse == self._pulses[rank] else 0.0
            self._beats[rank], self._pulses[rank] = beat, pulse


def end_job(comm: World | Alone, folder: Path, text: str, printed: str, stuck: Sequence[Whereabouts] = ()) -> None:
    """Print, write the text to RUN/failure-TIME.txt, and end all ranks at once, those that are `stuck` too."""
    print(printed, file=sys.stderr, flush=True)
    with suppress(OSError):
        (folder / time.strftime("failure-%Y%m%d-%H%M%S.txt")).write_text(text + "\n", encoding="utf-8")
    time.sleep(0.3)  # MPICH's launcher drops what it has not passed on when a job aborts
    faulthandler.dump_traceback_later(5, exit=True)  # if even that hangs
    for record in stuck:
        if record.pid != os.getpid():
            _send(record, signal.SIGKILL)  # a launcher may wait for a stopped process
    comm.abort(1)


def main_stack(file: Path, start: int = 0) -> list[str]:
    """Lines of the main thread's stack, innermost call first, that a rank has written behind byte `start`; [] if none.

    A long one is cut.
    """
    try:
        with file.open(errors="replace") as opened:
            opened.seek(start)
            threads = _THREAD.split(opened.read())
    except OSError:
        return []
    if len(threads) < 2:
        return []
    return _cut([line.strip() for line in threads[-1].splitlines() if line.startswith("  ")], _FRAMES)


def told_together(stacks: dict[int, list[str]]) -> list[str]:
    """Lines that tell each stack once, with the ranks that were there; ranks that gave none come last."""
    ranks: dict[tuple[str, ...], list[int]] = {}
    for rank, stack in stacks.items():
        ranks.setdefault(tuple(stack), []).append(rank)
    silent = ranks.pop((), [])
    lines = []
    for stack, there in sorted(ranks.items(), key=lambda item: len(item[1])):  # the odd one out is what is wrong
        lines += [f"  {spoken(there)}:", *(f"    {line}" for line in stack)]
    return [*lines, f"  {spoken(silent)}: no answer"] if silent else lines


def spoken(ranks: Sequence[int]) -> str:
    """Ranks for people, e.g. "rank 3" or "ranks 0, 2-5"."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join("-".join(map(str, part)) for part in parts)


def _cut(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"  ... and {len(lines) - most} more"]


def _read(file: Path) -> Whereabouts | None:
    try:
        return Whereabouts.read(file)
    except (OSError, ValueError):
        return None


def _send(record: Whereabouts, number: signal.Signals) -> None:
    """Signal a rank's process if it is one of this machine."""
    if record.process.alive:
        with suppress(ProcessLookupError):
            os.kill(record.pid, number)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
