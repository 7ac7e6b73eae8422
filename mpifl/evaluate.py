"""Score a finished run: `python -m mpifl.evaluate RUN`, on the central test split and client by client."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mpifl.comm import Alone, World
from mpifl.config import UserError, load
from mpifl.console import Console, score_rows
from mpifl.engine.clock import Clock
from mpifl.fleet import Fleet, serve
from mpifl.launch import Parser, agree, all_or_none, command
from mpifl.results import read_vector, write_json
from mpifl.scoring import score_central, score_clients
from mpifl.session import Session

BEST_LOW, BEST_HIGH = ("loss", "token_loss"), ("accuracy", "top_k", "token_accuracy")
"""Figures of which it is known which end is the worst."""


def evaluate(folder: Path, comm: World | Alone, console: Console) -> dict[str, dict[str, Any]] | None:
    """Score every model in a run folder; returns {model: {metric: value}} on rank 0, also for single clients."""
    job = agree(comm, lambda: load(_existing(folder / "config.toml")))
    job = dataclasses.replace(job, baselines=False)
    session = agree(comm, lambda: Session.open(job, comm, Clock(comm.rank)))
    vectors = agree(comm, lambda: _models(folder, session))
    with all_or_none(comm, session.host.clock, folder), closing(session), comm.using(job.comm.reduce, console.say):
        if comm.rank > 0:
            serve(comm, session.host)
            return None
        fleet = Fleet(comm, session.host, job.faults.tolerate, console.say)
        scored, recorded = {}, {}
        for name, theta in vectors.items():
            central = score_central(fleet, session.scorer, theta)
            clients = score_clients(fleet, session.scorer, theta)
            split = session.scorer.client_split
            scored[name] = central | _spread(clients, split)
            columns = {figure: [None if np.isnan(v) else float(v) for v in clients[figure]] for figure in clients}
            recorded[name] = {"split": split, "scores": scored[name], "clients": columns}
            whose = f"those of clients, of {len(clients['examples'])} clients' own '{split}' rows"
            console.say(f"{name}: scores are of split '{session.scorer.split}'; {whose}")
            console.table(score_rows(scored[name], "the output of --json"))
        fleet.stop()
        _record(recorded, folder / "evaluation.json", console)
        return scored


def _record(recorded: dict[str, Any], path: Path, console: Console) -> None:
    """Keep what was found, single clients too, for mpifl.report; a folder of somebody else's stays as it is."""
    try:
        write_json(path, recorded)
    except UserError as error:
        console.say(str(error))


def _spread(clients: dict[str, np.ndarray], split: str) -> dict[str, float]:
    """Mean over clients, and mean over the worst tenth of them, of every figure; over those that have one."""
    spread = {}
    for name, values in clients.items():
        values = values[~np.isnan(values)]
        if name != "examples" and len(values):
            ranked = np.sort(values)[:: -1 if name in BEST_LOW else 1]
            spread[f"{name}, mean of clients"] = float(values.mean())
            worst = "worst" if name in BEST_LOW + BEST_HIGH else "lowest"
            spread[f"{name}, {worst} decile of clients"] = float(ranked[: max(1, len(values) // 10)].mean())
    return spread


def _chosen(run: str | None) -> Path:
    if run is None:
        raise UserError("which run? python -m mpifl.evaluate RUN, where RUN is the folder a run printed at its end")
    return Path(run)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}; a finished run prints where it is")
    return path


def _models(folder: Path, session: Session) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no model (*.safetensors): the run has not finished")
    vectors = {}
    for file in files:
        vectors[file.stem] = read_vector(file, session.parts.model)
    return vectors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return command(_command, arguments)


def _command(comm: World | Alone, arguments: Sequence[str]) -> None:
    parser = Parser(prog="python -m mpifl.evaluate", description="Score the models of a finished run.")
    parser.add_argument("run", nargs="?", help="the run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.read(comm, arguments)
    if options is None:
        return
    folder = agree(comm, lambda: _chosen(options.run))
    scored = evaluate(folder, comm, Console(quiet=options.json or comm.rank > 0))
    if options.json and scored is not None:
        print(json.dumps(scored))


if __name__ == "__main__":
    sys.exit(main())
