"""The run folder: the resolved job, one line of metrics per round, the summary, the model."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpifl.comm import Alone, World
from mpifl.config import Job, UserError, differences, load, resolved, to_toml
from mpifl.lock import locked
from mpifl.model import Model
from mpifl.status import last_words
from mpifl.watchdog import end_job

CONFIG, METRICS, SUMMARY = "config.toml", "metrics.jsonl", "summary.json"

_SUMMED = (
    *("examples", "steps", "bytes_down", "bytes_up", "repeated_asks"),
    *("excluded", "dropped", "late", "virtual_seconds"),
)
"""What the summary has the totals of."""


def refuse_taken(path: Path, known: tuple[str, ...] = ()) -> None:
    """Raise UserError when there is something at `path` already, beside what has one of the `known` names."""
    known = ("lock", "status", *known)  # what a start leaves that ended before it began
    if not os.path.exists(path):
        return
    if not path.is_dir() or not all(any(there.match(name) for name in known) for there in path.iterdir()):
        raise UserError(f"run.out is '{path}', which already exists; remove it or choose another run.out")


def seeds_in(base: Path, job: Job) -> tuple[str, ...]:
    """Names that may be in the folder of a job with several seeds: of the runs of an earlier start of it."""
    runs = list(base.glob("seed-*")) if os.path.isdir(base) and job.run.resume == "auto" else []
    return ("seed-*", SUMMARY) if runs and all((run / CONFIG).is_file() for run in runs) else ()


class RunFolder:
    """The folder of one run, found new or as an earlier start of the same job left it; `begin` writes to it first.

    summary: of a run that is finished, else None. Raises UserError when `out` holds anything else, a run of another
    job for one: nothing is overwritten.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.path = job, Path(job.run.out) if job.run.out else default_folder(job)
        self.summary: dict[str, Any] | None = None
        self._finished = 0
        self.old = job.run.resume == "auto" and os.path.isfile(self.path / CONFIG)
        if self.old:
            self._refuse_another_job()
            self._look_at_summary()
        else:
            refuse_taken(self.path)

    @contextmanager
    def locked(self, comm: World | Alone, say: Callable[[str], None]) -> Iterator[None]:
        """Make the folder, and keep other jobs out of it within the block. say: told in a line if that takes long."""
        try:
            (self.path / "status").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.out is '{self.path}', which cannot be written: {error.strerror}") from None
        with locked(self.path, lambda line: end_job(comm, self.path, line, line), say):
            if not self.old and (self.path / CONFIG).exists():
                raise UserError(f"run.out is '{self.path}', which another job has just used; {_OTHER}")
            yield

    def past(self, done: int | None, comm: World | Alone) -> list[str]:
        """Lines on the starts before this one, which goes on after so many rounds (None: there is no checkpoint)."""
        if not self.old:
            return []
        died = last_words(self.path)
        first = "a rank of this job died" if comm.lost else "an earlier start of this run died"
        lines = [f"{first}; {died[0]}", *died[1:]] if died else []
        what = "starting again: there is no checkpoint" if done is None else f"going on after round {done}"
        ranks = f"{comm.size} ranks that are" if comm.size > 1 else "rank that is"
        left = f"with the {ranks} left " if comm.lost else ""
        return [*lines, f"{what} {left}({self.path})"]

    def begin(self, done: int | None) -> list[dict[str, Any]]:
        """Write the job, and forget what came after so many rounds; returns the records of those.

        Raises UserError when rounds were added to a run that is finished and has no checkpoint.
        """
        if self._finished and done is None:
            raise UserError(
                f"the run in '{self.path}' is finished with {self._finished} rounds, and has no checkpoint to add more "
                f"to; {_OTHER}, with run.save_every if it may grow"
            )
        records = [record for record in _records(self.path / METRICS) if record["round"] <= (done or 0)]
        table = resolved(self.job)
        if Path(self.job.data.path).is_dir():  # so that the run can be scored from anywhere
            table["data"]["path"] = str(Path(self.job.data.path).resolve())
        write_text(self.path / CONFIG, to_toml(table))
        (self.path / SUMMARY).unlink(missing_ok=True)  # rounds were added to a run that was finished
        if self.old:
            write_text(self.path / METRICS, "".join(json.dumps(record) + "\n" for record in records))
        return records

    def round(self, record: dict[str, Any]) -> None:
        """Append one round's record; each line is complete on disk as far as the system writes it."""
        with _telling(self.path / METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def make_rounds_durable(self) -> None:
        """Wait until the records are on disk."""
        if (self.path / METRICS).exists():
            with _telling(self.path / METRICS), (self.path / METRICS).open("a") as file:
                os.fsync(file.fileno())

    def model(self, name: str, state_dict: dict[str, Tensor]) -> None:
        """Write NAME.safetensors under the module's own names."""
        _replace(self.path / f"{name}.safetensors", lambda path: save_file(state_dict, path))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json; its presence says that the run is complete."""
        write_json(self.path / SUMMARY, summary)

    def _refuse_another_job(self) -> None:
        try:
            there = resolved(load(self.path / CONFIG))
        except UserError as error:
            raise UserError(f"run.out is '{self.path}', whose {CONFIG} cannot be read ({error}); {_OTHER}") from None
        differing = differences(there, resolved(self.job))
        if differing:
            what = ", ".join(f"{key} is {then!r} there, now {now!r}" for key, then, now in differing)
            raise UserError(f"run.out is '{self.path}', which holds a run of another job: {what}; {_OTHER}")

    def _look_at_summary(self) -> None:
        try:
            if os.path.exists(self.path / SUMMARY) and not os.path.isfile(self.path / SUMMARY):
                raise ValueError("it is no file")  # a device may be read without end
            summary = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
            rounds = int(summary["rounds"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path / SUMMARY} cannot be read ({error}); {_OTHER}") from None
        if rounds > self.job.rounds:
            raise UserError(f"rounds is {self.job.rounds}, but the run in '{self.path}' has done {rounds}; {_OTHER}")
        self._finished, self.summary = rounds, summary if rounds == self.job.rounds else None


_OTHER = "choose another run.out"


def _records(path: Path) -> list[dict[str, Any]]:
    """Rounds on record, in order, up to where a killed run may have left half a line."""
    records: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                if record["round"] != len(records) + 1:
                    break
                Totals([record])
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            records.append(record)
    return records


class Totals:
    """Adds up the records of all rounds, of those on record first."""

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self.rounds = 0
        self.sums = dict.fromkeys(_SUMMED, 0)
        self.phases: dict[str, float] = {}
        self.imbalances: list[float] = []
        self.scores: dict[str, Any] = {}
        self.loss: float | None = None
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Add one round's record."""
        self.rounds += 1
        for name in self.sums:
            self.sums[name] += record.get(name, 0)
        for phase, seconds in record["seconds"].items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds
        self.imbalances.append(record["imbalance"])
        self.loss = record["loss"]
        self.scores = record.get("scores", self.scores)

    def summary(self) -> dict[str, Any]:
        """Return sums, mean imbalance, shares of rank 0's time by phase, and the last scores."""
        total = max(self.phases.get("total", 0.0), 1e-9)
        shares = {phase: seconds / total for phase, seconds in self.phases.items() if phase != "total"}
        return {
            "accuracy": self.scores.get("accuracy"),
            "loss": self.scores.get("test_loss"),
            "training_loss": self.loss,
            "scores": self.scores,
            **self.sums,
            "imbalance": sum(self.imbalances) / len(self.imbalances),
            "phases": shares,
        }


def default_folder(job: Job) -> Path:
    """runs/NAME-TIME, with a number behind it while that is taken (two runs in one second)."""
    first = candidate = Path("runs") / f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while os.path.exists(candidate):
        number += 1
        candidate = first.with_name(f"{first.name}-{number}")
    return candidate


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is there whole or not at all."""
    _replace(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def read_vector(file: Path, model: Model) -> Tensor:
    """Read a safetensors file of the plain module as a model's vector, (P,). Raises UserError for another one."""
    try:
        vector = model.from_state_dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    except KeyError as error:
        raise UserError(f"{file} has no parameter {error}; was it made by another job?") from None
    if len(vector) != model.size:
        raise UserError(f"{file} has {len(vector)} parameters, the job's model {model.size}")
    return vector


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with _telling(path):
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(str(temporary))
        temporary.chmod(mode)  # safetensors lets nobody else read what it writes
        os.replace(temporary, path)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Have what cannot be written within the block end the run in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written: {what}; when that is mended the same command goes on") from None


def versions(mpi_library: str) -> dict[str, str]:
    """Versions that bits depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "mpi": mpi_library}
    return found | {package: _version(package) for package in ("mpifl", "numpy", "h5py", "mpi4py")}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def hardware(device: torch.device) -> str:
    """Kind of processor that trains: digests are comparable within one kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{platform.machine()} {platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
