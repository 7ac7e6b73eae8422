"""What a GPU is worth: its matrix peak, our engines, whole jobs, and the peers on the same GPU.

Cases that the --json file already holds are shown and not measured again, so that a broken run goes on where it was.
peak: TFLOP/s of products of 8,192 x 8,192 matrices. engines: seconds of a round by engine.name and engine.dtype.
jobs: seconds of all rounds. share: TFLOP/s of training CIFAR-10's CNN with a cohort of 200, in percent of the peak in
TF32. peers: as family peers, 100 rounds each in turns of 5; FedJAX and pfl-research where their environments are named.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mpifl.bench import datasets, peers
from mpifl.bench.cases import Case, count, kept
from mpifl.bench.rounds import Workload
from mpifl.bench.training import job, trained
from mpifl.build import build
from mpifl.config import Table, UserError, load
from mpifl.data.batches import blank_columns, to_inputs

EMNIST = Workload(partial(datasets.femnist, clients=3400), {"name": "emnist_conv"}, cohort=10, batch=20)
CIFAR = Workload(partial(datasets.cifar, clients=1000), {"name": "cifar_cnn"}, cohort=50, batch=10)
SPEECH = Workload(partial(datasets.speech, clients=715), {"name": "char_lstm"}, cohort=10, batch=4)
JOBS = {"emnist": (EMNIST, 1500), "cifar": (CIFAR, 1500), "speech": (SPEECH, 1200)}
ENGINES = [("serial", "float32"), ("batched", "float32"), ("graph", "float32"), ("graph", "tf32"), ("graph", "bf16")]
WIDTH, PRODUCTS = 8192, 30
TURN, TURNS = 5, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options: which cases, the peers' environments, the device, and where datasets are kept."""
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES], help="cases (default: all)")
    parser.add_argument("--fedjax", metavar="PYTHON", help="python of an environment with fedjax and jax for GPUs")
    parser.add_argument("--pfl", metavar="PYTHON", help="python of an environment with pfl[pytorch]")
    parser.add_argument("--folder", type=Path, help="make datasets here and keep them for the next time")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(cpu: to try the script out)")
    parser.add_argument("--rounds", type=count, help="fewer rounds of each job than it has, to try the script out")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each measurement, those that were made before marked as stored."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; --device cpu tries the script out")
    before = stored(options.json)
    with kept(options.folder) as folder:
        for name in options.only:
            for case, measure in CASES[name](options, folder):
                if case in before:
                    yield before[case] | {"stored": True}
                else:
                    yield from ({"case": case} | found for found in measure())


def stored(path: str | None) -> dict[str, Case]:
    """Cases of this family in a file of JSON lines, by name."""
    if path is None or not Path(path).exists():
        return {}
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return {line["case"]: line for line in lines if line["family"] == "gpu"}


Cases = Iterator[tuple[str, Callable[[], Iterator[Case]]]]
"""Names, and what measures them when it is called."""


def peak(options: argparse.Namespace, folder: Path) -> Cases:
    """Matrix products by number format."""
    for dtype in ("float32", "tf32", "bf16"):
        yield f"peak, {dtype}", partial(_peak, dtype, options.device)


def engines(options: argparse.Namespace, folder: Path) -> Cases:
    """Each engine on each workload."""
    for name, (workload, _) in JOBS.items():
        for engine, dtype in ENGINES:
            table = _job(workload, folder, options, rounds=options.rounds or 30)
            table["engine"] = {"name": engine, "dtype": dtype}
            yield f"{name}, {engine}, {dtype}", partial(_rounds, table)


def jobs(options: argparse.Namespace, folder: Path) -> Cases:
    """Whole jobs, with the engine and the format that a job gets by default."""
    for name, (workload, rounds) in JOBS.items():
        table = _job(workload, folder, options, options.rounds or rounds)
        yield f"{name}, {options.rounds or rounds:,} rounds", partial(_whole, table)


def share(options: argparse.Namespace, folder: Path) -> Cases:
    """The device's matrix peak, and what training makes of it."""
    table = _job(CIFAR._replace(cohort=200), folder, options, options.rounds or 30)
    table["engine"] = {"dtype": "tf32"}
    yield "cifar, cohort 200, tf32", partial(_share, table, options.device)


def against(options: argparse.Namespace, folder: Path) -> Cases:
    """The peers on the same GPU, taking turns."""
    for name, workload, peer in (("emnist", EMNIST, "fedjax"), ("cifar", CIFAR, "pfl")):
        if getattr(options, peer):
            yield f"{name} against {peer}", partial(_against, workload, folder, options, peer)


CASES: dict[str, Callable[[argparse.Namespace, Path], Cases]] = {
    "peak": peak,
    "engines": engines,
    "jobs": jobs,
    "share": share,
    "peers": against,
}


def _job(workload: Workload, folder: Path, options: argparse.Namespace, rounds: int) -> Table:
    path = folder / f"{workload.dataset.func.__name__}-{workload.dataset.keywords['clients']}"
    list(workload.dataset(path))
    table = job(path, workload.model, workload.cohort, max(2, rounds), workload.batch, cache_mb=8192)
    table["run"]["device"] = options.device
    return table


def _peak(dtype: str, device: str) -> Iterator[Case]:
    yield {"TFLOP_per_s": matrix_peak(dtype, device)}


def matrix_peak(dtype: str, device: str, width: int = WIDTH) -> float:
    """TFLOP/s of matrix products in "float32", "tf32" or "bf16"."""
    width = width if device == "cuda" else min(width, 512)
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    matrix = torch.ones(width, width, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    for products in (3, PRODUCTS):  # the first ones warm up
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(products):
            matrix @ matrix
        _synchronize(device)
    torch.set_float32_matmul_precision("highest")
    return PRODUCTS * 2 * width**3 / (time.perf_counter() - began) / 1e12


def _rounds(table: Table) -> Iterator[Case]:
    run = trained(table, ranks=1)
    yield {"s_round": run.median_seconds, "examples_per_s": run.mean("examples") / run.median_seconds}


def _whole(table: Table) -> Iterator[Case]:
    run = trained(table, ranks=1)
    yield {"s_all": run.summary["seconds"], "s_round": run.median_seconds}


def _share(table: Table, device: str) -> Iterator[Case]:
    run, flops = trained(table, ranks=1), flops_of_an_example(table)
    reached, most = flops * run.mean("examples") / run.median_seconds / 1e12, matrix_peak("tf32", device)
    yield {"TFLOP_per_s": reached, "percent_of_peak": 100 * reached / most, "s_round": run.median_seconds}


def flops_of_an_example(table: Table) -> float:
    """Multiplications and additions of forward and backward of an example of a job, as torch counts them."""
    parts = build(load(table | {"run": table["run"] | {"device": "cpu"}}))
    rows = table["algorithm"]["batches"]["size"]
    batch = to_inputs(blank_columns(parts.dataset.features, rows), parts.dataset.features)
    batch["index"] = torch.arange(rows)
    with FlopCounterMode(display=False) as counter:
        parts.model.grad_and_loss(torch.zeros(parts.model.size), batch)
    return counter.get_total_flops() / rows


def _against(workload: Workload, folder: Path, options: argparse.Namespace, peer: str) -> Iterator[Case]:
    table = _job(workload, folder, options, TURN)
    table["algorithm"]["batches"]["shuffle"] = False
    chosen = argparse.Namespace(fedjax=None, pfl=None, flower=None, repeats=TURNS)
    setattr(chosen, peer, getattr(options, peer))
    with TemporaryDirectory() as scratch:
        found: dict[str, Any] = {}
        for case in peers.contest(table, Path(scratch, "contest"), chosen):
            found[f"s_{case['case'].split(',')[0].replace(' ', '_')}"] = case["s_round"]
        ours = found["s_mpifl"]
        yield found | {f"times_{name.removeprefix('s_')}": s / ours for name, s in found.items() if name != "s_mpifl"}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
