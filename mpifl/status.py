"""What a run is doing, or where it died: `python -m mpifl.status RUN [--follow] [--stacks]`, from any machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpifl.comm import Alone
from mpifl.config import UserError
from mpifl.console import Console, score_rows
from mpifl.engine.clock import ENDED, Whereabouts
from mpifl.launch import Parser
from mpifl.lock import Holder
from mpifl.watchdog import main_stack, spoken, stacks_file, told_together

RUNNING, FINISHED, STOPPED, DIED, STUCK = "running", "finished", "stopped early", "died", "stuck"
SILENT = 60.0
"""Seconds after which a process of another machine, whose pulse arrives every ten, is lost."""
_RECENT = 10
"""Rounds over which speed is measured."""
_SHOWN = 20
"""Ranks that are listed, the most silent ones first."""
_TAIL = 1 << 18
_REFRESH = 1.0


@dataclass(frozen=True)
class Status:
    """A run as its folder shows it. rounds: of the job. recent: records of the last rounds. checkpoint: rounds in it.

    ranks: of the latest start. stuck: those of them that are. now: unix time.
    """

    folder: Path
    state: str
    rounds: int
    recent: list[dict[str, Any]]
    ranks: list[Whereabouts]
    stuck: list[Whereabouts]
    checkpoint: int | None
    now: float

    @staticmethod
    def of(folder: Path) -> Status:
        """Look at a run's folder; raises UserError if it is none."""
        try:
            job = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
            rounds, stall_timeout = int(job["rounds"]), float(job["run"].get("stall_timeout", 0.0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"'{folder}' is no run folder: it has no readable config.toml ({error})") from None
        now, holder = time.time(), Holder.of(folder)
        held, ranks = holder is not None and holder.alive(), Whereabouts.of_run(folder)
        if held and ranks and ranks[0].process != holder.process:
            ranks = []  # of an earlier start: this one is just beginning
        stuck = [rank for rank in ranks if _stuck(rank, now, stall_timeout)]
        state = _state(folder, ranks, bool(stuck), held)
        return Status(folder, state, rounds, _recent(folder), ranks, stuck, newest_checkpoint(folder), now)

    @property
    def done(self) -> int:
        """Rounds that are done."""
        return self.recent[-1]["round"] if self.recent else 0

    @property
    def speed(self) -> tuple[float, float]:
        """Rounds and clients per second, over the last rounds."""
        seconds = sum(record["seconds"]["total"] for record in self.recent)
        clients = sum(record["clients"] for record in self.recent)
        return (len(self.recent) / seconds, clients / seconds) if seconds else (0.0, 0.0)

    @property
    def scores(self) -> tuple[int, dict[str, Any]]:
        """The last scores, and after how many rounds they were."""
        scored = [record for record in self.recent if "scores" in record]
        return (scored[-1]["round"], scored[-1]["scores"]) if scored else (0, {})

    def line(self) -> str:
        """The run in one line."""
        scores = {name: value for name, value in self.scores[1].items() if isinstance(value, float)}
        parts = [self._rounds(), *(value for _, value in self._pace())]
        return "  ".join([*parts, *(f"{name} {value:.4f}" for name, value in scores.items())])

    def lines(self) -> list[str]:
        """All there is to say."""
        after, scores = self.scores
        rows = [("run", str(self.folder)), ("state", self._rounds()), *self._pace()]
        rows += [(f"{name}, round {after}", value) for name, value in score_rows(scores, "metrics.jsonl")]
        if self.state != FINISHED:
            checkpoint = "none" if self.checkpoint is None else f"after round {self.checkpoint}"
            rows.append(("checkpoint", checkpoint + _GOES_ON.get(self.state, "")))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        if self.state in (RUNNING, STUCK):
            lines += self._table()
        elif self.state == DIED:
            lines += last_words(self.folder)
        return lines

    def _rounds(self) -> str:
        return f"{self.state}: {self.done} of {self.rounds} rounds"

    def _pace(self) -> list[tuple[str, str]]:
        speed, clients = self.speed
        if self.state != RUNNING or not speed:
            return []
        left = _duration((self.rounds - self.done) / speed)
        return [("speed", f"{speed:.3g} rounds/s, {clients:.0f} clients/s"), ("time", f"{left} left")]

    def _table(self) -> list[str]:
        head = ("rank", "host", "pid", "phase", "round", "client", "silent", "")
        rows = [head]
        shown = sorted(self.ranks, key=lambda rank: rank.beat)[:_SHOWN]
        for rank in sorted(shown, key=lambda rank: rank.rank):
            alive = {True: "alive", False: "has left", None: "on another machine"}[rank.process.alive]
            note = "STUCK" if rank in self.stuck else ""
            place = (str(rank.round + 1) if rank.round >= 0 else "", str(rank.client) if rank.client >= 0 else "")
            silent = f"{max(0.0, self.now - rank.beat):.1f} s"
            what = ", ".join(word for word in (rank.process.trouble or alive, note) if word)
            rows.append((str(rank.rank), rank.host, str(rank.pid), rank.phase, *place, silent, what))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
        more = len(self.ranks) - len(shown)
        return [*lines, f"... and {more} more, which were heard of since"] if more else lines


_GOES_ON = {STOPPED: "; the same command goes on", DIED: "; the same command goes on"}


def last_words(folder: Path, since: float = 0.0) -> list[str]:
    """Lines on the ranks of a run that died: where each was last, the first to fall silent first; [] if none did.

    since: unix time; ranks that were silent then already are of an earlier start.
    """
    ranks = [rank for rank in Whereabouts.of_run(folder) if rank.phase != ENDED and rank.last_sign > since]
    if not ranks:
        return []
    ranks.sort(key=lambda rank: (rank.process.alive or False, rank.last_sign))  # who still runs was not the first
    first = ranks[0].last_sign
    lines = []
    for rank in ranks[:_SHOWN]:
        when = time.strftime("%H:%M:%S", time.localtime(first))
        later = f" + {rank.last_sign - first:.3f} s" if lines else ""
        runs = f", {rank.process.trouble or 'still runs'}" if rank.process.alive else ""
        lines.append(f"  {rank}: silent since {when}{later}{runs}")
    more = [f"  ... and {len(ranks) - _SHOWN} more"] if len(ranks) > _SHOWN else []
    report = _failure(folder, ranks[-1].last_sign)
    return ["the first to fall silent comes first:", *lines, *more, *([f"see {report}"] if report else [])]


def newest_checkpoint(folder: Path) -> int | None:
    """Rounds in the newest checkpoint of a run, None without one."""
    marks = (folder / "checkpoints").glob("round-*/COMPLETE")
    return max((int(mark.parent.name.removeprefix("round-")) for mark in marks), default=None)


def _state(folder: Path, ranks: Sequence[Whereabouts], stuck: bool, held: bool) -> str:
    if (folder / "summary.json").exists():
        return FINISHED
    if ranks and all(rank.phase == ENDED for rank in ranks):
        return STOPPED
    dead = any(rank.process.alive is False and rank.phase != ENDED for rank in ranks)
    if dead or not held:
        return DIED
    return STUCK if stuck else RUNNING


def _stuck(rank: Whereabouts, now: float, stall_timeout: float) -> bool:
    """Whether nothing is heard of a rank that should work."""
    if rank.phase == ENDED or rank.process.alive is False:
        return False
    stopped = rank.process.here and rank.process.state == "T"
    return stopped or 0 < stall_timeout < now - rank.beat or now - rank.last_sign > SILENT


def _recent(folder: Path) -> list[dict[str, Any]]:
    """Records of the last rounds."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # cut at either end
    return [record for record in records if isinstance(record, dict) and "round" in record][-_RECENT:]


def _failure(folder: Path, since: float) -> Path | None:
    """The report of a failure that ended the ranks' work."""
    reports = sorted(folder.glob("failure-*.txt"))
    return reports[-1] if reports and reports[-1].stat().st_mtime > since - SILENT else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def stacks(status: Status, wait: float = 2.0) -> list[str]:
    """Have the ranks of a run that live on this machine write their stacks; lines that tell them."""
    asked = {
        rank.rank: stacks_file(status.folder / "status", rank.rank)
        for rank in status.ranks
        if rank.phase != ENDED and rank.process.alive
    }
    before = {rank: file.stat().st_size if file.exists() else 0 for rank, file in asked.items()}
    for rank in status.ranks:
        if rank.rank in asked:
            os.kill(rank.pid, signal.SIGUSR2)
    end, able = time.monotonic() + wait, [rank.rank for rank in status.ranks if rank.process.state in ("R", "S")]
    while time.monotonic() < end and any(not main_stack(asked[rank], before[rank]) for rank in able if rank in asked):
        time.sleep(0.05)
    lines = ["what ranks are doing, the innermost call first:"] if asked else ["no rank runs on this machine"]
    lines += told_together({rank: main_stack(file, before[rank]) for rank, file in asked.items()})
    others = [rank.rank for rank in status.ranks if rank.process.alive is None]
    return [*lines, f"  {spoken(others)}: on another machine; ask there"] if others else lines


def follow(folder: Path, console: Console) -> Status:
    """Show a run until it ends: on a terminal all there is, refreshed, elsewhere a line whenever a round is done."""
    if not console.rich.is_terminal:
        return _until_end(folder, lambda status, before: console.say(status.line()) if _moved(status, before) else None)
    from rich.live import Live
    from rich.text import Text

    with Live(console=console.rich, transient=True, auto_refresh=False) as live:
        return _until_end(folder, lambda status, _: live.update(Text("\n".join(status.lines())), refresh=True))


def _until_end(folder: Path, show: Callable[[Status, Status | None], None]) -> Status:
    before = None
    while True:
        status = Status.of(folder)
        if status.state not in (RUNNING, STUCK):
            return status
        show(status, before)
        before = status
        time.sleep(_REFRESH)


def _moved(status: Status, before: Status | None) -> bool:
    return before is None or (status.done, status.state) != (before.done, before.state)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 it runs, or ended in order, 1 it died or is stuck, 2 refused."""
    parser = Parser(
        prog="python -m mpifl.status",
        description="Say what a run is doing, or where it died.",
        epilog="Exit status: 0 it runs, has finished, or stopped early as it was asked to; 1 it died or is stuck; "
        "2 the folder is none of a run.",
    )
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")
    parser.add_argument("--stacks", action="store_true", help="also show what ranks on this machine are doing")
    try:
        options = parser.read(Alone(), sys.argv[1:] if arguments is None else arguments)
        if options is None:
            return 0
        console = Console()
        status = follow(options.run, console) if options.follow else Status.of(options.run)
        for line in status.lines() + (stacks(status) if options.stacks else []):
            console.say(line)
    except UserError as error:
        print(f"mpifl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if status.state in (DIED, STUCK) else 0


if __name__ == "__main__":
    sys.exit(main())
