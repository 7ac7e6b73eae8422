"""What federation is compared with: one model trained on everybody's data, and each client on its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from mpifl.algorithms.fedavg import local_training
from mpifl.fleet import Fleet
from mpifl.measure import Metric, headline, ratios, scoring
from mpifl.model import Model
from mpifl.optim import Optimizer
from mpifl.rand import fold, sample
from mpifl.scoring import Scorer, score_central
from mpifl.tree import Tree
from mpifl.work import Batching, Client, ClientWork, Upload

MOST_CLIENTS = 100
"""So many clients, at most, are trained alone: their vectors are all held at once."""


@dataclass(frozen=True)
class Baselines:
    """The works of both baselines; every rank builds the same."""

    everybody: ClientWork
    alone: ClientWork
    score: ClientWork
    opt: Optimizer
    metrics: tuple[str, ...]

    @staticmethod
    def of(
        model: Model, batches: Batching, opt: Optimizer, epochs: int, metrics: dict[str, Metric], scorer: Scorer
    ) -> Baselines:
        """Train with the job's client optimizer and batch size for `epochs`; score what `scorer` does."""
        once = replace(batches, epochs=epochs, steps=None, max_steps=None)
        alone = local_training(model, once, opt, 0.0, "uniform")

        def keep(shared: Tree, client: Client, carry: Tree) -> Upload:
            return Upload({}, torch.ones_like(client.n), scratch={"theta": carry["theta"]})

        everybody = local_training(model, replace(once, of="all", max_examples=None), opt, 0.0, "uniform")
        own = lambda shared, client: client.scratch["theta"]  # noqa: E731
        rows = scorer.clients.batches.size
        score = scoring(model, metrics, scorer.split, "all", own, numbers_only=True, size=rows)
        return Baselines(everybody, alone._replace(finish=keep), score, opt, tuple(metrics))

    @property
    def works(self) -> tuple[ClientWork, ...]:
        """All of them."""
        return (self.everybody, self.alone, self.score)

    def run(self, fleet: Fleet, scorer: Scorer, theta: torch.Tensor, seed: int) -> dict[str, float]:
        """Return the job's first metric that is one number, of {"centralized": ..., "mean client alone": ...}.

        theta: where both start, (P,).
        """
        fleet.begin(fleet.round + 1)
        shared = {"theta": theta, "lr": torch.tensor(self.opt.lr(0))}
        trained = fleet.ask(self.everybody, np.zeros(1, dtype=np.int64), None, shared).mean
        centralized = score_central(fleet, scorer, theta - trained["pseudo_grad"])
        able = np.flatnonzero(self.alone.batches.steps_of(fleet.host.dataset.sizes("train")))
        clients = able[sample(fold(seed, "baselines"), len(able), MOST_CLIENTS)]
        fleet.ask(self.alone, clients, None, shared)
        _, sums = fleet.rows(self.score, clients, {})
        metric = headline(self.metrics, centralized)
        return {"centralized": centralized[metric], "mean client alone": float(ratios(sums)[metric].mean())}
