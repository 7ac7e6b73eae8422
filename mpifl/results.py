"""The run folder: the resolved job, one line of metrics per round, the summary, the model."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mpifl.config import Job, UserError, resolved, to_toml


def refuse_taken(path: Path) -> None:
    """Raise UserError when there is something at `path` already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"run.out is '{path}', which already exists; remove it or choose another run.out")


class RunFolder:
    """A new folder for one run. Raises UserError when `out` already holds something: nothing is overwritten."""

    def __init__(self, job: Job) -> None:
        self.path = Path(job.run.out) if job.run.out else default_folder(job)
        try:
            refuse_taken(self.path)
            (self.path / "status").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"run.out is '{self.path}', which cannot be written: {error.strerror}") from None
        table = resolved(job)
        if Path(job.data.path).is_dir():  # so that the run can be scored from anywhere
            table["data"]["path"] = str(Path(job.data.path).resolve())
        (self.path / "config.toml").write_text(to_toml(table), encoding="utf-8")

    def round(self, record: dict[str, Any]) -> None:
        """Append one round's record; each line is complete on disk as far as the system writes it."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def model(self, name: str, state_dict: dict[str, Tensor]) -> None:
        """Write NAME.safetensors under the module's own names."""
        _replace(self.path / f"{name}.safetensors", lambda path: save_file(state_dict, path))

    def summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json; its presence says that the run is complete."""
        write_json(self.path / "summary.json", summary)


class Totals:
    """Adds up the records of all rounds."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(("examples", "steps", "bytes_down", "bytes_up", "excluded", "repeated_asks"), 0)
        self.phases: dict[str, float] = {}
        self.imbalances: list[float] = []
        self.scores: dict[str, Any] = {}
        self.loss: float | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Add one round's record."""
        for name in self.sums:
            self.sums[name] += record[name]
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
    while candidate.exists():
        number += 1
        candidate = first.with_name(f"{first.name}-{number}")
    return candidate


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    _replace(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.part")
    write(str(temporary))
    os.replace(temporary, path)


def versions(mpi_library: str) -> dict[str, str]:
    """Versions that bits depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "mpi": mpi_library}
    for package in ("mpifl", "numpy", "h5py", "mpi4py"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware(device: torch.device) -> str:
    """Kind of processor that trains: digests are comparable within one kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{platform.machine()} {platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
