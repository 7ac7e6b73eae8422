"""Runs the tests marked `mpi(ranks=N, timeout=S)` on N ranks, from a plain `python -m pytest`.

The pytest that was started (the parent) hands all tests of one rank count to one child,
`mpirun -n N python -m pytest`, because imports cost seconds. The ranks append what happens to one file of
JSON lines, and the parent merges their reports of a test into one. A test that exceeds its limit, loses a
rank, or failed on one rank while the others wait for it is reported as failed, with the stacks of all ranks;
its child is killed, and a fresh one goes on with the rest.
"""

import faulthandler
import json
import os
import re
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

TIME_LIMIT = 60.0  # seconds that a test may take, its fixtures included
START_LIMIT = 120.0  # seconds that a child may take to import and collect
GRACE = 5.0  # seconds that the other ranks get to end a test that failed on one rank
STACKS = signal.SIGRTMIN + 1  # asks a rank for its stacks; the usual signals belong to the tested programs
FOLDER = "PYTEST_MPIRUN_FOLDER"  # set in a child: where its ranks write

# This process's rank, None where no mpirun started it.
RANK_NAMES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
RANK = next((int(os.environ[name]) for name in RANK_NAMES if name in os.environ), None)


def ranks_of(item) -> int | None:
    """On how many ranks a test runs under mpirun, None for one that does not."""
    marker = item.get_closest_marker("mpi")
    if marker and "ranks" not in marker.kwargs:
        raise pytest.UsageError(f"{item.nodeid}: the marker mpi needs ranks=N")
    return marker and marker.kwargs["ranks"]


def shared_memory_of(pid) -> list[str]:
    """The files that MPI made for a process: it leaves them behind when a rank dies."""
    return re.findall(r"/dev/shm/(?:mpich_shm_|sm_segment)\S+", Path(f"/proc/{pid}/maps").read_text())


class Rank:
    """In a child: writes down what this rank does, and keeps the ranks in step."""

    def __init__(self, config):
        self.config, self.comm = config, None
        folder, append = Path(os.environ[FOLDER]), os.O_CREAT | os.O_WRONLY | os.O_APPEND
        config.option.basetemp = str(folder / f"tmp{RANK}")
        output = os.open(folder / f"output{RANK}", append)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(STACKS, file=output)
        self.events = os.open(folder / "events", append)
        self.tell("started", None)

    def tell(self, what, test, **details):
        event = {"what": what, "test": test, "rank": RANK, "pid": os.getpid(), **details}
        event |= {"time": time.monotonic(), "printed": os.fstat(1).st_size}
        line = json.dumps(event, default=str) + "\n"
        os.write(self.events, line.encode())  # in one piece: the ranks share the file

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if self.comm is None:
            from mpi4py import MPI

            self.comm, request = MPI.COMM_WORLD.Idup()
            wait_patiently(request)
            self.tell("joined", None, shared_memory=shared_memory_of("self"))
        self.tell("begun", item.nodeid)
        result = yield
        self.tell("ended", item.nodeid)
        wait_patiently(self.comm.Ibarrier())
        return result

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.tell("report", report.nodeid, report=data)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self):
        return "", "", ""  # the parent prints letters and summary


def wait_patiently(request):
    """Wait without taking the core from a rank that works, as MPI's own polling does."""
    pause = 1e-4
    while not request.Test():
        time.sleep(pause)
        pause = min(2 * pause, 0.01)


class Parent:
    """In the pytest that was started: runs the marked tests in children, one child at a time."""

    def __init__(self, config, start_job):
        self.config, self.start_job, self.child = config, start_job, None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if not ranks_of(item):
            return None
        if not (self.child and self.child.will_run(item)):
            self.close_child()
            rest = item.session.items[item.session.items.index(item) :]
            same = [other for other in rest if ranks_of(other) == ranks_of(item)]
            self.child = Child(self.config, self.start_job, same)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.child.run(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self):
        self.close_child()

    def close_child(self):
        if self.child:
            self.child.close()


class Child:
    """One `mpirun -n N python -m pytest`, seen from the parent."""

    def __init__(self, config, start_job, items):
        self.config, self.items, self.ranks = config, items, ranks_of(items[0])
        self.events, self.bytes_read, self.heard = [], 0, time.monotonic()
        argv = [
            "-m",
            "pytest",
            "-qs",
            "-o",
            "addopts=",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            config.rootpath,
        ]
        argv += ["-c", config.inipath] if config.inipath else []
        argv += ["--with-mpi"] if config.pluginmanager.hasplugin("pytest_mpi") else []
        given = config.option
        for flag, values in ("-p", given.plugins), ("-W", given.pythonwarnings), ("-o", given.override_ini):
            argv += [word for value in values or () for word in (flag, value)]
        argv += [item.nodeid for item in items]
        folder = config._tmp_path_factory.mktemp(f"mpirun-{self.ranks}-")
        env = {FOLDER: str(folder), "PYTHONUNBUFFERED": "1", "PYTEST_ADDOPTS": None}
        self.job = start_job(self.ranks, argv, folder, env, config.rootpath)

    def will_run(self, item) -> bool:
        running = self.job.running()
        self.listen()
        return item in self.items and (running or bool(self.said("begun", item)))

    def run(self, item) -> list[pytest.TestReport]:
        """Wait until all ranks are through with this test, or until that cannot be hoped for any more."""
        while True:
            running = self.job.running()
            self.listen()
            if len(self.said("ended", item)) == self.ranks:
                return self.merged(item)
            if trouble := self.trouble(item, running):
                return self.broken(item, trouble)
            time.sleep(0.02)

    def close(self):
        """End the child, at once if it still has tests to run."""
        if len(self.said("ended", self.items[-1])) == self.ranks:
            self.job.wait(10)
        self.job.end()

    def listen(self):
        """Take in what the ranks wrote since the last time."""
        with suppress(FileNotFoundError), open(self.job.folder / "events", "rb") as stream:
            stream.seek(self.bytes_read)
            for line in stream:
                if line.endswith(b"\n"):
                    self.events.append(self.event(line))
                    self.bytes_read += len(line)
                    self.heard = time.monotonic()

    def event(self, line) -> dict:
        event = json.loads(line)
        if event["what"] == "joined":
            self.job.shared_memory.update(event["shared_memory"])
        if event["what"] == "report":
            revive = self.config.hook.pytest_report_from_serializable
            event["report"] = report = revive(config=self.config, data=event["report"])
            if isinstance(report.longrepr, list):  # JSON has no tuples: (file, line, reason) of a skip
                report.longrepr = tuple(report.longrepr)
        return event

    def said(self, what, item) -> dict[int, dict]:
        """The last event of this kind about this test, by rank."""
        return {e["rank"]: e for e in self.events if e["what"] == what and e["test"] == item.nodeid}

    def reports(self, item) -> list[tuple[int, pytest.TestReport]]:
        """The ranks' reports on this test, each with its rank."""
        events = [e for e in self.events if e["what"] == "report" and e["test"] == item.nodeid]
        return sorted(((e["rank"], e["report"]) for e in events), key=lambda pair: pair[0])

    def merged(self, item) -> list[pytest.TestReport]:
        """One report for each phase of the test."""
        merged = []
        for phase in "setup", "call", "teardown":
            reports = {rank: report for rank, report in self.reports(item) if report.when == phase}
            report = reports and self.merged_phase(item, reports)
            # Where the setup went wrong on one rank, a call that went well on another is no news.
            if report and not (phase == "call" and report.passed and not merged[0].passed):
                merged.append(report)
        return merged

    def merged_phase(self, item, reports) -> pytest.TestReport:
        """The gravest of the ranks' reports on one phase, with what else failed as sections."""
        worst = max(map(gravity, reports.values()))
        blamed = {rank: report for rank, report in reports.items() if gravity(report) == worst}
        report = next(iter(blamed.values()))
        report.duration = max(other.duration for other in reports.values())
        if report.failed:
            alike = [rank for rank, other in blamed.items() if str(other.longrepr) == str(report.longrepr)]
            file, line, name = report.location
            report.location = (file, line, f"{name} (rank {', '.join(map(str, alike))} of {self.ranks})")
            report.sections += [(f"rank {r}", str(blamed[r].longrepr)) for r in blamed if r not in alike]
            report.sections += [section for rank in blamed for section in self.output_of(rank, item)]
        return report

    def output_of(self, rank, item) -> list[tuple[str, str]]:
        """What a rank printed during the test, its stacks included, as a section of a report."""
        begun, ended = (self.said(what, item).get(rank, {}).get("printed") for what in ("begun", "ended"))
        file = self.job.folder / f"output{rank}"
        lines = file.read_bytes()[begun:ended].decode(errors="replace").splitlines() if file.exists() else []
        text = "\n".join(line for line in lines if not re.search(r"/_?pytest/|/pluggy/|<frozen runpy>", line))
        return [(f"rank {rank}: output", text[-8000:])] if text else []

    def trouble(self, item, running) -> str | None:
        """Why the test can no longer end well."""
        begun, ended = ([e["time"] for e in self.said(what, item).values()] for what in ("begun", "ended"))
        limit = item.get_closest_marker("mpi").kwargs.get("timeout", TIME_LIMIT)
        now = time.monotonic()
        if not running:
            return f"mpirun ended with status {self.job.process.returncode} before the test did"
        if not begun:
            return f"did not begin within {START_LIMIT:g} s" if now - self.heard > START_LIMIT else None
        if now - min(begun) > limit:
            return f"took more than its limit of {limit:g} s"
        if ended and now - max(ended) > GRACE and any(report.failed for _, report in self.reports(item)):
            return f"failed on one rank, and others were still in it {GRACE:g} s later"
        return None

    def broken(self, item, trouble) -> list[pytest.TestReport]:
        """Kill the child, and report the test that did not end on all ranks."""
        mpirun = f"{self.job.text('stdout')}\n{self.job.text('stderr')}".strip()
        if living := self.job.processes() & {event["pid"] for event in self.events}:
            for pid in living:
                with suppress(ProcessLookupError):
                    os.kill(pid, STACKS)
            time.sleep(0.5)
        self.job.end()
        self.listen()
        sections = [(f"rank {r}", str(report.longrepr)) for r, report in self.reports(item) if report.failed]
        sections += [section for rank in range(self.ranks) for section in self.output_of(rank, item)]
        sections += [("mpirun: output", mpirun[-8000:])] if mpirun else []
        states = [f"  rank {rank}: {self.state_of(rank, item, mpirun)}" for rank in range(self.ranks)]
        begun = min((event["time"] for event in self.said("begun", item).values()), default=time.monotonic())
        report = partial(pytest.TestReport, item.nodeid, item.location, {})
        failed = report("failed", "\n".join([trouble, *states]), "call", sections, time.monotonic() - begun)
        return [report("passed", None, "setup"), failed, report("passed", None, "teardown")]

    def state_of(self, rank, item, mpirun) -> str:
        begun = self.said("begun", item).get(rank)
        if not begun:
            return "had not begun"
        if any(report.failed for its_rank, report in self.reports(item) if its_rank == rank):
            return "failed"
        if rank in self.said("ended", item):
            return "waited for the others"
        # Both MPIs name the process that died first, and kill the others.
        return "died" if re.search(rf"\b{begun['pid']}\b", mpirun) else "in the test"


def gravity(report) -> int:
    """Skip < pass < unexpected pass < expected failure < failure: the gravest report stands for the test."""
    if report.failed:
        return 2 if str(report.longrepr).startswith("[XPASS(strict)]") else 4
    if report.skipped:
        return 3 if hasattr(report, "wasxfail") else 0
    return 1
