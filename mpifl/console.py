"""What rank 0 tells a person: a live bar on a terminal, plain lines elsewhere, one table at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Console:
    """Prints to stdout unless quiet, and to log.txt once a run folder is known."""

    def __init__(self, quiet: bool = False) -> None:
        self.rich = RichConsole(file=sys.stdout, quiet=quiet, highlight=False, soft_wrap=True)
        if not self.rich.is_terminal:
            self.rich.width = 110  # a digest fits on its line
        self._log: Path | None = None
        self._bar: Progress | None = None

    def log_to(self, path: Path) -> None:
        """Also append every line to the file at `path`."""
        self._log = path

    def say(self, text: str) -> None:
        """Print one line."""
        self.rich.print(text, markup=False)
        self.rich.file.flush()
        self._append(text + "\n")

    def start(self, rounds: int) -> None:
        """Open the live bar, if this is a terminal."""
        if self.rich.is_terminal and not self.rich.quiet:
            columns = [
                TextColumn("round"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
            ]
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=self.rich)
            self._bar.start()
            self._task = self._bar.add_task("", total=rounds)

    def round(self, record: dict[str, Any], rounds: int) -> None:
        """Show a finished round: on the bar, or as a plain line when it was evaluated."""
        speed = record["clients"] / max(record["seconds"]["total"], 1e-9)
        parts = [f"loss {record['loss']:.4f}"] if record.get("loss") is not None else []
        parts += [f"{name} {value:.4f}" for name, value in record.get("scores", {}).items()]
        text = "  ".join([*parts, f"{speed:.0f} clients/s"])
        if self._bar:
            self._latest = parts[1:] or getattr(self, "_latest", [])
            shown = "  ".join([*parts[:1], *self._latest, f"{speed:.0f} clients/s"])
            self._bar.update(self._task, advance=1, description=shown)
        if "scores" in record:
            line = f"round {record['round']:>{len(str(rounds))}}/{rounds}  {text}"
            self._append(line + "\n") if self._bar else self.say(line)

    def stop(self) -> None:
        """Close the live bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Print a short table of (name, value)."""
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        self.rich.print(table)
        self.rich.file.flush()
        self._append("".join(f"{name:<20} {value}\n" for name, value in rows))

    def _append(self, text: str) -> None:
        if self._log:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text)


def readable_bytes(count: float) -> str:
    """Format a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
