"""Checks of what ranks share: cores, GPUs, memory, folders."""

from __future__ import annotations

from collections.abc import Sequence

from mpifl.config import Job
from mpifl.console import readable_bytes
from mpifl.doctor.facts import Fact, Found, Needs, Problem, Rank, by_node, groups, plural, ranges, spoken

LOGS = 64 << 20
"""Bytes of disk that a run folder may take beside checkpoints and models."""
NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "panfs", "pvfs2", "wekafs"),
    *("glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.ceph", "fuse.dfuse", "fuse.juicefs", "virtiofs"),
}


def places(ranks: Sequence[Rank], job: Job) -> Found:
    """Cores and GPU of each rank; whether some are crowded while others are idle."""
    at = lambda rank: (tuple(rank.cores), len(rank.allotted), rank.gpu and rank.gpu.id)  # noqa: E731
    for (cores, allotted, _), group in groups(ranks, at).items():
        gpu = group[0].gpu
        of_gpus = f"; GPU {gpu.id}, {gpu.name}, {readable_bytes(gpu.free)} free, of {len(gpu.seen)} seen" if gpu else ""
        yield Fact(spoken(group), f"cores {ranges(cores)} of {allotted}{of_gpus}")
    for group in by_node(ranks):
        yield from _crowded_cores([rank for rank in group if rank.cores], job.run.threads)
        yield from _crowded_gpus([rank for rank in group if rank.gpu], job.run.server_gpu == "own")


def _crowded_cores(ranks: Sequence[Rank], threads: int) -> Found:
    """Ranks that are bound to fewer cores than an even share of the node's."""
    allotted = set().union(*(rank.allotted for rank in ranks))
    share = -(-len(ranks) * threads // max(1, len(allotted)))  # threads on a core where all are used alike
    told: set[int] = set()
    for cores in sorted(groups(ranks, lambda rank: tuple(rank.cores)), key=len):
        inside = [rank for rank in ranks if set(rank.cores) <= set(cores)]
        if len(inside) * threads > len(cores) * share and not told & {rank.rank for rank in inside}:
            told |= {rank.rank for rank in inside}
            yield Problem(
                f"{spoken(inside)}: {plural(len(inside) * threads, 'thread')} on {plural(len(cores), 'core')} "
                f"({ranges(cores)}), though {plural(len(allotted), 'core')} are there for {plural(len(ranks), 'rank')}",
                _unbind(ranks[0], threads),
            )


def _unbind(rank: Rank, threads: int) -> str:
    if "SLURM_STEP_ID" in rank.settings:
        return f"srun --cpus-per-task={threads} --cpu-bind=cores; where mpirun starts the ranks, sbatch with as many"
    if "Open MPI" in rank.versions.get("MPI", ""):
        return f"mpirun --bind-to none, or mpirun --map-by slot:PE={threads}"
    return "mpirun -bind-to none, and no taskset around it"


def _crowded_gpus(ranks: Sequence[Rank], own: bool) -> Found:
    """Hosts that share a GPU while another is idle; the server may share one unless it is to have its own."""
    seen, used = {id for rank in ranks for id in rank.gpu.seen}, groups(ranks, lambda rank: rank.gpu.id)
    for id, users in used.items():
        sharing = [rank for rank in users if own or rank.rank > 0]
        if len(sharing) > 1 and len(seen) > len(used):
            yield Problem(
                f"{spoken(sharing)} share GPU {id}, while {len(seen) - len(used)} of {len(seen)} are idle",
                "let each rank see one GPU (srun --gpus-per-task=1), or every rank all of them (unset "
                "CUDA_VISIBLE_DEVICES)",
            )
        elif len(sharing) > 1 and "SLURM_GPUS_PER_TASK" in sharing[0].settings:
            yield Problem(
                f"{spoken(sharing)} share GPU {id}: they were to get one per task, but mpirun's ranks are one task",
                "sbatch --gpus-per-node in place of --gpus-per-task, or srun in place of mpirun",
            )


def memory(ranks: Sequence[Rank], job: Job) -> Found:
    """Whether what the job takes is left, on each node, in each control group and for each rank."""
    needs = _needs(ranks)
    if needs and len(ranks) == 1:
        yield Fact("memory needed", readable_bytes(needs.server))
    elif needs:
        yield Fact("memory needed", f"{readable_bytes(needs.server)} on rank 0, {readable_bytes(needs.host)} on a host")
    limits = [limit for group in by_node([rank for rank in ranks if rank.memory]) for limit in _limits(group)]
    if limits:
        least, where, _ = min(limits, key=lambda limit: limit[0])
        yield Fact("memory free", f"{readable_bytes(least)} {where}{', elsewhere more' * (len(limits) > 1)}")
    for free, where, group in limits:
        more = sum(_more(rank, needs) for rank in group)
        if more > free:
            yield Problem(
                f"{spoken(group)} will take {readable_bytes(more)} more, and {readable_bytes(free)} are free {where}",
                "fewer ranks on a node, smaller data.cache_mb, run.memory_mb or batches, or more memory: sbatch --mem, "
                "docker run --memory, ulimit -v unlimited",
            )


def _limits(ranks: Sequence[Rank]) -> list[tuple[int, str, list[Rank]]]:
    """(bytes left, where, for whom) on one node."""
    limits = [(min(rank.memory.free for rank in ranks), f"on {ranks[0].host}", list(ranks))]
    for cgroup, inside in groups(ranks, lambda rank: rank.memory.cgroup).items():
        if cgroup:
            limits.append((min(rank.memory.left for rank in inside), f"under the limit of {cgroup}", inside))
    bounded = [rank for rank in ranks if rank.memory.address_space is not None]
    return limits + [(rank.memory.address_space, "under ulimit -v", [rank]) for rank in bounded]


def _more(rank: Rank, needs: Needs | None) -> int:
    """Bytes that the job will take beside what the rank has already."""
    if needs is None:
        return 0
    return max(0, (needs.host if rank.rank else needs.server) - rank.memory.resident)


def _needs(ranks: Sequence[Rank]) -> Needs | None:
    return next((rank.needs for rank in ranks if rank.needs), None)


def shared_memory(ranks: Sequence[Rank], job: Job) -> Found:
    """Whether the ranks of a node can exchange through memory that they share, as comm.reduce wants."""
    needs, several = _needs(ranks), any(len(group) > 1 for group in by_node(ranks))
    if job.comm.reduce == "flat" or not (several or job.comm.reduce == "node") or len(ranks) == 1:
        return
    for group in by_node([rank for rank in ranks if rank.shared_memory is not None]):
        free, hosts = min(rank.shared_memory for rank in group), sum(rank.rank > 0 for rank in group)
        need = needs.down * 5 // 4 + needs.up * hosts + (1 << 20) if needs else 0
        if group[0].rank == 0 or need > free:
            yield Fact(f"/dev/shm of {group[0].host}", f"{readable_bytes(free)} free, {readable_bytes(need)} needed")
        if need > free:
            yield Problem(
                f"/dev/shm of {group[0].host} has {readable_bytes(free)} free, and {spoken(group)} exchange through "
                f"{readable_bytes(need)} of it",
                f"docker run --shm-size={1 + (need >> 30)}g, or mount -o remount,size={1 + (need >> 30)}g /dev/shm; "
                f"comm.reduce=flat goes without it, more slowly",
            )


def folders(ranks: Sequence[Rank], job: Job) -> Found:
    """File systems of data and results: lockable where something is locked, seen by all, large enough."""
    used = [(rank, folder) for rank in ranks for folder in rank.folders]
    for (key, path, kind), pairs in groups(used, lambda pair: (pair[1].key, pair[1].path, pair[1].kind)).items():
        on, least = [rank for rank, _ in pairs], min(folder.free for _, folder in pairs)
        refused = [rank for rank, folder in pairs if folder.lock]
        reason = next((folder.lock for _, folder in pairs if folder.lock), "")
        reach = "network" if kind in NETWORK_FILE_SYSTEMS else "local"
        locks = f", no locks ({reason})" if refused else ""
        yield Fact(key, f"{path}: {kind}, {reach}, {readable_bytes(least)} free{locks}; {spoken(on)}")
        if refused and key == "data.stage":
            yield Problem(
                f"{spoken(refused)} cannot lock files in {path} ({kind}): {reason}; copies there are made under a lock",
                "data.stage=FOLDER on the node's own disk, or have that file system mounted with locks",
            )
        elif refused and ranks[0].settings.get("HDF5_USE_FILE_LOCKING", "").upper() not in ("FALSE", "0"):
            yield Problem(
                f"{spoken(refused)} cannot lock files in {path} ({kind}): {reason}; HDF5 may refuse to open any there",
                "export HDF5_USE_FILE_LOCKING=FALSE, or have it mounted with locks (Lustre: -o flock; NFS: no nolock)",
            )
    out = next((folder for folder in ranks[0].folders if folder.key == "run.out"), None)
    if out is not None:
        for outcome, group in groups(ranks, lambda rank: rank.run_folder).items():
            yield from _in_run_folder(outcome, group, f"{out.path} ({out.kind})")
        needs = _needs(ranks)
        if needs and needs.disk + LOGS > out.free:
            yield Problem(
                f"{out.path} has {readable_bytes(out.free)} free, and a run takes up to "
                f"{readable_bytes(needs.disk + LOGS)}, mostly checkpoints",
                "run.out=FOLDER on a larger disk, or a smaller run.keep",
            )


def _in_run_folder(outcome: str, ranks: Sequence[Rank], where: str) -> Found:
    what, _, reason = outcome.partition(": ")
    if what == "not written":
        yield Problem(f"{spoken(ranks)} cannot write to {where}: {reason}", "run.out=FOLDER, where all nodes may write")
    elif what == "missing":
        yield Problem(
            f"{spoken(ranks)} cannot see what rank 0 writes to {where}",
            "run.out=FOLDER on a file system that all nodes share",
        )
    elif what == "no answer":
        yield Problem(
            f"{spoken(ranks)}: {where} does not answer",
            "run.out=FOLDER on another file system; ls the folder on that node: it hangs until its server is back",
        )
