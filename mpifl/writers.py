"""Other places for the rounds of a run: TensorBoard, MLflow, Weights & Biases. Each needs its package.

Rank 0 feeds them with the numbers of metrics.jsonl under the names that they have there, such as scores/accuracy.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mpifl.config import Job, UserError, resolved
from mpifl.reporting.runs import flattened

Record = dict[str, Any]


class Writer(Protocol):
    """What a writer has. Its constructor imports its package, and raises ImportError."""

    def open(self, folder: Path, job: Job) -> None:
        """Begin, or go on with, the run in `folder`."""

    def round(self, record: Record) -> None:
        """Take a round's record."""

    def close(self, summary: Record | None) -> None:
        """End; without a summary the run is not finished."""


class TensorBoard:
    """Event files in RUN/tensorboard, for `tensorboard --logdir`."""

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._events = SummaryWriter, None

    def open(self, folder: Path, job: Job) -> None:
        """Note where to write."""
        self._folder, self._job = folder / "tensorboard", job

    def round(self, record: Record) -> None:
        """Write scalars; from the first round on, what an earlier start wrote is replaced."""
        if self._events is None:
            self._events = self._make(str(self._folder), purge_step=record["round"])
            self._events.add_text("job", f"```\n{json.dumps(resolved(self._job), indent=2)}\n```", record["round"])
        for name, value in numbers(record).items():
            self._events.add_scalar(name, value, record["round"])
        self._events.flush()

    def close(self, summary: Record | None) -> None:
        """Complete the file."""
        if self._events is not None:
            self._events.close()


class MLflow:
    """A run in MLFLOW_TRACKING_URI, or in RUN/mlflow, in an experiment of the job's name."""

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions would have a database, not for NFS
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric, self._param = MlflowClient, Metric, Param

    def open(self, folder: Path, job: Job) -> None:
        """Create the run, or go on with the one that an earlier start created."""
        where = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri()
        client = self._client = self._client(tracking_uri=where)
        noted = folder / "mlflow-run"
        if noted.exists():
            self._run = noted.read_text(encoding="utf-8").strip()
            client.update_run(self._run, "RUNNING")
            return
        there = client.get_experiment_by_name(job.name)
        experiment = there.experiment_id if there else client.create_experiment(job.name)
        self._run = client.create_run(experiment, run_name=folder.name).info.run_id
        options = [self._param(key, str(value)[:500]) for key, value in flattened(resolved(job))]
        for first in range(0, len(options), 100):  # as many as a call may have
            client.log_batch(self._run, params=options[first : first + 100])
        noted.write_text(f"{self._run}\n", encoding="utf-8")

    def round(self, record: Record) -> None:
        """Log metrics, all in one call."""
        now, step = int(1e3 * time.time()), record["round"]
        self._client.log_batch(self._run, [self._metric(n, v, now, step) for n, v in numbers(record).items()])

    def close(self, summary: Record | None) -> None:
        """Set the run's status."""
        if summary:
            self._client.set_tag(self._run, "digest", summary["digest"])
        self._client.set_terminated(self._run, "FINISHED" if summary else "KILLED")


class WeightsAndBiases:
    """A run in the project of the job's name; with WANDB_MODE=offline in RUN/wandb, for `wandb sync`."""

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb

    def open(self, folder: Path, job: Job) -> None:
        """Start the run, or go on with the one that an earlier start of the job started."""
        noted = folder / "wandb-run"
        if not noted.exists():
            noted.write_text(f"{uuid.uuid4().hex[:12]}\n", encoding="utf-8")
        self._run = self._wandb.init(
            project=job.name,
            name=folder.name,
            id=noted.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=resolved(job),
            settings=self._wandb.Settings(silent=True),
        )
        self._run.define_metric("*", step_metric="round")

    def round(self, record: Record) -> None:
        """Log numbers; they are sent by a process of W&B's own."""
        self._run.log(numbers(record) | {"round": record["round"]})

    def close(self, summary: Record | None) -> None:
        """Wait until all is sent."""
        if summary:
            self._run.summary.update({"digest": summary["digest"]})
        self._run.finish(exit_code=0 if summary else 1)


WRITERS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}
"""By name in a job, which is also that of mpifl's extra that installs the package."""


class Writers:
    """Those that a job names, fed together. A writer that fails while rounds are done is left out: training goes on.

    say: told of that in a line. Raises UserError where a package is missing.
    """

    def __init__(self, names: Sequence[str], say: Callable[[str], None]) -> None:
        self.say = say
        self._open: dict[str, Writer] = {}
        self._made = {name: _made(name) for name in dict.fromkeys(names)}

    def open(self, folder: Path, job: Job) -> None:
        """Begin. Raises UserError with what a writer complains of."""
        for name, writer in self._made.items():
            try:
                writer.open(folder, job)
            except Exception as error:
                hint = "; WANDB_MODE=offline needs no account" if name == "wandb" else ""
                raise UserError(f"run.writers: {name} cannot start: {_first_line(error)}{hint}") from error
            self._open[name] = writer

    def round(self, record: Record) -> None:
        """Pass a round's record on."""
        for name in list(self._open):
            self._try(name, lambda writer: writer.round(record))

    def close(self, summary: Record | None = None) -> None:
        """End all that are open; without a summary the run is not finished."""
        for name in list(self._open):
            self._try(name, lambda writer: writer.close(summary))
            self._open.pop(name, None)

    def _try(self, name: str, do: Callable[[Writer], None]) -> None:
        try:
            do(self._open[name])
        except Exception as error:
            del self._open[name]
            self.say(f"{name} failed and is left out from here on: {_first_line(error)}; metrics.jsonl has all rounds")


def _made(name: str) -> Writer:
    try:
        return WRITERS[name]()
    except ImportError as error:
        raise UserError(f'run.writers has "{name}", which needs a package: pip install "mpifl[{name}]"') from error


def numbers(record: Record) -> dict[str, float]:
    """All numbers of a record but the round's, by name; those in tables as table/name."""
    flat = flattened({name: value for name, value in record.items() if name != "round"}, joint="/")
    return {name: float(value) for name, value in flat if isinstance(value, int | float)}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
