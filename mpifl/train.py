"""Train a job: `mpirun -n 9 python -m mpifl.train [jobs/NAME.toml] [key.path=value ...]`, or without mpirun.

Rank 0 is the server, the others host clients; a single process does both.
"""

from __future__ import annotations

import sys

from mpifl.command_line import DEFAULT_JOB, main

if __name__ == "__main__":  # this module is imported from there once its torch is needed
    sys.exit(main())

import dataclasses
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
from mpifl.dry_run import introduce
from mpifl.engine.clock import Clock
from mpifl.fleet import Fleet, serve
from mpifl.journal import Journal, put_scores
from mpifl.launch import agree, all_or_none, require_same
from mpifl.measure import headline
from mpifl.messages import NOBODY
from mpifl.profiling import ProfiledFleet, profiled, report
from mpifl.results import RunFolder, Totals, default_folder, hardware, refuse_taken, versions, write_json
from mpifl.scoring import score_here, score_state
from mpifl.session import Session
from mpifl.tree import Tree, digest
from mpifl.work import Cohort

__all__ = ["DEFAULT_JOB", "main", "run", "train"]


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
    clock.enter("start")
    session = agree(comm, lambda: Session.open(job, comm, clock))
    require_same(comm, session.digests())
    folder = agree(comm, lambda: RunFolder(job) if comm.rank == 0 else None)
    path = Path(comm.share(str(folder.path) if folder else ""))
    with (
        all_or_none(comm, clock, path),
        closing(session),
        comm.using(job.comm.reduce, console.say),
        comm.on_own_cores(job.run.threads),
        profiled(path / "profile", comm, session) as profile,
    ):
        clock.attach(path / "status" / f"rank-{comm.rank:05d}")
        if folder is None:
            serve(comm, session.host)
            if profile:
                profile.gather()
            return None
        console.log_to(path / "log.txt")
        kind = ProfiledFleet if profile else Fleet
        fleet = kind(comm, session.host, job.run.nonfinite, console.say, session.parts.algorithm.works)
        introduce(session, console)
        totals = Totals()
        state = train(session, fleet, folder, totals, console)
        summary = _finish(session, fleet, folder, totals, state, began)
        if profile:
            report(profile.gather(), fleet.balance, profile.folder, console)
        _conclude(summary, console)
        return summary


def train(session: Session, fleet: Fleet, folder: RunFolder, totals: Totals, console: Console) -> Tree:
    """Run the rounds; returns the final server state."""
    job, algorithm, clock = session.job, session.parts.algorithm, session.host.clock
    state = algorithm.init(session.theta.clone())
    journal = Journal(folder, totals, console, job.rounds, clock, served=session.comm.size > 1)
    fleet.meanwhile, by_server = journal.work, session.server_scores
    clock.lap()
    lap = time.perf_counter()
    with console.live(job.rounds), closing(journal):
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
                left = journal.finish()
                # Hosts together would have been faster than rank 0 alone.
                by_server &= job.run.scored_by == "server" or left * fleet.hosts <= len(session.scorer.blocks)
                if by_server and not last:
                    journal.score(record, score_here(fleet, session.scorer, algorithm, state))
                else:
                    with clock.booked("evaluate"):
                        put_scores(record, score_state(fleet, session.scorer, algorithm, state))
                    fleet.read_traffic()
            clock.enter("write")
            lap, before = time.perf_counter(), lap
            record["seconds"] = clock.lap() | {"total": lap - before}
            journal.add(record)
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
        with session.host.clock.booked("baselines"):
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
        "same_bits": session.same_bits,
        "resident_bytes": resident,
        "dataset": parts.dataset.digest,
        "versions": versions(session.comm.library),
        "hardware": hardware(session.host.device),
        "out": str(folder.path),
    }
    folder.summary(summary)
    return summary


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
