"""Jobs trained in processes of their own, and what their run folders say of time and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from mpifl.config import Table, UserError, to_toml

HOSTS = 2
# More ranks than cores, as root or not. What the user has set wins.
_MPI_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


@dataclass(frozen=True)
class Trained:
    """What a run's folder says: its summary, and a record of each round."""

    summary: dict[str, Any]
    rounds: list[dict[str, Any]]

    def host_seconds(self, phase: str) -> float:
        """Seconds that hosts spent in a phase in a round, all hosts together; the first round is left out."""
        later = self.rounds[1:]
        return sum(record["host_seconds"][phase] for record in later) / len(later)

    def mean(self, figure: str) -> float:
        """Mean of a figure of the records of rounds; the first round is left out."""
        return sum(record[figure] for record in self.rounds[1:]) / len(self.rounds[1:])

    @property
    def median_seconds(self) -> float:
        """Seconds of a round, without evaluation: the median; the first round is left out."""
        return median(r["seconds"]["total"] - r["seconds"].get("evaluate", 0.0) for r in self.rounds[1:])

    @property
    def round_seconds(self) -> float:
        """Seconds of a round, without evaluation; the first round is left out."""
        later = self.rounds[1:]
        return sum(record["seconds"]["total"] - record["seconds"].get("evaluate", 0.0) for record in later) / len(later)


def job(path: Path, model: Table, cohort: int, rounds: int, batch: int, cache_mb: int = 512) -> Table:
    """FedAvg with SGD, one epoch of each client; what is scored at the end is left to a few rows."""
    return {
        "rounds": rounds,
        "cohort": cohort,
        "data": {"path": str(path), "cache_mb": cache_mb},
        "model": model,
        "algorithm": {"name": "fedavg", "client_opt": {"name": "sgd", "lr": 0.01}, "batches": {"size": batch}},
        "run": {"eval_every": rounds, "eval_rows": 64},
    }


def trained(job: Table, ranks: int = 1 + HOSTS) -> Trained:
    """Train a job on so many ranks if there is an mpirun, else in one process.

    Raises UserError with what it said when it fails.
    """
    with TemporaryDirectory() as folder:
        file, out = Path(folder, "job.toml"), Path(folder, "out")
        file.write_text(to_toml(job | {"run": job.get("run", {}) | {"out": str(out)}}))
        on_ranks(ranks, "mpifl.train", str(file), "--quiet")
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return Trained(json.loads((out / "summary.json").read_text()), [json.loads(line) for line in lines])


def on_ranks(ranks: int, module: str, *words: str) -> str:
    """Run a module on so many ranks, or in one process where there is no mpirun; returns what it printed.

    Raises UserError with what it said when it fails.
    """
    launcher = [mpirun(), "-n", str(ranks)] if mpirun() and ranks > 1 else []
    command = [*launcher, sys.executable, "-m", module, *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def mpirun() -> str | None:
    """The mpirun of this environment."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def environment() -> dict[str, str]:
    """This process's environment without what a launcher told it, as launchers do not nest."""
    launched = ("PMI", "PMIX", "OMPI_COMM", "MPI_", "HYDRA", "PRTE_LAUNCHED")
    own = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    return _MPI_SETTINGS | own
