"""The plugin at work: an inner pytest in a folder of its own, whose tests pass, fail, hang and die."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.launches

HERE = Path(__file__).parent
HEADER = "import os, signal, time\nimport pytest\n"
WORLD = """

@pytest.fixture
def world():
    from mpi4py import MPI
    return MPI.COMM_WORLD
"""

# A rank that tells its process, a child that left its session, and its shared memory, and waits for ever.
HANG = r"""
import os, re, subprocess, sys
from mpi4py import MPI
world = MPI.COMM_WORLD
print("here is rank", world.rank, flush=True)
nowhere = subprocess.DEVNULL
stray = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=nowhere, stderr=nowhere)
shared = set(re.findall(r"/dev/shm/\S+", open("/proc/self/maps").read()))
with open(f"rank{world.rank}.part", "w") as file:
    print(os.getpid(), stray.pid, *shared, file=file)
os.rename(file.name, f"rank{world.rank}")
world.recv(source=1 - world.rank)
"""


@pytest.fixture
def inner(tmp_path, monkeypatch):
    """A folder with an inner test file and this project's conftest, to which `patch` is appended."""

    def inner(tests, patch=""):
        monkeypatch.setenv("PYTHONPATH", str(HERE))
        monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
        (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\nfilterwarnings = error\n")
        (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text() + WORLD + patch)
        (tmp_path / "test_inner.py").write_text(HEADER + textwrap.dedent(tests))
        return tmp_path

    return inner


@pytest.fixture
def run_inner(inner, launch):
    def run_inner(tests, *options, patch="", ranks=None):
        return launch(ranks, "-m", "pytest", "-vrs", *options, timeout=50, cwd=inner(tests, patch))

    return run_inner


def outcomes(run) -> dict[str, str]:
    """What the inner pytest printed for each test: PASSED, FAILED, SKIPPED, XFAIL or ERROR."""
    found = re.findall(r"^test_inner\.py::(\S+) +([A-Z]+)", run.stdout, re.MULTILINE)
    assert found, run.stdout + run.stderr
    return dict(found)


def section(run, title) -> str:
    """The text below `--- title ---` or `___ title ___` in the inner output, up to the next such line."""
    parts = re.split(r"^(?:-{3,}|_{3,}|={3,}) (.+) [-_=]{3,}\n", run.stdout, flags=re.MULTILINE)
    assert title in parts, f"no section {title!r} in\n{run.stdout}"
    return parts[parts.index(title) + 1]


def left_behind(folder) -> set[str]:
    """Processes and shared memory of the ranks of HANG that still exist."""
    named = {word for rank in (0, 1) for word in (folder / f"rank{rank}").read_text().split()}
    return {word for word in named if (os.path.exists(word) if word.startswith("/") else alive(word))}


def alive(pid) -> bool:
    with suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def within(seconds, condition) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_reports_of_the_ranks_are_merged(run_inner):
    run = run_inner("""
        @pytest.mark.parametrize("n", [pytest.param(n, marks=pytest.mark.mpi(ranks=n)) for n in (3, 2)])
        def test_sum(n, world):
            assert world.allreduce(1) == n
        def test_serial(world):
            assert world.size == 1
        @pytest.mark.mpi(ranks=2)
        def test_one_rank_fails(world):
            print("printed by", world.rank)
            assert world.rank != 1, "the odd one"
        @pytest.mark.mpi(ranks=2)
        def test_ranks_fail_differently(world):
            assert world.rank == 5, f"reason {world.rank}"
        @pytest.mark.mpi(ranks=2)
        def test_ranks_fail_alike():
            pytest.fail("all of us")
        @pytest.mark.mpi(ranks=2)
        def test_all_skip():
            pytest.skip("nothing to see")
        @pytest.mark.mpi(ranks=2)
        def test_one_rank_skips(world):
            if world.rank == 0:
                pytest.skip("only rank 1 looks")
        @pytest.mark.mpi(ranks=2)
        @pytest.mark.xfail(strict=True)
        def test_one_rank_fails_as_expected(world):
            assert world.rank == 0
        @pytest.mark.mpi(ranks=2)
        @pytest.mark.xfail(strict=True)
        def test_passes_unexpectedly():
            pass
        @pytest.fixture
        def rank_0_only(world):
            assert world.rank == 0, "cannot set up"
        @pytest.mark.mpi(ranks=2)
        def test_setup_fails_on_one_rank(rank_0_only):
            pass
    """)
    assert outcomes(run) == {
        "test_sum[2]": "PASSED",
        "test_sum[3]": "PASSED",
        "test_serial": "PASSED",
        "test_one_rank_fails": "FAILED",
        "test_ranks_fail_differently": "FAILED",
        "test_ranks_fail_alike": "FAILED",
        "test_all_skip": "SKIPPED",
        "test_one_rank_skips": "PASSED",
        "test_one_rank_fails_as_expected": "XFAIL",
        "test_passes_unexpectedly": "FAILED",
        "test_setup_fails_on_one_rank": "ERROR",
    }
    assert run.returncode == 1
    assert "AssertionError: the odd one" in section(run, "test_one_rank_fails (rank 1 of 2)")
    assert section(run, "rank 1: output") == "printed by 1\n"
    assert "reason 0" in section(run, "test_ranks_fail_differently (rank 0 of 2)")
    assert "reason 1" in section(run, "rank 1")
    assert "all of us" in section(run, "test_ranks_fail_alike (rank 0, 1 of 2)")
    assert "nothing to see" in run.stdout


def test_what_hangs_or_dies_is_failed_and_the_rest_still_runs(run_inner, tmp_path):
    run = run_inner(
        """
        @pytest.mark.mpi(ranks=2, timeout=1)
        def test_deadlock(world):
            def wait_for_a_message():
                world.recv(source=1 - world.rank)
            wait_for_a_message()
        @pytest.mark.mpi(ranks=2)
        def test_death(world):
            open(f"maps{world.rank}", "w").write(open("/proc/self/maps").read())
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            world.Barrier()
        @pytest.mark.mpi(ranks=2)
        def test_failure_before_a_collective(world):
            assert world.rank == 0, "left the others alone"
            world.Barrier()
        @pytest.mark.mpi(ranks=2)
        def test_afterwards(world):
            assert world.allreduce(1) == 2
        """,
        patch="\nmpirun_plugin.GRACE = 0.5\n",
    )
    assert outcomes(run) == {
        "test_deadlock": "FAILED",
        "test_death": "FAILED",
        "test_failure_before_a_collective": "FAILED",
        "test_afterwards": "PASSED",
    }
    assert "limit of 1 s\n  rank 0: in the test\n  rank 1: in the test" in section(run, "test_deadlock")
    assert run.stdout.count("in wait_for_a_message\n") == 2
    assert "  rank 0: in the test\n  rank 1: died" in section(run, "test_death")
    assert "  rank 0: in the test\n  rank 1: failed" in section(run, "test_failure_before_a_collective")
    assert "left the others alone" in section(run, "rank 1")
    shared_memory = re.findall(r"/dev/shm/\S+", (tmp_path / "maps1").read_text())
    assert shared_memory and not any(map(os.path.exists, shared_memory))


def test_waiting_ranks_leave_the_cores_to_the_others(run_inner):
    run = run_inner("""
        before = []
        @pytest.mark.mpi(ranks=2)
        def test_rank_0_takes_its_time(world):
            before.append(time.process_time())
            if world.rank == 0:
                time.sleep(1)
        @pytest.mark.mpi(ranks=2)
        def test_rank_1_slept_meanwhile():
            assert time.process_time() - before[0] < 0.4
    """)
    assert set(outcomes(run).values()) == {"PASSED"}, run.stdout


def test_one_child_per_number_of_ranks_and_without_pytest_mpi(run_inner, tmp_path):
    run = run_inner(
        """
        @pytest.mark.parametrize("n", [pytest.param(n, marks=pytest.mark.mpi(ranks=n)) for n in (1, 2)])
        @pytest.mark.parametrize("again", [1, 2])
        def test_pid(n, again):
            open(f"{n} {os.getpid()}", "w").close()
        """,
        *("-p", "no:pytest_mpi"),
    )
    assert list(outcomes(run).values()) == ["PASSED"] * 4
    assert sorted(path.name.split()[0] for path in tmp_path.glob("[12] *")) == ["1", "2", "2"]


def test_under_mpirun_only_what_fits_runs(run_inner, tmp_path):
    log_outcomes = """
def pytest_runtest_logreport(report):
    if report.when == "setup":
        with open(f"rank{mpirun_plugin.RANK}", "a") as log:
            print(report.nodeid, report.outcome, report.longrepr and report.longrepr[2], file=log)
"""
    tests = """
        def test_serial():
            pass
        @pytest.mark.launches
        def test_launch(launch):
            assert False
        @pytest.mark.mpi(ranks=2)
        def test_two():
            assert False
        @pytest.mark.mpi(ranks=3)
        def test_three(world):
            assert world.allreduce(1) == 3
    """
    run = run_inner(tests, "--with-mpi", patch=log_outcomes, ranks=3)
    assert run.returncode == 0, run.stdout + run.stderr
    for rank in range(3):
        assert (tmp_path / f"rank{rank}").read_text().splitlines() == [
            "test_inner.py::test_serial skipped Skipped: a test of one process: it would run on every rank at once",
            "test_inner.py::test_launch skipped Skipped: starts mpirun itself, which does not nest",
            "test_inner.py::test_two skipped Skipped: needs 2 ranks, runs on 3",
            "test_inner.py::test_three passed None",
        ]


def test_without_mpirun_tests_are_skipped_with_the_reason(run_inner):
    tests = """
        @pytest.mark.mpi(ranks=2)
        def test_two():
            pass
        @pytest.mark.launches
        def test_launch(launch):
            launch(2, "-c", "")
    """
    run = run_inner(tests, patch="\nfind_mpirun = lambda: None\n")
    assert set(outcomes(run).values()) == {"SKIPPED"}
    assert run.stdout.count("needs mpirun, found neither beside python nor on PATH") == 2


def test_marker_without_ranks_is_refused(run_inner):
    run = run_inner("@pytest.mark.mpi\ndef test_two():\n    pass")
    assert "test_inner.py::test_two: the marker mpi needs ranks=N" in run.stdout + run.stderr
    assert run.returncode == 4


def test_ranks_die_with_pytest(inner):
    folder = inner("@pytest.mark.mpi(ranks=2)\ndef test_hang():" + textwrap.indent(HANG, "    "))
    ranks = [folder / "rank0", folder / "rank1"]
    with subprocess.Popen([sys.executable, "-m", "pytest"], cwd=folder, stdout=subprocess.DEVNULL) as outer:
        started = within(30, lambda: all(rank.exists() for rank in ranks))
        outer.kill()
    assert started
    pids = [rank.read_text().split()[0] for rank in ranks]
    try:
        assert within(5, lambda: not any(map(alive, pids)))
    finally:
        for left in left_behind(folder):  # nobody else is left to clean up
            Path(left).unlink() if left.startswith("/") else os.kill(int(left), signal.SIGKILL)


def test_launch_returns_what_ran(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("OMPI_MCA_osc", "mine")
    monkeypatch.setenv("UNWANTED", "1")
    code = "import os, sys; print(*map(os.environ.get, sys.argv[1:])); sys.exit(os.getcwd())"
    names = ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_osc", "MORE", "UNWANTED"]
    run = launch(None, "-c", code, *names, env={"MORE": "more", "UNWANTED": None}, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (1, "1 mine more None\n", f"{tmp_path}\n")


def test_launch_starts_so_many_ranks(launch):
    run = launch(3, "-c", "from mpi4py import MPI; print(MPI.COMM_WORLD.allreduce(1))")
    assert (run.returncode, "".join(run.stdout.split())) == (0, "333")


def test_launch_kills_everything_at_its_time_limit(launch, tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"still ran after 4 s\n(.*\n)*.*here is rank"):
        launch(2, "-c", HANG, timeout=4, cwd=tmp_path)
    assert not left_behind(tmp_path)


def test_launch_cleans_up_after_a_rank_that_died(launch, tmp_path):
    death = "import time; time.sleep(0.8)\nif world.rank == 1: os.kill(os.getpid(), 9)\nworld.recv"
    run = launch(2, "-c", HANG.replace("world.recv", death), timeout=20, cwd=tmp_path)
    assert run.returncode != 0
    assert not left_behind(tmp_path)
