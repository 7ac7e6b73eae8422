"""The same rounds through mpifl, a plain torch loop, FedJAX, pfl-research and Flower, taking turns (A B C A B C).

dense, conv, cifar and lstm are the workloads of family round. In a turn everyone trains the same cohorts from the same
model: one epoch of SGD in the order of rows, the mean weighted by examples, nothing evaluated. s_round is a turn's
mean, the median over turns after the first one; times_ours compares it with mpifl's, a server and two hosts;
s_first_round has compiling in it. A peer takes part if its environment is named, as it is fastest on two cores.

loss (of the final model, on rows of these clients), moved (norm of the model's change) and apart (norm of its
difference from mpifl's model), both over the norm of mpifl's change, show whether all did the same. In conv and cifar
everyone draws a dropout of its own, and FedJAX fills a client's last batch with its first rows.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from mpifl.bench.cases import Case, count, kept
from mpifl.bench.rounds import WORKLOADS, Workload
from mpifl.bench.training import HOSTS, job, mpirun
from mpifl.bench.turns import Contestant, take_turns
from mpifl.comm import Alone
from mpifl.config import Table, load, to_toml
from mpifl.data.batches import as_columns, to_inputs
from mpifl.engine.clock import Clock
from mpifl.session import Session

SCRIPTS = Path(__file__).parent / "contestants"
NAMES = ("dense", "conv", "cifar", "lstm")
CHECKED_ROWS = 500
CPU = torch.device("cpu")
# Ray's actors find the script's modules, and nobody calls home.
FLOWER = {"PYTHONPATH": str(SCRIPTS), "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options: the peers' environments, which workloads, how many rounds, and where datasets are kept."""
    for peer, what in (("fedjax", "fedjax"), ("pfl", "pfl[pytorch]"), ("flower", "flwr[simulation] and torch")):
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"python of an environment with {what}")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=[*NAMES], help="workloads (default: all)")
    parser.add_argument("--rounds", type=count, default=5, help="rounds of a turn (default 5)")
    parser.add_argument("--folder", type=Path, help="make datasets here and keep them for the next time")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each contestant on each workload."""
    with kept(options.folder) as folder, TemporaryDirectory() as scratch:
        for name in options.only:
            workload = WORKLOADS[name]
            path = folder / workload.dataset.__name__
            list(workload.dataset(path))
            for case in contest(job_of(workload, path, options.rounds), Path(scratch, name), options):
                yield case | {"case": f"{name}, {case['case']}"}


def job_of(workload: Workload, path: Path, rounds: int) -> Table:
    """The workload as a job of ours, in the order of rows."""
    made = job(path, workload.model, workload.cohort, rounds, workload.batch)
    made["algorithm"]["batches"]["shuffle"] = False
    return made


def contest(job: Table, folder: Path, options: argparse.Namespace) -> Iterator[Case]:
    """Let all contestants take turns on a job; yields a case of each."""
    folder.mkdir()
    (folder / "job.toml").write_text(to_toml(job | {"run": job["run"] | {"out": str(folder / "out")}}))
    session = Session.open(load(job), Alone(), Clock(0))
    examples = write_workload(session, folder / "workload.npz")
    with ExitStack() as running:
        running.enter_context(closing(session))
        taking_part = contestants(folder, options, alone=session.host.device.type == "cuda")
        for contestant in taking_part:
            running.enter_context(closing(contestant))
            contestant.start()
        take_turns(taking_part, options.repeats)
    ours = taking_part[0]
    for contestant in taking_part:
        yield {
            "case": contestant.name,
            "s_round": contestant.round_seconds,
            "examples_per_s": examples / job["rounds"] / contestant.round_seconds,
            "times_ours": contestant.round_seconds / ours.round_seconds,
            "s_first_round": contestant.turns[0][0],
            **compared(session, folder / "workload.npz", contestant.model, ours.model),
            "contestant": contestant.versions,
        }


def contestants(folder: Path, options: argparse.Namespace, alone: bool = False) -> list[Contestant]:
    """Ours first; each peer as it is fastest on two cores, or alone: on one GPU."""
    made = []

    def enter(name: str, *command: object, environments: Sequence[dict[str, str]] = ({},)) -> None:
        model = folder / f"{len(made)}.npy"
        made.append(Contestant(name, [*map(str, command), str(model)], model, environments))

    def script(peer: str, python: str, threads: int) -> tuple[object, ...]:
        return python, SCRIPTS / f"{peer}.py", folder / "workload.npz", threads

    several = 1 if alone else HOSTS
    launcher = [mpirun(), "-n", 1 + HOSTS] if mpirun() and not alone else []
    name = f"mpifl, hosts: {HOSTS}" if launcher else "mpifl, alone"
    enter(name, *launcher, sys.executable, "-m", "mpifl.bench.contestants.ours", folder / "job.toml")
    for threads in sorted({1, several}):
        enter(f"torch loop, threads: {threads}", *script("torch_loop", sys.executable, threads))
    if options.fedjax:
        enter("FedJAX", *script("with_fedjax", options.fedjax, HOSTS))
    for processes in sorted({1, several}) if options.pfl else ():
        workers = pfl_workers(processes)
        enter(f"pfl-research, processes: {processes}", *script("with_pfl", options.pfl, 1), environments=workers)
    if options.flower:
        enter(f"Flower, actors: {HOSTS}", *script("with_flower", options.flower, HOSTS), environments=[FLOWER])
    return made


def pfl_workers(processes: int) -> list[dict[str, str]]:
    """Environment of each of pfl's processes."""
    if processes == 1:
        return [{}]
    addresses = ",".join([f"127.0.0.1:{_free_port()}"] * processes)  # the first one's is listened to
    return [{"PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(rank)} for rank in range(processes)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_workload(session: Session, path: Path) -> int:
    """Write what the peers train, only the clients who take part; returns the examples of a turn."""
    job, dataset = session.job, session.parts.dataset
    cohorts = np.stack([session.sampled(round) for round in range(job.rounds)])
    ids = np.unique(cohorts)
    clients = [to_inputs(as_columns(dataset.client("train", id), CPU), dataset.features) for id in ids.tolist()]
    sizes = [len(client["y"]) for client in clients]
    batches = session.parts.algorithm.works[0].batches
    np.savez(
        path,
        **{name: np.concatenate([client[name].numpy() for client in clients]) for name in ("x", "y")},
        offsets=np.cumsum([0, *sizes]),
        cohorts=np.searchsorted(ids, cohorts),
        start=session.theta.cpu().numpy(),
        net=job.model["name"],
        hidden=np.asarray(job.model.get("hidden", []), np.int64),
        classes=dataset.features["y"].classes,
        batch=batches.size,
        lr=job.algorithm["client_opt"]["lr"],
        device=job.run.device,
    )
    return int(dataset.sizes("train")[cohorts].sum())


def compared(session: Session, workload: Path, model: Path, ours: Path) -> Case:
    """Loss, moved and apart of a contestant's model, as this module's docstring says."""
    with np.load(workload) as file:
        x, y = (torch.from_numpy(file[name][:CHECKED_ROWS]) for name in ("x", "y"))
    theta, own = torch.from_numpy(np.load(model)), torch.from_numpy(np.load(ours))
    losses = session.parts.model.losses(theta, {"x": x, "y": y, "index": torch.arange(len(y))})
    unit = (own - session.theta).norm()
    return {
        "loss": float(losses.mean()),
        "moved": float((theta - session.theta).norm() / unit),
        "apart": float((theta - own).norm() / unit),
    }
