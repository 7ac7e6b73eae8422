"""A host answers the server's asks for the clients it was given: it has an engine visit them, and sums."""

from __future__ import annotations

import resource
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpifl.config import Engine, UserError, choice
from mpifl.data.batches import batches, blank_columns
from mpifl.engine.batched import Batched
from mpifl.engine.clients import Clients, Visited
from mpifl.engine.clock import Clock
from mpifl.engine.graph import as_cuda_graph
from mpifl.engine.serial import Serial, keep_freed_memory, visit
from mpifl.engine.store import ClientMemory
from mpifl.engine.together import first_line, refusing_module
from mpifl.tree import Layout, Tree, leaves, one_row, tree_map
from mpifl.uplink.exact import Accumulator, Wire
from mpifl.work import Client, ClientWork, Upload


@dataclass
class Ask:
    """One question to one rank: which work, for which of its clients, with what.

    work: index into the works. ids: (n,) int64. given: leaves (n, ...). limits: the sum's, (leaves,).
    clients: size of the whole cohort over all ranks. ahead: (m,) int64 clients that this rank will host next round.
    room: bytes -> zeroed memory for the sums, (bytes,) uint8; None: where they lie does not matter.
    """

    work: int
    round: int
    ids: np.ndarray
    shared: Tree
    limits: np.ndarray
    clients: int
    given: Tree = field(default_factory=dict)
    attempt: int = 0
    ahead: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    room: Callable[[int], np.ndarray] | None = None


class Host:
    """The clients of one rank, and the engine that runs their works.

    works: everything that may be asked, in the same order on every rank. exact: whether sums follow the law of the
    same bits. engine: the job's; "auto" goes on with another engine where a work does not run in the one that pays.
    tolerant: whether a client whose visit raises is left out of an answer; `raised` is the first one of the latest, and
    what it raised. say: called with a line for people (default: to stderr).
    """

    def __init__(
        self,
        works: tuple[ClientWork, ...],
        dataset: Any,
        memory: ClientMemory,
        seed: int,
        clock: Clock,
        rank: int = 0,
        ranks: int = 1,
        device: str | torch.device = "cpu",
        budget: int = 512 << 20,
        exact: bool = True,
        engine: Engine = Engine(),  # noqa: B008 - immutable
        tolerant: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        for work in works:
            split = choice(work.batches.split, dataset.splits, "split of the dataset")
            if work.batches.of == "client" and split != "train" and not dataset.aligned(split):
                raise UserError(
                    f"split '{split}' does not have the clients of split 'train', who are asked to visit it"
                )
        self.works, self.dataset, self.memory, self.seed, self.clock = works, dataset, memory, seed, clock
        self.rank, self.ranks, self.exact, self.tolerant = rank, ranks, exact, tolerant
        self.raised: tuple[int, str] | None = None
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.clients = Clients(dataset, memory, seed, self.device, budget)
        self.source = self.clients.source
        self.asked_for, self.say = engine.name, say or self._say
        self.serial = Serial(self.clients, clock, engine.check)
        self.batched = _batched(self.clients, clock, engine, lambda line: self.say(line))
        keep_freed_memory()
        self.asked_to_stop: Callable[[], bool] = lambda: False
        self._alone: set[ClientWork] = set()
        self._wires: dict[tuple[int, Layout, Layout], Wire] = {}
        self._blank_scratch: Tree = {}

    def settle(self, round: int, accepted: int) -> None:
        """Before an ask of `round`: make rows of accepted rounds current, forget those of an abandoned one."""
        self.clients.settle(round, accepted)

    def wire(self, work: int, shared: Tree, given: Tree) -> Wire:
        """Find what this work's uploads look like by a blank visit on zero examples."""
        key = (work, Layout.of(shared), Layout.of(given))
        if key not in self._wires:
            self._wires[key] = Wire.of(self._blank_visit(work, shared, given), self.ranks, self.exact)
        return self._wires[key]

    def answer(self, ask: Ask) -> list[Tensor]:
        """Visit the clients and return the buffers to reduce."""
        self.clock.round = ask.round
        work = self.works[ask.work]
        wire = self.wire(ask.work, ask.shared, one_row(ask.given))
        memory = torch.from_numpy(ask.room(wire.bytes)) if ask.room else None
        total = Accumulator(wire, ask.limits, ask.clients, self.rank, memory)
        before, phase, self.raised = dict(self.clock.seconds), self.clock.phase, None
        examples = steps = 0
        for visited in self._visits(ask):
            if visited.error is not None:
                if not self.tolerant or work.batches.of != "client":
                    raise visited.error
                self.clock.enter(phase)
                self._leave_out(visited.ids[0], visited.error, total)
                continue
            with self.clock.during("sum"):
                ids, upload = visited.ids, visited.upload
                counts = total.add_block(ids, upload) if visited.stacked else [total.add(ids[0], upload)]
                for number, counted in enumerate(counts):
                    if counted:
                        examples, steps = examples + visited.examples[number], steps + visited.steps[number]
                    if work.batches.of == "client":
                        if counted:
                            self.clients.keep(ids[number], visited.upload_of(number))
                        else:
                            self.clients.exclude(ids[number])
        spent = {
            phase: self.clock.seconds.get(phase, 0.0) - before.get(phase, 0.0) for phase in ("load", "train", "sum")
        }
        total.report(
            busy=sum(spent.values()),
            **spent,
            steps=steps,
            examples=examples,
            resident_bytes=resident_bytes(),
            stop=self.asked_to_stop(),
        )
        return total.buffers

    def _leave_out(self, id: int, error: Exception, total: Accumulator) -> None:
        self.clients.exclude(id)
        total.refuse(id)
        if self.raised is None or id < self.raised[0]:
            self.raised = id, _in_short(error)

    def rows(self, ask: Ask) -> tuple[np.ndarray, np.ndarray]:
        """Visit the clients and return (ids (n,) int64, per-client [weight | stats] (n, S) float64) unsummed."""
        width = sum(self.wire(ask.work, ask.shared, {}).small)
        ids, rows = [], []
        for visited in self._visits(ask):
            if visited.error is not None:
                raise visited.error
            for number, id in enumerate(visited.ids):
                upload = visited.upload_of(number)
                values = [upload.weight, *(leaf for _, leaf in leaves(upload.stats))]
                rows.append(torch.cat([v.reshape(-1).double().cpu() for v in values]).numpy())
                ids.append(id)
        return np.asarray(ids, dtype=np.int64), np.asarray(rows, dtype=np.float64).reshape(len(ids), width)

    def blank_client(self, examples: int, given: Tree | None = None) -> Client:
        """A client without a past, for visits that only find shapes or sizes."""
        return self.clients.one(-1, 0, examples, given or {})._replace(scratch=self._blank_scratch)

    def _visits(self, ask: Ask) -> Iterator[Visited]:
        """Have an engine visit the clients of an ask."""
        self.clients.turn(ask.round, ask.attempt)
        work, ids = self.works[ask.work], ask.ids
        shared, given = (tree_map(lambda leaf: leaf.to(self.device), tree) for tree in (ask.shared, ask.given))
        engine = self.batched if self._runs_batched(work) else self.serial
        excluded = self.clients.excluded if work.batches.of == "client" else ()
        if excluded or engine is self.batched:
            order = np.flatnonzero(~np.isin(ids, list(excluded)))
            if engine is self.batched:
                order = order[self.clients.longest_first(work.batches, ids[order])]
            ids, given = ids[order], tree_map(lambda leaf: leaf[torch.as_tensor(order, device=leaf.device)], given)
        if len(ask.ahead):
            self.source.prefetch(work.batches, np.concatenate([ids, ask.ahead]))
        return engine.visits(work, shared, ids, given)

    def _runs_batched(self, work: ClientWork) -> bool:
        """Blocks of a split, and all of it, are large enough one by one."""
        return self.batched is not None and work.batches.of == "client" and work not in self._alone

    def _blank_visit(self, work: int, shared: Tree, given: Tree) -> Upload:
        chosen = self.works[work]
        one_batch = replace(chosen.batches, size=0, epochs=1, steps=1, drop_last=False, shuffle=False)
        columns = {k: v.to(self.device) for k, v in blank_columns(self.dataset.features).items()}
        client, zeros = self.blank_client(2, tree_map(self._zeros, given)), tree_map(self._zeros, shared)
        stream = batches(columns, self.dataset.features, replace(one_batch, max_examples=None, max_steps=None), 0)
        upload = visit(chosen, zeros, client, stream)
        if self._runs_batched(chosen):
            self._try_batched(chosen, zeros, client)
        # What one work keeps for a later one of the round has its shape from here; asks come in one order.
        self._blank_scratch = self._blank_scratch | upload.scratch
        return upload

    def _try_batched(self, work: ClientWork, shared: Tree, client: Client) -> None:
        """Note a work that does not run on several clients at once; UserError if the job wants just that."""
        try:
            self.batched.try_out(work, shared, client, slowly=self.asked_for != "auto")
        except Exception as error:  # the same visit has just succeeded one by one: it is vmap that refuses
            who = refusing_module(error) or "a work"
            what = f"{who} cannot run on several clients at once ({first_line(error)})"
            if self.asked_for != "auto":
                raise UserError(
                    f'engine.name is "{self.asked_for}", but {what}; use engine.name = "serial" or "auto"'
                ) from error
            self.say(f"{what}: clients train one by one")
            self._alone.add(work)

    def _say(self, line: str) -> None:
        print(f"rank {self.rank}: {line}", file=sys.stderr, flush=True)

    def _zeros(self, leaf: Tensor) -> Tensor:
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=self.device)


def _batched(clients: Clients, clock: Clock, engine: Engine, say: Callable[[str], None]) -> Batched | None:
    """The engine that trains several clients at once, if the job wants it, or the device."""
    on_gpu = clients.device.type == "cuda"
    name = engine.name if engine.name != "auto" else "graph" if on_gpu and not engine.check else "serial"
    if name == "serial":
        return None
    capture = as_cuda_graph if name == "graph" else None
    return Batched(clients, clock, say, engine.clients_at_once, capture)


def _in_short(error: Exception) -> str:
    """What was raised, and where, in one line."""
    *_, last = traceback.extract_tb(error.__traceback__)
    what = textwrap.shorten(f"{type(error).__name__}: {first_line(error)}", 200)
    return f"{what} ({Path(last.filename).name}, line {last.lineno})"


def resident_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
