"""What is wrong with a job's ranks, by what they found out: functions of (ranks, job) that yield facts and problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpifl.config import Job
from mpifl.doctor.facts import Fact, Found, Problem, Rank, by_node, groups, most_common, plural, spoken
from mpifl.doctor.resources import folders, memory, places, shared_memory

SKEW = 1.0
"""Seconds that clocks may differ: status files and logs of several nodes are compared by time."""


def answers(ranks: Sequence[Rank], job: Job) -> Found:
    """Probes that failed or hung, by rank."""
    for probe, group in groups(ranks, lambda rank: rank.doing).items():
        if probe:
            yield Problem(f"{spoken(group)} did not get through '{probe}' in time", _LOOK_AT[probe])
    for probe, where in _LOOK_AT.items():
        failing = [rank for rank in ranks if probe in rank.failed]
        for (kind, text), group in groups(failing, lambda rank, probe=probe: tuple(rank.failed[probe])).items():
            if kind == "UserError":  # a line that says how to mend it
                yield Problem(f"{spoken(group)}: {text}")
            else:
                yield Problem(f"{spoken(group)}: '{probe}' failed with {kind}: {text}", where)


_MOUNTED = "ls /proc /sys/fs/cgroup /dev/shm on that node: they must be mounted"
_LOOK_AT = {
    "software": 'python -m pip install -e ".[mpich]" in the environment of that node',
    "cores": _MOUNTED,
    "network": _MOUNTED,
    "storage": "ls the folders of data.path, data.stage and run.out on that node: their file systems must answer",
    "torch": 'python -c "import torch" on that node; python -m pip install --force-reinstall torch',
    "training": "python -m mpifl.train with the same job and --dry-run, on that node, shows where",
    "gpu": "nvidia-smi on that node; CUDA_VISIBLE_DEVICES must name GPUs that are there",
    "memory": _MOUNTED,
}


def library(ranks: Sequence[Rank], job: Job) -> Found:
    """MPI: which, what it can do, and how messages travel."""
    mpi = ranks[0].mpi
    yield Fact("launcher", ranks[0].launcher or ("srun" if "SLURM_STEP_ID" in ranks[0].settings else "none"))
    if len(ranks) == 1:
        found = " ".join(mpi.get("version", "none that mpi4py finds").partition("\n")[0].split())
        yield Fact("MPI", f"{found}; not in use, as this process is alone")
    else:
        name = ranks[0].versions.get("MPI", "unknown")
        yield Fact("MPI", f"{name}, standard {mpi.get('standard')}, thread level {mpi.get('threads')}")
        yield Fact("transports", _transports(ranks))
        staged = "not needed: what lies on a GPU travels through the host's memory"
        yield Fact("CUDA-aware", f"{mpi.get('cuda', 'unknown')}; {staged}")
        if mpi.get("threads") in ("single", "funneled"):
            yield Problem(
                f"MPI's thread level is '{mpi['threads']}': a thread that fails could not end the other ranks",
                'use an MPI built with thread support, as python -m pip install -e ".[mpich]" brings one',
            )
    for wheels, group in groups(ranks, lambda rank: tuple(rank.wheels)).items():
        if len(wheels) > 1:
            yield Problem(
                f"{spoken(group)}: {' and '.join(wheels)} are in one environment, and overwrite each other's mpirun",
                f"python -m pip uninstall -y {' '.join(wheels)}; python -m pip install {wheels[0]}",
            )


def _transports(ranks: Sequence[Rank]) -> str:
    parts = ["shared memory within a node"]
    if len(by_node(ranks)) > 1:
        fabrics = sorted({fabric for rank in ranks for fabric in rank.fabrics})
        parts.append(f"between nodes {', '.join(fabrics) or 'TCP, as no node has InfiniBand or Slingshot'}")
    device = [line for line in ranks[0].mpi.get("version", "").splitlines() if line.startswith("MPICH Device")]
    parts += [" ".join(line.split()) for line in device]
    asked = ("OMPI_", "UCX_") if "Open MPI" in ranks[0].versions.get("MPI", "") else ("MPIR_", "FI_", "UCX_")
    return "; ".join(parts + [f"{name}={value}" for name, value in ranks[0].settings.items() if name.startswith(asked)])


def nodes(ranks: Sequence[Rank], job: Job) -> Found:
    """How many ranks each node has."""
    counts = groups(by_node(ranks), len)
    yield Fact("nodes", "; ".join(f"{len(on)} with {plural(count, 'rank')}" for count, on in counts.items()))


def software(ranks: Sequence[Rank], job: Job) -> Found:
    """The same versions on all ranks, and one kind of processor."""
    common, known = {}, [rank for rank in ranks if rank.versions]
    for name in dict.fromkeys(name for rank in known for name in rank.versions):
        version = lambda rank, name=name: rank.versions.get(name, "unknown")  # noqa: E731
        common[name] = most_common(known, version)
        for value, group in groups(known, version).items():
            if value != common[name]:
                yield Problem(
                    f"{spoken(group)}: {name} {value}, elsewhere {common[name]}",
                    "start all ranks with one environment's own python, by its full path, on a file system that all "
                    "nodes see: mpirun -n 9 ENVIRONMENT/bin/python -m mpifl.train",
                )
    yield Fact("versions", ", ".join(f"{name} {value}" for name, value in common.items() if name != "MPI"))
    kinds = groups(ranks, lambda rank: rank.processor)
    differ = "; as they differ, last bits depend on which rank hosts a client" if len(kinds) > 1 else ""
    yield Fact("processors", "; ".join(f"{kind or 'unknown'}: {spoken(on)}" for kind, on in kinds.items()) + differ)


def clocks(ranks: Sequence[Rank], job: Job) -> Found:
    """Whether the ranks' clocks agree."""
    if len(ranks) > 1:
        furthest = max(abs(bound) for rank in ranks[1:] for bound in rank.clock)
        yield Fact("clocks", f"within {furthest:.4f} s of rank 0's, as far as messages can tell")
    for rank in ranks:
        low, high = rank.clock
        if low > SKEW or high < -SKEW:
            ahead, doubt = (low + high) / 2, (high - low) / 2
            yield Problem(
                f"the clock of {spoken([rank])} is {abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} that of "
                f"{spoken(ranks[:1])} (give or take {doubt:.4f} s)",
                "timedatectl set-ntp true (or systemctl restart chronyd), on both nodes",
            )


def same_job(ranks: Sequence[Rank], job: Job) -> Found:
    """The same job, dataset and initial model on all ranks."""
    for name, mend in _MADE_FROM.items():
        by_digest = groups(ranks, lambda rank, name=name: rank.digests.get(name, ""))
        by_digest.pop("", None)
        if by_digest:
            yield Fact(f"digest of {name}", "; ".join(f"{hex[:16]}: {spoken(on)}" for hex, on in by_digest.items()))
        if len(by_digest) > 1:
            yield Problem(f"ranks have different {name}: {'; '.join(spoken(on) for on in by_digest.values())}", mend)


_MADE_FROM = {
    "jobs": "start all ranks with the same arguments, and the job file on a file system that all nodes see",
    "datasets": "python -m data_prep verify FOLDER on those nodes; data that a function makes must not depend on rank, "
    "time or an unseeded generator",
    "initial models": "what builds the model must not depend on rank, time or an unseeded generator",
}

CHECKS: tuple[Callable[[Sequence[Rank], Job], Found], ...] = (
    library, nodes, software, places, memory, shared_memory, folders, clocks, same_job, answers,
)  # fmt: skip


def examine(ranks: Sequence[Rank], job: Job) -> list[Fact | Problem]:
    """Return all that the checks find, in their order."""
    return [found for check in CHECKS for found in check(ranks, job)]
