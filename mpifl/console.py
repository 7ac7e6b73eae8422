"""What rank 0 tells a person: a live bar on a terminal, plain lines elsewhere, one table at the end."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

PIPE_WIDTH = 110
"""Columns where there is no terminal: a digest fits on its line."""
LONGEST_VECTOR = 10
"""Numbers of a score that are printed."""
LAUNCHERS = {"mpirun", "mpiexec", "mpiexec.hydra", "prterun", "prted", "orterun", "orted", "hydra_pmi_proxy"}


class Console:
    """Prints to stdout unless quiet, and to log.txt once a run folder is known."""

    def __init__(self, quiet: bool = False) -> None:
        self.rich = RichConsole(file=_output(), quiet=quiet, highlight=False, soft_wrap=True)
        if not self.rich.is_terminal:
            self.rich.width = PIPE_WIDTH
        self._log: Path | None = None
        self._bar: Progress | None = None
        self._scores: list[str] = []

    def log_to(self, path: Path) -> None:
        """Also append every line to the file at `path`."""
        self._log = path

    def say(self, text: str) -> None:
        """Print one line."""
        self.rich.print(text, markup=False)
        self.rich.file.flush()
        self._append(text + "\n")

    @contextmanager
    def live(self, rounds: int) -> Iterator[None]:
        """Show a live bar within the block, if this is a terminal."""
        if not self.rich.is_terminal or self.rich.quiet:
            yield
            return
        self._bar = Progress(
            TextColumn("round"),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(rounds)) + 1)),
            BarColumn(bar_width=16),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.rich,
        )
        with self._bar:
            self._task = self._bar.add_task("", total=rounds)
            yield
        self._bar = None

    def round(self, record: dict[str, Any], rounds: int) -> None:
        """Show a finished round: on the bar, or as a plain line when it was evaluated."""
        loss = [] if record["loss"] is None else [f"loss {record['loss']:.4f}"]
        speed = f"{record['clients'] / max(record['seconds']['total'], 1e-9):.0f} clients/s"
        if "scores" in record:
            numbers = {name: value for name, value in record["scores"].items() if isinstance(value, float)}
            self._scores = [f"{name} {value:.4f}" for name, value in numbers.items()]
            line = "  ".join([f"round {record['round']:>{len(str(rounds))}}/{rounds}", *loss, *self._scores, speed])
            self._append(line + "\n") if self._bar else self.say(line)
        if self._bar:
            shown = [score for score in self._scores if not score.startswith("test_loss")][:1]
            self._bar.update(self._task, advance=1, description="  ".join([*loss, *shown, speed]))

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Print lines of (name, value), the values in one column."""
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.say(f"{name:<{width}}  {value}")

    def _append(self, text: str) -> None:
        if self._log:
            with suppress(OSError), self._log.open("a", encoding="utf-8") as file:
                file.write(text)


def _output() -> TextIO:
    """Where people look: the launcher's terminal if it has one on this machine, else stdout.

    Under a launcher a rank's own stdout says nothing: MPICH always gives it a pipe, Open MPI always a terminal
    of its own making, which it forwards by the line, too late for a live bar.
    """
    launcher, pid = None, os.getppid()
    while pid > 1 and (found := _process(pid)) is not None and found[0] in LAUNCHERS:
        launcher, pid = pid, found[1]
    if launcher is None:
        return sys.stdout
    try:
        output = os.readlink(f"/proc/{launcher}/fd/1")
        if output.startswith(("/dev/pts/", "/dev/tty")):
            return open(output, "w", encoding="utf-8")
    except OSError:
        pass
    return _Pipe(sys.stdout)


class _Pipe(io.TextIOBase):
    """A stream that is not taken for a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Pass on."""
        return self._stream.write(text)

    def flush(self) -> None:
        """Pass on."""
        self._stream.flush()


def _process(pid: int) -> tuple[str, int] | None:
    """Name and parent of a process on this machine."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return None
    return (Path(os.fsdecode(command)).name or name), int(rest.split()[1])


def score_rows(scores: Mapping[str, Any], file: str) -> list[tuple[str, str]]:
    """Format scores for a table: numbers and short vectors; for what is larger its shape, and the file that has it."""
    rows = []
    for name, value in scores.items():
        shape = np.shape(value)
        if len(shape) > 1 or math.prod(shape) > LONGEST_VECTOR:
            rows.append((name, f"{' x '.join(map(str, shape))} numbers in {file}"))
        else:
            rows.append((name, ", ".join(f"{number:.4f}" for number in np.atleast_1d(value))))
    return rows


def readable_bytes(count: float) -> str:
    """Format a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
