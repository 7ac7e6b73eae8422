"""What a launcher told this process, and what MPI reads when it starts."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from mpifl.process import Process

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "PALS_SIZE", "MV2_COMM_WORLD_SIZE")


def is_launched() -> bool:
    """Whether a launcher started this process."""
    managed = any(name in os.environ for name in (*_SIZES, "PMI_RANK", "PMIX_RANK", "PALS_RANKID"))
    return managed or launched_ranks() > 1


def launched_rank() -> int:
    """This process's rank as the launcher counts, 0 if there is none: for messages before MPI is up."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "PALS_RANKID", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def launched_ranks() -> int:
    """How many ranks a launcher says it started; 1 if none did."""
    sizes = [int(os.environ[name]) for name in _SIZES if os.environ.get(name, "").isdigit()]
    # In a batch script's own shell SLURM_NTASKS counts tasks that nobody has started.
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_STEP_ID", "").isdigit():
        sizes.append(int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1))
    return max(sizes, default=1)


def affinity() -> set[int]:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _forget_a_killed_start() -> None:
    """Remove the shared memory that ranks of this Slurm step left on this node when they were killed.

    MPICH under srun names it by job and step, which stay the same when Slurm starts a job again, and would wait in it
    for the dead for ever.
    """
    step = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
    if "PMI_FD" not in os.environ or not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return
    name = 0x811C9DC5
    for byte in step.encode():
        name = (name ^ byte) * 0x01000193 % 2**32  # FNV-1a
    since_boot = Process.current().started / os.sysconf("SC_CLK_TCK")
    began = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
    for file in Path("/dev/shm").glob(f"mpich_shm_{name:x}_*"):
        with suppress(OSError):  # another rank was first
            if file.stat().st_mtime < began:  # all ranks began before any of them made a new one
                file.unlink()


def set_up() -> None:
    """Settings that MPI reads when it starts; the user's own win."""
    _forget_a_killed_start()
    told = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or os.environ.get("MPI_LOCALNRANKS")
    tasks = told or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 4(x2),3
    if max(int(count) for count in re.findall(r"(?:^|,)(\d+)", tasks)) > len(affinity()):
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
        # From its sixth small collective on MPICH synchronises through flags that it spins on: 300 ms a Reduce
        # with nine ranks on two cores, against 10 without.
        os.environ.setdefault("MPIR_CVAR_POSIX_NUM_COLLS_THRESHOLD", "2147483647")
    fabrics = Path("/sys/class/infiniband")
    if not (fabrics.is_dir() and any(fabrics.iterdir())):
        os.environ.setdefault("OMPI_MCA_btl", "^ofi")  # its search for a fabric takes a second at every start
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")


def outlives_ranks() -> bool:
    """Whether MPI lets the others go on when a rank dies: Open MPI under `mpirun --with-ft ulfm`."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes", "t", "y")  # noqa: SIM112 - as mpirun writes it


def launcher_process() -> int:
    """The process of Open MPI's launcher on this node, which may have started this one by way of a script."""
    pid = os.getppid()
    while pid > 1:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        if name.startswith("prte") or name in ("mpirun", "mpiexec"):
            return pid
        pid = int(rest.split()[1])
    return os.getppid()
