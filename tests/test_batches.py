"""Batches: as many as announced, each example once an epoch, a function of client and key, floats on 64-byte lines."""

import itertools

import numpy as np
import pytest
import torch

from mpifl.config import UserError
from mpifl.data.batches import as_columns, batches, blank_columns, to_inputs
from mpifl.data.format import aligned_empty
from mpifl.data.memory import MemoryDataset
from mpifl.data.shard import Feature
from mpifl.rand import fold
from mpifl.work import Batching

FEATURES = {"x": Feature("float32", (3,)), "y": Feature("int64", ())}


def columns(n):
    return {"x": torch.arange(3.0 * n).view(n, 3), "y": torch.arange(n)}


def drawn(n, batching, key=1):
    return list(batches(columns(n), FEATURES, batching, key))


def indices(found):
    return [batch["index"].tolist() for batch in found]


def chained(lists):
    return list(itertools.chain.from_iterable(lists))


ALL = [
    Batching(size, epochs, steps, shuffle, drop_last, max_examples, max_steps)
    for size, (epochs, steps), shuffle, drop_last, max_examples, max_steps in itertools.product(
        [0, 1, 3, 8], [(1, None), (2, None), (1, 7)], [True, False], [True, False], [None, 5], [None, 2]
    )
]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 20])
def test_as_many_batches_come_as_were_announced(n):
    for batching in ALL:
        found = indices(drawn(n, batching))
        assert len(found) == int(batching.steps_of(n)), batching
        used = int(batching.examples_used(n))
        size = batching.size or used
        allowed = {size} if batching.drop_last else {size, used % size or size} if used else set()
        assert {len(rows) for rows in found} <= allowed, batching
        assert all(len(set(rows)) == len(rows) for rows in found), batching


def test_steps_of_many_clients_are_those_of_each():
    sizes = np.asarray([0, 1, 2, 3, 7, 8, 20])
    for batching in ALL:
        each = [int(batching.steps_of(int(n))) for n in sizes]
        assert batching.steps_of(sizes).tolist() == each
        assert batching.steps_of(sizes).dtype == np.int64


@pytest.mark.parametrize(
    ("batching", "n", "steps"),
    [
        (Batching(size=3, epochs=2), 7, 6),
        (Batching(size=3, epochs=2, drop_last=True), 7, 4),
        (Batching(size=3, epochs=2, drop_last=True), 2, 0),
        (Batching(size=0, epochs=2), 77, 2),
        (Batching(size=3, steps=10), 7, 10),
        (Batching(size=3, steps=10), 0, 0),
        (Batching(size=3, steps=10, drop_last=True), 2, 0),
        (Batching(size=3, steps=10, max_steps=4), 7, 4),
        (Batching(size=3, max_examples=4), 7, 2),
    ],
)
def test_steps_by_hand(batching, n, steps):
    assert int(batching.steps_of(n)) == steps == len(drawn(n, batching))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [0, 1, 3, 20])
def test_an_epoch_holds_each_example_once_and_the_last_batch_is_the_short_one(size, shuffle):
    found = indices(drawn(7, Batching(size=size, epochs=3, shuffle=shuffle)))
    per_epoch = len(found) // 3
    orders = [chained(found[e * per_epoch : (e + 1) * per_epoch]) for e in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) == (3 if shuffle else 1)
    assert shuffle or orders[0] == list(range(7))
    if size == 3:
        assert [len(rows) for rows in found] == [3, 3, 1] * 3


def test_dropping_the_last_short_batch_leaves_out_other_examples_each_epoch():
    found = indices(drawn(7, Batching(size=3, epochs=20, drop_last=True)))
    left_out = {(set(range(7)) - set(a) - set(b)).pop() for a, b in zip(found[::2], found[1::2])}
    assert len(left_out) > 1


def test_steps_go_round_again_epoch_by_epoch():
    found = indices(drawn(5, Batching(size=2, steps=7)))
    for epoch in (found[:3], found[3:6]):
        assert sorted(chained(epoch)) == [0, 1, 2, 3, 4]


def test_index_leads_every_feature_of_a_batch():
    for batch in drawn(11, Batching(size=4, epochs=2, max_examples=9)):
        assert torch.equal(batch["y"], batch["index"])
        assert torch.equal(batch["x"], columns(11)["x"][batch["index"]])


def test_order_and_step_keys_are_functions_of_the_visits_key():
    batching = Batching(size=3, epochs=2)
    first, again, other = (drawn(20, batching, key) for key in (1, 1, 2))
    assert indices(first) == indices(again) != indices(other)
    keys = [[int(batch["key"]) for batch in found] for found in (first, again, other)]
    assert keys[0] == keys[1] and len(set(keys[0] + keys[2])) == 2 * len(keys[0])
    assert first[0]["key"].shape == () and first[0]["key"].dtype == torch.int64


def test_orders_are_uniform():
    counts = np.zeros((5, 5))
    for client in range(2000):
        order = chained(indices(drawn(5, Batching(size=2), fold(0, client))))
        counts[range(5), order] += 1
    assert np.abs(counts - 400).max() < 6 * np.sqrt(400)


def test_a_cap_on_examples_takes_the_first_or_a_subset_of_the_visit_for_all_its_epochs():
    plain = indices(drawn(9, Batching(size=2, epochs=3, max_examples=4, shuffle=False)))
    assert chained(plain) == [0, 1, 2, 3] * 3
    subsets = set()
    for key in range(8):
        found = chained(indices(drawn(9, Batching(size=2, epochs=3, max_examples=4), key)))
        epochs = {frozenset(found[i : i + 4]) for i in (0, 4, 8)}
        assert len(epochs) == 1 and len(*epochs) == 4
        subsets |= epochs
    assert len(subsets) > 4


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_floats_of_every_batch_start_on_a_64_byte_line(size, shuffle):
    odd = torch.from_numpy(np.arange(61, dtype=np.float32)[1:].reshape(20, 3))  # 4 bytes off
    features = FEATURES | {"z": Feature("uint8", (5,), mean=3.0, std=2.0)}
    stored = {"x": odd, "y": torch.arange(20), "z": torch.ones(20, 5, dtype=torch.uint8)}
    for batch in batches(stored, features, Batching(size=size, epochs=2, shuffle=shuffle), 1):
        assert all(leaf.is_contiguous() for leaf in batch.values())
        assert all(batch[name].data_ptr() % 64 == 0 for name in "xz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": -1}, "batches size is -1; it must be at least 0"),
        ({"epochs": 0}, "batches epochs is 0; it must be at least 1"),
        ({"steps": 0}, "batches steps is 0; it must be at least 1"),
        ({"max_examples": -2}, "batches max_examples is -2; it must be at least 1"),
        ({"max_steps": 0}, "batches max_steps is 0; it must be at least 1"),
    ],
)
def test_numbers_that_would_train_nobody_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Batching(**options)


# --- what models read ------------------------------------------------------------------------------------


def test_columns_become_inputs_by_one_rule():
    features = {
        "image": Feature("uint8", (2,), mean=100.0, std=50.0),
        "level": Feature("float32", (), mean=1.0, std=2.0),
        "raw": Feature("float64", ()),
        "pixel": Feature("uint8", ()),
        "label": Feature("int32", ()),
        "flag": Feature("bool", ()),
        "scaled": Feature("int16", (), mean=0.0, std=10.0),
    }
    stored = {
        "image": torch.tensor([[0, 255]], dtype=torch.uint8),
        "level": torch.tensor([5.0]),
        "raw": torch.tensor([0.1], dtype=torch.float64),
        "pixel": torch.tensor([255], dtype=torch.uint8),
        "label": torch.tensor([-3], dtype=torch.int32),
        "flag": torch.tensor([True]),
        "scaled": torch.tensor([25], dtype=torch.int16),
    }
    inputs = to_inputs(stored, features)
    expected = {
        "image": torch.tensor([[-2.0, 3.1]]),
        "level": torch.tensor([2.0]),
        "raw": torch.tensor([0.1]),
        "pixel": torch.tensor([255]),
        "label": torch.tensor([-3]),
        "flag": torch.tensor([1]),
        "scaled": torch.tensor([2.5]),
    }
    torch.testing.assert_close(inputs, expected)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_a_second_pass_reads_the_same_and_stored_data_stay_as_they_were(dtype, shuffle):
    features = {"x": Feature(dtype, (2,), mean=4.0, std=2.0)}
    data = MemoryDataset([{"x": np.arange(12, dtype=dtype).reshape(6, 2)}], features=features)
    columns = as_columns(data.client("train", 0), torch.device("cpu"))
    batching = Batching(size=3, epochs=2, shuffle=shuffle)
    passes = [list(batches(columns, features, batching, 5)) for _ in range(2)]
    for first, second in zip(*passes, strict=True):
        assert torch.equal(first["x"], second["x"])
        expected = (torch.arange(12.0).view(6, 2)[first["index"]] - 4) / 2
        torch.testing.assert_close(first["x"], expected)
    assert data.client("train", 0)["x"].tolist() == np.arange(12).reshape(6, 2).tolist()


def test_channels_are_scaled_each_by_its_own():
    features = {"x": Feature("uint8", (2, 1, 2), mean=(10.0, 20.0), std=(2.0, 5.0))}
    stored = {"x": torch.tensor([[[[10, 12]], [[20, 25]]], [[[8, 10]], [[15, 30]]]], dtype=torch.uint8)}
    expected = torch.tensor([[[[0.0, 1]], [[0, 1]]], [[[-1, 0]], [[-1, 2]]]])
    assert torch.equal(to_inputs(stored, features)["x"], expected)


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"drop_last": True}, {"max_examples": 7}, {"steps": 9}])
def test_making_few_rows_ready_at_a_time_changes_no_batch(options, monkeypatch):
    features = {"x": Feature("uint8", (3,), mean=1.0, std=2.0), "y": Feature("int64", ())}
    columns = {"x": torch.arange(33, dtype=torch.uint8).view(11, 3), "y": torch.arange(11)}
    batching = Batching(size=2, epochs=2, **options)
    whole = list(batches(columns, features, batching, 5))
    monkeypatch.setattr("mpifl.data.batches.GATHERED_BYTES", 130)  # two batches
    parts = list(batches(columns, features, batching, 5))
    for first, second in zip(whole, parts, strict=True):
        for name in first:
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("width", "copied"), [(16, False), (3, True)])
def test_batches_in_stored_order_are_views_where_they_start_on_a_line_of_64_bytes(width, copied):
    features = {"x": Feature("float32", (width,))}
    columns = as_columns({"x": aligned_empty((9, width), np.dtype("float32"))}, torch.device("cpu"))
    first, stored = columns["x"].data_ptr(), range(columns["x"].data_ptr(), columns["x"].data_ptr() + 36 * width)
    found = [batch["x"].data_ptr() for batch in batches(columns, features, Batching(size=2, shuffle=False), 0)]
    assert all(address % 64 == 0 for address in found) and found[0] == first
    assert [address not in stored for address in found[1:4]] == [copied] * 3


def test_a_visit_for_shapes_reads_zeros_of_the_stored_dtypes():
    features = {"x": Feature("uint8", (2, 3)), "y": Feature("int64", ())}
    blank = blank_columns(features, rows=4)
    assert {name: (c.dtype, tuple(c.shape)) for name, c in blank.items()} == {
        "x": (torch.uint8, (4, 2, 3)),
        "y": (torch.int64, (4,)),
    }
