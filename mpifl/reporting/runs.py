"""What run folders hold, read as plain files: also of a run that is going on, was killed, or is of an older version."""

from __future__ import annotations

import io
import json
import math
import tomllib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpifl.config import Table, UserError

CLIENTS = "evaluation.json"
"""Where a run folder has the scores of single clients, {model: {"clients": {figure: [one per client, or null]}}}."""
_OF_THE_SEED = ("seed", "seeds", "run.out")
"""Keys in which runs differ that repeat each other."""


@dataclass(frozen=True)
class Run:
    """One run folder.

    job: key.path -> value. text: the job file. columns: what metrics.jsonl says, name -> (rounds done,) float64, NaN
    where a round has none; what is in a table there is called "seconds/wait". summary: {} unless the run is finished.
    clients: model -> figure -> (clients that have one,) float64. unread: lines of metrics.jsonl that are no record,
    such as half of one.
    """

    name: str
    path: Path
    job: Table
    text: str
    columns: dict[str, np.ndarray]
    summary: Table
    clients: dict[str, dict[str, np.ndarray]]
    unread: int

    @property
    def finished(self) -> bool:
        """Whether the run has all its rounds and a summary."""
        return bool(self.summary)

    @property
    def done(self) -> int:
        """Rounds that were done."""
        return int(self.columns["round"].max(initial=0))

    @property
    def state(self) -> str:
        """In words, how far it went."""
        planned = self.job.get("rounds")
        of = f"{planned:,}" if isinstance(planned, int) else "?"
        return "finished" if self.finished else f"unfinished: {self.done:,} of {of} rounds"

    @property
    def hosts(self) -> int:
        """Ranks that host clients."""
        return max(1, self.ranks - 1)

    @property
    def ranks(self) -> int:
        """Ranks that run it: those of its status files where there is no summary yet."""
        return int(self.summary.get("ranks") or len(list(self.path.glob("status/rank-*"))) or 1)

    @property
    def changed(self) -> float:
        """Unix seconds of the last round that was written, or of the start."""
        file = self.path / "metrics.jsonl"
        return (file if file.is_file() else self.path / "config.toml").stat().st_mtime

    @property
    def failures(self) -> list[str]:
        """What failure-*.txt say, if it is not finished."""
        files = [] if self.finished else sorted(self.path.glob("failure-*.txt"))
        return [text for file in files if (text := _text(file).strip())]

    @property
    def checkpoint(self) -> str:
        """Name of the newest usable checkpoint, "" if there is none."""
        return max((path.parent.name for path in self.path.glob("checkpoints/round-*/COMPLETE")), default="")

    def column(self, name: str) -> np.ndarray:
        """(rounds done,) float64; NaN throughout where it was never recorded."""
        return self.columns.get(name, np.full(len(self.columns["round"]), math.nan))

    def summed(self, *names: str) -> np.ndarray:
        """Sum of these columns over all rounds up to each, (rounds done,)."""
        return np.cumsum(sum(np.nan_to_num(self.column(name)) for name in names))

    def parts(self, table: str) -> dict[str, float]:
        """Sums over rounds of what is in a table of each record, e.g. "seconds": {phase: s}."""
        prefix = f"{table}/"
        return {name[len(prefix) :]: float(np.nansum(c)) for name, c in self.columns.items() if name.startswith(prefix)}

    @property
    def rank_seconds(self) -> dict[str, dict[str, float]]:
        """Seconds by phase of each rank, as profile/phases.txt lists them; {} where the run was not profiled."""
        file = self.path / "profile" / "phases.txt"
        head, *lines = [line.split() for line in _text(file).splitlines()] if file.is_file() else [[]]
        phases = head[1 : head.index("total")] if "total" in head else []
        of_ranks = [line for line in lines if line and line[0].isdigit()]
        return {f"rank {line[0]}": dict(zip(phases, map(float, line[1:]))) for line in of_ranks if phases}

    @property
    def scores(self) -> list[str]:
        """Names of scores that are numbers: the job's first metric, the others, then those of single models."""
        names = [name.removeprefix("scores/") for name in self.columns if name.startswith("scores/")]
        return sorted(names, key=lambda name: ("/" in name, name == "test_loss"))

    def last(self, name: str) -> float:
        """The last value of a column that is there; NaN without one."""
        values = self.column(name)
        values = values[~np.isnan(values)]
        return float(values[-1]) if len(values) else math.nan


@dataclass(frozen=True)
class Group:
    """Runs that differ by seed only, or a single run."""

    name: str
    runs: tuple[Run, ...]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, and those in folders of seeds=N; each once. Raises UserError for what is no run folder."""
    paths = list(dict.fromkeys(path.resolve() for folder in folders for path in _runs_in(folder)))
    return [_read(path, name) for path, name in zip(paths, short_names(paths))]


def _runs_in(folder: Path) -> list[Path]:
    if (folder / "config.toml").is_file():
        return [folder]
    seeds = [path for path in folder.glob("seed-*") if (path / "config.toml").is_file()]
    if not seeds:
        what = "has neither config.toml nor seed-*/" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} is no run folder: it {what}; a run prints where its results are")
    return sorted(seeds, key=lambda path: (len(path.name), path.name))


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    for parts in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(path: Path, name: str) -> Run:
    text = _text(path / "config.toml")
    try:
        job = dict(flattened(tomllib.loads(text)))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path / 'config.toml'} is not valid TOML: {error}") from None
    columns, unread = _columns(path / "metrics.jsonl")
    return Run(name, path, job, text, columns, _json(path / "summary.json"), _clients(path / CLIENTS), unread)


def _clients(path: Path) -> dict[str, dict[str, np.ndarray]]:
    clients = {}
    for model, about in _json(path).items():
        columns = about.get("clients") if isinstance(about, dict) else None
        found = {name: _finite(values) for name, values in (columns or {}).items() if name != "examples"}
        if found := {name: values for name, values in found.items() if len(values)}:
            clients[model] = found
    return clients


def _finite(values: Sequence[Any]) -> np.ndarray:
    """Numbers, (n,) float64, without null, NaN and infinity."""
    numbers = np.array([value for value in values if isinstance(value, int | float)], dtype=np.float64)
    return numbers[np.isfinite(numbers)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _json(path: Path) -> Table:
    if not path.exists():
        return {}
    try:
        table = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path} holds no table; was it written by another program?")
    return table


def flattened(table: Mapping[str, Any], above: str = "", joint: str = ".") -> Iterator[tuple[str, Any]]:
    """Yield (key.path, value) of everything in a table of tables."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{above}{key}{joint}", joint)
        else:
            yield f"{above}{key}", value


def _columns(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """Read a round per line; returns its numbers by column, and how many lines are no round.

    A run that was killed may leave half a line, and one that goes on does some rounds again: the later line counts.
    """
    columns, rows, unread = {"round": array("d")}, 0, 0
    with path.open("rb") if path.is_file() else io.BytesIO() as lines:
        for line in lines:
            record = _record(line)
            if record is None:
                unread += 1
                continue
            for name, value in flattened(record, joint="/"):
                if isinstance(value, int | float) and abs(value) < 1e300:  # what is NaN or infinite is a gap
                    column = columns.setdefault(name, array("d"))
                    column.extend([math.nan] * (rows - len(column)))
                    column.append(value)
            rows += 1
    for column in columns.values():
        column.extend([math.nan] * (rows - len(column)))
    arrays = {name: np.frombuffer(column, dtype=np.float64) for name, column in columns.items()}
    _, backwards = np.unique(arrays["round"][::-1], return_index=True)
    return {name: values[rows - 1 - backwards] for name, values in arrays.items()}, unread


def _record(line: bytes) -> Table | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    round = record.get("round") if isinstance(record, dict) else None
    return record if isinstance(round, int) and 0 < round < 2**53 else None


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ by seed only; a run that is there twice, as on other ranks, stays by itself."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        job = {key: value for key, value in run.job.items() if key not in _OF_THE_SEED}
        alike.setdefault(json.dumps(job, sort_keys=True, default=str), []).append(run)
    groups = []
    for same in alike.values():
        if len(same) == len({str(run.job.get("seed")) for run in same}) > 1:
            groups.append(Group(f"{_common_name(same)} ({len(same)} seeds)", tuple(same)))
        else:
            groups += [Group(run.name, (run,)) for run in same]
    return groups


def _common_name(runs: Sequence[Run]) -> str:
    if len({run.path.parent for run in runs}) == 1 and all(run.path.name.startswith("seed-") for run in runs):
        return runs[0].path.parent.name
    return f"{runs[0].name} … {runs[-1].name}" if len(runs) > 3 else ", ".join(run.name for run in runs)


def differing(runs: Sequence[Run]) -> list[str]:
    """Keys of the job, but for its folder, that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.job)
    return [key for key in keys if key != "run.out" and len({repr(run.job.get(key)) for run in runs}) > 1]
