"""What a run's rounds did, written in order, each when its scores are there.

Rank 0 may score a round while hosts train the next ones, a block whenever it would only wait for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from mpifl.console import Console
from mpifl.engine.clock import Clock
from mpifl.results import RunFolder, Totals
from mpifl.writers import Writers

Scoring = Iterator[dict[str, Any] | None]
"""Scores a state, a block at each `next`; what comes last is loss and metrics."""


class Journal:
    """Records on their way to metrics.jsonl, the job's writers, the totals and the console.

    served: others train meanwhile, and `work` is called while rank 0 waits for them: what can wait is left to it.
    """

    def __init__(
        self,
        folder: RunFolder,
        totals: Totals,
        console: Console,
        rounds: int,
        clock: Clock,
        served: bool = False,
        writers: Writers | None = None,
    ) -> None:
        self.folder, self.totals, self.console, self.rounds, self.served = folder, totals, console, rounds, served
        self.clock, self.writers = clock, writers
        self._waiting: deque[dict[str, Any]] = deque()
        self._scored: dict[str, Any] | None = None
        self._scoring: Scoring | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Write a record, or keep it behind one that is being scored."""
        if self.served:
            self._write()
        self._waiting.append(record)
        if not self.served:
            self._write()

    def score(self, record: dict[str, Any], scoring: Scoring) -> None:
        """Begin to score the round of a record that is yet to be added; `finish` the one before."""
        self._scored, self._scoring = record, scoring

    def work(self) -> bool:
        """Write what can be written, or score one block; returns False when there is nothing to do."""
        if self._waiting and self._waiting[0] is not self._scored:
            with self.clock.booked("write"):
                return self._write()
        if self._scoring is None:
            return False
        round = self.clock.round
        with self.clock.booked("evaluate"):
            scores = next(self._scoring, None)
        self.clock.round = round
        if scores is not None:
            put_scores(self._scored, scores)
            self._scored = self._scoring = None
            self._write()
        return True

    def finish(self) -> int:
        """Score what is left; returns how many blocks that were."""
        self._write()
        blocks = 0
        while self._scoring is not None:
            self.work()
            blocks += 1
        return blocks

    def close(self) -> None:
        """Write what is there, also when training ended early."""
        self._scored = self._scoring = None
        self._write()

    def _write(self) -> bool:
        written = False
        while self._waiting and self._waiting[0] is not self._scored:
            record, written = self._waiting.popleft(), True
            self.totals.add(record)
            self.folder.round(record)
            if self.writers:
                self.writers.round(record)
            self.console.round(record, self.rounds)
        return written


def put_scores(record: dict[str, Any], scores: dict[str, Any]) -> None:
    """Add loss and metrics to a record."""
    record["scores"] = {"test_loss": scores["loss"]} | {name: s for name, s in scores.items() if name != "loss"}
