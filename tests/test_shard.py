"""Reading datasets that plain h5py wrote: every row as it was put there, every damage an error that names the file."""

import fcntl
import os
import shutil
import threading
import zlib
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
import pytest
from shard_files import (
    FEATURES,
    SIZES,
    arrays,
    assert_same,
    clients,
    concatenated,
    flip,
    flip_byte,
    one_line,
    plant,
    plant_shard,
    replace_text,
)

from mpifl.config import UserError
from mpifl.data import column
from mpifl.data.shard import Dataset, Feature, embedded


@pytest.fixture
def planted(tmp_path):
    """Train in 3 shards (clients 0-1, 2-5, 6) and three splits of one shard."""
    splits = {
        "train": (clients(), (0, 2, 6, 7), False),
        "validation": (clients((1, 1, 1, 0, 1, 1, 1)), (0, 7), False),
        "reversed": (clients()[::-1], (0, 7), False),
        "test": ([("block-00000-000000", arrays(5))], (0, 1), True),
    }
    return plant(tmp_path / "planted", splits)


# ---- what is there


def test_planted_dataset_is_read(planted, open_dataset):
    dataset = open_dataset(str(planted))
    assert dataset.splits == ("reversed", "test", "train", "validation")
    assert dataset.features == {
        "t": Feature("uint8", (6,), classes=90, pad=0),
        "x": Feature("uint8", (2, 3), mean=0.0, std=16.0),
        "y": Feature("int32", (), classes=5),
    }
    assert (dataset.clients, dataset.provenance) == (7, {"source": "planted"})
    assert dataset.sizes("train").dtype == np.int64 and dataset.sizes("train").tolist() == list(SIZES)
    assert (dataset.total("train"), dataset.total("test")) == (16, 5)
    assert [dataset.central(split) for split in ("train", "test")] == [False, True]
    aligned = {split: dataset.aligned(split) for split in dataset.splits}
    assert aligned == {"train": True, "validation": True, "reversed": False, "test": False}
    assert dataset.ids("reversed").tolist() == [f"c{i}".encode() for i in range(6, -1, -1)]
    for index, (name, columns) in enumerate(clients()):
        assert dataset.client_id("train", index) == name
        assert_same(dataset.client("train", index), columns)
    assert dataset.recomputed_digest() == dataset.digest
    with pytest.raises(ValueError, match="read-only"):
        dataset.sizes("train")[0] = 1


def test_every_range_of_rows_is_read_across_shards(planted, open_dataset):
    whole = concatenated(clients())
    for start in range(0, 17, 4):  # as the first touch
        for stop in range(start, 17, 3):
            fresh = Dataset(planted)
            found = fresh.rows("train", start, stop)
            fresh.close()
            assert_same(found, {name: rows[start:stop] for name, rows in whole.items()})
    dataset = open_dataset(planted)
    for start in range(17):
        for stop in range(start, 17):
            found = dataset.rows("train", start, stop)
            assert_same(found, {name: rows[start:stop] for name, rows in whole.items()})


@pytest.mark.parametrize("touch", ["first", "second"])
def test_arrays_lie_on_64_byte_lines_and_keep_no_more_in_memory_than_their_rows(planted, open_dataset, touch):
    dataset = open_dataset(planted)
    if touch == "second":
        dataset.client("train", 5)
    for found in (dataset.rows("train", 9, 13), dataset.client("train", 5)):
        for name in ("x", "y"):
            rows = found[name]
            assert rows.ctypes.data % 64 == 0 or touch == "first"
            assert rows.base is None or rows.base.nbytes < rows.nbytes + 64


@pytest.mark.parametrize(
    "storage", [{"chunks": True}, {"chunks": True, "compression": "gzip"}, {"chunks": True, "fletcher32": True}]
)
def test_any_storage_that_hdf5_knows_itself_is_read(tmp_path, open_dataset, storage, monkeypatch):
    monkeypatch.setattr(column, "load_plugins", lambda: pytest.fail("no plugin is needed"))
    dataset = open_dataset(plant(tmp_path / "d", {"train": (clients(), (0, 4, 7), False)}, **storage))
    for index, (_, columns) in enumerate(clients()):
        assert_same(dataset.client("train", index), columns)
    assert_same(dataset.rows("train", 2, 9), {n: rows[2:9] for n, rows in concatenated(clients()).items()})


def test_indices_outside_the_split_are_errors_not_other_clients(planted, open_dataset):
    dataset = open_dataset(planted)
    for index in (-1, 7):
        with pytest.raises(IndexError, match="clients 0 to 6"):
            dataset.client("train", index)
    for start, stop in ((-1, 2), (0, 17), (3, 2)):
        with pytest.raises(IndexError, match="rows 0 to 16"):
            dataset.rows("train", start, stop)
    with pytest.raises(UserError, match="did you mean 'train'"):
        dataset.client("trian", 0)


def test_sizes_and_ids_touch_no_shard(planted, open_dataset):
    dataset = open_dataset(planted)
    for path in planted.glob("train-*.h5"):
        path.unlink()
    assert dataset.sizes("train").sum() == dataset.total("train") == 16
    assert dataset.client_id("train", 6) == "c6" and len(dataset.digest) == 64
    with pytest.raises(UserError, match=r"train-00001\.h5"):
        dataset.client("train", 3)


def test_relative_path_stays_valid_when_the_working_directory_changes(planted, open_dataset, monkeypatch):
    monkeypatch.chdir(planted.parent)
    dataset = open_dataset("planted")
    monkeypatch.chdir("/")
    assert_same(dataset.client("train", 0), clients()[0][1])


def test_dataset_without_train_split_opens(tmp_path, open_dataset):
    dataset = open_dataset(plant(tmp_path / "d", {"test": (clients(), (0, 7), False)}))
    assert dataset.total("test") == 16 and not dataset.aligned("test")
    with pytest.raises(UserError, match="no split of d 'train'"):
        _ = dataset.clients


def test_two_threads_read_a_fresh_dataset_at_once(planted, open_dataset):
    expected, wrong = clients(), []

    def read(dataset, order, barrier):
        barrier.wait()
        for index in order:
            found = dataset.client("train", index)
            if any(not np.array_equal(found[name], rows) for name, rows in expected[index][1].items()):
                wrong.append(index)

    for _ in range(8):
        dataset, barrier = open_dataset(planted), threading.Barrier(2)
        orders = ([5, 6, 0, 2, 3], [6, 5, 3, 2, 0])
        threads = [threading.Thread(target=read, args=(dataset, order, barrier)) for order in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(path.endswith("train-00001.h5") for path in open_files()) == 1  # opened by one of them alone
        dataset.close()
    assert not wrong


def open_files():
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(handle))
        except OSError:
            pass
    return found


# ---- damage


def refused(path):
    before = len(open_files())
    with pytest.raises(UserError) as error:
        Dataset(path)
    assert len(open_files()) == before
    return one_line(error)


def test_what_is_no_dataset_is_refused_at_open(tmp_path):
    assert "no such folder" in refused(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    assert "no index.h5" in refused(tmp_path / "folder")
    (tmp_path / "folder" / "index.h5").write_bytes(b"not HDF5")
    assert "index.h5: cannot be read" in refused(tmp_path / "folder")
    with h5py.File(tmp_path / "folder" / "index.h5", "w"):
        pass
    assert "is None None, not mpifl-shards 2" in refused(tmp_path / "folder")


def test_other_format_version_is_refused_at_open(planted):
    with h5py.File(planted / "index.h5", "r+") as index:
        index.attrs["version"] = 3
    assert "mpifl-shards 3, not mpifl-shards 2; update mpifl" in refused(planted)


@pytest.mark.parametrize("name", ["train-00001.h5", "test-00000.h5"])
def test_shard_truncated_by_one_byte_is_refused_at_open(planted, name):
    size = (planted / name).stat().st_size
    os.truncate(planted / name, size - 1)
    message = refused(planted)
    assert name in message and f"{size} bytes" in message and f"{size - 1} bytes" in message
    assert "copy it again" in message


def test_missing_shard_is_refused_at_open(planted):
    (planted / "train-00002.h5").unlink()
    assert "train-00002.h5: this shard is missing" in refused(planted)


def test_truncated_index_is_refused_at_open(planted):
    os.truncate(planted / "index.h5", (planted / "index.h5").stat().st_size - 1)
    assert "index.h5" in refused(planted)


@pytest.mark.parametrize("name", ["features", "provenance", "splits", "splits/train/digests", "splits/train/shards"])
def test_index_without_a_table_is_refused_at_open(planted, name):
    with h5py.File(planted / "index.h5", "r+") as index:
        del index[name]
    assert "index.h5: a table is missing or cannot be read" in refused(planted)


@pytest.mark.parametrize(
    "alter",
    [
        lambda index: replace_text(index, "features", lambda features: features["x"].update(std=8.0)),
        lambda index: replace_text(index, "features", lambda features: features["y"].update(classes=6)),
        lambda index: replace_text(index, "features", lambda features: features["x"].update(std=0.0)),
        lambda index: replace_text(index["splits/train"], "digests", lambda digests: digests.update(central=True)),
        lambda index: replace_text(index["splits/train"], "digests", lambda digests: digests.update(ids="0" * 64)),
        lambda index: index.attrs.__setitem__("digest", "0" * 64),
        lambda index: index["splits"].move("train", "training"),
    ],
)
def test_altered_header_is_refused_at_open(planted, alter):
    with h5py.File(planted / "index.h5", "r+") as index:
        alter(index)
    assert "index.h5: its features or digests are not those that it was written with" in refused(planted)


@pytest.mark.parametrize(("table", "value"), [("sizes", 5), ("ids", b"c9")])
def test_altered_table_of_the_index_is_found_when_it_is_read(planted, open_dataset, table, value):
    with h5py.File(planted / "index.h5", "r+") as index:
        index[f"splits/train/{table}"][0] = value
    dataset = open_dataset(planted)
    with pytest.raises(UserError, match=f"index.h5: its {table} of split 'train'") as error:
        getattr(dataset, table)("train")
    assert one_line(error)
    with pytest.raises(UserError, match=r"index\.h5|train-00000\.h5"):
        dataset.client("train", 0)


def test_altered_order_of_shards_is_found_when_one_is_touched(planted, open_dataset):
    with h5py.File(planted / "index.h5", "r+") as index:
        replace_text(index["splits/train"], "shards", lambda shards: shards[1].update(first=1))
    with pytest.raises(UserError, match=r"train-0000[01]\.h5"):
        open_dataset(planted).client("train", 1)


@pytest.mark.parametrize("firsts", [(1, 2, 6), (0, 0, 6), (0, 6, 2), (0, 2, 7), (0, 2, 9)])
def test_shards_that_do_not_follow_one_another_are_refused_at_open(planted, firsts):
    with h5py.File(planted / "index.h5", "r+") as index:
        replace_text(
            index["splits/train"],
            "shards",
            lambda shards: [shard.update(first=first) for shard, first in zip(shards, firsts)],
        )
    assert "index.h5: shards of split 'train' do not follow one another" in refused(planted)


@pytest.mark.parametrize(("column", "row"), [("t", 0), ("lengths/t", 7), ("x", 7), ("y", 7)])
@pytest.mark.parametrize("touch", [lambda d: d.client("train", 5), lambda d: d.rows("train", 13, 14)])
def test_flipped_bit_is_found_at_first_touch_of_its_client(planted, open_dataset, column, row, touch):
    # Row 7 of the shard is of client 5: sizes 3 1 0 6.
    if column == "t":
        with h5py.File(planted / "train-00001.h5") as file:
            row = int(file["items/t"][3])
    flip(planted / "train-00001.h5", column, row)
    dataset = open_dataset(planted)
    for index in (0, 1, 2, 3, 4, 6):
        assert_same(dataset.client("train", index), clients()[index][1])
    name = column.removeprefix("lengths/")
    for _ in range(2):
        with pytest.raises(UserError, match=f"train-00001.h5: column '{name}' of client 'c5'.*checksum") as error:
            touch(dataset)
        assert one_line(error)


def test_checksums_are_verified_once(planted, open_dataset, monkeypatch):
    dataset, checked = open_dataset(planted), []
    crc32 = zlib.crc32
    monkeypatch.setattr(column.zlib, "crc32", lambda rows, start=0: checked.append(rows.size) or crc32(rows, start))

    def sizes(*indices):
        """Numbers that are summed for clients: of t its lengths and items, of x 6 for each row, of y one."""
        held = [clients()[index][1] for index in indices]
        items = [int((np.cumsum(c["t"][:, ::-1] != 0, axis=1) > 0).sum()) for c in held]
        rows = [len(c["y"]) for c in held]
        return [size for pair in zip(rows, items) for size in pair] + [6 * n for n in rows] + rows

    dataset.client("train", 5)
    assert checked == sizes(5)
    dataset.client("train", 5)
    dataset.rows("train", 9, 13)
    assert checked == sizes(5)
    checked.clear()
    dataset.rows("train", 7, 9)  # clients 3, 4 (empty) and 5, which is known by now
    assert checked == sizes(3, 4, 5)


def reverse(tables):
    tables["offsets"] = tables["offsets"][::-1].copy()


def shift(tables):
    tables["offsets"] = tables["offsets"] + 1


def dip(tables):
    tables["offsets"][2] = 2


def longer(tables):
    tables["y"] = np.append(tables["y"], np.int32(0))


def other_dtype(tables):
    tables["y"] = tables["y"].astype("u4")


def lose(tables):
    del tables["crc32/y"]


def fewer_checksums(tables):
    tables["crc32/y"] = tables["crc32/y"][:-1]


def reverse_items(tables):
    tables["items/t"] = tables["items/t"][::-1].copy()


def fewer_lengths(tables):
    tables["lengths/t"] = tables["lengths/t"][:-1]


def signed_lengths(tables):
    tables["lengths/t"] = tables["lengths/t"].astype("i1")


def group_for_table(tables):
    tables["lengths/t/nested"] = tables.pop("lengths/t")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (reverse, "offsets must start at 0 and never decrease"),
        (shift, "offsets must start at 0 and never decrease"),
        (dip, "offsets must start at 0 and never decrease"),
        (longer, r"column 'y' is int32 \(11,\)"),
        (other_dtype, "column 'y' is uint32"),
        (lose, "a table is missing.*'y'"),
        (group_for_table, "a table is missing or cannot be read"),
        (fewer_checksums, "checksums of 'y' for 4 clients"),
        (reverse_items, "items/t must start at 0 and never decrease"),
        (fewer_lengths, r"lengths of 't' are for 4 and \(9,\)"),
        (signed_lengths, "lengths of 't' are for .* int8"),
    ],
)
def test_impossible_tables_are_found_when_the_shard_is_first_opened(tmp_path, open_dataset, damage, problem):
    def alter(split, number, tables):
        if number == 1:
            damage(tables)

    # The index vouches for the damage, so that nothing but the table itself can tell.
    dataset = open_dataset(plant(tmp_path / "d", {"train": (clients(), (0, 2, 6, 7), False)}, alter=alter))
    assert_same(dataset.client("train", 0), clients()[0][1])
    before = len(open_files())
    with pytest.raises(UserError, match=f"train-00001.h5: .*{problem}") as error:
        dataset.check("train", 1)
    assert one_line(error) and len(open_files()) == before


@pytest.mark.parametrize("change", ["offsets", "ids", "crc32/x", "items/t"])
def test_tables_the_index_does_not_vouch_for_are_found_when_the_shard_is_first_opened(planted, open_dataset, change):
    with h5py.File(planted / "train-00001.h5", "r+") as file:
        values = file[change][:]
        values[1] = b"c9" if change == "ids" else values[1] + 1
        file[change][:] = values
    dataset = open_dataset(planted)
    assert_same(dataset.client("train", 0), clients()[0][1])
    with pytest.raises(UserError, match=r"train-00001\.h5: ") as error:
        dataset.client("train", 4)
    assert one_line(error)


@pytest.mark.parametrize("wrong", [[9, 0], [200, 56]])
def test_lengths_that_are_not_those_of_the_items_are_found_though_checksums_match(tmp_path, open_dataset, wrong):
    held = [("a", {"t": np.array([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9]], "u1"), "y": np.zeros(2, "i4")})]
    features = {name: FEATURES[name] for name in ("t", "y")}

    def alter(split, number, tables):
        tables["lengths/t"] = np.array(wrong, "u1")
        tables["crc32/t"] = np.array([zlib.crc32(tables["t"], zlib.crc32(tables["lengths/t"]))], "u4")

    dataset = open_dataset(plant(tmp_path / "d", {"train": (held, (0, 1), False)}, features, alter))
    with pytest.raises(UserError, match=r"train-00000\.h5: lengths of 't' are not those of its sequences"):
        dataset.client("train", 0)


def test_shard_exchanged_for_another_of_the_same_size_is_found(planted, open_dataset):
    sizes = [len(columns["y"]) for _, columns in clients()[2:6]]
    size = (planted / "train-00001.h5").stat().st_size
    other = [(name, {**c, "y": (c["y"] + 1) % 5}) for name, c in clients()[2:6]]
    assert [len(columns["y"]) for _, columns in other] == sizes
    assert plant_shard(planted / "train-00001.h5", other)[0]["bytes"] == size
    with pytest.raises(UserError, match=r"train-00001\.h5: its tables are not those"):
        open_dataset(planted).client("train", 2)


def test_shards_in_each_others_place_are_found(tmp_path, open_dataset):
    held = [("a", arrays(3, seed=1)), ("b", {**arrays(3, seed=1), "y": np.zeros(3, "i4")})]
    planted = plant(tmp_path / "d", {"train": (held, (0, 1, 2), False)})
    first, second = planted / "train-00000.h5", planted / "train-00001.h5"
    assert first.stat().st_size == second.stat().st_size
    shutil.move(first, planted / "third")
    shutil.move(second, first)
    shutil.move(planted / "third", second)
    dataset = open_dataset(planted)
    for index in (0, 1):
        with pytest.raises(UserError, match=rf"train-0000{index}\.h5: its clients are not those"):
            dataset.client("train", index)


@pytest.mark.parametrize("content", [None, "tables", "noise"])
def test_foreign_file_in_place_of_a_shard_is_found_at_first_touch(planted, open_dataset, content):
    path = planted / "train-00002.h5"
    path.unlink()
    if content == "noise":
        path.write_bytes(b"noise" * 1000)
    else:
        with h5py.File(path, "w") as file:
            if content:
                file.create_group("offsets")
    with h5py.File(planted / "index.h5", "r+") as index:
        replace_text(index["splits/train"], "shards", lambda shards: shards[2].update(bytes=path.stat().st_size))
    dataset = open_dataset(planted)
    before = len(open_files())
    with pytest.raises(UserError, match=r"train-00002\.h5: (a table is missing|cannot be read)") as error:
        dataset.client("train", 6)
    assert len(open_files()) == before and "copy it again" in one_line(error)


def test_shard_cut_while_it_is_read_is_no_empty_client(planted, open_dataset):
    with h5py.File(planted / "train-00001.h5") as file:
        end = file["x"].id.get_offset() + 4 * 6
    dataset = open_dataset(planted)
    dataset.client("train", 2)
    os.truncate(planted / "train-00001.h5", end)
    with pytest.raises(UserError, match=r"train-00001\.h5: it ends before its last row"):
        dataset.client("train", 5)


def test_rows_that_the_file_system_does_not_give_are_named(planted, open_dataset, monkeypatch):
    dataset = open_dataset(planted)
    dataset.check("train", 1)

    def preadv(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(column.os, "preadv", preadv)
    with pytest.raises(UserError, match=r"train-00001\.h5: rows of '\w' cannot be read .*Input/output error") as error:
        dataset.client("train", 5)
    assert one_line(error)


def test_compressed_rows_that_cannot_be_unpacked_are_named(tmp_path, open_dataset):
    storage = {"chunks": True, "compression": "gzip"}
    planted = plant(tmp_path / "d", {"train": (clients(), (0, 7), False)}, **storage)
    with h5py.File(planted / "train-00000.h5") as file:
        chunk = file["x"].id.get_chunk_info(0)
    flip_byte(planted / "train-00000.h5", chunk.byte_offset + chunk.size // 2)
    with pytest.raises(UserError, match=r"train-00000\.h5: rows \d+ to \d+ of 'x' cannot be unpacked") as error:
        open_dataset(planted).rows("train", 0, 16)
    assert one_line(error)


# ---- file systems


def test_file_system_that_refuses_locks(planted, open_dataset):
    with ExitStack() as stack:
        for path in planted.iterdir():
            fcntl.flock(stack.enter_context(open(path, "rb")), fcntl.LOCK_EX)
        with pytest.raises(OSError, match="lock"):
            h5py.File(planted / "index.h5", "r", locking=True)
        assert_same(open_dataset(planted).rows("train", 0, 16), concatenated(clients()))


def test_read_only_folder_is_read_and_left_as_it_is(planted, open_dataset):
    for path in planted.iterdir():
        path.chmod(0o444)
    planted.chmod(0o555)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in planted.iterdir()}
    assert_same(open_dataset(planted).rows("train", 0, 16), concatenated(clients()))
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in planted.iterdir()} == before
    planted.chmod(0o755)


def test_folder_that_may_not_be_entered_is_refused_in_one_line(planted):
    planted.chmod(0)
    owner = os.geteuid()
    try:
        if owner == 0:  # whom nothing is forbidden
            os.seteuid(65534)
        with pytest.raises(UserError, match=f"{planted} cannot be read: no permission") as error:
            Dataset(planted)
    finally:
        os.seteuid(owner)
        planted.chmod(0o755)
    assert one_line(error)


def test_two_readers_share_a_dataset(planted, open_dataset):
    first, second = open_dataset(planted), open_dataset(planted)
    assert_same(first.client("train", 5), second.client("train", 5))
    first.close()
    assert_same(second.client("train", 0), clients()[0][1])


def test_one_open_file_per_touched_shard(planted, open_dataset):
    dataset = open_dataset(planted)
    before = len(open_files())
    for index in range(7):
        dataset.client("train", index)
    assert len(open_files()) == before + 3
    dataset.close()
    assert len(open_files()) == before - 1  # the index


# ---- shipped datasets


@pytest.mark.parametrize(
    "spec",
    [
        {"dtype": "int32", "shape": [2.0]},
        {"dtype": "int32", "shape": [2**20, 2**20]},
        {"dtype": "int32", "shape": [], "classes": 1e308},
        {"dtype": "int32", "shape": [], "classes": True},
        {"dtype": "uint8", "shape": [], "classes": 257},
        {"dtype": "uint8", "shape": [4], "pad": []},
        {"dtype": "uint8", "shape": [4], "pad": -1},
        {"dtype": "uint8", "shape": [4], "pad": 10**18},
    ],
)
def test_a_feature_whose_numbers_mean_nothing_is_refused(spec):
    with pytest.raises(UserError) as error:
        Feature(**spec)
    assert one_line(error)


def test_texts_of_any_length_as_older_writers_made_them_are_read(planted, open_dataset):
    with h5py.File(planted / "index.h5", "r+") as index:
        for holder, name in [(index, "features"), (index, "provenance"), (index["splits/train"], "shards")]:
            replace_text(holder, name, lambda value: None)
        for name in ("format", "digest"):
            index.attrs[name] = index.attrs[name].decode()
        assert h5py.check_string_dtype(index["features"].dtype).length is None
    dataset = open_dataset(planted)
    assert_same(dataset.client("train", 0), clients()[0][1])


@pytest.mark.parametrize("table", ["sizes", "ids"])
def test_an_index_whose_table_of_clients_is_gone_is_named(planted, open_dataset, table):
    with h5py.File(planted / "index.h5", "r+") as index:
        index.move(f"splits/train/{table}", "elsewhere")
    with pytest.raises(UserError, match=r"index\.h5: a table is missing or cannot be read") as error:
        open_dataset(planted).client("train", 0)
    assert one_line(error)


def test_embedded_digits_are_whole(open_dataset):
    dataset = open_dataset(embedded("digits"))
    assert (dataset.clients, dataset.total("train"), dataset.total("test")) == (100, 1437, 360)
    assert dataset.features["x"] == Feature("uint8", (8, 8), mean=0.0, std=16.0)
    assert dataset.features["y"] == Feature("uint8", (), classes=10)
    assert dataset.rows("train", 0, 1437)["x"].max() == 16
    assert dataset.recomputed_digest() == dataset.digest
    assert "CC BY 4.0" in dataset.provenance["licence"]
    assert sum(path.stat().st_size for path in embedded("digits").iterdir()) < 150_000


def test_unknown_embedded_dataset_is_refused():
    with pytest.raises(UserError, match="did you mean 'digits'"):
        embedded("digit")
