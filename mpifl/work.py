"""The contracts: what a client does, what leaves it, what the server asks. Everything else implements or calls these.

Shape letters used across the package: P parameters, U upload, B batch, K clients in a block, R ranks.
Three lifetimes, three names: `shared` (all clients, one copy), `client` (this client, this round), `carry`
(this step). `carry` is donated: a step may overwrite it. `shared`, `client` and `batch` are read-only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpifl.config import require_count
from mpifl.tree import Tree, tree_map


@dataclass(frozen=True)
class Batching:
    """How a client's examples become batches; its options are the job file's.

    size: examples per batch (0: one batch of everything). epochs: passes over the data, or steps: exactly
    this many batches, going round again as needed. shuffle: a new order each epoch. drop_last: leave out a
    short last batch. max_examples: use only the first so many of a client's examples (shuffled once if
    `shuffle`). max_steps: stop after so many batches. split: which split of the dataset. of: whose rows:
    "client" the client's own; "block" rows [id * size, (id + 1) * size) of the whole split, so that any rank
    may score a piece of it; "all" the whole split for every id.
    """

    size: int = 0
    epochs: int = 1
    steps: int | None = None
    shuffle: bool = True
    drop_last: bool = False
    max_examples: int | None = None
    max_steps: int | None = None
    split: str = "train"
    of: Literal["client", "block", "all"] = "client"

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for name, least in (("size", 0), ("epochs", 1), ("steps", 1), ("max_examples", 1), ("max_steps", 1)):
            value = getattr(self, name)
            if value is not None:
                require_count(f"batches {name}", value, least)

    def examples_used(self, examples: np.ndarray | int) -> np.ndarray | int:
        """Examples of a client that take part, from the number it has."""
        return examples if self.max_examples is None else np.minimum(examples, self.max_examples)

    def steps_of(self, examples: np.ndarray | int) -> np.ndarray:
        """Batches a client with so many examples runs, int64; 0 for a client that runs none."""
        n = np.asarray(self.examples_used(examples), dtype=np.int64)
        size = np.maximum(n, 1) if self.size == 0 else np.int64(self.size)
        per_epoch = n // size if self.drop_last else -(-n // size)
        steps = per_epoch * self.epochs if self.steps is None else np.where(per_epoch > 0, self.steps, 0)
        return steps if self.max_steps is None else np.minimum(steps, self.max_steps)


class Client(NamedTuple):
    """One visit to one client; under vmap every field gains a leading client axis.

    id: () int64 index in the dataset. key: () int64 random key of (seed, round, client). n: () float32
    examples that take part. memory: what it kept last time, or the blank memory. visits: () int64, 0 at the
    first participation. scratch: what it kept from an earlier ask of this round. given: inputs from the
    server for this client alone.
    """

    id: Tensor
    key: Tensor
    n: Tensor
    memory: Tree
    visits: Tensor
    scratch: Tree
    given: Tree


class Upload(NamedTuple):
    """What a client returns: `update` and `weight` travel, `memory` and `scratch` stay, `stats` are plain sums.

    update: leaves are multiplied by weight, (), and summed over clients. memory: for the client's next round.
    scratch: for the next ask of this round. stats: instruments, summed unweighted, never transformed.
    """

    update: Tree
    weight: Tensor
    memory: Tree = {}  # noqa: RUF012 - never written to
    scratch: Tree = {}  # noqa: RUF012
    stats: Tree = {}  # noqa: RUF012


class ClientWork(NamedTuple):
    """What one client does: start -> step per batch -> finish, on tensors without a client axis.

    start: (shared, client) -> carry. step: (shared, client, carry, batch) -> carry. finish: (shared, client,
    carry) -> Upload. A client without a batch is never started: the host leaves it out, uncounted.
    """

    start: Callable[[Tree, Client], Tree]
    step: Callable[[Tree, Client, Tree, Tree], Tree]
    finish: Callable[[Tree, Client, Tree], Upload]
    batches: Batching


@dataclass(frozen=True)
class Sums:
    """Sums over the counted clients of one ask: weight * update, weight, number of clients, stats (float64).

    stats: floats, and nested lists of them for leaves that have axes.
    """

    update: Tree
    weight: float
    count: int
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Tree:
        """sum(weight * update) / sum(weight) as float32 leaves; zeros when the total weight is 0."""
        weight = self.weight or math.inf
        return tree_map(lambda leaf: (leaf / weight).to(torch.float32), self.update)


class Cohort:
    """This round's clients as the server sees them: constants of the dataset, and questions to ask.

    round: 0-based. ids: (C,) int64 sampled clients. population: clients of the dataset. total_weight: the
    sum of all their weights (examples, or clients when weights are uniform). fraction and weight_fraction
    describe the clients *counted* by the latest ask: their number / population, their weight / total_weight.
    """

    def __init__(
        self,
        round: int,
        ids: np.ndarray,
        population: int,
        total_weight: float,
        ask: Callable[[ClientWork, np.ndarray, Tree | None, Tree], Sums],
    ) -> None:
        self.round = round
        self.ids = ids
        self.population = population
        self.total_weight = total_weight
        self.latest = Sums({}, 0.0, 0)
        self._ask = ask

    @property
    def fraction(self) -> float:
        """|S| / N over counted clients."""
        return self.latest.count / self.population

    @property
    def weight_fraction(self) -> float:
        """W_S / W over counted clients."""
        return self.latest.weight / self.total_weight

    def sum(self, work: ClientWork, given: Tree | None = None, ids: Sequence[int] | None = None, **shared: Any) -> Sums:
        """Ask every client of the cohort (or of `ids`) to do `work`; shared: the tensors all of them see.

        given: leaves of shape (C, ...), row i for the i-th id.
        """
        chosen = self.ids if ids is None else np.asarray(ids, dtype=np.int64)
        self.latest = self._ask(work, chosen, given, shared)
        return self.latest

    def mean(
        self, work: ClientWork, given: Tree | None = None, ids: Sequence[int] | None = None, **shared: Any
    ) -> Tree:
        """`sum(...)`, divided by the total weight; float32 leaves."""
        return self.sum(work, given, ids, **shared).mean


class Personal(NamedTuple):
    """How to score a client that has a vector of its own: its cluster's, or a part kept in its memory.

    shared: state -> what the works see. theta: (shared, client) -> (P,). before: works asked first, whose
    scratch `theta` may read.
    """

    shared: Callable[[Tree], Tree]
    theta: Callable[[Tree, Client], Tensor]
    before: tuple[ClientWork, ...] = ()


class Algorithm(NamedTuple):
    """A federated method: server state and rounds, written against a Cohort; see mpifl/algorithms for examples.

    init: theta0 (P,) -> state. round: (state, cohort) -> new state; the old one stays as it was. works: all a
    host may be asked, the one that trains last (its examples are a client's weight). models: state -> the vectors
    that are exported and scored, {"model": theta} or one per cluster. memory: theta0 -> a client's state before its
    first visit ({}: none is kept). weighting: what Upload.weight is. personal: how a client is scored, where that
    needs more than a vector for all. elementwise: whether `init` and `round` treat every coordinate of vectors (P,) by
    itself, so that a rank may hold a slice of each.
    """

    init: Callable[[Tensor], Tree]
    round: Callable[[Tree, Cohort], Tree]
    works: tuple[ClientWork, ...]
    models: Callable[[Tree], dict[str, Tensor]]
    memory: Callable[[Tensor], Tree] = lambda theta: {}
    weighting: Literal["examples", "uniform"] = "examples"
    personal: Personal | None = None
    elementwise: bool = False
