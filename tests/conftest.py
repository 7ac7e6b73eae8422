"""Tests that need MPI: the markers `mpi` and `launches`, and the fixture `launch`.

`mpi(ranks=N, timeout=S)`: the test runs on N ranks, from a plain `python -m pytest` (mpirun_plugin.py).
`launches`: the test starts mpirun itself, with `launch`. Under `mpirun -n 3 python -m pytest --with-mpi`
(pytest-mpi) those run that are marked with 3 ranks; all others are skipped. `slurm`: see test_slurm.py.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import mpirun_plugin
import pytest
from mpirun_plugin import ranks_of

IS_CHILD = mpirun_plugin.FOLDER in os.environ
UNDER_MPIRUN = mpirun_plugin.RANK is not None

# More ranks than cores, as root or not, without a network. What the user has set wins.
MPI_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl": "^ofi",  # it looks for a network for a second
    "OMPI_MCA_osc": "^ucx",  # it prints a warning per rank and window
}

# Linux sends SIGTERM (15) to the command when pytest itself dies, however it dies: PR_SET_PDEATHSIG (1).
DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def pytest_configure(config):
    config.addinivalue_line("markers", "mpi(ranks, timeout=60): runs on so many ranks, for at most so many seconds")
    config.addinivalue_line("markers", "launches: starts mpirun itself, with the fixture `launch`")
    config.addinivalue_line("markers", "slurm: needs a Slurm of virtual nodes; runs only when asked for, with -m slurm")
    if IS_CHILD:
        config.pluginmanager.register(mpirun_plugin.Rank(config))
    elif not UNDER_MPIRUN and not what_is_missing():
        config.pluginmanager.register(mpirun_plugin.Parent(config, Job))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ranks_of(item) or 0)  # so that one child can run all tests of a rank count
    for item in items:
        if reason := reason_to_skip(item):
            item.add_marker(pytest.mark.skip(reason=reason), append=False)  # in front of pytest-mpi's own


def reason_to_skip(item) -> str | None:
    ranks = ranks_of(item)
    if IS_CHILD:
        return None
    if item.get_closest_marker("slurm") and "slurm" not in item.config.option.markexpr:
        return "takes minutes and root; to run it: python -m pytest -m slurm"
    if not UNDER_MPIRUN:
        return what_is_missing() if ranks else None
    if item.get_closest_marker("launches"):
        return "starts mpirun itself, which does not nest"
    if ranks is None:
        return "a test of one process: it would run on every rank at once"
    from mpi4py import MPI

    size = MPI.COMM_WORLD.size
    return None if ranks == size else f"needs {ranks} ranks, runs on {size}"


def what_is_missing() -> str | None:
    if not find_mpirun():
        return "needs mpirun, found neither beside python nor on PATH"
    return None if importlib.util.find_spec("mpi4py") else "needs mpi4py"


def find_mpirun() -> str | None:
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


class Job:
    """`python *argv`, on so many ranks or without mpirun (None), and all processes that it starts in turn.

    A variable of its own in their environment marks them: none escapes by a new session or by losing its
    parent. What they print is in the files `stdout` and `stderr` of the folder.
    """

    def __init__(self, ranks, argv, folder: Path, env=None, cwd=None):
        launcher = [] if ranks is None else [find_mpirun(), "-n", ranks]
        command = [sys.executable, "-IS", "-c", DIE_WITH_PARENT, *launcher, sys.executable, *argv]
        self.mark = f"PYTEST_MPIRUN_{uuid.uuid4().hex}"
        settings = {**MPI_SETTINGS, **os.environ, **(env or {}), self.mark: "1"}
        self.folder, self.shared_memory, self.next_look, self.began = folder, set(), 0.2, time.monotonic()
        with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={name: value for name, value in settings.items() if value is not None},
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def running(self) -> bool:
        if self.seconds > self.next_look:  # now and then, since the dead cannot be asked
            self.look_for_shared_memory()
            self.next_look *= 1.25
        return self.process.poll() is None

    def wait(self, seconds) -> bool:
        """Whether the command ended within so many seconds."""
        end = self.seconds + seconds
        while self.running() and self.seconds < end:
            time.sleep(0.01)
        return not self.running()

    def processes(self) -> set[int]:
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile, or another user's
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.add(int(folder.name))
        return found

    def look_for_shared_memory(self):
        for pid in self.processes():
            with suppress(OSError):
                self.shared_memory.update(mpirun_plugin.shared_memory_of(pid))

    def end(self):
        """Kill what still runs, the launcher gently so that it cleans up, and remove the shared memory."""
        self.look_for_shared_memory()
        with suppress(subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(2)
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()
        for file in self.shared_memory:
            Path(file).unlink(missing_ok=True)

    def text(self, name) -> str:
        return (self.folder / name).read_text(errors="replace").replace("\0", "")


@dataclass(frozen=True)
class Finished:
    """What `launch` returns: text and wall time of a command that ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


@pytest.fixture
def launch(tmp_path_factory):
    """Run python under mpirun and wait: `launch(ranks, *argv, timeout=60, env=None, cwd=None)` -> Finished.

    `ranks` None: without mpirun. `env` adds variables, and removes those whose value is None. After `timeout`
    seconds the test fails and shows the output so far. Whatever happens, no process is left running.
    """

    def launch(ranks, *argv, timeout=60.0, env=None, cwd=None) -> Finished:
        if ranks is not None and (missing := what_is_missing()):
            pytest.skip(missing)
        job = Job(ranks, argv, tmp_path_factory.mktemp("launch"), env, cwd)
        try:
            in_time, seconds = job.wait(timeout), job.seconds
        finally:
            job.end()
        stdout, stderr = job.text("stdout"), job.text("stderr")
        if not in_time:
            command = " ".join(map(str, argv))
            pytest.fail(f"{command} (ranks: {ranks}) still ran after {timeout:g} s\n{stdout}\n{stderr}")
        return Finished(job.process.returncode, stdout, stderr, seconds)

    return launch


@pytest.fixture
def no_picture(monkeypatch):
    """Conversions draw no picture, which takes longer than they do; test_report.py is about pictures."""
    monkeypatch.setattr("data_prep.report._draw", lambda dataset, split, label, tally, picture: None)


@pytest.fixture
def open_dataset():
    """Open datasets that are closed at the test's end."""
    from mpifl.data.shard import Dataset  # not where tests are only listed or started

    with ExitStack() as opened:
        yield lambda path: opened.enter_context(closing(Dataset(path)))
