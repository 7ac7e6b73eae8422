"""Seeded partitions of a labelled corpus over clients: arrays of example indices, ascending.

Randomness is numpy.random.RandomState throughout: NumPy's policy freezes its streams, so that one seed gives
one partition, hence the same bytes of a dataset, under every NumPy version. Generator makes no such promise.
"""

from __future__ import annotations

import numpy as np
from numpy.random import RandomState

from mpifl.config import UserError


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Give each client a label distribution drawn from a symmetric Dir(alpha), and examples by it.

    Hsu et al. 2019. A client fills its share from what the clients before it left; a label that has run out
    is dropped and the others scaled up. Every example lands exactly once and sizes differ by at most 1.
    `alpha` is the concentration of each label (the paper's alpha times its prior, 1 / labels). Raises
    UserError for alpha below 0.01, where the draw underflows.
    """
    if clients < 1 or not 0.01 <= alpha < np.inf:
        raise UserError(f"{clients} clients, alpha {alpha}: at least 1 client and alpha 0.01 are needed")
    random = RandomState(seed)
    pools = _shuffled_by_label(labels, random)
    left = np.array([len(pool) for pool in pools])
    mixes = random.dirichlet(np.full(len(pools), alpha), clients)
    parts = []
    for client, mix in enumerate(mixes):
        wanted = len(labels) // clients + (client < len(labels) % clients)
        taken = _draw(wanted, mix, left, random)
        left -= taken
        parts.append(np.sort(np.concatenate([pool[n : n + k] for pool, n, k in zip(pools, left, taken)])))
    return parts


def equal_labels(labels: np.ndarray, clients: int, per_label: int, seed: int) -> list[np.ndarray]:
    """Give each client `per_label` examples of every label; the rest is not used.

    Raises UserError naming the label that has too few.
    """
    random = RandomState(seed)
    shares = []
    for pool in _shuffled_by_label(labels, random):
        if len(pool) < clients * per_label:
            found = f"label {labels[pool[0]]} has {len(pool)} examples"
            raise UserError(f"{found}, {clients} clients x {per_label} need more; lower --clients or --per-label")
        shares.append(pool[: clients * per_label].reshape(clients, per_label))
    return list(np.sort(np.concatenate(shares, axis=1), axis=1))


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw `count` examples in which every label has its share of the corpus, to within one example."""
    if not 0 <= count <= len(labels):
        raise UserError(f"{count} of {len(labels)} examples cannot be drawn")
    pools = _shuffled_by_label(labels, RandomState(seed))
    shares = np.array([count * len(pool) / len(labels) for pool in pools])
    counts = np.floor(shares).astype(int)
    largest_remainders = np.argsort(counts - shares, kind="stable")[: count - counts.sum()]
    counts[largest_remainders] += 1
    return np.sort(np.concatenate([pool[:n] for pool, n in zip(pools, counts)]))


def _shuffled_by_label(labels: np.ndarray, random: RandomState) -> list[np.ndarray]:
    return [random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def _draw(wanted: int, mix: np.ndarray, left: np.ndarray, random: RandomState) -> np.ndarray:
    """Draw counts per label, (labels,), from `mix` without exceeding `left`; draws that do are made again."""
    taken = np.zeros_like(left)
    while (short := wanted - taken.sum()) > 0:
        weights = mix * (left > taken)
        if weights.sum() == 0:  # only labels that this client would never draw are left
            weights = (left - taken).astype(float)
        taken += np.minimum(random.multinomial(short, weights / weights.sum()), left - taken)
    return taken
