"""Rounds on 1 .. n ranks: the same cohort on all (strong), and a cohort that grows with the hosts (weak).

Rank 0 serves, so n ranks are n - 1 hosts; one rank does both. Seconds are of a round without evaluation, the median
after the first. speedup is against one host, percent_efficiency what each host keeps of it; hosts beyond the cores
share them. s_predicted is bench/prediction.py's: compute of the run on one rank, the cohorts' imbalance under
longest-first placement, and the round trip of the flat buffer that family comm measures at so many ranks. The table
goes to FOLDER/scale.csv, and to FOLDER/scale.png. --paper measures nothing: it prints the prediction for a cluster.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import mean

import numpy as np

from mpifl.bench.cases import Case, count, kept
from mpifl.bench.prediction import Machine, predict
from mpifl.bench.rounds import WORKLOADS
from mpifl.bench.training import job, mpirun, on_ranks, trained
from mpifl.comm import Alone
from mpifl.config import Table, UserError, load
from mpifl.engine.clock import Clock
from mpifl.placement import longest_first
from mpifl.session import Session

NAMES = ("dense", "conv", "cifar", "lstm")
PAPER = Machine(alpha=3e-6, beta=1 / 25e9, gamma=1 / 20e9, ranks_per_node=8, server=1e-3)
"""Nodes of 8 GPUs, 3 us and 25 GB/s between nodes, 20 GB/s through the memory of one core."""
WAYS = ("flat", "node", "sharded")
PAPER_STEP, PAPER_CLIENT_STEPS = 1e-3, 10
"""Seconds of a client's step on a GPU, and its steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options: which workload, on how many ranks, how large a cohort, and where files go."""
    parser.add_argument("--only", choices=NAMES, default="dense", help="workload (default dense)")
    parser.add_argument("--ranks", type=count, nargs="+", default=[1, 2, 3, 5, 9], help="(default 1 2 3 5 9)")
    parser.add_argument("--cohort", type=count, default=20, help="clients: of all hosts, or of each (default 20)")
    parser.add_argument("--rounds", type=count, default=12, help="rounds of each, at least 2 (default 12)")
    parser.add_argument("--folder", type=Path, help="make datasets here and keep them for the next time")
    parser.add_argument("--out", type=Path, default=Path("scale"), metavar="FOLDER", help="(default scale)")
    parser.add_argument("--paper", action="store_true", help="print predictions for a cluster up to 1,024 GPUs")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each way to scale and number of ranks; then write the table and the picture."""
    if options.paper:
        yield from on_paper()
        return
    if not mpirun():
        raise UserError('family scale needs mpirun, found neither beside python nor on PATH: pip install -e ".[mpich]"')
    rows = []
    with kept(options.folder) as folder:
        for case in measured(options, folder):
            rows.append(case)
            yield case
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "scale.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.out / "scale.png")


def measured(options: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """Yield what was measured, and predicted from the run on one rank and from family comm."""
    workload, rounds = WORKLOADS[options.only], max(2, options.rounds)
    path = folder / workload.dataset.__name__
    list(workload.dataset(path))

    def job_of(cohort: int) -> Table:
        return job(path, workload.model, cohort, rounds, workload.batch)

    alone = trained(job_of(options.cohort), ranks=1)
    busy = sum(alone.host_seconds(phase) for phase in ("load", "train", "sum"))
    server = alone.round_seconds - busy
    parameters = model_size(job_of(options.cohort))
    exchange = {ranks: round_trip(ranks, parameters, options.repeats) for ranks in options.ranks}
    for way in ("strong", "weak"):
        for ranks in options.ranks:
            hosts = max(1, ranks - 1)
            grown = hosts if way == "weak" else 1
            table = job_of(options.cohort * grown)
            run = trained(table, ranks)
            compute = busy * grown * imbalance(table, hosts) / min(hosts, cores())
            seconds, speedup = run.median_seconds, alone.median_seconds * grown / run.median_seconds
            yield {
                "case": f"{way}, {ranks} ranks, cohort {options.cohort * grown:,}",
                "s_round": seconds,
                "s_predicted": server + compute + exchange[ranks],
                "speedup": speedup,
                "percent_efficiency": 100 * speedup / hosts,
                "s_exchange": exchange[ranks],
                "imbalance": run.mean("imbalance"),
            }


def model_size(table: Table) -> int:
    """Parameters of a job's model."""
    with closing(Session.open(load(table), Alone(), Clock())) as session:
        return session.parts.model.size


def imbalance(table: Table, hosts: int) -> float:
    """Mean over a job's rounds of the busiest host's steps over the mean host's."""
    with closing(Session.open(load(table), Alone(), Clock())) as session:
        sizes, batches = session.parts.dataset.sizes("train"), session.parts.algorithm.works[-1].batches
        steps = [batches.steps_of(sizes[session.sampled(round)]) for round in range(session.job.rounds)]
    loads = [np.bincount(longest_first(each, hosts), weights=each, minlength=hosts) for each in steps]
    return mean(float(load.max() / load.mean()) for load in loads)


def round_trip(ranks: int, parameters: int, repeats: int) -> float:
    """Seconds of the flat buffer's way down and up."""
    if ranks == 1:
        return 0.0
    ms = json.loads(on_ranks(ranks, "mpifl.bench.exchange", str(parameters), str(repeats), "auto"))["auto"]
    return 1e-3 * (ms["down"] + ms["up"])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_paper() -> Iterator[Case]:
    """Yield predictions for a cluster: 10 clients for each GPU, 1.2 million to 1.2 billion parameters."""
    busy_of_a_host = 10 * PAPER_CLIENT_STEPS * PAPER_STEP
    for parameters in (1_200_000, 100_000_000, 1_000_000_000):
        for ranks in (9, 65, 1025):
            ways = {way: predict(PAPER, way, ranks, parameters, busy_of_a_host * (ranks - 1), 1.1) for way in WAYS}
            yield {
                "case": f"{ranks - 1:,} GPUs, {parameters:,} parameters",
                "s_compute": ways["flat"].compute,
                **{f"s_{way}": predicted.total for way, predicted in ways.items()},
                "s_server_flat": ways["flat"].server,
            }


def draw(rows: list[Case], path: Path) -> None:
    """Draw seconds of a round and efficiency against hosts; UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f'{path} is drawn by matplotlib, which is missing: pip install -e ".[prep]"') from None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, way in zip(figure.subplots(1, 2), ("strong", "weak")):
        chosen = [row for row in rows if row["case"].startswith(way)]
        ranks = [int(row["case"].split()[1]) for row in chosen]
        axes.plot(ranks, [row["s_round"] for row in chosen], "o-", color="#4477AA", label="measured")
        axes.plot(ranks, [row["s_predicted"] for row in chosen], "s--", color="#CC6677", label="predicted")
        axes.set(title=f"{way} scaling", xlabel="ranks (one serves)", ylabel="s per round", xticks=ranks)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
