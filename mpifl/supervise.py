"""Start a job again when a rank, a node or the launcher dies: `python -m mpifl.supervise mpirun -n 9 python -m ...`.

The job goes on from its last checkpoint. Whether it is finished is what its run folder says, never the launcher's exit
status alone: Open MPI's mpirun returns 0 when it has lost a node.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from mpifl.config import UserError
from mpifl.launch import Parser
from mpifl.process import Process
from mpifl.status import last_words, newest_checkpoint

MARK = "MPIFL_SUPERVISED"
"""A variable of all processes that a supervisor has started: those that a launcher leaves behind are found by it."""
RESTARTS = 3
FINAL = (2, 75, 130, 143)
"""Exit statuses after which nothing is started again: refused, stopped early as asked, interrupted, terminated."""
_LOOK, _LONGEST_LOOK = 0.2, 5.0
_KILLING = 10.0


class Supervisor:
    """A command that is started again when it fails, so often without a new checkpoint. folder: of the run."""

    def __init__(self, command: Sequence[str], folder: Path, restarts: int = RESTARTS) -> None:
        self.command, self.folder, self.restarts = list(command), folder, restarts
        me = Process.current()
        self.mark = f"{me.machine}-{me.pid}-{me.started}"
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: list[int] = []
        self._waiting: deque[int] = deque()
        self._shared_memory: set[str] = set()

    def run(self) -> int:
        """Run until the job is finished, or must not or cannot go on; returns the exit status."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        fruitless = 0
        while True:
            began, before, summary = time.time(), self._progress(), self._summary()
            status = self._run_once()
            if status not in FINAL and self._summary() and (status == 0 or self._summary() != summary):
                return 0
            if status in FINAL or self._asked:
                return status
            status = status or 1
            fruitless = 0 if self._progress() > before else fruitless + 1
            _say(f"the job ended with status {status}, and is not finished")
            for run in self._runs():
                for line in last_words(run, began):
                    print(line, file=sys.stderr)
            if fruitless > self.restarts:
                _say(f"giving up: {self.restarts} restarts brought no new checkpoint; {self.folder} has what there is")
                return status
            checkpoint = newest_checkpoint(self._runs()[-1])
            where = "from the beginning" if checkpoint is None else f"after round {checkpoint}"
            _say(f"starting it again {where}")

    def _run_once(self) -> int:
        """Run the command to its end, and remove what it leaves; returns its exit status."""
        environment = os.environ | {MARK: self.mark}
        # In a session of its own: Ctrl-C reaches it once, from here.
        self._process = subprocess.Popen(
            self.command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._forward()
        pause = _LOOK
        while True:
            with suppress(subprocess.TimeoutExpired):
                status = self._process.wait(pause)
                break
            self._look_for_shared_memory()
            pause = min(1.25 * pause, _LONGEST_LOOK)
        self._clean_up()
        return status if status >= 0 else 128 - status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Have the job stop in order; a second signal of the kind reaches the launcher as it is."""
        ask = number in (signal.SIGTERM, signal.SIGHUP) and number not in self._asked
        self._asked.append(number)
        self._waiting.append(signal.SIGUSR1 if ask else number)  # Open MPI's mpirun passes that on to ranks
        self._forward()

    def _forward(self) -> None:
        while self._waiting and self._process is not None and self._process.poll() is None:
            self._process.send_signal(self._waiting.popleft())

    def _clean_up(self) -> None:
        """Kill what is left of the job on this machine, and remove the memory that its processes shared."""
        self._look_for_shared_memory()
        end = time.monotonic() + _KILLING
        while (left := self._processes()) and time.monotonic() < end:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        if left:
            _say(f"processes {', '.join(map(str, left))} of the job cannot be killed")
        for file in () if left else self._shared_memory:
            Path(file).unlink(missing_ok=True)
        self._shared_memory.clear()

    def _look_for_shared_memory(self) -> None:
        """Note what MPI has mapped: it leaves that behind when ranks are killed, and the dead cannot be asked."""
        for pid in self._processes():
            with suppress(OSError):
                self._shared_memory.update(shared_memory_of(pid))

    def _processes(self) -> list[int]:
        """All processes of the job on this machine."""
        mark, found = f"\0{MARK}={self.mark}\0".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile, or another user's
                if mark in b"\0" + (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def _runs(self) -> list[Path]:
        """The run's folder, and those of its seeds if there are several."""
        return [self.folder, *sorted(self.folder.glob("seed-*"))]

    def _progress(self) -> int:
        """A number that grows with every checkpoint."""
        return sum(newest_checkpoint(run) or 0 for run in self._runs())

    def _summary(self) -> float:
        """When the run was finished, 0 if it is not."""
        file = self.folder / "summary.json"
        return file.stat().st_mtime if file.exists() else 0.0


def shared_memory_of(pid: int) -> list[str]:
    """Files that MPI made for the ranks of a node to share; a process that has them mapped."""
    return re.findall(r"/dev/shm/(?:mpich_shm_|sm_segment)\S+", Path(f"/proc/{pid}/maps").read_text())


def run_folder(command: Sequence[str]) -> Path:
    """The run folder that a command names, itself or in its job file; raises UserError if it names none."""
    named = [word.removeprefix("run.out=") for word in command if word.startswith("run.out=")]
    for word in command:
        if not named and word.endswith(".toml"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                named.append(tomllib.loads(Path(word).read_text(encoding="utf-8"))["run"]["out"])
    if not named or not named[-1].strip("\"'"):
        raise UserError("a job that is to be started again needs a run folder of its own: add run.out=FOLDER")
    return Path(named[-1].strip("\"'"))


def require_supervisor(on_rank_failure: str) -> None:
    """Raise UserError for a job that is to be started again and has nobody who would."""
    if on_rank_failure == "restart" and MARK not in os.environ:
        raise UserError(
            'run.on_rank_failure is "restart", which needs a supervisor: start the job by '
            "`python -m mpifl.supervise mpirun -n 9 python -m mpifl.train ... run.out=FOLDER`"
        )


def _say(text: str) -> None:
    print(f"mpifl: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 finished, else that of the last start."""
    parser = Parser(
        prog="python -m mpifl.supervise",
        description="Start a job, and start it again from its last checkpoint when it dies.",
        epilog="Exit status: 0 the job is finished; 75 it stopped early, as SIGTERM or SIGUSR1 ask it to; else that of "
        "the last start.",
    )
    parser.add_argument(
        "--restarts", type=int, default=RESTARTS, help=f"at most, without a new checkpoint (default: {RESTARTS})"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="e.g. mpirun -n 9 python -m mpifl.train run.out=...")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] in (["-h"], ["--help"]):
            print(parser.format_help())
            return 0
        options = parser.parse_args(words)
        if not options.command:
            raise UserError("which command? python -m mpifl.supervise mpirun -n 9 python -m mpifl.train run.out=FOLDER")
        if options.restarts < 0:
            raise UserError(f"--restarts is {options.restarts}; it must be at least 0")
        return Supervisor(options.command, run_folder(options.command), options.restarts).run()
    except FileNotFoundError as error:
        _say(f"there is no command {error.filename}")
    except UserError as error:
        _say(str(error))
    return 2


if __name__ == "__main__":
    sys.exit(main())
