"""Rounds of FedAvg, a server and two hosts: seconds, examples per second, where hosts' time goes, memory.

dense, conv: 10 of 340 clients with FEMNIST's shapes and sizes, batch 20. cifar: 50 clients of 50 images, batch 10.
lstm: 10 clients of 40 sequences of 80 characters, batch 4. A second is the median over rounds after the first;
percentages are of hosts' time, what is left of it is waiting: for the server, the network and the slower host. Memory
is the most that a rank held, with cohorts of 10 and of 5,000 of 20,000 small clients.

no_op: 10, 100 and 1,000 clients, drawn of twice as many, who do nothing and upload one number. ms_round is what a
round costs by itself, where each rank has a core; ms_server rank 0's part of it, without waiting; us_client what a host
spends on a client.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from mpifl.bench import datasets
from mpifl.bench.cases import Case, count, kept
from mpifl.bench.training import HOSTS, Trained, job, trained
from mpifl.config import Table
from mpifl.model import Model
from mpifl.tree import Tree
from mpifl.work import Algorithm, Batching, ClientWork, Cohort, Upload

PHASES = ("load", "train", "sum")
SERVER_PHASES = ("sample", "server", "send", "reduce", "write", "checkpoint")
SMALL_CLIENTS, COHORTS = 20_000, (10, 5_000)
NO_OP, NO_OP_COHORTS = "no_op", (10, 100, 1_000)

Record = dict[str, Any]


class Workload(NamedTuple):
    """A model on a dataset: clients of a round, rows of a batch."""

    dataset: Callable[[Path], Iterator[Case]]
    model: Table
    cohort: int
    batch: int


def many_small(path: Path) -> Iterator[Case]:
    """More clients than any cohort here."""
    return datasets.people(path, SMALL_CLIENTS)


WORKLOADS = {
    "dense": Workload(datasets.femnist, {"name": "mlp", "hidden": [200, 200]}, 10, 20),
    "conv": Workload(datasets.femnist, {"name": "emnist_conv"}, 10, 20),
    "cifar": Workload(datasets.cifar, {"name": "cifar_cnn"}, 50, 10),
    "lstm": Workload(datasets.speech, {"name": "char_lstm"}, 10, 4),
    "memory": Workload(many_small, {"name": "mlp", "hidden": [200, 200]}, 0, 4),
}


def no_op(model: Model, batches: Batching) -> Algorithm:
    """Build rounds of clients that do nothing and upload one number; nothing travels down but who they are."""
    number, weight = torch.ones(1), torch.ones(())

    def finish(*_: object) -> Upload:
        return Upload({"number": number}, weight)

    work = ClientWork(lambda shared, client: {}, lambda shared, client, carry, batch: carry, finish, batches)

    def round(state: Tree, cohort: Cohort) -> Tree:
        cohort.sum(work)
        return state

    return Algorithm(lambda theta: {"theta": theta}, round, (work,), lambda state: {"model": state["theta"]})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options: which workloads, how many rounds, and where datasets are kept."""
    names = [*WORKLOADS, NO_OP]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="workloads (default: all)")
    parser.add_argument("--rounds", type=count, default=12, help="rounds of each, at least 2 (default 12)")
    parser.add_argument("--ranks", type=count, default=1 + HOSTS, help=f"one serves (default {1 + HOSTS})")
    parser.add_argument("--folder", type=Path, help="make datasets here and keep them for the next time")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each workload, and for each cohort of those that are about cohorts."""
    rounds = max(2, options.rounds)
    with kept(options.folder) as folder:
        for name in options.only:
            if name == NO_OP:
                yield from no_op_cases(folder, rounds, options.ranks)
                continue
            workload = WORKLOADS[name]
            path = folder / workload.dataset.__name__
            list(workload.dataset(path))  # what writing takes is of family data
            for cohort in COHORTS if name == "memory" else [workload.cohort]:
                run = trained(job(path, workload.model, cohort, rounds, workload.batch), options.ranks)
                yield {"case": f"{name}, cohort {cohort:,}"} | (_memory(run) if name == "memory" else _speed(run))


def no_op_cases(folder: Path, rounds: int, ranks: int) -> Iterator[Case]:
    """Yield what rounds cost in which clients do nothing; few clients, so that nearly all of them are in memory."""
    for cohort in NO_OP_COHORTS:
        path = folder / f"people_{2 * cohort}"
        list(datasets.people(path, 2 * cohort))
        table = job(path, {"name": "logistic"}, cohort, rounds, batch=4)
        run = trained(table | {"algorithm": {"name": f"{__name__}:no_op", "batches": {"size": 4}}}, ranks)
        yield {"case": f"{NO_OP}, cohort {cohort:,}"} | _framework(run)


def _speed(run: Trained) -> Case:
    hosts = max(1, len(run.summary["resident_bytes"]) - 1)
    return {
        "s_round": run.median_seconds,
        "examples_per_s": run.mean("examples") / run.round_seconds,
        **{f"percent_{phase}": 100 * run.host_seconds(phase) / hosts / run.round_seconds for phase in PHASES},
        "imbalance": run.mean("imbalance"),
    }


def _memory(run: Trained) -> Case:
    server, *hosts = run.summary["resident_bytes"]
    return {"MB_server": server / 1e6, "MB_host": max(hosts or [server]) / 1e6, "s_round": run.round_seconds}


def _framework(run: Trained) -> Case:
    def middle(seconds: Callable[[Record], float]) -> float:
        return median(seconds(record) for record in run.rounds[1:])

    server = middle(lambda record: sum(record["seconds"].get(phase, 0.0) for phase in SERVER_PHASES))
    client = middle(lambda record: sum(record["host_seconds"].values()) / record["clients"])
    return {"ms_round": 1e3 * run.median_seconds, "ms_server": 1e3 * server, "us_client": 1e6 * client}
