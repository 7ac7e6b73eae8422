"""Client memory: staged by a visit, current after its round was accepted, the same in memory and in mapped files."""

import gc

import pytest
import torch

from mpifl.engine.store import ClientMemory

BLANK = {"control": torch.full((3,), 0.5), "head": {"w": torch.zeros(2, 2, dtype=torch.float64)}}


def row(value):
    return {
        "control": torch.full((3,), float(value)),
        "head": {"w": torch.full((2, 2), -float(value), dtype=torch.float64)},
    }


def values(store, clients):
    """The value each client's row was made from; NaN for a row that is not whole."""
    rows = store.read(clients)
    whole = (rows["control"] == -rows["head"]["w"].view(len(clients), 4)[:, :3]).all(dim=1)
    return [float(c[0]) if ok else float("nan") for c, ok in zip(rows["control"], whole)]


def test_a_client_without_a_past_has_the_blank_memory_and_no_visit():
    store = ClientMemory(BLANK)
    rows = store.read([4, 9])
    assert store.kept and store.visits(4) == 0
    assert rows["control"].tolist() == [[0.5] * 3] * 2 and rows["head"]["w"].shape == (2, 2, 2)
    assert store.bytes == 0 and list(store.snapshot()) == []


def test_an_algorithm_without_memory_keeps_none():
    store = ClientMemory({})
    assert not store.kept and store.read([1, 2]) == {}


def test_a_staged_row_is_seen_by_nobody_before_commit():
    store = ClientMemory(BLANK)
    store.stage(1, row(1))
    assert store.read([1])["control"].tolist() == [[0.5] * 3]
    assert store.visits(1) == 0 and store.digests() == []
    store.commit()
    assert values(store, [1]) == [1.0] and store.visits(1) == 1


def test_commit_makes_each_staged_row_current_once():
    store = ClientMemory(BLANK)
    store.stage(1, row(1))
    store.commit()
    store.commit()
    assert store.visits(1) == 1
    store.stage(1, row(2))
    store.stage(1, row(3))  # a repeated ask
    store.stage(2, row(4))
    store.commit()
    assert values(store, [2, 1]) == [4.0, 3.0]
    assert (store.visits(1), store.visits(2)) == (2, 1)


def test_discard_leaves_the_rows_as_they_were():
    store = ClientMemory(BLANK)
    store.stage(1, row(1))
    store.commit()
    before = store.digests()
    store.stage(1, row(2))
    store.stage(5, row(2))
    store.discard()
    store.commit()
    assert store.digests() == before and store.visits(5) == 0


def test_what_is_read_staged_or_written_is_a_copy():
    store = ClientMemory(BLANK)
    mine = row(1)
    store.stage(1, mine)
    mine["control"].fill_(9)
    store.commit()
    store.read([1])["control"].fill_(9)
    store.read([2])["control"].fill_(9)
    assert values(store, [1]) == [1.0] and store.read([2])["control"].tolist() == [[0.5] * 3]


@pytest.mark.parametrize("budget", [0, 1 << 20], ids=["mapped", "in memory"])
def test_many_rows_are_kept_in_memory_or_mapped_files_alike(budget):
    blank = {"control": torch.zeros(1 << 10)}  # 256 rows a chunk: 1 MiB
    store = ClientMemory(blank, budget)
    clients = [(7 * i) % 1000 for i in range(700)]
    for client in clients:
        store.stage(client, {"control": torch.full((1 << 10,), float(client))})
    store.commit()
    rows = store.read(clients)["control"]
    assert torch.equal(rows, torch.tensor(clients, dtype=torch.float32)[:, None].expand(-1, 1 << 10))
    assert store.bytes == 3 << 20
    assert [client for client, _, _ in store.snapshot()] == sorted(clients)


def test_spilled_rows_give_the_digest_of_resident_ones_and_their_files_close():
    digests = []
    for budget in (0, 1 << 30):
        store = ClientMemory(BLANK, budget)
        for client in range(300):
            store.stage(client, row(client))
        store.commit()
        digests.append(store.digests())
        del store
        gc.collect()  # a file left open would be a ResourceWarning, hence an error here
    assert digests[0] == digests[1] and len({sha for _, sha in digests[0]}) == 300


def test_reading_and_writing_moves_rows_between_ranks():
    here, there = ClientMemory(BLANK), ClientMemory(BLANK, budget=0)
    for client in (3, 1, 2):
        here.stage(client, row(client))
    here.commit()
    here.stage(3, row(30))
    here.commit()
    ids = [1, 3]
    for client, visits, packed in here.snapshot():
        if client in ids:
            there.put(client, packed, visits)
    assert values(there, ids) == [1.0, 30.0] and [there.visits(i) for i in ids] == [1, 2]
    assert there.digests() == [entry for entry in here.digests() if entry[0] in ids]


def test_digests_come_by_client_and_see_row_and_visits():
    def digests(visits, value):
        store = ClientMemory(BLANK)
        row = {"control": torch.full((3,), value), "head": {"w": torch.zeros(2, 2).double()}}
        for client, visited in zip((8, 2), visits):
            store.put(client, store.layout.pack(row, store.layout.empty()), visited)
        return store.digests()

    plain = digests([1, 1], 0.0)
    assert [client for client, _ in plain] == [2, 8]
    assert len({plain[0][1], digests([1, 2], 0.0)[0][1], digests([1, 1], 1.0)[0][1]}) == 3


def test_frozen_rows_keep_their_values_whatever_later_rounds_write():
    store = ClientMemory({"x": torch.zeros(3)})

    def accept(value):
        for client in range(5):
            store.stage(client, {"x": torch.full((3,), value)})
        store.commit()

    accept(1.0)
    frozen = store.freeze()
    for value in (2.0, 3.0, 4.0):
        accept(value)
    assert all(torch.equal(row[:12].view(torch.float32), torch.ones(3)) for _, _, row in frozen)
    store.thaw()
    slots, held = len(store._chunks) * store._rows_per_chunk, store.bytes
    for _ in range(2 * slots):
        accept(5.0)
    assert store.bytes == held  # what was frozen is used again


def test_a_row_larger_than_a_chunk_has_a_chunk_of_its_own():
    store = ClientMemory({"x": torch.zeros(20 << 20)}, budget=0)  # 80 MiB
    for client in (1, 2):
        store.stage(client, {"x": torch.full((20 << 20,), float(client))})
        store.commit()
    assert float(store.read([2])["x"][0, -1]) == 2.0 and store.bytes == 2 * (80 << 20)


@pytest.mark.parametrize("wrong", [{"contrl": torch.zeros(3)}, {"control": torch.zeros(())}])
def test_a_row_of_another_layout_is_refused(wrong):
    store = ClientMemory({"control": torch.zeros(3)})
    with pytest.raises(ValueError, match="expected control"):
        store.stage(1, wrong)
