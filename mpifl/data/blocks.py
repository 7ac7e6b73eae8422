"""Batches of several visits side by side, for engines that train many clients in one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpifl.data.batches import Columns, epochs, moved, to_inputs
from mpifl.rand import fold, folds
from mpifl.tree import Tree
from mpifl.work import Batching

PIECE_BYTES = 64 << 20
"""Inputs made ready at a time, at least a batch of every client: few launches, and little memory beside a model's."""


def side_by_side(
    columns: Sequence[Columns], features: dict[str, Any], batching: Batching, keys: Sequence[int], size: int
) -> Iterator[Tree]:
    """The batches of K visits, as `batches` gives each of them, until the longest ends: leaves (K, size, ...).

    columns, keys: (K) of each client. size: rows of a batch, at least those of the largest. A batch has `mask`,
    (K, size), `index`, (K, size), and `key`, (K,). What is masked is a client's first row: rows that a batch lacks, and
    all rows of a client that has no steps left. All rows are on the device, and the order in which they are read on
    the way there, when this returns.
    """
    device = next(iter(columns[0].values())).device
    sizes = [len(next(iter(one.values()))) for one in columns]
    visits = [_places(n, batching, key, size) for n, key in zip(sizes, keys)]
    steps = max(len(counts) for _, counts in visits)
    rows, table = np.zeros((steps, len(visits), size), np.int64), np.zeros((steps, len(visits), 2), np.int64)
    for k, (places, counts) in enumerate(visits):
        rows[: len(counts), k], table[: len(counts), k, 0] = places, counts
        table[:, k, 1] = folds(fold(keys[k], "step"), steps).view(np.int64)
    starts = np.cumsum([0, *sizes[:-1]])
    whole = {name: torch.cat([one[name] for one in columns]) for name in columns[0]}
    return _cut(whole, features, *(moved(torch.from_numpy(array), device) for array in (rows, table, starts)))


def _places(stored: int, batching: Batching, key: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each batch of a visit, (steps, size) int64, 0 where it is shorter, and how many they are, (steps,)."""
    orders = list(epochs(stored, batching, key))
    whole = [np.pad(order, (0, -len(order) % size)).reshape(-1, size) for order in orders]
    counts = [np.minimum(len(order) - np.arange(0, len(order), size), size) for order in orders]
    return np.concatenate(whole), np.concatenate(counts)


def _cut(whole: Columns, features: dict[str, Any], rows: Tensor, table: Tensor, starts: Tensor) -> Iterator[Tree]:
    """Gather pieces of several steps and cut them; rows: (S, K, B) of each client's own, starts: (K,)."""
    steps, clients, size = rows.shape
    row_bytes = sum(8 * column.shape[1:].numel() for column in whole.values())
    at_once = max(1, PIECE_BYTES // (clients * size * row_bytes))
    within = torch.arange(size, device=rows.device)
    for first in range(0, steps, at_once):
        index, (counts, keys) = rows[first : first + at_once], table[first : first + at_once].unbind(-1)
        places = (index + starts.view(-1, 1)).view(-1)
        inputs = to_inputs({name: column.index_select(0, places) for name, column in whole.items()}, features)
        piece = {name: value.view(*index.shape, *value.shape[1:]) for name, value in inputs.items()}
        piece |= {"index": index, "mask": within < counts.unsqueeze(-1), "key": keys}
        for step in range(len(index)):
            yield {name: value[step] for name, value in piece.items()}
