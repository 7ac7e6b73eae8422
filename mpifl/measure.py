"""Metrics as sums over examples, and the ClientWorks that collect them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mpifl.model import Model
from mpifl.tree import Tree
from mpifl.work import Batching, Client, ClientWork, Upload

Metric = Callable[[Tensor, Tree], Tensor]
"""(scores (B, ...), batch) -> one number per example, (B,); what is reported is their mean."""

BLOCK = 512
"""Rows of one block of a central split; fixed, so that sums do not depend on who scores what."""


def accuracy(scores: Tensor, batch: Tree) -> Tensor:
    """1.0 where the highest score is at `batch["y"]`, (B,)."""
    return (scores.argmax(dim=-1) == batch["y"]).to(torch.float32)


def without_key(batch: Tree) -> Tree:
    """The same batch for evaluation: no key, so no dropout and no augmentation."""
    return {name: leaf for name, leaf in batch.items() if name != "key"}


def example_sums(values: Tensor, batch: Tree) -> Tensor:
    """Sum per-example values, (B,), over rows the mask keeps; () float64, so that long sums stay sharp."""
    mask = batch.get("mask")
    kept = values if mask is None else torch.where(mask, values, 0.0)
    return kept.to(torch.float64).sum()


def scoring(
    model: Model,
    metrics: dict[str, Metric],
    split: str,
    of: Literal["client", "block", "all"],
    theta_of: Callable[[Tree, Client], Tensor] = lambda shared, client: shared["theta"],
) -> ClientWork:
    """Score one vector: stats are sums over examples of `loss`, each metric, and `examples`; weight is examples.

    theta_of: (shared, client) -> (P,), for clients that have a vector of their own.
    """

    def start(shared: Tree, client: Client) -> Tree:
        zero = torch.zeros((), dtype=torch.float64)
        return {
            "theta": theta_of(shared, client),
            "sums": {name: zero for name in ("loss", "examples", *metrics)},
        }

    def step(shared: Tree, client: Client, carry: Tree, batch: Tree) -> Tree:
        batch = without_key(batch)
        scores = model.scores(carry["theta"], batch)
        values = {name: metric(scores, batch) for name, metric in metrics.items()}
        values["loss"] = model.loss(scores, batch)
        values["examples"] = torch.ones_like(values["loss"])
        sums = {name: total + example_sums(values[name], batch) for name, total in carry["sums"].items()}
        return {"theta": carry["theta"], "sums": sums}

    def finish(shared: Tree, client: Client, carry: Tree) -> Upload:
        return Upload(update={}, weight=carry["sums"]["examples"], stats=carry["sums"])

    return ClientWork(start, step, finish, Batching(size=BLOCK, shuffle=False, split=split, of=of))


def means(stats: dict[str, float]) -> dict[str, float]:
    """Divide sums by the number of examples: {"loss": ..., metric: ...}; NaN-free, 0 when nothing was scored."""
    examples = max(stats["examples"], 1.0)
    return {name: total / examples for name, total in stats.items() if name != "examples"}
