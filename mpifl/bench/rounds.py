"""Rounds of FedAvg, a server and two hosts: seconds, examples per second, where hosts' time goes, memory.

dense, conv: 10 of 340 clients with FEMNIST's shapes and sizes, batch 20. cifar: 50 clients of 50 images, batch 10.
lstm: 10 clients of 40 sequences of 80 characters, batch 4. A second is the median over rounds after the first;
percentages are of hosts' time, what is left of it is waiting: for the server, the network and the slower host. Memory
is the most that a rank held, with cohorts of 10 and of 5,000 of 20,000 small clients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mpifl.bench import datasets
from mpifl.bench.cases import Case, count, kept
from mpifl.bench.training import Trained, job, trained
from mpifl.config import Table

PHASES = ("load", "train", "sum")
SMALL_CLIENTS, COHORTS = 20_000, (10, 5_000)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options: which workloads, how many rounds, and where datasets are kept."""
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=[*WORKLOADS], help="workloads (default: all)")
    parser.add_argument("--rounds", type=count, default=12, help="rounds of each, at least 2 (default 12)")
    parser.add_argument("--folder", type=Path, help="make datasets here and keep them for the next time")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each workload, and one for each cohort's memory."""
    rounds = max(2, options.rounds)
    with kept(options.folder) as folder:
        for name in options.only:
            workload = WORKLOADS[name]
            path = folder / workload.dataset.__name__
            list(workload.dataset(path))  # what writing takes is of family data
            for cohort in COHORTS if name == "memory" else [workload.cohort]:
                run = trained(job(path, workload.model, cohort, rounds, workload.batch))
                yield {"case": f"{name}, cohort {cohort:,}"} | (_memory(run) if name == "memory" else _speed(run))


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
