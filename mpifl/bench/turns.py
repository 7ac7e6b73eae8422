"""Contestants that take turns: processes that stay, train the same rounds at each word from us, and wait between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from mpifl.bench.training import environment
from mpifl.config import UserError

PATIENCE = 10.0
"""Seconds for a contestant to end by itself; Ray takes three."""
LAST_WORDS = 2000


class Contestant:
    """A command in one or several processes that speaks as contestants/protocol.py says.

    environments: what each process has beside ours. model: where it writes what it trained. turns: seconds of each
    round of each turn so far. versions: what it said of itself. UserError, with what it wrote to stderr, if it ends.
    """

    def __init__(
        self, name: str, command: list[str], model: Path, environments: Sequence[dict[str, str]] = ({},)
    ) -> None:
        self.name, self.command, self.model, self.environments = name, command, model, environments
        self.errors = model.with_suffix(".err")
        self.processes: list[subprocess.Popen] = []
        self.turns: list[list[float]] = []
        self.versions: dict[str, str] = {}

    def start(self) -> None:
        """Start the processes; `ready` waits until they can take turns."""
        with self.errors.open("a") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
            for own in self.environments:
                try:
                    process = subprocess.Popen(self.command, env=environment() | own, start_new_session=True, **pipes)
                except OSError as error:
                    raise UserError(f"{self.name}: '{self.command[0]}' cannot be run: {error.strerror}") from None
                self.processes.append(process)

    def ready(self) -> None:
        """Wait until it can take its turn."""
        self.versions = self._hear()["versions"]

    def turn(self) -> None:
        """Have it train its rounds, and wait for it."""
        for process in self.processes:
            try:
                process.stdin.write("\n")
                process.stdin.flush()
            except BrokenPipeError:
                self._fail()
        self.turns.append(self._hear()["seconds"])

    @property
    def round_seconds(self) -> float:
        """Seconds of a round: the mean of a turn, the median over turns after the first."""
        return median(mean(turn) for turn in self.turns[1:])

    def close(self) -> None:
        """Tell it to end, and end it if it does not."""
        for process in self.processes:
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
        for process in self.processes:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    process.wait(PATIENCE)
                    break
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, number)
            process.wait()
            process.stdout.close()

    def _hear(self) -> dict[str, Any]:
        """The line of the first process, when all have said theirs."""
        first, *_ = [process.stdout.readline() or self._fail() for process in self.processes]
        return json.loads(first)

    def _fail(self) -> str:
        said = self.errors.read_text(errors="replace").strip()[-LAST_WORDS:] or "nothing"
        raise UserError(f"{self.name} ended; '{' '.join(self.command)}' said: {said}")


def take_turns(contestants: Sequence[Contestant], repeats: int) -> None:
    """One turn each, in order, so many times after a first one that does not count."""
    for contestant in contestants:
        contestant.ready()
    for _ in range(1 + repeats):
        for contestant in contestants:
            contestant.turn()
