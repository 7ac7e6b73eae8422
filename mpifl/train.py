"""Train a job: `mpirun -n 9 python -m mpifl.train [jobs/NAME.toml] [key.path=value ...]`, or without mpirun.

Rank 0 is the server, the others host clients; a single process does both.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # torch makes a million objects that stay: not visiting them halves the start of nine ranks

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mpifl.build import find_job
from mpifl.comm import Alone, World, connect
from mpifl.config import Job, load
from mpifl.console import Console, readable_bytes, score_rows
from mpifl.engine.clock import Clock
from mpifl.fleet import Fleet, serve
from mpifl.launch import Parser, agree, all_or_none, command, require_same
from mpifl.measure import headline
from mpifl.messages import NOBODY
from mpifl.plan import PlanFleet, show_plan
from mpifl.results import RunFolder, Totals, default_folder, hardware, refuse_taken, versions, write_json
from mpifl.scoring import score_state
from mpifl.session import Session
from mpifl.tree import Tree, digest
from mpifl.work import Cohort

if __name__ == "__main__":
    gc.freeze()
    gc.enable()

DEFAULT_JOB = Path(__file__).parent / "digits.toml"


def run(
    job: str | Path | Mapping[str, Any] | Job,
    overrides: Sequence[str] = (),
    comm: World | Alone | None = None,
    quiet: bool = True,
) -> dict[str, Any] | None:
    """Run a job and return its summary; under mpirun every rank calls this, and ranks other than 0 get None.

    job: a path, a table with a job file's keys, or a Job. overrides: "key.path=value". comm: Alone() runs in
    this process alone even under mpirun. Raises UserError, on every rank, for a job that cannot be run.
    """
    comm = comm or connect()
    clock = Clock(comm.rank)
    console = Console(quiet or comm.rank > 0)
    job = agree(comm, lambda: job if isinstance(job, Job) else _load(job, overrides))
    if job.seeds == 1:
        return _run_one(job, comm, clock, console)
    base, summaries = Path(job.run.out) if job.run.out else default_folder(job), []
    agree(comm, lambda: refuse_taken(base) if comm.rank == 0 else None)
    for seed in range(job.seed, job.seed + job.seeds):
        settings = dataclasses.replace(job.run, out=str(base / f"seed-{seed}"))
        summaries.append(_run_one(dataclasses.replace(job, seed=seed, seeds=1, run=settings), comm, clock, console))
    return _over_seeds(summaries, base, console) if comm.rank == 0 else None


def _load(job: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Job:
    return load(job if isinstance(job, Mapping) else find_job(str(job)), overrides)


def _run_one(job: Job, comm: World | Alone, clock: Clock, console: Console) -> dict[str, Any] | None:
    began = time.perf_counter()
    session = agree(comm, lambda: Session.open(job, comm, clock))
    require_same(comm, session.digests())
    folder = agree(comm, lambda: RunFolder(job) if comm.rank == 0 else None)
    path = Path(comm.share(str(folder.path) if folder else ""))
    with all_or_none(comm, clock, path), closing(session):
        clock.attach(path / "status" / f"rank-{comm.rank:05d}")
        if folder is None:
            serve(comm, session.host)
            return None
        console.log_to(path / "log.txt")
        fleet = Fleet(comm, session.host, job.run.nonfinite, console.say, session.parts.algorithm.works)
        _introduce(session, console)
        totals = Totals()
        state = train(session, fleet, folder, totals, console)
        summary = _finish(session, fleet, folder, totals, state, began)
        _conclude(summary, console)
        return summary


def train(session: Session, fleet: Fleet, folder: RunFolder, totals: Totals, console: Console) -> Tree:
    """Run the rounds; returns the final server state."""
    job, algorithm, clock = session.job, session.parts.algorithm, session.host.clock
    state = algorithm.init(session.theta.clone())
    clock.lap()
    lap = time.perf_counter()
    with console.live(job.rounds):
        for round in range(job.rounds):
            clock.round = round
            clock.enter("sample")
            last = round + 1 == job.rounds
            fleet.begin(round, NOBODY if last else session.sampled(round + 1))
            cohort = session.cohort(round, fleet)
            clock.enter("server")
            new = algorithm.round(state, cohort)
            if cohort.latest.count:
                state, fleet.accepted = new, round
            else:
                console.say(f"round {round + 1}: no client counted (no batches, or left out); nothing changes")
            record = _record(round, cohort, fleet)
            if (round + 1) % job.run.eval_every == 0 or last:
                with clock.booked("evaluate"):
                    scores = score_state(fleet, session.scorer, algorithm, state)
                record["scores"] = {"test_loss": scores.pop("loss"), **scores}
                fleet.read_traffic()
            clock.enter("write")
            lap, before = time.perf_counter(), lap
            record["seconds"] = clock.lap() | {"total": lap - before}
            totals.add(record)
            folder.round(record)
            console.round(record, job.rounds)
    return state


def _record(round: int, cohort: Cohort, fleet: Fleet) -> dict[str, Any]:
    """What a round did, for metrics.jsonl; bytes are payload at rank 0's MPI calls, evaluation apart."""
    traffic, latest = fleet.read_traffic(), cohort.latest
    stats = dict(latest.stats)
    steps = stats.pop("steps", 0.0)
    return {
        "round": round + 1,
        "loss": stats.pop("loss") / steps if steps and "loss" in stats else None,
        **stats,
        "clients": latest.count,
        "cohort": len(cohort.ids),
        "examples": traffic.examples,
        "steps": traffic.steps,
        "excluded": traffic.excluded,
        "repeated_asks": traffic.repeats,
        "bytes_down": traffic.bytes_down,
        "bytes_up": traffic.bytes_up,
        "imbalance": traffic.imbalance,
        "host_seconds": traffic.hosts,
    }


def _finish(
    session: Session, fleet: Fleet, folder: RunFolder, totals: Totals, state: Tree, began: float
) -> dict[str, Any]:
    """Digests, baselines, models and summary; then the hosts may go."""
    job, parts = session.job, session.parts
    seconds = time.perf_counter() - began
    session.host.clock.enter("finish")
    memory, resident = fleet.memory_digest(), fleet.resident_bytes
    baselines = {}
    if session.baselines:
        baselines = session.baselines.run(fleet, session.scorer, session.theta, job.seed)
    fleet.stop()
    for name, theta in parts.algorithm.models(state).items():
        folder.model(name, parts.model.state_dict(theta))
    summary = {
        "job": job.name,
        "seed": job.seed,
        "digest": digest(state),
        "memory_digest": memory,
        "rounds": job.rounds,
        "seconds": seconds,
        **totals.summary(),
        "metrics": list(parts.metrics),
        "baselines": baselines,
        "ranks": session.comm.size,
        "same_bits": job.comm.sum == "exact" and session.host.device.type == "cpu",
        "resident_bytes": resident,
        "dataset": parts.dataset.digest,
        "versions": versions(session.comm.library),
        "hardware": hardware(session.host.device),
        "out": str(folder.path),
    }
    folder.summary(summary)
    return summary


def _introduce(session: Session, console: Console) -> None:
    """Say in a few lines what is about to run."""
    job, dataset, model = session.job, session.parts.dataset, session.parts.model
    hosts = max(1, session.comm.size - 1)
    where = "this process" if session.comm.size == 1 else f"1 server + {hosts} hosts ({session.comm.library})"
    sizes = dataset.sizes("train")
    console.say(
        f"{job.name}: {job.algorithm['name']} on {dataset.clients} clients, {int(sizes.sum())} examples; "
        f"{job.model['name']} with {model.size} parameters; {where}"
    )
    console.say(
        f"cohort {min(job.cohort or dataset.clients, dataset.clients)} for {job.rounds} rounds; clients are weighted "
        f"{'by their examples' if session.parts.algorithm.weighting == 'examples' else 'uniformly'}; seed {job.seed}"
    )
    if session.scorer.split == "train":
        console.say("there is no test split: test_loss and scores are of the training examples")
    if job.comm.sum != "exact":
        console.say('comm.sum = "float32": results depend on the number of ranks in their last bits')
    if session.host.device.type != "cpu":
        console.say(f"on {session.host.device.type}, results may differ in their last bits from run to run")


def _conclude(summary: dict[str, Any], console: Console) -> None:
    """Print the closing table."""
    rows = score_rows(summary["scores"], "summary.json")
    metric = headline(summary["metrics"], summary["scores"])
    rows += [(f"{metric}, {name}", f"{value:.4f}") for name, value in summary["baselines"].items()]
    phases = sorted(summary["phases"].items(), key=lambda item: -item[1])
    rows += [
        ("rounds", f"{summary['rounds']} in {summary['seconds']:.1f} s"),
        (
            "rank 0's time",
            ", ".join(f"{name} {100 * share:.0f} %" for name, share in phases if share >= 0.005),
        ),
        (
            "bytes moved",
            f"{readable_bytes(summary['bytes_down'])} down, {readable_bytes(summary['bytes_up'])} up",
        ),
        ("imbalance", f"{summary['imbalance']:.2f} (busiest host / mean)"),
        ("digest", summary["digest"]),
    ]
    if summary["memory_digest"]:
        rows.append(("client memory", summary["memory_digest"]))
    if summary["excluded"]:
        rows.append(("clients left out", str(summary["excluded"])))
    console.table([*rows, ("results", summary["out"])])


def _over_seeds(summaries: list[dict[str, Any]], folder: Path, console: Console) -> dict[str, Any]:
    """Mean and sample deviation of every score over seeds, printed and written beside the seeds' folders."""
    metric = headline(summaries[0]["metrics"], summaries[0]["scores"])
    each = [s["scores"] | {f"{metric}, {name}": value for name, value in s["baselines"].items()} for s in summaries]
    spread = {}
    for name in each[0]:
        values = [scores[name] for scores in each]
        spread[name] = {"mean": np.mean(values, axis=0).tolist(), "deviation": np.std(values, axis=0, ddof=1).tolist()}
    numbers = {name: s for name, s in spread.items() if isinstance(s["mean"], float)}
    rows = [(name, f"{s['mean']:.4f} ± {s['deviation']:.4f}") for name, s in numbers.items()]
    console.table([(f"{len(summaries)} seeds", "mean ± deviation"), *rows, ("results", str(folder))])
    summary = {"scores": spread, "seeds": summaries}
    write_json(folder / "summary.json", summary)
    return summary


def dry_run(path: str | Path, overrides: Sequence[str], comm: World | Alone) -> None:
    """Print the plan of a job on this many ranks."""
    job = agree(comm, lambda: _load(path, overrides))
    session = agree(comm, lambda: Session.open(job, comm, Clock(comm.rank)))
    if comm.rank > 0:
        return
    console = Console()
    _introduce(session, console)
    fleet = PlanFleet(session.host, comm.size, session.parts.algorithm.works)
    state = session.parts.algorithm.init(session.theta.clone())
    cohort_of = lambda round: session.cohort(round, fleet)  # noqa: E731
    show_plan(fleet, session.parts.algorithm, state, cohort_of, job.rounds, session.scorer.central, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 refused, 1 failed, 130 interrupted."""
    return command(_command, arguments)


def _command(comm: World | Alone, arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m mpifl.train",
        description="Train a federated job, alone or on all ranks of `mpirun -n 9 python -m mpifl.train`.",
        epilog="With no job, handwritten digits (embedded) are trained by FedAvg. Any key of a job file can be "
        "given as key.path=value, e.g. rounds=5 run.out=results algorithm.client_opt.lr=0.05.",
    )
    parser.add_argument("job", nargs="?", help="a job file, e.g. jobs/mnist_iid.toml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the job")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.read(comm, arguments)
    if options is None:
        return
    words = [word for word in (options.job, *options.overrides) if word]
    path = DEFAULT_JOB if not words or "=" in words[0] else words.pop(0)
    if path is DEFAULT_JOB:
        words = [f"name={Path(word[10:]).name}" for word in words if word.startswith("data.path=")] + words
    if options.dry_run:
        dry_run(path, words, comm)
    else:
        run(path, words, comm, options.quiet)


if __name__ == "__main__":
    sys.exit(main())
