"""The plan of a job, without training: its real rounds run over a fleet whose ranks only count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from mpifl.comm import Alone
from mpifl.console import Console, readable_bytes
from mpifl.data.batches import batches, blank_columns
from mpifl.engine.host import Ask, Host, resident_bytes
from mpifl.fleet import Fleet
from mpifl.measure import BLOCK
from mpifl.messages import NOBODY
from mpifl.tree import Tree, leaves, one_row
from mpifl.work import Algorithm, ClientWork, Cohort


class CountingComm:
    """Looks like a world of `size` ranks, counts the bytes that would move, and moves none."""

    rank, library, patient = 0, "none", False

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes_down = self.bytes_up = 0

    def announce(self, header: np.ndarray) -> None:
        """Count what every rank would receive."""
        self.bytes_down += header.nbytes if self.size > 1 else 0

    def publish(self, nbytes: int, fill: Callable[[np.ndarray], object]) -> np.ndarray:
        """Count a buffer."""
        self.bytes_down += nbytes if self.size > 1 else 0
        return Alone().publish(nbytes, fill)

    def room(self, nbytes: int) -> np.ndarray:
        """Nobody needs any."""
        raise NotImplementedError

    def scatter(self, table: np.ndarray, row: np.ndarray) -> None:
        """Count a table."""
        self.announce(table)
        row[:] = table[0]

    def reduce(self, buffer: np.ndarray) -> None:
        """Count what would be summed."""
        self.bytes_up += buffer.nbytes if self.size > 1 else 0

    def arrive(self, meanwhile: Callable[[], bool] = lambda: False) -> None:
        """Nobody to wait for."""


@dataclass
class Planned:
    """One round as planned: clients and steps of each rank, and bytes at rank 0's MPI calls."""

    clients: np.ndarray
    steps: np.ndarray
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass
class Sizes:
    """Largest buffers, in bytes, that asks needed so far, and the last ask."""

    down: int = 0
    wire: int = 0
    ask: Ask | None = field(default=None)


class PlanFleet(Fleet):
    """A Fleet that asks nobody and notes who would have been asked."""

    def __init__(self, host: Host, ranks: int, of_a_round: tuple[ClientWork, ...] = ()) -> None:
        host.ranks = ranks
        super().__init__(CountingComm(ranks), host, of_a_round=of_a_round)
        host.answer = self._answer
        self.sizes = Sizes()

    def plan(self, algorithm: Algorithm, state: Tree, cohort: Cohort, upcoming: np.ndarray) -> Planned:
        """Plan one round, after which these clients come."""
        self.planned = Planned(np.zeros(self.comm.size, np.int64), np.zeros(self.comm.size, np.int64))
        self.begin(cohort.round, upcoming)
        algorithm.round(state, cohort)
        traffic = self.read_traffic()
        return replace(self.planned, bytes_down=traffic.bytes_down, bytes_up=traffic.bytes_up)

    def _place(self, work: ClientWork, ids: np.ndarray) -> np.ndarray:
        home = super()._place(work, ids)
        steps = work.batches.steps_of(self.host.source.examples(work.batches)[ids])
        ranks = self.comm.size
        ran = np.bincount(home, weights=steps > 0, minlength=ranks).astype(np.int64)
        self.planned.clients = np.maximum(self.planned.clients, ran)
        self.planned.steps += np.bincount(home, weights=steps, minlength=ranks).astype(np.int64)
        return home

    def _answer(self, ask: Ask) -> list[Tensor]:
        wire = self.host.wire(ask.work, ask.shared, one_row(ask.given))
        shared = sum(leaf.nbytes for _, leaf in leaves(ask.shared))
        self.sizes = Sizes(max(self.sizes.down, shared), max(self.sizes.wire, wire.bytes), ask)
        return wire.buffers()


def expected_memory(
    fleet: PlanFleet, algorithm: Algorithm, state: Tree, score: ClientWork, rounds: int
) -> tuple[int, int]:
    """Return expected resident bytes of (rank 0, a host) at a job's end, after a round was planned.

    Measured as far as possible: what this process holds, before and after a real step of training and a real
    block of scoring on zeros; then a round's buffers, and the data and client memory that a host will keep.
    """
    host, sizes = fleet.host, fleet.sizes
    hosts = fleet.hosts
    buffers = sizes.down + 2 * sizes.wire  # MPI's temporary is as large as what it sums
    server = buffers + 2 * sum(leaf.nbytes for _, leaf in leaves(state))
    idle = resident_bytes()
    _one_batch(host, host.works[sizes.ask.work], sizes.ask.shared)
    _one_batch(host, score, {"theta": next(iter(algorithm.models(state).values()))})
    # Rows of all who may be visited, and a round's new ones beside them until it is accepted.
    rows = -(-host.dataset.clients // hosts) + -(-sizes.ask.clients // hosts)
    busy = resident_bytes() + expected_data(fleet, score, rounds) + host.memory.layout.bytes * rows
    return (busy if fleet.comm.size == 1 else idle) + server, busy + buffers


def expected_data(fleet: PlanFleet, score: ClientWork, rounds: int) -> int:
    """Return expected bytes of clients' and test rows that a host holds after so many rounds like the one planned."""
    host, source, cohort = fleet.host, fleet.host.source, fleet.sizes.ask.clients
    hosts, clients, total = fleet.hosts, host.dataset.clients, host.dataset.total
    stays = source.resident(host.works[fleet.sizes.ask.work].batches)
    everyone = (source.kept_bytes if stays else source.bytes_of)(total("train"), clients)
    if not stays:
        held = min(source.budget, 2 * everyone * cohort / clients / hosts)  # of this round, and of the next
    elif host.memory.kept or cohort == clients:  # a client always comes to the same host
        held = everyone * (1 - (1 - cohort / clients) ** rounds) / hosts
    else:
        held = everyone * (1 - (1 - cohort / clients / hosts) ** rounds)
    blocks = source.kept_bytes(total(score.batches.split), len(source.examples(score.batches)))
    return int(held + (blocks / hosts if source.resident(score.batches) else 0))


def _one_batch(host: Host, work: ClientWork, shared: Tree) -> None:
    rows = work.batches.size or BLOCK
    stored = {name: column.to(host.device) for name, column in blank_columns(host.dataset.features, rows).items()}
    client = host.blank_client(rows)
    carry = work.start(shared, client)
    for batch in batches(stored, host.dataset.features, replace(work.batches, epochs=1, steps=1), 0):
        carry = work.step(shared, client, carry, batch)


def show_plan(
    fleet: PlanFleet,
    algorithm: Algorithm,
    state: Tree,
    cohort_of: Callable[[int], Cohort],
    rounds: int,
    score: ClientWork,
    console: Console,
) -> None:
    """Print what each rank will do in the first two rounds, and what that moves and holds."""
    ids = [cohort_of(round).ids for round in range(min(3, rounds))] + [NOBODY]
    planned = [fleet.plan(algorithm, state, cohort_of(round), ids[round + 1]) for round in range(min(2, rounds))]
    for number, plan in enumerate(planned, 1):
        per_rank = ", ".join(f"{rank}: {c} ({s})" for rank, (c, s) in enumerate(zip(plan.clients, plan.steps)))
        console.say(f"round {number}: clients (steps) by rank  {per_rank}")
        console.say(
            f"round {number}: {plan.clients.sum()} clients, {plan.steps.sum()} steps, "
            f"{plan.bytes_down} bytes down, {plan.bytes_up} bytes up"
        )
    server, host = expected_memory(fleet, algorithm, state, score, rounds)
    if fleet.comm.size == 1:
        console.say(f"memory: about {readable_bytes(server)} in this process")
    else:
        console.say(f"memory: about {readable_bytes(server)} on rank 0, {readable_bytes(host)} on each host")
    console.say("bytes are of training; the first round also describes its layout, and evaluation comes on top")
