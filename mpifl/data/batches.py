"""From a client's stored columns to its batches: a function of the client and its key, never of the machine.

Stored columns become model inputs by one rule: a column with a recorded mean and std becomes float32
(x - mean) / std, other floats float32, other integers int64. Until then they stay as they are stored, on a GPU too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpifl.rand import fold, folds, permutation
from mpifl.tree import Tree, aligned
from mpifl.work import Batching

Columns = dict[str, Tensor]
"""Stored columns of one client, (n, ...) each, in their stored dtype."""

GATHERED_BYTES = 4 << 20
"""Inputs made ready at a time, at least a batch: more would fall out of a core's cache before they are used."""


def as_columns(arrays: dict[str, np.ndarray], device: torch.device) -> Columns:
    """Stored arrays as tensors on `device`; unsigned integers that torch cannot index become wider.

    What torch cannot share (a read-only array, one in another order) is copied.
    """
    shared = {name: np.require(_widened(array), requirements="CW") for name, array in arrays.items()}
    return {name: torch.from_numpy(array).to(device) for name, array in shared.items()}


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on `device`; to a GPU without waiting for what it still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _widened(array: np.ndarray) -> np.ndarray:
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}.get(array.dtype.name)
    return array if wider is None else array.astype(wider)


def to_inputs(columns: Columns, features: dict[str, Any]) -> Columns:
    """Turn stored columns into what models read (the rule in this module's docstring); may return views."""
    inputs = {}
    for name, column in columns.items():
        feature = features[name]
        if feature.std is not None:
            mean, std = _scale(feature.mean, column), _scale(feature.std, column)
            inputs[name] = column.to(torch.float32, copy=True).sub_(mean).div_(std)
        else:
            inputs[name] = column.to(torch.float32 if column.is_floating_point() else torch.int64)
    return inputs


def _scale(value: float | tuple[float, ...], column: Tensor) -> float | Tensor:
    """A number, or one per channel (the first axis of a row) in a shape that broadcasts."""
    if isinstance(value, tuple):
        return moved(torch.tensor(value), column.device).view(-1, *[1] * (column.dim() - 2))
    return value


def epochs(stored: int, batching: Batching, key: int) -> Iterator[np.ndarray]:
    """Yield, for each epoch of a visit to a client with `stored` rows, which rows it reads, (m,) int64, in order.

    Every `batch_rows` of them are a batch, the last ones maybe a shorter one; the last epoch ends with the last step.
    key: of (seed, round, client); the order of epoch e is a function of it.
    """
    steps, used = int(batching.steps_of(stored)), int(batching.examples_used(stored))
    chosen = np.arange(stored)
    if used < stored and batching.shuffle:
        chosen = permutation(fold(key, "subset"), stored)
    chosen = chosen[:used]
    size = batch_rows(batching, used)
    stop = used - used % size if batching.drop_last else used
    epoch = 0
    while steps:
        order = chosen
        if batching.shuffle:
            order = chosen[permutation(fold(key, "shuffle", epoch), used)]
        yield order[: min(stop, steps * size)]
        steps -= min(steps, -(-stop // size))
        epoch += 1


def batch_rows(batching: Batching, used: int) -> int:
    """Rows of a full batch of a client of which `used` examples take part."""
    return batching.size or max(1, used)


def batches(columns: Columns, features: dict[str, Any], batching: Batching, key: int) -> Iterator[Tree]:
    """Yield a visit's batches: feature leaves, `index` (B,) int64 and `key` () int64; floats start on a 64-byte line.

    key: as in `epochs`; the key of step s is a function of it.
    """
    any_column = next(iter(columns.values()))
    stored, device = len(any_column), any_column.device
    size = batch_rows(batching, int(batching.examples_used(stored)))
    at_once = size * max(1, GATHERED_BYTES // (size * _input_bytes(columns)))
    keys = iter(step_keys(key, int(batching.steps_of(stored)), device))
    for order in epochs(stored, batching, key):
        index = torch.from_numpy(order).to(device)
        for first in range(0, len(index), at_once):
            part = index[first : first + at_once]
            rows = {name: column[first : first + len(part)] for name, column in columns.items()}
            if batching.shuffle:
                rows = {name: column.index_select(0, part) for name, column in columns.items()}
            inputs = to_inputs(rows, features) | {"index": part}
            for cut in zip(*(value.split(size) for value in inputs.values())):
                batch = {name: aligned(v) if v.is_floating_point() else v for name, v in zip(inputs, cut)}
                yield batch | {"key": next(keys)}


def step_keys(key: int, steps: int, device: torch.device) -> Tensor:
    """The key of each step of a visit, (steps,) int64."""
    return torch.from_numpy(folds(fold(key, "step"), steps).view(np.int64)).to(device)


def _input_bytes(columns: Columns) -> int:
    """Bytes of one row of inputs, at most."""
    return sum(8 * column.shape[1:].numel() for column in columns.values())


def blank_columns(features: dict[str, Any], rows: int = 2) -> Columns:
    """Return zero columns of these features, (rows, ...), for a visit that only finds shapes."""
    zeros = {name: np.zeros((rows, *feature.shape), feature.dtype) for name, feature in features.items()}
    return as_columns(zeros, torch.device("cpu"))
