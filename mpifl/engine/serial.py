"""One client at a time: the engine that always works, the fast one on a core, and the oracle of all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from mpifl.data.batches import batches
from mpifl.engine.clients import Clients, Visited, of_the_machine
from mpifl.engine.clock import Clock
from mpifl.tree import Tree, leaves, tree_map
from mpifl.work import Client, ClientWork, Upload


def keep_freed_memory() -> None:
    """Have glibc reuse freed blocks of up to 30 MiB instead of handing them back to the system.

    Freeing one such block raises its thresholds for good. Otherwise large temporaries are mapped and zeroed anew in
    every step: the EMNIST conv net's takes 2 % longer with sgd, 6 % with adam, 14 % with yogi.
    """
    torch.empty(30 << 20, dtype=torch.uint8)


def visit(work: ClientWork, shared: Tree, client: Client, batches: Iterable[Tree]) -> Upload:
    """Run start, a step per batch, and finish; returns the client's Upload."""
    carry = work.start(shared, client)
    for batch in batches:
        carry = work.step(shared, client, carry, batch)
    return work.finish(shared, client, carry)


def checked_visit(work: ClientWork, shared: Tree, client: Client, batches: Iterable[Tree]) -> Upload:
    """As `visit`, and raise AssertionError naming the leaf if the work wrote to shared, client or a batch."""
    fixed = {"shared": shared, "client": client._asdict()}
    before = _versions(fixed)
    carry = work.start(shared, client)
    for batch in batches:
        versions = _versions(batch)
        carry = work.step(shared, client, carry, batch)
        _compare(versions, _versions(batch), "batch")
    upload = work.finish(shared, client, carry)
    _compare(before, _versions(fixed), "read-only input")
    return upload


class Serial:
    """Visits clients in the order given; check: verify that works write only to their carry."""

    def __init__(self, clients: Clients, clock: Clock, check: bool = False) -> None:
        self.clients, self.clock = clients, clock
        self.visit = checked_visit if check else visit

    def visits(self, work: ClientWork, shared: Tree, ids: np.ndarray, given: Tree) -> Iterator[Visited]:
        """Yield a Visited for every client that has a batch; given: leaves (n, ...) for n ids."""
        for row, id in enumerate(ids.tolist()):
            self.clock.visit(id)
            try:
                visited = self._one(work, shared, id, tree_map(lambda leaf, row=row: leaf[row], given))
            except Exception as error:
                if of_the_machine(error):
                    raise
                visited = Visited([id], error=error)
            if visited:
                yield visited
        self.clock.visit(-1)

    def _one(self, work: ClientWork, shared: Tree, id: int, given: Tree) -> Visited | None:
        """Visit a client; None if it has no batch."""
        clients, batching = self.clients, work.batches
        with self.clock.during("load"):
            columns = clients.source.columns(batching, id)
            stored = len(next(iter(columns.values())))
            steps, n = int(batching.steps_of(stored)), int(batching.examples_used(stored))
            if steps == 0:
                return None
            key = clients.key(id)
            client = clients.one(id, key, n, given)
        with self.clock.during("train"):
            stream = batches(columns, clients.dataset.features, batching, key)
            upload = self.visit(work, shared, client, self.clock.beating(stream))
        return Visited([id], [n], [steps], upload)


def _versions(tree: Tree) -> dict[str, int]:
    return {name: leaf._version for name, leaf in leaves(tree)}


def _compare(before: dict[str, int], after: dict[str, int], what: str) -> None:
    written = [name for name in before if before[name] != after[name]]
    assert not written, f"a ClientWork wrote to its {what}: {', '.join(written)}; only the carry is donated"
