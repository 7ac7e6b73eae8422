"""The shard format: the tests read with plain h5py what the writer wrote, and plant what the reader reads."""

import fcntl
import hashlib
import json
import os
import time
import zlib
from contextlib import ExitStack
from itertools import pairwise

import h5py
import numpy as np
import pytest

from mpifl.config import UserError
from mpifl.data import shard
from mpifl.data.shard import Dataset, Feature, embedded
from mpifl.data.writer import ShardWriter

FEATURES = {"x": Feature("uint8", (2, 3), mean=0.0, std=16.0), "y": Feature("int32", (), classes=5)}
SIZES = (4, 0, 3, 1, 0, 6, 2)


def arrays(rows, seed=0):
    random = np.random.RandomState(seed)
    return {
        "x": random.randint(0, 256, (rows, 2, 3)).astype("u1"),
        "y": random.randint(0, 5, rows).astype("i4"),
    }


def clients(sizes=SIZES):
    return [(f"c{i}", arrays(rows, seed=i)) for i, rows in enumerate(sizes)]


def concatenated(held):
    return {name: np.concatenate([columns[name] for _, columns in held]) for name in ("x", "y")}


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(error):
    return "\n" not in str(error.value) and str(error.value)


def plant_shard(path, held):
    """Write one shard with plain h5py; return what the index says of it."""
    whole = concatenated(held)
    offsets = np.cumsum([0] + [len(columns["y"]) for _, columns in held]).astype("i8")
    digest = hashlib.sha256(offsets.tobytes())
    with h5py.File(path, "w") as file:
        file["offsets"] = offsets
        for name in ("x", "y"):
            file[name] = whole[name]
            crc32 = np.array([zlib.crc32(columns[name].tobytes()) for _, columns in held], "u4")
            file[f"crc32/{name}"] = crc32
            digest.update(crc32.tobytes())
    return {"file": path.name, "bytes": os.path.getsize(path), "digest": digest.hexdigest()}


def plant_split(folder, index, split, held, cuts, central=False):
    entries = []
    for number, (first, stop) in enumerate(pairwise(cuts)):
        entry = plant_shard(folder / f"{split}-{number:05d}.h5", held[first:stop])
        entries.append({**entry, "first": first})
    group = index.create_group(f"splits/{split}")
    group.attrs["central"] = central
    group.attrs["shards"] = json.dumps(entries)
    group["sizes"] = np.array([len(columns["y"]) for _, columns in held], "i8")
    group["ids"] = np.array([name.encode() for name, _ in held])


@pytest.fixture
def planted(tmp_path):
    """A dataset made by plain h5py: train in 3 shards (clients 0-1, 2-5, 6) and three splits of one shard."""
    folder = tmp_path / "planted"
    folder.mkdir()
    with h5py.File(folder / "index.h5", "w") as index:
        index.attrs["format"], index.attrs["version"] = "mpifl-shards", 1
        features = {"x": {"dtype": "uint8", "shape": [2, 3], "mean": 0.0, "std": 16.0, "classes": None}}
        features["y"] = {"dtype": "int32", "shape": [], "mean": None, "std": None, "classes": 5}
        index.attrs["features"] = json.dumps(features)
        index.attrs["provenance"] = json.dumps({"source": "planted"})
        plant_split(folder, index, "train", clients(), (0, 2, 6, 7))
        plant_split(folder, index, "validation", clients((1, 1, 1, 0, 1, 1, 1)), (0, 7))
        plant_split(folder, index, "reversed", clients()[::-1], (0, 7))
        plant_split(folder, index, "test", [("block-000000", arrays(5))], (0, 1), central=True)
    return folder


@pytest.fixture
def open_dataset():
    opened = []

    def open_(path):
        opened.append(Dataset(path))
        return opened[-1]

    yield open_
    for dataset in opened:
        dataset.close()


# ---- writing


def test_files_on_disk_follow_the_documented_layout(tmp_path):
    held = clients()
    with ShardWriter(tmp_path / "d", FEATURES, {"source": "test"}, shard_bytes=80) as writer:
        writer.write("train", held)
    with h5py.File(tmp_path / "d" / "index.h5") as index:
        assert (index.attrs["format"], index.attrs["version"]) == ("mpifl-shards", 1)
        assert json.loads(index.attrs["provenance"]) == {"source": "test"}
        assert json.loads(index.attrs["features"])["x"] == {
            "dtype": "uint8", "shape": [2, 3], "mean": 0.0, "std": 16.0, "classes": None,
        }  # fmt: skip
        group = index["splits/train"]
        assert group["sizes"][:].tolist() == list(SIZES) and group["sizes"].dtype == np.int64
        assert [name.decode() for name in group["ids"]] == [name for name, _ in held]
        shards, central = json.loads(group.attrs["shards"]), group.attrs["central"]
    assert not central
    # A row is 10 bytes and a shard ends before it exceeds 80: sizes 4 0 3 1 0 | 6 2.
    assert [entry["first"] for entry in shards] == [0, 5]
    for entry, part in zip(shards, (held[:5], held[5:])):
        path = tmp_path / "d" / entry["file"]
        assert path.stat().st_size == entry["bytes"]
        with h5py.File(path) as file:
            assert_same({name: file[name][:] for name in FEATURES}, concatenated(part))
            assert file["offsets"].dtype == np.int64 and file["crc32/x"].dtype == np.uint32
            assert file["offsets"][:].tolist() == np.cumsum([0] + [len(c["y"]) for _, c in part]).tolist()
            for name in FEATURES:
                assert file[name].chunks is None
                assert file[f"crc32/{name}"][:].tolist() == [zlib.crc32(c[name].tobytes()) for _, c in part]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


@pytest.mark.parametrize("shard_bytes", [1, 45, 1 << 20])
def test_round_trip(tmp_path, open_dataset, shard_bytes):
    held = clients()
    with ShardWriter(tmp_path / "d", FEATURES, {"made": [1, 2.5]}, shard_bytes) as writer:
        writer.write("train", iter(held))
        writer.central("test", arrays(1200, seed=9))
    dataset = open_dataset(tmp_path / "d")
    assert (dataset.features, dataset.provenance) == (FEATURES, {"made": [1, 2.5]})
    for index, (name, columns) in enumerate(held):
        assert dataset.client_id("train", index) == name
        assert_same(dataset.client("train", index), columns)
    assert_same(dataset.rows("train", 0, sum(SIZES)), concatenated(held))
    assert dataset.central("test") and dataset.sizes("test").tolist() == [512, 512, 176]
    assert_same(dataset.rows("test", 0, 1200), arrays(1200, seed=9))
    assert dataset.total("test") == 1200


def test_dtypes_and_memory_orders_survive(tmp_path, open_dataset):
    columns = {
        "flags": np.array([True, False, True]),
        "half": np.array([0.5, -1, 2], np.float16),
        "swapped": (np.arange(3) * 70000).astype(">i4"),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(3, 2)),
        "strided": np.arange(12, dtype=np.uint16)[::4],
    }
    with ShardWriter(tmp_path / "d") as writer:
        writer.write("train", [("a", columns), ("ü" * 3, columns)])
    dataset = open_dataset(tmp_path / "d")
    native = {name: rows.astype(rows.dtype.newbyteorder("=")) for name, rows in columns.items()}
    assert_same(dataset.client("train", 1), native)
    assert dataset.client_id("train", 1) == "üüü"
    assert dataset.features["fortran"] == Feature("float64", (2,))


def test_writer_streams_shard_by_shard_and_copies_what_it_is_given(tmp_path, open_dataset):
    buffer, on_disk = np.zeros((4, 10), np.uint8), []

    def reusing_one_buffer():
        for i in range(6):
            on_disk.append(len(list(tmp_path.glob("d.partial-*/train-*.h5"))))
            buffer[:] = i
            yield f"c{i}", {"x": buffer}

    with ShardWriter(tmp_path / "d", shard_bytes=80) as writer:
        writer.write("train", reusing_one_buffer())
    assert on_disk == [0, 0, 0, 1, 1, 2]  # asked for client i, everything but the open shard has left memory
    dataset = open_dataset(tmp_path / "d")
    assert [int(dataset.client("train", i)["x"].max()) for i in range(6)] == list(range(6))


def test_same_input_gives_the_same_bytes_later_elsewhere(tmp_path, open_dataset):
    written, digests = [], []
    for name, pause in (
        ("one", 0),
        ("a_much_longer_name", 1.1),
    ):  # HDF5's times have a resolution of one second
        time.sleep(pause)
        turned = (lambda columns: dict(reversed(columns.items()))) if pause else dict  # order in a dict has no say
        with ShardWriter(tmp_path / name, turned(FEATURES), turned({"b": 1, "a": 2}), shard_bytes=50) as writer:
            writer.write("train", ((client, turned(columns)) for client, columns in clients()))
            writer.central("test", turned(arrays(600)))
        written.append(bytes_of(tmp_path / name))
        digests.append(open_dataset(tmp_path / name).digest)
    assert written[0] == written[1] and len(written[0]) > 4
    assert digests[0] == digests[1]


def test_digest_tells_every_difference(tmp_path, open_dataset):
    def digest(name, held, features=FEATURES, provenance=None):
        with ShardWriter(tmp_path / name, features, provenance) as writer:
            writer.write("train", held)
        return open_dataset(tmp_path / name).digest

    altered = clients()
    altered[2][1]["x"][0, 0, 0] ^= 1
    renamed = [("other", clients()[0][1]), *clients()[1:]]
    rescaled = {**FEATURES, "x": Feature("uint8", (2, 3), mean=0.0, std=8.0)}
    digests = {
        digest("a", clients()),
        digest("b", altered),
        digest("c", renamed),
        digest("d", clients(), rescaled),
        digest("e", clients(), provenance={"source": "other"}),
    }
    assert len(digests) == 5 and all(len(value) == 64 for value in digests)


def with_column(name, value):
    return {**arrays(3), name: value}


BAD_COLUMNS = {
    "missing": ({"x": arrays(3)["x"]}, "y", "is missing"),
    "extra": (with_column("z", np.zeros(3)), "z", "one too many"),
    "ragged": (with_column("y", np.zeros(2, "i4")), "y", "has 2 rows"),
    "dtype": (with_column("y", np.zeros(3, "i8")), "y", "int64"),
    "shape": (with_column("x", np.zeros((3, 3, 2), "u1")), "x", r"\(3, 2\)"),
    "object": (with_column("y", np.array([1, 2, 3], object)), "y", "object"),
    "text": (with_column("y", np.array(["a", "b", "c"])), "y", "<U1"),
    "list": (with_column("y", [1, 2, 3]), "y", "list"),
    "scalar": (with_column("y", np.int32(3)), "y", "int32"),
    "label above": (with_column("y", np.array([0, 5, 1], "i4")), "y", "labels must be 0 to 4"),
    "label below": (with_column("y", np.array([0, -1, 1], "i4")), "y", "labels must be 0 to 4"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
@pytest.mark.parametrize("position", [0, 1])
def test_bad_column_is_refused_by_split_client_and_column(tmp_path, case, position):
    columns, column, problem = BAD_COLUMNS[case]
    held = [*[("good", arrays(2))][:position], ("bad one", columns)]
    with (
        pytest.raises(UserError, match=rf"split 'train', client 'bad one', column '{column}'.*{problem}") as error,
        ShardWriter(tmp_path / "d", FEATURES) as writer,
    ):
        writer.write("train", held)
    assert one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_floats_are_refused(tmp_path, value):
    columns = {"f": np.array([[0, 1], [2, value]], np.float32)}
    with (
        pytest.raises(UserError, match=r"'train', client 'a', column 'f': row 1"),
        ShardWriter(tmp_path / "d") as writer,
    ):
        writer.write("train", [("a", columns)])


def test_first_client_sets_the_columns_when_none_are_given(tmp_path):
    held = [("a", {"v": np.zeros((0, 4), "f4")}), ("b", {"v": np.zeros((2, 5), "f4")})]
    with pytest.raises(UserError, match="client 'b', column 'v'"), ShardWriter(tmp_path / "d") as writer:
        writer.write("train", held)


@pytest.mark.parametrize("rows", [np.zeros((3, 0)), np.zeros(3, np.longdouble), np.zeros(3, complex), np.zeros(())])
def test_first_column_that_cannot_be_stored_is_named(tmp_path, rows):
    with (
        pytest.raises(UserError, match="split 'train', client 'a', column 'v': is"),
        ShardWriter(tmp_path / "d") as writer,
    ):
        writer.write("train", [("a", {"v": rows})])


@pytest.mark.parametrize("bad", ["", 7, None, b"bytes", "nul\0", "lone \ud800", "x" * 256])
def test_id_that_is_no_short_text_is_refused(tmp_path, bad):
    with (
        pytest.raises(UserError, match=r"split 'train', client .*an id must") as error,
        ShardWriter(tmp_path / "d") as w,
    ):
        w.write("train", [("a", arrays(1)), (bad, arrays(1))])
    assert one_line(error)


def test_duplicate_id_is_refused_within_a_split_only(tmp_path, open_dataset):
    with (
        pytest.raises(UserError, match=r"split 'train', client 'a'.*unique"),
        ShardWriter(tmp_path / "d") as writer,
    ):
        writer.write("train", [("a", arrays(1)), ("b", arrays(1)), ("a", arrays(1))])
    with ShardWriter(tmp_path / "d") as writer:
        writer.write("train", [("a", arrays(1))])
        writer.write("test", [("a", arrays(2))])
    assert open_dataset(tmp_path / "d").splits == ("test", "train")


@pytest.mark.parametrize(
    ("fill", "problem"),
    [
        (lambda writer: None, "at least one client"),
        (lambda writer: writer.write("train", []), "split 'train' has no clients"),
        (lambda writer: writer.central("test", arrays(0)), "split 'test' has no rows"),
        (lambda writer: writer.central("test", with_column("y", np.zeros(2, "i4"))), "'test'.*column 'y'"),
        (lambda writer: writer.write("train", [("a", None)]), "'train', client 'a'"),
        (lambda writer: writer.write("../up", clients()), "cannot name a split"),
        (
            lambda writer: (writer.write("train", clients()), writer.write("train", clients())),
            "written before",
        ),
    ],
)
def test_bad_splits_are_refused_and_leave_nothing(tmp_path, fill, problem):
    with pytest.raises(UserError, match=problem), ShardWriter(tmp_path / "d", FEATURES) as writer:
        fill(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["offsets", "crc32", "mask", "index", "key", "a/b", "", "1st"])
def test_names_with_a_meaning_of_their_own_cannot_name_columns(tmp_path, name):
    with pytest.raises(UserError, match="cannot name a column"):
        ShardWriter(tmp_path / "d", {name: Feature("uint8", ())})


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "object"},
        {"dtype": "uint9"},
        {"dtype": "complex64"},
        {"shape": (0,)},
        {"mean": 1.0},
        {"mean": 0.0, "std": 0.0},
        {"mean": np.nan, "std": 1.0},
        {"classes": 0},
        {"dtype": "float32", "classes": 3},
    ],
)
def test_impossible_features_are_refused(wrong):
    with pytest.raises(UserError):
        Feature(**{"dtype": "uint8", "shape": (2,), **wrong})


def test_provenance_must_be_json(tmp_path):
    with pytest.raises(UserError, match="provenance"):
        ShardWriter(tmp_path / "d", provenance={"when": object()})


def test_source_that_fails_half_way_leaves_nothing(tmp_path):
    def failing():
        yield from clients()
        raise RuntimeError("the source broke")

    with (
        pytest.raises(RuntimeError, match="source broke"),
        ShardWriter(tmp_path / "d", shard_bytes=1) as writer,
    ):
        writer.write("train", failing())
    assert list(tmp_path.iterdir()) == []


def test_swallowed_failure_does_not_finish_a_half_split(tmp_path):
    with (
        pytest.raises(UserError, match="'train' was not written to its end"),
        ShardWriter(tmp_path / "d") as writer,
    ):
        with pytest.raises(UserError):
            writer.write("train", [("a", arrays(1)), ("a", arrays(1))])
        writer.write("test", [("a", arrays(1))])
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused_untouched_unless_empty(tmp_path, open_dataset):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(UserError, match="remove it or choose another --out"):
            ShardWriter(tmp_path / name)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    with ShardWriter(tmp_path / "empty") as writer:
        writer.write("train", clients())
    assert open_dataset(tmp_path / "empty").clients == len(SIZES)


def test_folder_filled_meanwhile_is_refused_untouched(tmp_path):
    with pytest.raises(UserError, match="choose another --out"), ShardWriter(tmp_path / "d") as writer:
        writer.write("train", clients())
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "theirs").write_text("kept")
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "theirs"]


# ---- reading


def test_planted_dataset_is_read(planted, open_dataset):
    dataset = open_dataset(str(planted))
    assert dataset.splits == ("reversed", "test", "train", "validation")
    assert (dataset.clients, dataset.features, dataset.provenance) == (7, FEATURES, {"source": "planted"})
    assert dataset.sizes("train").dtype == np.int64 and dataset.sizes("train").tolist() == list(SIZES)
    assert (dataset.total("train"), dataset.total("test")) == (16, 5)
    assert [dataset.central(split) for split in ("train", "test")] == [False, True]
    aligned = {split: dataset.aligned(split) for split in dataset.splits}
    assert aligned == {"train": True, "validation": True, "reversed": False, "test": False}
    for index, (name, columns) in enumerate(clients()):
        assert dataset.client_id("train", index) == name
        assert_same(dataset.client("train", index), columns)
    with pytest.raises(ValueError, match="read-only"):
        dataset.sizes("train")[0] = 1


def test_every_range_of_rows_is_read_across_shards(planted, open_dataset):
    whole = concatenated(clients())
    for start in range(17):
        for stop in range(start, 17):
            if start % 4 == 0:  # also as the first touch
                fresh = Dataset(planted)
                found = fresh.rows("train", start, stop)
                assert_same(found, {n: c[start:stop] for n, c in whole.items()})
                assert all(rows.base is None for rows in found.values())  # no view keeps more in memory
                fresh.close()
    dataset = open_dataset(planted)
    for start in range(17):
        for stop in range(start, 17):
            assert_same(dataset.rows("train", start, stop), {n: c[start:stop] for n, c in whole.items()})


def test_central_blocks_are_aligned_with_no_clients(tmp_path, open_dataset):
    with ShardWriter(tmp_path / "d") as writer:
        writer.write("train", [("block-000000", arrays(3))])
        writer.central("test", arrays(3))
    dataset = open_dataset(tmp_path / "d")
    assert dataset.client_id("test", 0) == "block-000000" and not dataset.aligned("test")


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
    with ShardWriter(tmp_path / "d") as writer:
        writer.write("test", clients())
    dataset = open_dataset(tmp_path / "d")
    assert dataset.total("test") == 16 and not dataset.aligned("test")
    with pytest.raises(UserError, match="no split of d 'train'"):
        _ = dataset.clients


# ---- damage


def refused(path):
    with pytest.raises(UserError) as error:
        Dataset(path)
    return one_line(error)


def test_what_is_no_dataset_is_refused_at_open(tmp_path):
    assert "no such folder" in refused(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    assert "no index.h5" in refused(tmp_path / "folder")
    (tmp_path / "folder" / "index.h5").write_bytes(b"not HDF5")
    assert "index.h5: cannot be read" in refused(tmp_path / "folder")
    with h5py.File(tmp_path / "folder" / "index.h5", "w"):
        pass
    assert "is None None, not mpifl-shards 1" in refused(tmp_path / "folder")


def test_other_format_version_is_refused_at_open(planted):
    with h5py.File(planted / "index.h5", "r+") as index:
        index.attrs["version"] = 2
    assert "mpifl-shards 2, not mpifl-shards 1; update mpifl" in refused(planted)


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


def flip(path, column, row):
    """Flip one bit of the column's row in the file, behind HDF5's back."""
    with h5py.File(path) as file:
        dataset = file[column]
        at = dataset.id.get_offset() + row * dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("column", ["x", "y"])
@pytest.mark.parametrize("touch", [lambda d: d.client("train", 5), lambda d: d.rows("train", 13, 14)])
def test_flipped_bit_is_found_at_first_touch_of_its_client(planted, open_dataset, column, touch):
    flip(planted / "train-00001.h5", column, row=7)  # row 7 of the shard is of client 5: sizes 3 1 0 6
    dataset = open_dataset(planted)
    for index in (0, 1, 2, 3, 4, 6):
        assert_same(dataset.client("train", index), clients()[index][1])
    for _ in range(2):
        with pytest.raises(UserError, match=f"train-00001.h5: column '{column}' of client 'c5'.*checksum") as error:
            touch(dataset)
        assert one_line(error)


def test_checksums_are_verified_once(planted, open_dataset, monkeypatch):
    dataset, checked = open_dataset(planted), []
    crc32 = zlib.crc32
    monkeypatch.setattr(shard.zlib, "crc32", lambda rows: checked.append(len(rows)) or crc32(rows))
    dataset.client("train", 5)
    assert checked == [6, 6]
    dataset.client("train", 5)
    dataset.rows("train", 9, 13)
    assert checked == [6, 6]
    dataset.rows("train", 7, 9)  # clients 3, 4 (empty) and 5, which is known by now
    assert checked == [6, 6, 1, 1, 0, 0]


def reverse(file):
    file["offsets"][:] = file["offsets"][:][::-1]


def shift(file):
    file["offsets"][0] = 1


def dip(file):
    file["offsets"][2] = 2


def move_border(file):
    file["offsets"][1] += 1


def alter_checksum(file):
    file["crc32/x"][2] ^= 1


def lose_table(file):
    del file["crc32/y"]


def other_dtype(file):
    values = file["y"][:].astype("u4")
    del file["y"]
    file["y"] = values


def longer_column(file):
    values = np.concatenate([file["y"][:], [0]]).astype("i4")
    del file["y"]
    file["y"] = values


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (reverse, "offsets must start at 0 and never decrease"),
        (shift, "offsets must start at 0 and never decrease"),
        (dip, "offsets must start at 0 and never decrease"),
        (move_border, "sizes of clients that the index has"),
        (alter_checksum, "not those that the index was written with"),
        (lose_table, "table is missing"),
        (other_dtype, "column 'y' is uint32"),
        (longer_column, r"column 'y' is int32 \(11,\)"),
    ],
)
def test_damaged_tables_are_found_when_the_shard_is_first_opened(planted, open_dataset, damage, problem):
    path = planted / "train-00001.h5"
    with h5py.File(path, "r+") as file:
        damage(file)
    with h5py.File(planted / "index.h5", "r+") as index:  # so that only the first opening can tell
        attributes = index["splits/train"].attrs
        shards = json.loads(attributes["shards"])
        shards[1]["bytes"] = path.stat().st_size
        attributes["shards"] = json.dumps(shards)
    dataset = open_dataset(planted)
    assert_same(dataset.client("train", 0), clients()[0][1])
    with pytest.raises(UserError, match=f"train-00001.h5: .*{problem}") as error:
        dataset.client("train", 4)
    assert one_line(error)


@pytest.mark.parametrize(("table", "value"), [("sizes", 5), ("ids", b"c9")])
def test_altered_index_has_another_digest(planted, open_dataset, table, value):
    before = Dataset(planted)
    digest = before.digest
    before.close()
    with h5py.File(planted / "index.h5", "r+") as index:
        index[f"splits/train/{table}"][0] = value
    assert open_dataset(planted).digest != digest


def test_shard_exchanged_for_another_of_the_same_size_is_found(planted, open_dataset):
    other = [(name, arrays(len(columns["y"]), seed=90 + i)) for i, (name, columns) in enumerate(clients()[2:6])]
    size = (planted / "train-00001.h5").stat().st_size
    assert plant_shard(planted / "train-00001.h5", other)["bytes"] == size
    with pytest.raises(UserError, match=r"train-00001\.h5"):
        open_dataset(planted).client("train", 2)


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


def test_two_readers_share_a_dataset(planted, open_dataset):
    first, second = open_dataset(planted), open_dataset(planted)
    assert_same(first.client("train", 5), second.client("train", 5))
    first.close()
    assert_same(second.client("train", 0), clients()[0][1])


# ---- shipped datasets


def test_embedded_digits_are_whole(open_dataset):
    dataset = open_dataset(embedded("digits"))
    assert (dataset.clients, dataset.total("train"), dataset.total("test")) == (100, 1437, 360)
    assert dataset.features["x"] == Feature("uint8", (8, 8), mean=0.0, std=16.0)
    assert dataset.features["y"] == Feature("uint8", (), classes=10)
    assert dataset.rows("train", 0, 1437)["x"].max() == 16
    assert "CC BY 4.0" in dataset.provenance["licence"]
    assert sum(path.stat().st_size for path in embedded("digits").iterdir()) < 150_000


def test_unknown_embedded_dataset_is_refused():
    with pytest.raises(UserError, match="did you mean 'digits'"):
        embedded("digit")
