"""Where the time of all ranks went: a Chrome trace per rank, and a table that names the slowest host and why.

In RUN/profile/: rank-NNNNN.json, in the trace-event format that https://ui.perfetto.dev and chrome://tracing open, a
slice for every phase of the clock; trace.json, those of all ranks together; phases.txt, the table that is printed.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from mpifl.comm import Alone, World
from mpifl.console import Console
from mpifl.engine.host import Ask
from mpifl.fleet import Fleet
from mpifl.session import Session
from mpifl.sharded import ShardedFleet
from mpifl.uplink.exact import Answer, Wire
from mpifl.work import ClientWork

T = TypeVar("T")

SLICES = 1_000_000
"""Slices that the traces of all ranks hold together: 120 MB, which viewers still open."""
SHORTEST = 5e-6
"""Seconds; a shorter slice is in the table, not in the trace."""
EVEN = 0.05
"""Hosts are called even when the busiest has no more than this share above their mean."""
WORTH_A_COLUMN = 0.01
"""Share of a rank's time that gives a phase a column."""
ROWS = 16
"""Ranks in the printed table; the file has all of them."""
_WORK = ("load", "train", "sum")


class Trace:
    """One rank's slices as a JSON array that grows; what is on disk can be opened, also when the rank was killed.

    limit: slices; `ended` is the round, from 0, whose first slice was beyond it, None if there was none.
    """

    def __init__(self, path: Path, rank: int, node: str, limit: int) -> None:
        self.ended: int | None = None
        self._rank, self._left, self._round, self._client = rank, limit, -1, -1
        self._file: TextIO = path.open("w", encoding="utf-8", buffering=1 << 16)
        name = json.dumps({"name": f"rank {rank} on {node}"})
        self._file.write(f'[\n{{"name":"process_name","ph":"M","pid":{rank},"tid":0,"args":{name}}}')
        self._file.write(
            f',\n{{"name":"process_sort_index","ph":"M","pid":{rank},"tid":0,"args":{{"sort_index":{rank}}}}}'
        )

    def add(self, phase: str, account: str, begin: float, end: float, round: int, client: int) -> None:
        """Write a slice; begin, end: unix seconds, in the file microseconds. Rounds count from 1 there."""
        one_client, self._client = client >= 0 and client == self._client, client
        if end - begin < SHORTEST or self.ended is not None:
            return
        if self._left == 0:
            self.ended = round
            return
        self._left -= 1
        about = f'"round":{round + 1}' if round >= 0 else ""
        if one_client:  # from begin to end: otherwise it is nobody's
            about += f'{"," if about else ""}"client":{client}'
        self._file.write(
            f',\n{{"name":"{phase}","cat":"{account}","ph":"X","pid":{self._rank},"tid":0,'
            f'"ts":{begin * 1e6:.1f},"dur":{(end - begin) * 1e6:.1f},"args":{{{about}}}}}'
        )
        if round != self._round:
            self._file.flush()
            self._round = round

    def close(self) -> None:
        """Complete the array, if it is not."""
        if not self._file.closed:
            self._file.write("\n]\n")
            self._file.close()


@dataclass(frozen=True)
class Times:
    """One rank's seconds by phase, its node, and the round, from 0, in which its trace ended early, or None."""

    rank: int
    node: str
    seconds: dict[str, float]
    ended: int | None

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


class Profile:
    """Traces this rank and adds up its seconds, from now until `gather`. folder: RUN/profile.

    What a host does for scoring and baselines is booked apart from what it does for rounds.
    """

    def __init__(self, folder: Path, comm: World | Alone, session: Session) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.comm, self.session, self.node = folder, comm, session, socket.gethostname()
        self.trace = Trace(rank_file(folder, comm.rank), comm.rank, self.node, max(1, SLICES // comm.size))
        self.seconds: dict[str, float] = {}
        self.clock, host = session.host.clock, session.host
        self.clock.listener = self._note
        host.answer, host.rows = self._apart(host.answer), self._apart(host.rows)

    def _apart(self, answer: Callable[[Ask], T]) -> Callable[[Ask], T]:
        def booked(ask: Ask) -> T:
            with self.clock.booked(self._account(self.session.host.works[ask.work])):
                return answer(ask)

        return booked

    def _account(self, work: ClientWork) -> str:
        if any(work is one for one in self.session.parts.algorithm.works):
            return self.clock.account
        return "evaluate" if any(work is one for one in self.session.scorer.works) else "baselines"

    def _note(self, phase: str, account: str, begin: float, end: float, round: int, client: int) -> None:
        self.seconds[account] = self.seconds.get(account, 0.0) + end - begin
        self.trace.add(phase, account, begin, end, round, client)

    def gather(self) -> list[Times]:
        """Complete the trace; every rank calls this, and rank 0 gets what all have, in order of rank, others []."""
        self.close()
        text = json.dumps([self.comm.rank, self.node, self.seconds, self.trace.ended]) + "\n"
        gathered = self.comm.gather(np.frombuffer(text.encode(), dtype=np.uint8).copy())
        return [] if gathered is None else [Times(*json.loads(line)) for line in gathered.tobytes().splitlines()]

    def close(self) -> None:
        """Complete the trace."""
        self.clock.enter(self.clock.phase)
        self.clock.listener = None
        self.trace.close()


@contextmanager
def profiled(folder: Path, comm: World | Alone, session: Session) -> Iterator[Profile | None]:
    """Profile what this rank does within the block, if the job says so. folder: RUN/profile."""
    if not session.job.run.profile:
        yield None
        return
    with closing(Profile(folder, comm, session)) as profile:
        yield profile


@dataclass
class Balance:
    """How much each rank did in the asks of rounds, without scoring and baselines.

    figures: of each rank, (ranks,). waited: seconds that hosts in the mean waited for the busiest, ask by ask.
    busiest: in how many asks a rank was that, (ranks,).
    """

    ranks: int
    waited: float = 0.0
    figures: dict[str, np.ndarray] = field(init=False)
    busiest: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.figures = {name: np.zeros(self.ranks) for name in ("busy", *_WORK, "steps")}
        self.busiest = np.zeros(self.ranks, dtype=np.int64)

    @property
    def first(self) -> int:
        """The first rank that hosts clients."""
        return min(1, self.ranks - 1)

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """Add an ask's rows, name -> (ranks,)."""
        for name, sums in self.figures.items():
            sums += rows[name]
        busy = rows["busy"][self.first :]
        self.waited += float(busy.max() - busy.mean())
        self.busiest[self.first + int(busy.argmax())] += 1

    def mean(self, name: str) -> float:
        """Mean of a figure over hosts."""
        return float(self.figures[name][self.first :].mean())

    @property
    def slowest(self) -> int:
        """The host that was busy longest."""
        return self.first + int(self.figures["busy"][self.first :].argmax())

    def step_seconds(self, rank: int) -> float:
        """Seconds of training per step of a rank."""
        return float(self.figures["train"][rank] / max(self.figures["steps"][rank], 1))

    def reasons(self, rank: int) -> dict[str, float]:
        """Seconds that a rank was busy beyond the mean of hosts, by reason; they add up to all of it."""
        steps, mean_step = self.figures["steps"][rank], self.mean("train") / max(self.mean("steps"), 1e-9)
        return {
            f"more steps ({steps:.0f}, mean {self.mean('steps'):.0f})": float(steps - self.mean("steps")) * mean_step,
            f"slower steps ({1e3 * self.step_seconds(rank):.3g} ms, mean {1e3 * mean_step:.3g})": float(
                self.figures["train"][rank] - steps * mean_step
            ),
            "loading data": float(self.figures["load"][rank]) - self.mean("load"),
            "summing": float(self.figures["sum"][rank]) - self.mean("sum"),
        }


class ProfiledFleet(Fleet):
    """A Fleet that keeps count of what each rank did."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.balance = Balance(self.comm.size)

    def _once(self, question: Ask, home: np.ndarray, wire: Wire) -> Answer:
        answer = super()._once(question, home, wire)
        if any(self.works[question.work] is one for one in self.of_a_round):
            self.balance.add(answer.rows)
        return answer


class ProfiledShardedFleet(ProfiledFleet, ShardedFleet):
    """The same of a sharded one."""


def report(ranks: list[Times], balance: Balance, folder: Path, console: Console) -> None:
    """On rank 0: join the traces, write the table, print it and what it says. folder: RUN/profile."""
    merge(folder, len(ranks))
    rows = phase_table(ranks, balance)
    said = verdict(ranks, balance)
    text = [*rows, *(f"{name}: {what}" for name, what in said)]
    (folder / "phases.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    console.say("seconds by rank and phase, the busiest host first:")
    for row in rows[: 1 + ROWS]:
        console.say(row)
    if len(rows) > 1 + ROWS:
        console.say(f"... and {len(rows) - 1 - ROWS} more in {folder / 'phases.txt'}")
    early = [times.ended for times in ranks if times.ended is not None]
    if early:
        room = f"{max(1, SLICES // len(ranks)):,} slices a rank"
        said.append(("traces end", f"in round {min(early) + 1}, at {room}; the table is of all rounds"))
    console.table([*said, ("traces", f"{folder / 'trace.json'}, for https://ui.perfetto.dev or chrome://tracing")])


def phase_table(ranks: list[Times], balance: Balance) -> list[str]:
    """Lines of a table: a head, rank 0, then hosts by how long they were busy; the phases that took most come first."""
    everywhere: dict[str, float] = {}
    for times in ranks:
        for phase, seconds in times.seconds.items():
            everywhere[phase] = everywhere.get(phase, 0.0) + seconds
    large = {phase for times in ranks for phase, s in times.seconds.items() if s >= WORTH_A_COLUMN * times.total}
    phases = sorted(large, key=lambda phase: -everywhere[phase])
    head = ["rank", *phases, "rest", "total", "steps", "ms/step"]
    widths = [max(8, len(name) + 2) for name in head]
    lines = ["".join(f"{name:>{width}}" for name, width in zip(head, widths))]
    busy = balance.figures["busy"]
    for times in sorted(ranks, key=lambda times: (times.rank >= balance.first > 0, -busy[times.rank])):
        steps = balance.figures["steps"][times.rank]
        spent = [times.seconds.get(phase, 0.0) for phase in phases]
        cells = [str(times.rank), *(f"{seconds:.2f}" for seconds in [*spent, times.total - sum(spent), times.total])]
        cells += [f"{steps:.0f}", f"{1e3 * balance.step_seconds(times.rank):.3f}"] if steps else ["", ""]
        lines.append("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)).rstrip())
    return lines


def verdict(ranks: list[Times], balance: Balance) -> list[tuple[str, str]]:
    """What the table says: which host is the slowest and why, and what hosts do with their time; [] without hosts."""
    if balance.ranks == 1 or not balance.mean("busy"):
        return []
    rank = balance.slowest
    beyond = float(balance.figures["busy"][rank]) - balance.mean("busy")
    who = f"rank {rank}" + (f" on {ranks[rank].node}" if len({times.node for times in ranks}) > 1 else "")
    percent = 100 * beyond / balance.mean("busy")
    much = f"{who}, busy {balance.figures['busy'][rank]:.2f} s, {percent:.0f} % over the mean"
    often = f"busiest in {balance.busiest[rank]} of {balance.busiest.sum()} asks"
    why = {reason: s for reason, s in balance.reasons(rank).items() if s >= 0.1 * beyond}
    parts = ", ".join(f"{s:.2f} s by {reason}" for reason, s in sorted(why.items(), key=lambda item: -item[1]))
    uneven = f"{much}: {parts}; {often}" if beyond > EVEN * balance.mean("busy") else f"hosts are even: {much}; {often}"
    return [("slowest host", uneven), ("hosts' time", _shares(ranks, balance))]


def _shares(ranks: list[Times], balance: Balance) -> str:
    """What a host in the mean does with its time after the start."""
    hosts = ranks[balance.first :]
    mean = lambda phases: sum(times.seconds.get(phase, 0.0) for times in hosts for phase in phases) / len(hosts)  # noqa: E731
    total = max(sum(times.total for times in hosts) / len(hosts) - mean(["start"]), 1e-9)
    parts = {phase: mean([phase]) for phase in (*_WORK, "evaluate", "baselines")}
    parts["wait for the busiest"] = balance.waited
    parts["wait for the server, and network"] = total - sum(parts.values())
    return ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in parts.items() if s >= 0.005 * total)


def merge(folder: Path, ranks: int) -> None:
    """Write trace.json, the slices of all ranks."""
    with (folder / "trace.json").open("wb") as merged:
        for rank in range(ranks):
            with rank_file(folder, rank).open("rb") as file:
                merged.write(b"," if rank else b"[")
                file.seek(1)  # behind its bracket
                shutil.copyfileobj(file, merged)
            merged.seek(-2, 2)  # over the bracket at its end
        merged.write(b"]\n")


def rank_file(folder: Path, rank: int) -> Path:
    """The trace of a rank."""
    return folder / f"rank-{rank:05d}.json"
