"""mpifl among the contestants: `mpirun -n 3 python -m mpifl.bench.contestants.ours JOB.toml MODEL.npy`.

At each line on standard input it trains the job's rounds as mpifl.train does, and prints the seconds of each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mpifl import __version__
from mpifl.comm import Alone, World
from mpifl.config import load
from mpifl.console import Console
from mpifl.engine.clock import Clock
from mpifl.fleet import Fleet, serve
from mpifl.journal import Journal
from mpifl.launch import agree, all_or_none, command
from mpifl.results import RunFolder, Totals
from mpifl.saving import Checkpoints, Writer
from mpifl.session import Session
from mpifl.stopping import TimeLimit
from mpifl.train import train

NAP = 0.005


def told(comm: World | Alone) -> bool:
    """Wait for rank 0's next line, on every rank, and leave the cores to others meanwhile; False at the end."""
    line = sys.stdin.readline() if comm.rank == 0 else ""
    comm.arrive(_nap)
    return comm.lowest(len(line) if comm.rank == 0 else 1) > 0  # all ranks are awake after this


def _nap() -> bool:
    time.sleep(NAP)
    return True


def turn(session: Session, folder: RunFolder) -> tuple[list[float], np.ndarray]:
    """Train all rounds from the start; returns seconds of each, evaluation apart, and the model, (P,)."""
    fleet = Fleet(session.comm, session.host, of_a_round=session.parts.algorithm.works)
    rounds, host = session.job.rounds, session.host
    folder.path.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, Totals(), Console(quiet=True), rounds, host.clock, session.comm.size > 1)
    saving = Checkpoints(Writer(folder.path, 0, host.memory), fleet, every=rounds + 1, keep=1)
    start = session.parts.algorithm.init(session.theta.clone())
    state, _ = train(session, fleet, journal, saving, TimeLimit(0.0, 0.0), (0, start))
    fleet.stop()
    lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-session.job.rounds :]
    spent = [json.loads(line)["seconds"] for line in lines]
    return [s["total"] - s.get("evaluate", 0.0) for s in spent], session.parts.algorithm.models(state)["model"].numpy()


def _command(comm: World | Alone, arguments: Sequence[str]) -> None:
    path, model = arguments
    session = agree(comm, lambda: Session.open(load(path), comm, Clock(comm.rank)))
    folder = agree(comm, lambda: RunFolder(session.job) if comm.rank == 0 else None)
    using, cores = comm.using(session.job.comm.reduce), comm.on_own_cores(session.job.run.threads)
    with all_or_none(comm, session.host.clock, Path(session.job.run.out)), using, cores, closing(session):
        _say(comm, {"versions": {"mpifl": __version__}})
        while told(comm):
            if folder is None:
                serve(comm, session.host)
                continue
            seconds, theta = turn(session, folder)
            np.save(model, theta)
            _say(comm, {"seconds": seconds})


def _say(comm: World | Alone, what: dict[str, Any]) -> None:
    if comm.rank == 0:
        print(json.dumps(what), flush=True)


if __name__ == "__main__":
    sys.exit(command(_command))
