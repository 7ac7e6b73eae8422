"""A dataset held in arrays: what it takes as it is, and what it refuses by client and column."""

import numpy as np
import pytest
import torch

from mpifl.config import UserError
from mpifl.data.batches import as_columns
from mpifl.data.format import Feature
from mpifl.data.memory import MemoryDataset

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def read_only(rows):
    rows = rows.copy()
    rows.flags.writeable = False
    return rows


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(ROWS[::-1].copy()[::-1], id="reversed"),
        pytest.param(np.asfortranarray(ROWS), id="column by column"),
        pytest.param(read_only(ROWS), id="read-only"),
        pytest.param(ROWS.astype(">f4"), id="byte-swapped"),
    ],
)
def test_arrays_in_any_order_become_the_same_columns(stored):
    data = MemoryDataset([{"x": stored}, {"x": ROWS}])
    for found in (data.client("train", 0), data.rows("train", 0, 4)):
        column = as_columns(found, torch.device("cpu"))["x"]
        assert torch.equal(column, torch.from_numpy(ROWS.copy()))


def test_arrays_that_can_be_shared_are_not_copied():
    rows = ROWS.copy()
    column = as_columns(MemoryDataset([{"x": rows}]).client("train", 0), torch.device("cpu"))["x"]
    assert column.data_ptr() == rows.ctypes.data


Y = np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("client", "problem"),
    [
        ({"x": ROWS.tolist(), "y": Y}, "column 'x': is list, not an array of numbers"),
        ({"x": np.float32(3), "y": Y}, "column 'x': is float32, not an array of numbers"),
        ({"x": ROWS.astype(object), "y": Y}, "column 'x': is object"),
        ({"x": ROWS}, "column 'y': is missing"),
        ({"x": ROWS, "y": Y, "z": Y}, "column 'z': is one too many"),
        ({"x": ROWS[:3], "y": Y}, "column 'y': has 4 rows, the client's first column has 3"),
        ({"x": ROWS[:, :2], "y": Y}, "column 'x': rows are float32 .2,., must be float32 .3,."),
        ({"x": ROWS, "y": Y + 2}, "column 'y': row 0 holds 2, labels must be 0 to 1"),
        ({}, "must be a dict of NumPy arrays"),
        (5, "must be a dict of NumPy arrays"),
    ],
)
def test_a_client_unlike_the_features_is_refused_by_split_client_and_column(client, problem):
    features = {"x": Feature("float32", (3,)), "y": Feature("int64", (), classes=2)}
    good = {"x": ROWS, "y": Y}
    with pytest.raises(UserError, match=f"split 'train', client '1'.*{problem}"):
        MemoryDataset([good, client], features=features)
    with pytest.raises(UserError, match=f"split 'test', client '0'.*{problem}"):
        MemoryDataset([good], [client], features)
