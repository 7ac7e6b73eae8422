"""Scores of a state over the fleet: central splits in fixed blocks, clients one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mpifl.fleet import Fleet
from mpifl.measure import BLOCK, Metric, means, ratios, scoring
from mpifl.model import Model
from mpifl.rand import fold, sample
from mpifl.tree import Tree
from mpifl.work import Algorithm, ClientWork

SAMPLED_BLOCKS = 64
"""At least so many blocks are a sample of a split."""


@dataclass(frozen=True)
class Scorer:
    """The works that score, to be appended to an algorithm's own; every rank builds the same."""

    central: ClientWork
    clients: ClientWork
    personal: ClientWork | None
    split: str
    client_split: str
    blocks: np.ndarray

    @staticmethod
    def of(
        algorithm: Algorithm,
        model: Model,
        metrics: dict[str, Metric],
        dataset: Any,
        rows: int = 0,
        seed: int = 0,
        size: int = BLOCK,
    ) -> Scorer:
        """Score on split "test" if it has rows, else on "train"; a client on its own test rows if it has any.

        size: rows that are scored at once. rows: score about so many (0: all), in blocks that are a function of the
        seed; small ones, as the rows of a split often lie in the order of classes or clients.
        """
        block = min(size, max(1, rows // SAMPLED_BLOCKS)) if rows else size
        split = "test" if "test" in dataset.splits and dataset.total("test") else "train"
        own = "test" if split == "test" and dataset.aligned("test") else "train"
        personal, blocks = algorithm.personal, -(-dataset.total(split) // block)
        return Scorer(
            central=scoring(model, metrics, split, "block", size=block),
            clients=scoring(model, metrics, own, "client", numbers_only=True, size=size),
            personal=scoring(model, metrics, own, "client", personal.theta, size=size) if personal else None,
            split=split,
            client_split=own,
            blocks=sample(fold(seed, "evaluate"), blocks, -(-rows // block) if rows else blocks),
        )

    @property
    def works(self) -> tuple[ClientWork, ...]:
        """All of them."""
        return (self.central, self.clients) + ((self.personal,) if self.personal else ())


def score_central(fleet: Fleet, scorer: Scorer, theta: Tensor) -> dict[str, Any]:
    """Loss and metrics of one vector over the central split: floats, or nested lists."""
    return means(fleet.ask(scorer.central, scorer.blocks, None, {"theta": theta}).stats)


def score_state(fleet: Fleet, scorer: Scorer, algorithm: Algorithm, state: Tree) -> dict[str, Any]:
    """Loss and metrics: of the one model, or of every client with the vector that is its own.

    Several models are also scored one by one, as metric/model.
    """
    models = algorithm.models(state)
    scored = {name: score_central(fleet, scorer, theta) for name, theta in models.items()}
    if scorer.personal is None:
        return next(iter(scored.values()))
    each = {f"{metric}/{name}": value for name, of in scored.items() for metric, value in of.items()}
    return means(_personal(fleet, scorer, algorithm, state).stats) | each


def score_here(fleet: Fleet, scorer: Scorer, algorithm: Algorithm, state: Tree) -> Iterator[dict[str, Any] | None]:
    """As `score_state` where no client has a vector of its own, by this rank alone: None at each block, then scores."""
    theta = next(iter(algorithm.models(state).values()))
    sums = yield from fleet.ask_here(scorer.central, scorer.blocks, {"theta": theta})
    yield means(sums.stats)


def _personal(fleet: Fleet, scorer: Scorer, algorithm: Algorithm, state: Tree) -> Any:
    everyone = np.arange(fleet.host.dataset.clients)
    shared = algorithm.personal.shared(state)
    for work in algorithm.personal.before:
        fleet.ask(work, everyone, None, shared)
    return fleet.ask(scorer.personal, everyone, None, shared)


def score_clients(fleet: Fleet, scorer: Scorer, theta: Tensor) -> dict[str, np.ndarray]:
    """Loss and each metric that is one number, and `examples`, per client: (clients scored,), in client order.

    NaN where a client has nothing that a metric counts.
    """
    _, sums = fleet.rows(scorer.clients, np.arange(fleet.host.dataset.clients), {"theta": theta})
    return {"examples": sums["examples"]} | ratios(sums, undefined=np.nan)
