"""How a program starts and ends on many ranks: agree before starting, and end together, whatever happens.

An exception on one rank would leave the others waiting in MPI for ever (both Open MPI and MPICH): so mistakes
found before training end all ranks in order, and whatever is raised later aborts the whole job.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mpifl import __version__
from mpifl.comm import Alone, World, connect
from mpifl.config import UserError, is_of_memory
from mpifl.engine.clock import Clock
from mpifl.launcher import launched_rank
from mpifl.stopping import ASKED, STATUS, Stopped, Terminated, may_requeue, requeue

T = TypeVar("T")


class Elsewhere(UserError):
    """Another rank failed to start and reports why; `status` is what it exits with."""

    def __init__(self, rank: int, status: int) -> None:
        super().__init__(f"rank {rank} could not start")
        self.status = status


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help is printed by rank 0 alone and whose errors are UserErrors."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(add_help=False, **keywords)
        self.add_argument("-h", "--help", action="store_true", help="show this and exit")
        self.add_argument("--version", action="store_true", help="show the version and exit")

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; --help lists what there is")

    def read(self, comm: World | Alone, arguments: Sequence[str]) -> argparse.Namespace | None:
        """Return parsed arguments, or None after help or version was printed."""
        if {"-h", "--help"} & set(arguments):  # before what is required is asked for
            return self._answer(comm, self.format_help())
        options = agree(comm, lambda: self.parse_intermixed_args(list(arguments)))
        return self._answer(comm, f"mpifl {__version__}") if options.version else options

    def _answer(self, comm: World | Alone, text: str) -> None:
        if comm.rank == 0:
            print(text, flush=True)


def command(body: Callable[[World | Alone, Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Run a program's body; returns its exit status.

    0 done, 1 failed, 2 refused, 75 stopped early with a checkpoint, 130 or 143 interrupted.
    """
    comm: World | Alone = Alone()
    try:
        comm = connect()
        ASKED.listen()
        body(comm, sys.argv[1:] if arguments is None else arguments)
        comm.leave(0)
        return 0
    except Stopped as stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        comm.arrive()
        if comm.rank == 0 and stopped.requeue and may_requeue():
            refused = requeue()
            print(f"mpifl: Slurm cannot start the job again: {refused}" if refused else "requeued", file=sys.stderr)
        comm.leave(STATUS)
        return STATUS
    except Elsewhere as failure:
        return failure.status
    except UserError as error:
        if launched_rank() == comm.rank or comm.size > 1:
            print(f"mpifl: {error}", file=sys.stderr, flush=True)
        return 1 if error.in_training else 2
    except KeyboardInterrupt as stop:
        name, status = interruption(stop)
        print(f"mpifl: {name}{stop}", file=sys.stderr, flush=True)
        if comm.size > 1:
            comm.abort(status)  # the other ranks may be waiting for this one
        return status
    except BrokenPipeError:
        return 1
    except Exception as error:
        if comm.size > 1 and not getattr(error, "agreed", False):
            traceback.print_exc()
            time.sleep(0.3)
            comm.abort(1)
        raise


def interruption(stop: KeyboardInterrupt) -> tuple[str, int]:
    """Return the name and exit status of what interrupted the program."""
    return ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)


def agree(comm: World | Alone, make: Callable[[], T]) -> T:
    """Return `make()` if it succeeded on every rank; otherwise the lowest failing rank raises its error.

    The others raise Elsewhere, so that every rank ends and only one speaks.
    """
    made, error = None, None
    try:
        made = make()
    except (Exception, SystemExit) as raised:
        error = _mendable(raised)
    refused = isinstance(error, UserError)
    rank, failed = divmod(comm.lowest(2 * (comm.size if error is None else comm.rank) + (not refused)), 2)
    if rank == comm.rank and error is not None:
        error.agreed = True
        raise error
    if rank < comm.size:
        raise Elsewhere(rank, 1 if failed else 2)
    return made


def outlive(comm: World | Alone, attempt: Callable[[bool], T]) -> T:
    """Return `attempt(False)`; whenever a rank dies, the others break it off and make `attempt(True)` together."""
    again = False
    while True:
        try:
            if again:
                comm.shrink()
            try:
                ended: T | Stopped = attempt(again)
            except Stopped as stopped:
                ended = stopped
            comm.all_done()
            break
        except comm.losses:
            again = True
    if isinstance(ended, Stopped):
        raise ended
    return ended


def require_same(comm: World | Alone, digests: dict[str, str]) -> None:
    """Raise UserError unless every rank has the same digests, (name -> hex): else they would train different things."""
    for name, text in digests.items():
        value = int(text[:15], 16)
        lowest, highest = comm.lowest(value), -comm.lowest(-value)

        def check(name: str = name, same: bool = lowest == highest) -> None:
            if not same:
                raise UserError(
                    f"ranks have different {name}: what each rank builds must not depend on the rank, the time or an "
                    f"unseeded generator, and every node must see the same files"
                )

        agree(comm, check)


@contextmanager
def all_or_none(comm: World | Alone, clock: Clock, folder: Path) -> Iterator[None]:
    """Within the block, whatever one rank raises ends the whole job, non-zero, and is reported once."""
    if comm.size == 1:
        try:
            yield
        except KeyboardInterrupt as stop:
            raise type(stop)(_left_in(clock, folder)) from None
        except SystemExit as leave:
            raise RuntimeError(f"sys.exit({leave.code!r}) was called ({clock.where()})") from leave
        except Exception as raised:
            error = _mendable(raised, folder)
            if isinstance(error, UserError):
                error.in_training = True
            raise error  # noqa: B904 - itself, or what stands for it
        return
    report = folder / comm.share(f"failure-{time.strftime('%Y%m%d-%H%M%S')}.txt")
    hook = threading.excepthook
    threading.excepthook = lambda raised: _end(comm, clock, report, raised.exc_value)
    try:
        yield
    except comm.losses:
        raise
    except BaseException as error:
        _end(comm, clock, report, error)
    finally:
        threading.excepthook = hook


def _end(comm: World | Alone, clock: Clock, report: Path, error: BaseException | None) -> None:
    status, error = 1, _mendable(error, report.parent)
    if isinstance(error, KeyboardInterrupt):
        name, status = interruption(error)
        text = f"mpifl: {name}{_left_in(clock, report.parent)}"
    elif isinstance(error, UserError):
        text = f"mpifl: {error}" + (f" ({clock.where()})" if comm.rank else "")
    else:
        text = f"mpifl: {clock.where()}:\n{''.join(traceback.format_exception(error))}"
    if _first_to_report(report):
        print(text, file=sys.stderr, flush=True)
        with suppress(OSError):  # the disk may be full
            report.write_text(text + "\n", encoding="utf-8")
        time.sleep(0.3)  # MPICH's launcher drops what it has not passed on when a job aborts
    else:
        time.sleep(1.5)  # let the rank that reports finish its sentence
    comm.abort(status)


def _mendable(error: BaseException | None, folder: Path | None = None) -> BaseException | None:
    """The error, or a UserError in place of one that says that memory or a disk is full, or of the run's files."""
    if is_of_memory(error):
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        return UserError(f"not enough memory ({told}); take a smaller model or batches, or fewer ranks on a node")
    if isinstance(error, OSError) and (error.errno in _OF_DISKS or _is_in(folder, error.filename)):
        return UserError(f"{error.filename or folder or 'a file'} cannot be used: {error.strerror}")
    return error


_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def _is_in(folder: Path | None, name: object) -> bool:
    return folder is not None and isinstance(name, str) and Path(name).absolute().is_relative_to(folder.absolute())


def _left_in(clock: Clock, folder: Path) -> str:
    return f" ({clock.where()}); what was written so far is in {folder}"


def _first_to_report(report: Path) -> bool:
    """Whether no other rank has reported yet: the same mistake raises on many ranks at once."""
    try:
        os.close(os.open(report, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
