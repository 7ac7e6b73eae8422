"""From a client's stored columns to its batches: a function of the client and its key, never of the machine.

Stored columns become model inputs by one rule: a uint8 or float column with a recorded std becomes float32
(x - mean) / std, other floats float32, other integers int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpifl.rand import as_tensor, fold, permutation
from mpifl.tree import Tree, aligned
from mpifl.work import Batching

Columns = dict[str, Tensor]
"""Stored columns of one client, (n, ...) each, in their stored dtype."""


class Source:
    """Reads a client's columns for a Batching, keeping what was read in memory within a budget of bytes."""

    def __init__(self, dataset: Any, budget: int, device: torch.device) -> None:
        self.dataset, self.budget, self.device = dataset, budget, device
        self.resident: dict[tuple[str, str, int, int], Columns] = {}
        self.bytes = 0

    def examples(self, batching: Batching) -> np.ndarray:
        """Number of examples behind each id that may be asked with this Batching, (ids,) int64."""
        if batching.of == "client":
            return self.dataset.sizes(batching.split)
        total = self.dataset.total(batching.split)
        if batching.of == "all":
            return np.asarray([total], dtype=np.int64)
        starts = np.arange(0, total, batching.size)
        return np.minimum(batching.size, total - starts)

    def columns(self, batching: Batching, id: int) -> Columns:
        """Read (or find resident) the rows behind `id`."""
        of, split, size = batching.of, batching.split, batching.size
        key = (of, split, id if of != "all" else 0, size if of == "block" else 0)
        found = self.resident.get(key)
        if found is not None:
            return found
        if of == "client":
            arrays = self.dataset.client(split, id)
        else:
            total = self.dataset.total(split)
            start, stop = (0, total) if of == "all" else (id * size, min((id + 1) * size, total))
            arrays = self.dataset.rows(split, start, stop)
        columns = {name: torch.from_numpy(_widened(array)).to(self.device) for name, array in arrays.items()}
        size = sum(column.nbytes for column in columns.values())
        if self.bytes + size <= self.budget:
            self.resident[key] = columns
            self.bytes += size
        return columns


def _widened(array: np.ndarray) -> np.ndarray:
    """The array in a dtype that torch can index: it knows wide unsigned integers by name only."""
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}.get(array.dtype.name)
    return array if wider is None else array.astype(wider)


def to_inputs(columns: Columns, features: dict[str, Any]) -> Columns:
    """Turn stored columns into what models read (the rule in this module's docstring)."""
    inputs = {}
    for name, column in columns.items():
        feature = features[name]
        if feature.std is not None:
            inputs[name] = column.to(torch.float32, copy=True).sub_(feature.mean or 0.0).div_(feature.std)
        else:
            inputs[name] = column.to(torch.float32 if column.is_floating_point() else torch.int64)
    return inputs


def batches(columns: Columns, features: dict[str, Any], batching: Batching, key: int) -> Iterator[Tree]:
    """Yield a visit's batches: feature leaves, `index` (B,) int64 and `key` () int64, each on a 64-byte line.

    key: of (seed, round, client); the order of epoch e and the key of step s are functions of it.
    """
    stored = len(next(iter(columns.values())))
    steps = int(batching.steps_of(stored))
    used = int(batching.examples_used(stored))
    chosen = np.arange(stored)
    if used < stored and batching.shuffle:
        chosen = permutation(fold(key, "subset"), stored)
    chosen = chosen[:used]
    size = batching.size or used
    step = epoch = 0
    while step < steps:
        order = chosen
        if batching.shuffle:
            order = chosen[permutation(fold(key, "shuffle", epoch), used)]
        index = torch.from_numpy(order).to(next(iter(columns.values())).device)
        rows = columns
        if batching.shuffle or used < stored:
            rows = {name: column.index_select(0, index) for name, column in columns.items()}
        inputs = to_inputs(rows, features)
        inputs["index"] = index
        stop = used - used % size if batching.drop_last else used
        for start in range(0, stop, size):
            if step == steps:
                return
            batch = {name: aligned(value[start : start + size]) for name, value in inputs.items()}
            batch["key"] = as_tensor(fold(key, "step", step)).to(index.device)
            yield batch
            step += 1
        epoch += 1


def blank_columns(features: dict[str, Any], rows: int = 2) -> Columns:
    """Return zero columns of these features, (rows, ...), for a visit that only finds shapes."""
    return {
        name: torch.from_numpy(_widened(np.zeros((rows, *feature.shape), dtype=feature.dtype)))
        for name, feature in features.items()
    }
