"""A host answers the server's asks for the clients it was given: plan, load, train, sum."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpifl.config import choice
from mpifl.data.batches import batches, blank_columns
from mpifl.data.source import Source
from mpifl.engine.clock import Clock
from mpifl.engine.serial import checked_visit, keep_freed_memory, visit
from mpifl.engine.store import ClientMemory
from mpifl.rand import as_tensor, fold
from mpifl.tree import Layout, Tree, leaves, one_row, tree_map
from mpifl.uplink.exact import Accumulator, Wire
from mpifl.work import Client, ClientWork, Upload


@dataclass
class Ask:
    """One question to one rank: which work, for which of its clients, with what.

    work: index into the works. ids: (n,) int64. given: leaves (n, ...). limits: the sum's, (leaves,).
    clients: size of the whole cohort over all ranks. ahead: (m,) int64 clients that this rank will host next round.
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


class Host:
    """The clients of one rank: their data, their memory, and the engine that runs their works.

    works: everything that may be asked, in the same order on every rank. check: verify that works write only
    to their carry. exact: whether sums follow the law of the same bits.
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
        check: bool = False,
    ) -> None:
        for work in works:
            choice(work.batches.split, dataset.splits, "split of the dataset")
        self.works, self.dataset, self.memory, self.seed, self.clock = works, dataset, memory, seed, clock
        self.rank, self.ranks, self.exact = rank, ranks, exact
        self.device = torch.device(device)
        self.source = Source(dataset, budget, self.device)
        self.visit = checked_visit if check else visit
        keep_freed_memory()
        self.scratch: dict[int, Tree] = {}
        self.fresh_scratch: dict[int, Tree] = {}
        self.round = -1
        self._wires: dict[tuple[int, Layout, Layout], Wire] = {}
        self._blank_scratch: Tree = {}

    def settle(self, round: int, accepted: int) -> None:
        """Before an ask of `round`: make rows of accepted rounds current, forget those of an abandoned one."""
        if accepted >= self.round:
            self.memory.commit()
        elif round > self.round:
            self.memory.discard()

    def wire(self, work: int, shared: Tree, given: Tree) -> Wire:
        """Find what this work's uploads look like by a blank visit on zero examples."""
        key = (work, Layout.of(shared), Layout.of(given))
        if key not in self._wires:
            self._wires[key] = Wire.of(self._blank_visit(work, shared, given), self.ranks, self.exact)
        return self._wires[key]

    def answer(self, ask: Ask) -> list[Tensor]:
        """Visit the clients one by one and return the buffers to reduce."""
        self._turn(ask)
        self.clock.round = ask.round
        work = self.works[ask.work]
        if len(ask.ahead):
            self.source.prefetch(work.batches, np.concatenate([ask.ids, ask.ahead]))
        wire = self.wire(ask.work, ask.shared, one_row(ask.given))
        total = Accumulator(wire, ask.limits, ask.clients, self.rank)
        shared, given = (tree_map(lambda leaf: leaf.to(self.device), tree) for tree in (ask.shared, ask.given))
        before = dict(self.clock.seconds)
        examples = steps = 0
        for row, id in enumerate(ask.ids.tolist()):
            self.clock.visit(id)
            upload, n, ran = self._visit(work, shared, id, tree_map(lambda leaf, row=row: leaf[row], given))
            if upload is None:
                continue
            with self.clock.during("sum"):
                if not total.add(id, upload):
                    self._forget(id)
                    continue
                examples, steps = examples + n, steps + ran
                if work.batches.of == "client":
                    self._keep(id, upload)
        self.clock.visit(-1)
        spent = {
            phase: self.clock.seconds.get(phase, 0.0) - before.get(phase, 0.0) for phase in ("load", "train", "sum")
        }
        total.report(
            busy=sum(spent.values()),
            **spent,
            steps=steps,
            examples=examples,
            resident_bytes=resident_bytes(),
        )
        return total.buffers

    def _turn(self, ask: Ask) -> None:
        """Bring scratch up to this ask: of earlier asks of the round, not of a first attempt at this one."""
        if ask.attempt == 0:
            self.scratch |= self.fresh_scratch
        if ask.round != self.round:
            self.scratch = {}
            self.round = ask.round
        self.fresh_scratch = {}

    def rows(self, ask: Ask) -> tuple[np.ndarray, np.ndarray]:
        """Visit the clients and return (ids (n,) int64, per-client [weight | stats] (n, S) float64) unsummed."""
        self._turn(ask)
        work = self.works[ask.work]
        width = sum(self.wire(ask.work, ask.shared, {}).small)
        shared = tree_map(lambda leaf: leaf.to(self.device), ask.shared)
        ids, rows = [], []
        for id in ask.ids.tolist():
            self.clock.visit(id)
            upload, _, _ = self._visit(work, shared, id, {})
            if upload is not None:
                values = [upload.weight, *(leaf for _, leaf in leaves(upload.stats))]
                rows.append(torch.cat([v.reshape(-1).double().cpu() for v in values]).numpy())
                ids.append(id)
        self.clock.visit(-1)
        return np.asarray(ids, dtype=np.int64), np.asarray(rows, dtype=np.float64).reshape(len(ids), width)

    def blank_client(self, examples: int, given: Tree | None = None) -> Client:
        """A client without a past, for visits that only find shapes or sizes."""
        return self._client(-1, 0, examples, given or {})._replace(scratch=self._blank_scratch)

    def _visit(self, work: ClientWork, shared: Tree, id: int, given: Tree) -> tuple[Upload | None, int, int]:
        """Run one client; returns (upload, examples, steps), upload None for a client without a batch."""
        batching = work.batches
        with self.clock.during("load"):
            columns = self.source.columns(batching, id)
            stored = len(next(iter(columns.values())))
            steps, n = int(batching.steps_of(stored)), int(batching.examples_used(stored))
            if steps == 0:
                return None, 0, 0
            key = fold(self.seed, "visit", max(self.round, 0), id)
            client = self._client(id, key, n, given)
        with self.clock.during("train"):
            stream = batches(columns, self.dataset.features, batching, key)
            return self.visit(work, shared, client, stream), n, steps

    def _client(self, id: int, key: int, n: int, given: Tree) -> Client:
        row = self.memory.read([id]) if self.memory.kept else {}
        return Client(
            id=torch.tensor(id, device=self.device),
            key=as_tensor(key).to(self.device),
            n=torch.tensor(float(n), device=self.device),
            memory=tree_map(lambda leaf: leaf[0].to(self.device), row),
            visits=torch.tensor(self.memory.visits(id), device=self.device),
            scratch=self.scratch.get(id, {}),
            given=given,
        )

    def _keep(self, id: int, upload: Upload) -> None:
        if self.memory.kept and upload.memory:
            self.memory.stage(id, upload.memory)
        if upload.scratch:
            self.fresh_scratch[id] = upload.scratch

    def _forget(self, id: int) -> None:
        """An excluded client keeps what it had before the round, whatever earlier asks staged."""
        self.memory.unstage(id)
        self.fresh_scratch.pop(id, None)

    def _blank_visit(self, work: int, shared: Tree, given: Tree) -> Upload:
        chosen = self.works[work]
        one_batch = replace(chosen.batches, size=0, epochs=1, steps=1, drop_last=False, shuffle=False)
        columns = {k: v.to(self.device) for k, v in blank_columns(self.dataset.features).items()}
        client = self.blank_client(2, tree_map(self._zeros, given))
        stream = batches(columns, self.dataset.features, replace(one_batch, max_examples=None, max_steps=None), 0)
        upload = visit(chosen, tree_map(self._zeros, shared), client, stream)
        # What one work keeps for a later one of the round has its shape from here; asks come in one order.
        self._blank_scratch = self._blank_scratch | upload.scratch
        return upload

    def _zeros(self, leaf: Tensor) -> Tensor:
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=self.device)


def resident_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
