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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from mpifl.build import find_job
from mpifl.checkpoint import Checkpoint, newest, other_machine, refuse_others
from mpifl.comm import Alone, World, connect
from mpifl.conclusion import conclude, finish, over_seeds
from mpifl.config import Job, load, seconds_of
from mpifl.console import Console
from mpifl.dry_run import introduce
from mpifl.engine.clock import Clock
from mpifl.faults import Turnout
from mpifl.fleet import Fleet, serve
from mpifl.journal import Journal, put_scores
from mpifl.launch import agree, all_or_none, outlive, require_same
from mpifl.messages import SAVE, SAVED, Header
from mpifl.profiling import ProfiledFleet, ProfiledShardedFleet, profiled, report
from mpifl.results import RunFolder, Totals, default_folder, hardware, refuse_taken, seeds_in, versions
from mpifl.saving import Checkpoints, Writer
from mpifl.scoring import score_here, score_state
from mpifl.session import Session
from mpifl.sharded import Follower, ShardedFleet
from mpifl.stopping import ASKED, Stopped, TimeLimit
from mpifl.supervise import require_supervisor
from mpifl.tree import Tree
from mpifl.watchdog import watched
from mpifl.work import Cohort
from mpifl.writers import Writers

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
    began = time.perf_counter()
    job = agree(comm, lambda: job if isinstance(job, Job) else _load(job, overrides))
    agree(comm, lambda: require_supervisor(job.run.on_rank_failure) if comm.rank == 0 else None)
    if job.run.on_rank_failure != "shrink":
        return _run_seeds(job, comm, quiet, began)
    agree(comm, comm.expect_losses)
    if not job.run.out:  # the next start of this command will choose another one
        out = comm.share(str(default_folder(job)) if comm.rank == 0 else "")
        job = _with(job, out=out, requeue="never")
    return outlive(comm, lambda again: _run_seeds(_with(job, resume="auto") if again else job, comm, quiet, began))


def _with(job: Job, **settings: Any) -> Job:
    return dataclasses.replace(job, run=dataclasses.replace(job.run, **settings))


def _run_seeds(job: Job, comm: World | Alone, quiet: bool, began: float) -> dict[str, Any] | None:
    """Run each of a job's seeds, from where an earlier start left it."""
    clock, console = Clock(comm.rank), Console(quiet or comm.rank > 0)
    limit = TimeLimit(seconds_of(job.run.time_limit), began)
    if job.seeds == 1:
        return _run_one(job, comm, clock, console, limit)
    base, summaries = Path(job.run.out) if job.run.out else default_folder(job), []
    agree(comm, lambda: refuse_taken(base, seeds_in(base, job)) if comm.rank == 0 else None)
    for seed in range(job.seed, job.seed + job.seeds):
        one = dataclasses.replace(_with(job, out=str(base / f"seed-{seed}")), seed=seed, seeds=1)
        summaries.append(_run_one(one, comm, clock, console, limit))
    return over_seeds(summaries, base, console) if comm.rank == 0 else None


def _load(job: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Job:
    return load(job if isinstance(job, Mapping) else find_job(str(job)), overrides)


def _run_one(job: Job, comm: World | Alone, clock: Clock, console: Console, limit: TimeLimit) -> dict[str, Any] | None:
    began = time.perf_counter()
    clock.enter("start")
    with ExitStack() as open_parts:
        folder = agree(comm, lambda: RunFolder(job) if comm.rank == 0 else None)
        if comm.share("finished" if folder and folder.summary else ""):
            return _finished_before(folder, console) if folder else None
        session = open_parts.enter_context(closing(agree(comm, lambda: Session.open(job, comm, clock))))
        require_same(comm, session.digests())
        writers = agree(comm, lambda: Writers(job.run.writers if comm.rank == 0 else (), console.say))
        path = Path(comm.share(str(folder.path) if folder else ""))
        agree(comm, lambda: open_parts.enter_context(folder.locked(comm, console.say)) if folder else None)
        checkpoint = agree(comm, lambda: newest(comm, path / "checkpoints"))
        dataset, layout = session.parts.dataset.digest, session.host.memory.layout
        agree(comm, lambda: refuse_others(checkpoint, dataset, layout) if checkpoint else None)
        past = folder.past(checkpoint and checkpoint.rounds, comm) if folder else []
        records = agree(comm, lambda: folder.begin(checkpoint and checkpoint.rounds) if folder else [])
        if folder:
            console.log_to(path / "log.txt")
        for line in past:
            console.say(line)
        open_parts.callback(writers.close)
        summary = _train_or_serve(session, folder, path, checkpoint, records, console, began, limit, writers)
    if summary == STOPPED:
        raise Stopped(requeue=job.run.requeue == "auto" and bool(job.run.out))
    return summary


def _train_or_serve(
    session: Session,
    folder: RunFolder | None,
    path: Path,
    checkpoint: Checkpoint | None,
    records: list[dict[str, Any]],
    console: Console,
    began: float,
    limit: TimeLimit,
    writers: Writers,
) -> dict[str, Any] | str | None:
    """One rank's part of a run; returns the summary on rank 0, None on others, or STOPPED on all."""
    job, comm, host = session.job, session.comm, session.host
    with (
        closing(Writer(path / "checkpoints", comm.rank, host.memory)) as writer,  # not waited for when a job is aborted
        all_or_none(comm, host.clock, path),
        watched(comm, host.clock, path, job.run.stall_timeout, ends_job=not comm.losses),
        comm.using(job.comm.reduce, console.say),
        comm.on_own_cores(job.run.threads),
        profiled(path / "profile", comm, session) as profile,
        ASKED.while_training(),
    ):
        fleet = _fleet(session, console, profile is not None)
        host.asked_to_stop = lambda: bool(ASKED.name)
        start = _start(session, fleet, checkpoint)
        if folder is None:
            stopped = serve(comm, host, _follower(session, fleet, writer, start))
            if profile:
                profile.gather()
            return STOPPED if stopped else None
        introduce(session, console)
        if checkpoint and (other := other_machine(checkpoint, _about(session))):
            console.say(f"another machine than before ({other}): the last bits may differ from an undisturbed run's")
        writers.open(path, job)
        totals, saving = Totals(records), Checkpoints(writer, fleet, job.run.save_every, job.run.keep)
        journal = Journal(folder, totals, console, job.rounds, host.clock, comm.size > 1, writers)
        state, why = train(session, fleet, journal, saving, limit, start)
        if why:
            fleet.stop(early=True)
        else:
            summary = finish(session, fleet, folder, totals, state, began)
            writers.close(summary)
        if profile:
            report(profile.gather(), fleet.balance, profile.folder, console)
        if why:
            done = f"{totals.rounds} of {job.rounds} rounds are done"
            goes_on = f"the same command goes on after round {saving.saved}"
            console.say(f"stopped by {why}: {done}; {goes_on} ({path})")
            return STOPPED
        conclude(summary, console)
        return summary


STOPPED = "stopped"


def _fleet(session: Session, console: Console, profiled: bool) -> Fleet:
    job, host, algorithm = session.job, session.host, session.parts.algorithm
    arguments = (session.comm, host, job.faults.tolerate, console.say, algorithm.works)
    if job.comm.reduce == "sharded":
        kind = ProfiledShardedFleet if profiled else ShardedFleet
        return kind(*arguments, parameters=session.parts.model.size)
    return (ProfiledFleet if profiled else Fleet)(*arguments)


def _start(session: Session, fleet: Fleet, checkpoint: Checkpoint | None) -> tuple[int, Tree]:
    """Rounds that are done, and what this rank keeps of the server's state; client memory is put in its place."""
    if checkpoint is None:
        return 0, fleet.hold(session.parts.algorithm.init(session.theta.clone()))
    checkpoint.restore(session.host.memory, lambda clients: fleet.keeper(clients) == session.comm.rank)
    fleet.limits, fleet.accepted = checkpoint.about["limits"], checkpoint.rounds - 1
    return checkpoint.rounds, fleet.hold(checkpoint.server(like=session.parts.algorithm.init(session.theta.clone())))


def _follower(session: Session, fleet: Fleet, writer: Writer, start: tuple[int, Tree]) -> Callable[[Header], None]:
    """What a host does beside answering asks: its part of checkpoints, and of a state that is sharded."""
    sharded = isinstance(fleet, ShardedFleet)
    shard = Follower(fleet, session.parts.algorithm, start[1], session.begin) if sharded else None

    def follow(header: Header) -> None:
        if header.command == SAVE:
            writer.begin(header.clients)
        elif header.command == SAVED:
            session.comm.gather(writer.finish().pack())
        else:
            shard.answer(header)

    return follow


def train(
    session: Session,
    fleet: Fleet,
    journal: Journal,
    saving: Checkpoints,
    limit: TimeLimit,
    start: tuple[int, Tree],
) -> tuple[Tree, str]:
    """Run the rounds; returns the last state, and why that was before the last round ("": it was not)."""
    job, algorithm, clock, console = session.job, session.parts.algorithm, session.host.clock, journal.console
    first, state = start
    kept = (first, state, dict(fleet.limits))

    def on_record() -> tuple[int, Tree, dict[str, Any], dict[str, Any]]:
        journal.finish()
        journal.folder.make_rounds_durable()
        return (*kept, _about(session))

    fleet.meanwhile, by_server = journal.work, session.server_scores
    longest, why = 0.0, ""
    clock.lap()
    lap = time.perf_counter()
    with console.live(job.rounds), closing(journal), saving.rescued(on_record):
        for round in range(first, job.rounds):
            clock.round = round
            clock.enter("sample")
            last = round + 1 == job.rounds
            cohort = session.begin(round, fleet)
            clock.enter("server")
            new = fleet.run(algorithm, state, cohort)
            if cohort.latest.count:
                state, fleet.accepted = new, round
            else:
                console.say(f"round {round + 1}: no client counted (no batches, or left out); nothing changes")
            record = _record(session.turnout(round), cohort, fleet)
            if (round + 1) % job.run.eval_every == 0 or last:
                left = journal.finish()
                # Hosts together would have been faster than rank 0 alone.
                by_server &= job.run.scored_by == "server" or left * fleet.hosts <= len(session.scorer.blocks)
                if by_server and not last:
                    journal.score(record, score_here(fleet, session.scorer, algorithm, fleet.fetch(state)))
                else:
                    with clock.booked("evaluate"):
                        whole = fleet.fetch(state)
                        put_scores(record, score_state(fleet, session.scorer, algorithm, whole))
                    fleet.read_traffic()
            clock.enter("write")
            lap, before = time.perf_counter(), lap
            longest = max(longest, lap - before)
            record["seconds"] = clock.lap() | {"total": lap - before}
            journal.add(record)
            kept = (round + 1, state, dict(fleet.limits))
            clock.enter("checkpoint")
            saving.finish()  # of the round before, written during this one
            why = "" if last else ASKED.name or (fleet.asked_to_stop and "a signal") or limit.reason(longest)
            if why or saving.due(round + 1, last):
                journal.finish()
                journal.folder.make_rounds_durable()
                saving.begin(round + 1, fleet.fetch(state), _about(session))
                fleet.read_traffic()
            if why:
                break
        saving.finish()
    return fleet.fetch(state), why


def _about(session: Session) -> dict[str, Any]:
    """What a checkpoint says of who made it."""
    return {
        "job": session.job.name,
        "seed": session.job.seed,
        "dataset": session.parts.dataset.digest,
        "ranks": session.comm.size,
        "versions": versions(session.comm.library),
        "hardware": hardware(session.host.device),
    }


def _finished_before(folder: RunFolder, console: Console) -> dict[str, Any]:
    console.say(f"{folder.path} holds this job's results already; choose another run.out to run it again")
    conclude(folder.summary, console)
    return folder.summary


def _record(turnout: Turnout, cohort: Cohort, fleet: Fleet) -> dict[str, Any]:
    """What a round did, for metrics.jsonl; bytes are payload at rank 0's MPI calls, evaluation apart."""
    traffic, latest = fleet.read_traffic(), cohort.latest
    stats = dict(latest.stats)
    steps = stats.pop("steps", 0.0)
    return {
        "round": cohort.round + 1,
        "loss": stats.pop("loss") / steps if steps and "loss" in stats else None,
        **stats,
        "clients": latest.count,
        "cohort": turnout.asked,
        "dropped": turnout.dropped,
        "late": turnout.late,
        "virtual_seconds": turnout.seconds,
        "examples": traffic.examples,
        "steps": traffic.steps,
        "excluded": traffic.excluded,
        "repeated_asks": traffic.repeats,
        "bytes_down": traffic.bytes_down,
        "bytes_up": traffic.bytes_up,
        "imbalance": traffic.imbalance,
        "host_seconds": traffic.hosts,
    }
