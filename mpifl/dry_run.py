"""What a job is about to do, in a few lines before it starts, or, for --dry-run, with a plan in place of starting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpifl.build import find_job
from mpifl.comm import Alone, World
from mpifl.config import load
from mpifl.console import Console
from mpifl.engine.clock import Clock
from mpifl.plan import PlanFleet, show_plan
from mpifl.session import Session


def dry_run(path: str | Path, overrides: Sequence[str], comm: World | Alone) -> None:
    """On rank 0: print the plan of a job on this many ranks. The others have no part in it."""
    session = Session.open(load(find_job(str(path)), overrides), comm, Clock())
    console = Console()
    introduce(session, console)
    fleet = PlanFleet(session.host, comm.size, session.parts.algorithm.works)
    state = session.parts.algorithm.init(session.theta.clone())
    cohort_of = lambda round: session.cohort(round, fleet)  # noqa: E731
    show_plan(fleet, session.parts.algorithm, state, cohort_of, session.job.rounds, session.scorer.central, console)


def introduce(session: Session, console: Console) -> None:
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
    if job.faults.simulated:
        first = session.turnout(0)
        console.say(
            f"faults: {first.asked} clients are asked in round 1, {first.dropped} dropped and {first.late} late; "
            f"it takes {first.seconds:.1f} virtual seconds"
        )
    if session.scorer.split == "train":
        console.say("there is no test split: test_loss and scores are of the training examples")
    if job.comm.sum != "exact":
        console.say('comm.sum = "float32": results depend on the number of ranks in their last bits')
    if session.host.device.type != "cpu":
        console.say(f"on {session.host.device.type}, results may differ in their last bits from run to run")
