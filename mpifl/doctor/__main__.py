"""`mpirun -n 9 python -m mpifl.doctor [JOB] [key.path=value ...]`: what keeps a job from running well here.

Under mpirun, srun or alone. Exit status: 0 healthy, 1 a problem was found, 2 the job file or its keys are wrong.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mpifl.comm import Alone, World, connect, mpi_version
from mpifl.command_line import DEFAULT_JOB
from mpifl.config import Job, UserError, load
from mpifl.console import Console
from mpifl.doctor.checks import examine
from mpifl.doctor.facts import Fact, Problem
from mpifl.doctor.probes import look
from mpifl.doctor.together import meet
from mpifl.launch import Elsewhere, Parser, agree
from mpifl.launcher import launched_rank

PATIENCE = 300.0
"""Seconds after which what a rank does counts as hanging."""

UNREACHED = (
    "other ranks do not answer: they hang, or nodes cannot reach each other; open their ports, or name the network by "
    "OMPI_MCA_btl_tcp_if_include=eth0 (Open MPI), FI_TCP_IFACE=eth0 and UCX_NET_DEVICES=eth0 (MPICH)"
)


def main(arguments: Sequence[str] | None = None, patience: float = PATIENCE) -> int:
    """Run the command line; returns the exit status. patience: seconds that each part of it may take."""
    # While MPI starts no thread runs: where a rank is missing, the stack that Python prints must say it.
    faulthandler.dump_traceback_later(patience, exit=True, file=sys.__stderr__)
    comm, apart = start_mpi_on_all_ranks()
    faulthandler.cancel_dump_traceback_later()
    if apart and launched_rank() > 0:
        return 0  # each rank is alone; the first one says so, unless another's failure has the launcher end it before
    try:
        return _command(comm, sys.argv[1:] if arguments is None else arguments, apart, patience)
    except Elsewhere as failure:
        return failure.status
    except UserError as error:
        print(f"mpifl: {error}", file=sys.stderr, flush=True)
        return 2
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        if comm.size > 1:
            comm.abort(status)  # the others wait for this rank
        return status


def start_mpi_on_all_ranks() -> tuple[World | Alone, list[Problem]]:
    """The ranks, or this one alone and why MPI does not bring it together with the others."""
    try:
        return connect(), []
    except (UserError, ImportError, RuntimeError, OSError) as error:
        return Alone(), [Problem(str(error).splitlines()[0], _start_several())]


def _start_several() -> str:
    """A command that starts several ranks here."""
    try:
        mpich = mpi_version().startswith("MPICH")
    except (ImportError, RuntimeError, OSError):
        return 'python -m pip install -e ".[mpich]"'
    doctor = f"{sys.executable} -m mpifl.doctor"
    if "SLURM_STEP_ID" in os.environ:
        return f"srun --mpi={'pmi2' if mpich else 'pmix'} {doctor}"
    beside = Path(sys.executable).with_name("mpirun")
    return f"{beside if beside.exists() else 'mpirun'} -n 9 {doctor}"


def _command(comm: World | Alone, arguments: Sequence[str], apart: list[Problem], patience: float) -> int:
    parser = Parser(
        prog="python -m mpifl.doctor",
        description="Say what would keep a job from running well on these ranks, and how to mend it.",
        epilog="Job and overrides are those of mpifl.train. Exit status: 0 healthy, 1 a problem was found, 2 the job "
        "file or its keys are wrong.",
    )
    parser.add_argument("job", nargs="?", help="a job file (default: the embedded one)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the job")
    options = parser.read(comm, arguments)
    if options is None:
        return 0
    words = [word for word in (options.job, *options.overrides) if word]
    path = DEFAULT_JOB if not words or "=" in words[0] else words.pop(0)
    job = agree(comm, lambda: _job(path, words))
    with _within(patience + 5, comm.rank, "rank 0 hangs"):
        rank = look(comm, job, patience)
    with _within(patience + 15, comm.rank, UNREACHED):
        ranks = meet(rank, comm, job, patience)
        status = int(comm.share(str(_report(apart + examine(ranks, job), comm)) if comm.rank == 0 else ""))
    if rank.doing:  # a thread of this rank still hangs, and may never let it end
        time.sleep(0.3)
        comm.abort(status)
    return status


def _job(path: str | Path, overrides: Sequence[str]) -> Job:
    if not Path(path).exists():
        with suppress(Exception):  # what is wrong with torch, which this imports, is found out later
            from mpifl.build import find_job

            path = find_job(str(path))
    return load(path, overrides)


@contextmanager
def _within(seconds: float, rank: int, otherwise: str) -> Iterator[None]:
    """End all ranks, by ending this one, when the block takes longer; rank 0 says why.

    Where a call that hangs keeps other threads from running, Python's own watchdog prints the stack in its place.
    """

    def give_up() -> None:
        if rank == 0:
            print(f"mpifl: after {seconds:.0f} s {otherwise}", file=sys.stderr, flush=True)
        time.sleep(0.3 if rank == 0 else 1.5)  # launchers drop what they have not passed on
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + 5, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _report(found: Sequence[Fact | Problem], comm: World | Alone) -> int:
    """Print a table of facts, then problems; returns the exit status."""
    console = Console()
    problems = [one for one in found if isinstance(one, Problem)]
    rows = [(one.name, one.value) for one in found if isinstance(one, Fact)]
    if comm.size == 1 and not problems:
        rows.append(("several ranks", _start_several()))
    console.table(rows)
    for problem in problems:
        console.say(f"\nproblem: {problem.what}")
        if problem.mend:
            console.say(f"mend it: {problem.mend}")
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "healthy: no problem found"
    console.say(f"\n{count}")
    return min(1, len(problems))


if __name__ == "__main__":
    sys.exit(main())
