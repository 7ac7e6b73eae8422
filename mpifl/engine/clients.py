"""The clients of one rank as works see them: their rows, their keys, and what they keep between visits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpifl.config import UserError, is_of_memory
from mpifl.data.batches import moved
from mpifl.data.source import Source
from mpifl.engine.store import ClientMemory
from mpifl.rand import as_tensor, fold
from mpifl.tree import Tree, tree_map
from mpifl.work import Batching, Client, Upload

_OF_A_GPU = ("CUDA error", "cuDNN error")


class Visited(NamedTuple):
    """Visits that are over: of one client, or of a block, whose upload's leaves are (K, ...) with K >= len(ids).

    error: what a visit to one client raised, in place of all but its id.
    """

    ids: list[int]
    examples: list[int] = []  # noqa: RUF012 - never written to
    steps: list[int] = []  # noqa: RUF012
    upload: Upload | None = None
    stacked: bool = False
    error: Exception | None = None

    def upload_of(self, number: int) -> Upload:
        """The upload of one of the clients, by its place in `ids`."""
        return on_leaves(lambda leaf: leaf[number], self.upload) if self.stacked else self.upload


class Clients:
    """All that a rank knows of its clients.

    budget: bytes for their data. scratch is of the round, and seen by later asks only: see `turn`.
    """

    def __init__(self, dataset: Any, memory: ClientMemory, seed: int, device: torch.device, budget: int) -> None:
        self.dataset, self.memory, self.seed, self.device = dataset, memory, seed, device
        self.source = Source(dataset, budget, device)
        self.round = -1
        self._scratch: dict[int, Tree] = {}
        self._fresh_scratch: dict[int, Tree] = {}
        self.excluded: set[int] = set()
        self._fresh_excluded: set[int] = set()

    def settle(self, round: int, accepted: int) -> None:
        """Before an ask of `round`: make rows of accepted rounds current, forget those of an abandoned one."""
        if accepted >= self.round:
            self.memory.commit()
        elif round > self.round:
            self.memory.discard()

    def turn(self, round: int, attempt: int) -> None:
        """Bring scratch, and who is excluded, up to an ask: by earlier asks of the round, not a first attempt at it."""
        if attempt == 0:
            self._scratch |= self._fresh_scratch
            self.excluded |= self._fresh_excluded
        if round != self.round:
            self._scratch, self.excluded = {}, set()
            self.round = round
        self._fresh_scratch, self._fresh_excluded = {}, set()

    def longest_first(self, batching: Batching, ids: np.ndarray) -> np.ndarray:
        """In which order to visit ids, (n,) int64 places among them: by steps, then examples, then id."""
        examples = self.source.examples(batching)[ids]
        return np.lexsort((ids, -examples, -batching.steps_of(examples)))

    def key(self, id: int) -> int:
        """The key of this round's visit to a client."""
        return fold(self.seed, "visit", max(self.round, 0), id)

    def scratch(self, id: int) -> Tree:
        """What a client kept from earlier asks of the round, {} for nothing."""
        return self._scratch.get(id, {})

    def one(self, id: int, key: int, n: int, given: Tree) -> Client:
        """A client for a visit with `key` to `n` examples."""
        row = self.memory.read([id]) if self.memory.kept else {}
        return Client(
            id=torch.tensor(id, device=self.device),
            key=as_tensor(key).to(self.device),
            n=torch.tensor(float(n), device=self.device),
            memory=tree_map(lambda leaf: leaf[0].to(self.device), row),
            visits=torch.tensor(self.memory.visits(id), device=self.device),
            scratch=self.scratch(id),
            given=given,
        )

    def together(self, ids: Sequence[int], keys: Sequence[int], n: Sequence[int], given: Tree) -> Client:
        """Clients for visits side by side: every leaf, also of given, is (K, ...); their scratch has one layout."""
        rows = self.memory.read(ids) if self.memory.kept else {}
        scratch = [self.scratch(id) for id in ids]
        return Client(
            id=self._tensor(ids),
            key=self._tensor(np.asarray(keys, np.uint64).view(np.int64)),
            n=self._tensor(np.asarray(n, np.float32)),
            memory=tree_map(lambda leaf: moved(leaf, self.device), rows),
            visits=self._tensor([self.memory.visits(id) for id in ids]),
            scratch=tree_map(lambda *leaf: torch.stack(leaf), *scratch),
            given=given,
        )

    def keep(self, id: int, upload: Upload) -> None:
        """Keep what a client's upload says stays here."""
        if self.memory.kept and upload.memory:
            self.memory.stage(id, upload.memory)
        if upload.scratch:
            self._fresh_scratch[id] = tree_map(torch.clone, upload.scratch)  # `shared` is gone by the next ask

    def exclude(self, id: int) -> None:
        """Have a client keep what it had before the round, whatever earlier asks staged, and no part in later ones."""
        self.memory.unstage(id)
        self._fresh_scratch.pop(id, None)
        self._fresh_excluded.add(id)

    def _tensor(self, values: Any) -> Tensor:
        return moved(torch.as_tensor(values), self.device)


def of_the_machine(error: Exception) -> bool:
    """Whether an error is not to be blamed on the client that was visited: memory, files, a GPU that is no longer fit.

    What raises on one machine and not on another must end the job, as its result would depend on who hosts whom.
    """
    of_a_gpu = isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_A_GPU)
    return of_a_gpu or is_of_memory(error) or isinstance(error, UserError | OSError)


def on_leaves(function: Callable[[Tensor], Tensor], upload: Upload) -> Upload:
    """An upload with `function` applied to every leaf."""
    return Upload(*(tree_map(function, part) if isinstance(part, dict) else function(part) for part in upload))
