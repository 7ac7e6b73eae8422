"""K clients per launch: blocks of clients that are loaded, trained and handed on together.

A block is K clients side by side: every tensor of theirs has a leading axis (K, ...), and all take as many steps as
the one with the most. Clients are visited longest first, so that those of a block differ little. A client that has
taken its steps is set aside, and its lane computes on what nobody reads. Blocks are filled up to K by repeating their
last client, and batches to their full size by masked rows, so that a client's result does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpifl.config import UserError, is_of_memory
from mpifl.data.batches import blank_columns, moved
from mpifl.data.blocks import side_by_side
from mpifl.engine.clients import Clients, Visited, of_the_machine
from mpifl.engine.clock import Clock
from mpifl.engine.graph import Capture, captured, shapes
from mpifl.engine.together import first_line, loops_refused, together, visit_together
from mpifl.tree import Tree, leaves, tree_map
from mpifl.work import Batching, Client, ClientWork, Upload

MOST_AT_ONCE = 256
"""Clients in a block unless a job says otherwise: more no longer make a GPU faster."""
MOST_ON_A_CPU = 16
"""There a block saves nothing but launches."""
MOST_CAPTURED = 8
"""Works and shapes whose buffers are kept: a rank's share of a cohort varies, and K with it."""
MEMORY_SHARE = 0.4
"""Of a GPU's memory that is free at the start: other ranks and the allocator's gaps want some too."""


@dataclass
class _Block:
    """A block ready to run: its K clients and their batches, of which the first len(ids) count."""

    ids: list[int]
    examples: list[int]
    steps: list[int]
    clients: Client
    batches: Iterator[Tree]


class Batched:
    """Visits clients in blocks of K; they must be given longest first.

    at_once: K, or 0: as many as a try-out of the work says that memory allows. capture: a Capture of graph.py, to
    replay steps instead of calling them, or None. say: called with a line for people.
    """

    def __init__(
        self,
        clients: Clients,
        clock: Clock,
        say: Callable[[str], None],
        at_once: int = 0,
        capture: Capture | None = None,
    ) -> None:
        self.clients, self.clock, self.say, self.at_once, self.capture = clients, clock, say, at_once, capture
        self.device = clients.device
        self._mapped: dict[ClientWork, ClientWork] = {}
        self._captured: dict[tuple[Any, ...], ClientWork] = {}
        self._most: dict[ClientWork, int] = {}

    def visits(self, work: ClientWork, shared: Tree, ids: np.ndarray, given: Tree) -> Iterator[Visited]:
        """Yield a Visited for every block of clients that have a batch; given: leaves (n, ...) for n ids."""
        phase = self.clock.phase
        for left in self._alike(work, ids):
            size, ready, alone = self._size(work, len(left)), None, 0
            while len(left):
                rows = left[:1] if alone else left[:size]
                block = ready or self._attempt(self._load, work, ids, rows, given, size)
                upload = self._attempt(self._train, work, shared, block) if isinstance(block, _Block) else block
                if upload is None:
                    size, ready = self._halve(work, size), None
                    continue
                if isinstance(upload, Exception) and len(rows) > 1:  # whose it is shows one by one, with the same bits
                    ready, alone = None, len(rows)
                    self.clock.enter(phase)
                    continue
                left, alone, ready = left[len(rows) :], max(0, alone - 1), None
                if isinstance(upload, Exception):
                    yield Visited(ids[rows].tolist(), error=upload)
                    continue
                if len(left) and not alone:  # loaded while the GPU is at work on this one
                    coming = self._attempt(self._load, work, ids, left[:size], given, size)
                    ready = coming if isinstance(coming, _Block) else None
                    self.clock.enter(phase)
                with self.clock.during("train"):
                    if self.device.type == "cuda":
                        torch.cuda.current_stream(self.device).synchronize()
                    upload = upload._replace(memory=tree_map(lambda leaf: leaf.to("cpu"), upload.memory))
                yield Visited(block.ids, block.examples, block.steps, upload, stacked=True)
        self.clock.visit(-1)

    def try_out(self, work: ClientWork, shared: Tree, client: Client, slowly: bool) -> None:
        """Run two blank clients together: raises whatever forbids that, and finds how many there is memory for.

        client: a blank one, for `serial.visit`. slowly: whether operations may run client by client within a launch,
        where vmap knows no better.
        """
        features = self.clients.dataset.features
        size = _rows_of_batch(work.batches, self.clients.source.examples(work.batches))
        columns = {name: column.to(self.device) for name, column in blank_columns(features, size).items()}
        two = Client(*(tree_map(_twice, part) if isinstance(part, dict) else _twice(part) for part in client))
        before = _most_allocated(self.device, reset=True)
        batches = side_by_side([columns] * 2, features, Batching(size=size), [0, 0], size)
        with loops_refused(not slowly):
            visit_together(self._of_many(work), shared, two, batches, [1, 1])
        needed, most = _most_allocated(self.device) - before, MOST_ON_A_CPU
        if needed:
            free, _ = torch.cuda.mem_get_info(self.device)
            most = max(1, min(MOST_AT_ONCE, int(MEMORY_SHARE * free / (needed / 2))))
        self._most[work] = self.at_once or most

    def _alike(self, work: ClientWork, ids: np.ndarray) -> list[np.ndarray]:
        """Places among ids of clients that have a batch, in groups whose scratch has the same leaves."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for row in np.flatnonzero(work.batches.steps_of(self.clients.source.examples(work.batches)[ids])).tolist():
            kept = tuple(name for name, _ in leaves(self.clients.scratch(int(ids[row]))))
            groups.setdefault(kept, []).append(row)
        return [np.asarray(group) for group in groups.values()]

    def _size(self, work: ClientWork, clients: int) -> int:
        """K for so many clients: as few blocks as possible, and none much larger than its share."""
        most = self._most[work]
        share = -(-clients // -(-clients // most))
        return most if self.at_once else min(most, share if share <= 16 else -(-share // 8) * 8)

    def _halve(self, work: ClientWork, size: int) -> int:
        if size == 1:
            raise UserError("one client alone does not fit in memory; lower the batches' size")
        self._most[work] = size // 2
        self._captured.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        change = f"{size} clients at once, {size // 2} from here on"
        self.say(f"out of memory with {change}: the digest is no longer comparable with that of other runs")
        return size // 2

    def _load(self, work: ClientWork, ids: np.ndarray, rows: np.ndarray, given: Tree, size: int) -> _Block:
        """What a block of these rows of ids needs, filled up to `size` clients."""
        clients, batching = self.clients, work.batches
        lanes = np.minimum(np.arange(size), len(rows) - 1)
        chosen = ids[rows].tolist()
        self.clock.visit(chosen[0])
        with self.clock.during("load"):
            columns = [clients.source.columns(batching, id) for id in chosen]
            stored = np.asarray([len(next(iter(one.values()))) for one in columns])
            steps, used = batching.steps_of(stored), batching.examples_used(stored)
            keys = np.asarray([clients.key(id) for id in chosen], np.uint64)
            largest = _rows_of_batch(batching, clients.source.examples(batching) if batching.size else stored)
            padded = [columns[lane] for lane in lanes.tolist()]
            batches = side_by_side(padded, clients.dataset.features, batching, keys[lanes].tolist(), largest)
            places = moved(torch.from_numpy(rows[lanes]), self.device)
            own = tree_map(lambda leaf: leaf[places], given)
            visitors = clients.together(ids[rows[lanes]].tolist(), keys[lanes], used[lanes], own)
        return _Block(chosen, used.tolist(), steps.tolist(), visitors, batches)

    def _train(self, work: ClientWork, shared: Tree, block: _Block) -> Upload:
        with self.clock.during("train"):
            size, batches = len(block.clients.id), self.clock.beating(block.batches)
            run = self._of_many(work)
            if self.capture is not None and work.batches.size:  # a batch of all examples has another shape each time
                first = next(batches)
                run, batches = self._of_shapes(run, shared, block.clients, first), chain([first], batches)
            steps = block.steps + block.steps[-1:] * (size - len(block.steps))
            return visit_together(run, shared, block.clients, batches, steps)

    def _of_many(self, work: ClientWork) -> ClientWork:
        """The work as a function of K clients."""
        if work not in self._mapped:
            self._mapped[work] = together(work, self.device)
        return self._mapped[work]

    def _of_shapes(self, work: ClientWork, shared: Tree, clients: Client, batch: Tree) -> ClientWork:
        """The work captured for trees of these shapes."""
        key = (work, *shapes(shared, clients._asdict(), batch))
        if key not in self._captured:
            if len(self._captured) == MOST_CAPTURED:
                del self._captured[next(iter(self._captured))]
            try:
                self._captured[key] = captured(work, shared, clients, batch, self.capture)
            except RuntimeError as error:
                if is_of_memory(error):
                    raise
                self.say(f"works are called step by step: one cannot be captured ({first_line(error)})")
                self.capture = None
                return work
        return self._captured[key]

    def _attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns, None if there is no memory for it, or the exception that a client is to blame for.

        After that the clock stays where it happened, to be reported.
        """
        phase = self.clock.phase
        try:
            return function(*arguments)
        except Exception as error:
            if not is_of_memory(error):
                if of_the_machine(error):
                    raise
                return error
        self.clock.enter(phase)
        return None


def _rows_of_batch(batching: Batching, examples: np.ndarray) -> int:
    """Rows of a full batch, or all that the largest of these clients fills."""
    largest = int(batching.examples_used(examples.max(initial=1)))
    return min(batching.size, largest) if batching.size else largest


def _most_allocated(device: torch.device, reset: bool = False) -> int:
    """Most bytes that tensors took on a GPU at once since the last reset, 0 on the CPU."""
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)


def _twice(leaf: Tensor) -> Tensor:
    return torch.stack([leaf, leaf])
