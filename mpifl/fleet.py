"""A question to a cohort, carried over the ranks: one header, one Scatter, one Bcast down, one Reduce up.

Rank 0 owns a `Fleet`; every other rank sits in `serve`. What goes down is laid out in messages.py, what comes
up, [update | weight | stats | count | one row per rank], in uplink/exact.py.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mpifl.config import UserError
from mpifl.engine.host import Ask, Host
from mpifl.messages import (
    ASK,
    MEMORY,
    NOBODY,
    RAISED,
    ROUND,
    ROWS,
    SAVE,
    SAVED,
    STOP,
    WHOLE,
    Header,
    Receiver,
    Sender,
    pack_digests,
    pack_raised,
    pack_rows,
)
from mpifl.placement import by_owner, longest_first
from mpifl.tree import Tree, one_row, tree_map
from mpifl.uplink.exact import Answer, Wire, decode, fits, next_limits
from mpifl.work import Algorithm, ClientWork, Cohort, Sums

EARLY, LONGEST_SLEEP = 0.9, 0.1
"""Hosts are looked for after this share of the time that they took for as many steps before; seconds."""
MOST_TOLD = 20
"""Lines about failing clients: metrics count all."""


@dataclass
class Traffic:
    """What asks cost since the last reading: steps and examples, seconds per rank, exclusions, repeats."""

    steps: int = 0
    examples: int = 0
    excluded: int = 0
    repeats: int = 0
    busy: np.ndarray = field(default_factory=lambda: np.zeros(1))
    hosts: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def imbalance(self) -> float:
        """Largest busy time over the mean of the hosts; 1.0 is perfect."""
        hosts = self.busy[1:] if len(self.busy) > 1 else self.busy
        return float(hosts.max() / hosts.mean()) if hosts.mean() > 0 else 1.0


class Fleet:
    """Rank 0's side: places clients, asks, repeats an ask whose grid did not fit, and reads the sums.

    tolerate: so many clients of a round may fail, as their visit raised or gave NaN or infinity, and are left out,
    counted in `traffic.excluded`; one more is a UserError naming client, round and reason. say: called with one line
    for people. of_a_round: the algorithm's works, whose steps together are what a client costs. meanwhile: called while
    hosts are waited for; does a piece of other work, or returns False.
    """

    def __init__(
        self,
        comm: Any,
        host: Host,
        tolerate: int = 0,
        say: Callable[[str], None] = print,
        of_a_round: tuple[ClientWork, ...] = (),
    ) -> None:
        self.comm, self.host, self.tolerate, self.say = comm, host, tolerate, say
        self._first = min(1, comm.size - 1)
        self.works, self.of_a_round = host.works, of_a_round
        self.round, self.accepted = 0, -1
        self._failed = self._told = 0
        self.limits: dict[str, list[float]] = {}
        self.traffic = Traffic(busy=np.zeros(comm.size))
        self.resident_bytes: list[int] = []
        self.asked_to_stop = False
        self.meanwhile: Callable[[], bool] = lambda: False
        self._step_seconds: dict[int, float] = {}
        self._read = (comm.bytes_down, comm.bytes_up)
        self._homes, self._next_homes = (NOBODY, NOBODY), (NOBODY, NOBODY)
        self._sender = Sender(comm)

    @property
    def hosts(self) -> int:
        """Ranks that host clients: all but the server, or the only one."""
        return max(1, self.comm.size - 1)

    def keeper(self, ids: np.ndarray) -> np.ndarray:
        """Rank that keeps the memory of each client, (n,) int64."""
        return self._first + by_owner(ids, self.hosts)

    def begin(self, round: int, upcoming: np.ndarray = NOBODY) -> None:
        """Start a round: clients are placed anew. upcoming: (m,) clients of the next one, which hosts may prefetch."""
        self.round, self._failed = round, 0
        self._homes = self._next_homes
        self._next_homes = (upcoming, self._home(self.of_a_round, upcoming))

    def hold(self, state: Tree) -> Tree:
        """Return what this rank keeps of a whole state: all of it."""
        return state

    def fetch(self, state: Tree) -> Tree:
        """Return the whole state, on rank 0, from what is kept of it."""
        return state

    def run(self, algorithm: Algorithm, state: Tree, cohort: Cohort) -> Tree:
        """Run one round of an algorithm on what is kept of the state."""
        return algorithm.round(state, cohort)

    def read_traffic(self) -> Traffic:
        """Return what was counted since the last reading."""
        read, self.traffic = self.traffic, Traffic(busy=np.zeros(self.comm.size))
        down, up = self.comm.bytes_down, self.comm.bytes_up
        read.bytes_down, read.bytes_up = down - self._read[0], up - self._read[1]
        self._read = (down, up)
        return read

    def ask(self, work: ClientWork, ids: np.ndarray, given: Tree | None, shared: Tree) -> Sums:
        """Have every client in `ids`, (n,) int64, do `work`; returns the exact sums over those that counted."""
        question, wire, name = self._question(work, ids, given or {}, shared)
        if any(work is one for one in self.of_a_round) and work.batches.of == "client":
            question.ahead = self._next_homes[0]
        home = self._place(work, ids)
        answer = self._once(question, home, wire)
        while wire.exact and not fits(question.limits, answer.peaks, len(ids)):
            self._tell_repeat(wire, answer)
            limits = next_limits(wire, question.limits, answer.peaks, len(ids))
            question = replace(question, limits=limits, attempt=question.attempt + 1)
            answer = self._once(question, home, wire)
        self._count(answer)
        self._refuse_bad(work, wire, answer, question.round)
        self.limits[name] = next_limits(wire, question.limits, answer.peaks, len(ids)).tolist()
        return answer.sums

    def ask_here(self, work: ClientWork, ids: np.ndarray, shared: Tree) -> Generator[None, None, Sums]:
        """As `ask`, and the same bits, but answered by this rank alone, one id at each `next`; counts no traffic."""
        question, wire, name = self._question(work, ids, {}, shared)
        while True:
            total, peaks = wire.buffers(), np.zeros(len(wire.names))
            for id in ids:
                part = self.host.answer(replace(question, ids=np.asarray([id])))
                for whole, buffer in zip(total, part):
                    whole += buffer  # grid values add exactly, whoever adds them in whatever order
                answer = decode(wire, part)
                self._refuse_bad(work, wire, answer, question.round)
                peaks = np.maximum(peaks, answer.peaks)
                yield
            fit = not wire.exact or fits(question.limits, peaks, len(ids))
            question.limits = next_limits(wire, question.limits, peaks, len(ids))
            if fit:
                self.limits[name] = question.limits.tolist()
                return decode(wire, total).sums

    def _question(self, work: ClientWork, ids: np.ndarray, given: Tree, shared: Tree) -> tuple[Ask, Wire, str]:
        """What is asked, what answers look like, and the name under which the sum's limits are kept."""
        given, shared = tree_map(torch.as_tensor, given), tree_map(torch.as_tensor, shared)
        index = self._index(work)
        wire = self.host.wire(index, shared, one_row(given))
        name = f"{index}:{'|'.join(wire.names)}"
        limits = np.asarray(self.limits.get(name) or wire.first_limits())
        return Ask(index, self.round, ids, shared, limits, len(ids), given), wire, name

    def rows(self, work: ClientWork, ids: np.ndarray, shared: Tree) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return (ids (n,), {"weight": (n,), stat: (n, ...)}) per client that ran `work`, in order of id, unsummed."""
        index = self._index(work)
        wire = self.host.wire(index, shared, {})
        question = Ask(index, self.round, ids, shared, wire.first_limits(), len(ids))
        mine = self.host.rows(self._send(ROWS, question, self._place(work, ids)))
        gathered = self.comm.gather(pack_rows(*mine)).view(np.float64).reshape(-1, 1 + sum(wire.small))
        gathered = gathered[np.argsort(gathered[:, 0], kind="stable")]
        shapes = {"weight": ()} | {leaf.name: leaf.shape for leaf in wire.stats.leaves}
        columns = np.split(gathered[:, 1:], np.cumsum(wire.small)[:-1], axis=1)
        stats = {name: c.reshape(len(gathered), *shape) for (name, shape), c in zip(shapes.items(), columns)}
        return gathered[:, 0].astype(np.int64), stats

    def memory_digest(self) -> str:
        """Return one sha256 over all clients' memory in order of client, "" when none is kept."""
        if not self.host.memory.kept:
            return ""
        Header(MEMORY, self.round, self.accepted).announce(self.comm)
        self.host.settle(self.round, self.accepted)
        packed = self.comm.gather(pack_digests(self.host.memory.digests()))
        entries = sorted(bytes(entry) for entry in packed.reshape(-1, 40))  # a client's number comes first
        return hashlib.sha256(b"".join(entries)).hexdigest()

    def stop(self, early: bool = False) -> None:
        """Let the hosts go; early: before the last round."""
        Header(STOP, self.round, self.accepted, work=int(early)).announce(self.comm)

    def _index(self, work: ClientWork) -> int:
        for index, known in enumerate(self.works):
            if known is work:
                return index
        raise ValueError("this ClientWork is not among the Algorithm's `works`, so hosts do not know it")

    def _place(self, work: ClientWork, ids: np.ndarray) -> np.ndarray:
        """Rank of each id: with its memory, else longest first; one home per client for all asks of a round."""
        if work.batches.of == "block":
            return self._first + longest_first(self.host.source.examples(work.batches)[ids], self.hosts)
        known, homes = self._homes
        where = np.searchsorted(known, ids).clip(max=max(0, len(known) - 1))
        new = ids[known[where] != ids] if len(known) else ids
        if len(new):
            of_a_round = any(work is one for one in self.of_a_round)
            known = np.concatenate([known, new])
            homes = np.concatenate([homes, self._home(self.of_a_round if of_a_round else (work,), new)])
            order = np.argsort(known, kind="stable")
            known, homes = self._homes = known[order], homes[order]
        return homes[np.searchsorted(known, ids)]

    def _home(self, works: tuple[ClientWork, ...], ids: np.ndarray) -> np.ndarray:
        """Rank of each id, (n,) int64, by the steps that these works take."""
        if self.host.memory.kept:
            return self.keeper(ids)
        steps = sum(self._steps(work, ids) for work in works if work.batches.of != "block")
        return self._first + longest_first(np.broadcast_to(steps, len(ids)), self.hosts)

    def _steps(self, work: ClientWork, ids: np.ndarray) -> np.ndarray:
        examples = self.host.source.examples(work.batches)
        return np.broadcast_to(work.batches.steps_of(examples[ids if work.batches.of == "client" else 0]), len(ids))

    def _once(self, question: Ask, home: np.ndarray, wire: Wire) -> Answer:
        mine, due = self._send(ASK, question, home), self._due(question, home)
        buffers = self.host.answer(mine)
        _reduce(self.comm, self.host, buffers, lambda: self._pass_time(due))
        with self.host.clock.during("server"):
            answer = decode(wire, buffers)
        self._time(question, answer)
        return answer

    def _due(self, question: Ask, home: np.ndarray) -> float:
        """When hosts are looked for."""
        steps = np.bincount(home, weights=self._steps(self.works[question.work], question.ids))
        expected = steps.max(initial=0.0) * self._step_seconds.get(question.work, 0.0)
        return time.perf_counter() + EARLY * expected

    def _pass_time(self, due: float) -> bool:
        """Do other work, or sleep until `due` where each look whether hosts have come would take a core from them."""
        if self.meanwhile():
            return True
        left = due - time.perf_counter()
        if left < 1e-3 or not self.comm.patient:
            return False
        time.sleep(min(left, LONGEST_SLEEP))
        return True

    def _send(self, command: int, question: Ask, home: np.ndarray) -> Ask:
        with self.host.clock.during("send"):
            home_ahead = self._next_homes[1] if len(question.ahead) else NOBODY
            mine = self._sender.send(command, question, home, self.accepted, home_ahead)
        self.host.settle(self.round, self.accepted)
        return mine

    def _count(self, answer: Answer) -> None:
        """Note what an accepted answer took; a first attempt whose grid did not fit counts for nothing but time."""
        for name in ("steps", "examples", "excluded"):
            setattr(self.traffic, name, getattr(self.traffic, name) + int(answer.rows[name].sum()))

    def _time(self, question: Ask, answer: Answer) -> None:
        rows, traffic = answer.rows, self.traffic
        self._step_seconds[question.work] = float((rows["busy"] / np.maximum(rows["steps"], 1)).max())
        traffic.busy = traffic.busy + rows["busy"]
        self.asked_to_stop |= bool(rows["stop"].any())
        self.resident_bytes = rows["resident_bytes"].astype(np.int64).tolist()
        for phase in ("load", "train", "sum"):
            traffic.hosts[phase] = traffic.hosts.get(phase, 0.0) + float(rows[phase].sum())

    def _tell_repeat(self, wire: Wire, answer: Answer) -> None:
        self.traffic.repeats += 1
        over = answer.first("over")
        if over:
            client = self.host.dataset.client_id("train", over[0])
            self.say(
                f"round {self.round + 1}: {wire.names[over[1]]} of client {client} is beyond the sum's grid; "
                f"asking again with a coarser one"
            )

    def _refuse_bad(self, work: ClientWork, wire: Wire, answer: Answer, round: int) -> None:
        """Stop at, or tell of, the first client whose visit raised, or whose numbers were not finite."""
        bad = answer.first("bad")
        if bad is None:
            return
        if work.batches.of != "client":  # no client is to blame: the model itself is beyond numbers
            raise UserError(
                f"round {round + 1}: {wire.names[bad[1]]} on split '{work.batches.split}' is NaN or infinite: "
                f"training has diverged; lower the learning rates or clip gradients (clip_norm)"
            )
        failed = int(answer.rows["excluded"].sum())
        self._failed += failed
        if self._failed <= self.tolerate and self._told == MOST_TOLD:
            return
        client, raised = self.host.dataset.client_id("train", bad[0]), bad[1] == len(wire.names)
        if raised:
            what, mend = f"client {client} raised {self._raised()}", "mend that"
        else:
            what = f"{wire.names[bad[1]]} of client {client} is NaN or infinite"
            mend = "lower the client learning rate or clip its gradients (clip_norm)"
        if self._failed > self.tolerate:
            raise UserError(
                f"round {round + 1}: {what}; {mend}, or raise faults.tolerate: it is {self.tolerate}, and "
                f"{self._failed} of this round's clients failed"
            )
        self._told += 1
        more = f", and {failed - 1} more" if failed > 1 else ""
        last = "; from here on such clients are only counted" if self._told == MOST_TOLD else ""
        self.say(f"round {round + 1}: {what}; left out{more}{last}")

    def _raised(self) -> str:
        """What the first visit raised that did in the last answer."""
        Header(RAISED, self.round, self.accepted).announce(self.comm)
        return self._gather_raised()

    def _gather_raised(self) -> str:
        gathered = self.comm.gather(pack_raised(self.host.raised))
        return "" if gathered is None else min(json.loads(line) for line in gathered.tobytes().splitlines())[1]


def serve(comm: Any, host: Host, follow: Callable[[Header], None] = lambda header: None) -> bool:
    """Answer rank 0's questions until it says stop; returns whether that was early.

    follow: does what a run asks of its ranks beside answers: checkpoints, and rounds of a state in parts.
    """
    receiver = Receiver(comm)
    while True:
        host.clock.enter("wait")
        header = Header.await_from(comm)
        host.clock.enter("receive")
        host.settle(header.round, header.accepted)
        if header.command == STOP:
            return bool(header.work)
        if header.command == MEMORY:
            comm.gather(pack_digests(host.memory.digests()))
        elif header.command == ROWS:
            comm.gather(pack_rows(*host.rows(receiver.receive(header))))
        elif header.command == RAISED:
            comm.gather(pack_raised(host.raised))
        elif header.command in (SAVE, SAVED, ROUND, WHOLE):
            follow(header)
        else:
            _reduce(comm, host, host.answer(receiver.receive(header)))


def _reduce(comm: Any, host: Host, buffers: list[torch.Tensor], meanwhile: Callable[[], bool] = lambda: False) -> None:
    with host.clock.during("wait"):
        comm.arrive(meanwhile)  # here ranks wait patiently for the last one to finish training; Reduce itself is busy
    with host.clock.during("reduce"):
        for buffer in buffers:
            comm.reduce(buffer.numpy())
