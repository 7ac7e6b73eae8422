"""Writing datasets: what is on disk, read with plain h5py; what the digest says; and what is refused."""

import json
import time
import zlib
from contextlib import closing, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from shard_files import SIZES, arrays, assert_same, clients, concatenated, flip_byte, one_line, stored

from data_prep.conversion import Conversion, Split
from data_prep.writing import write
from mpifl.config import UserError
from mpifl.data.pieces import COMPRESSIONS, PLUGINS, Storage, write_piece
from mpifl.data.shard import Dataset, Feature
from mpifl.data.writer import ShardWriter, Unfinished

FEATURES = {
    "t": Feature("uint8", (6,), classes=90, pad=0),
    "x": Feature("uint8", (2, 3), mean=0.0, std=16.0),
    "y": Feature("int32", (), classes=5),
}


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make(path, held, features=FEATURES, provenance=None, **how):
    with ShardWriter(path, features, provenance, **how) as writer:
        writer.write("train", held)
    return path


def digest_of(path):
    dataset = Dataset(path)
    dataset.close()
    return dataset.digest


def compressions():
    return [
        pytest.param(name, marks=[pytest.mark.skipif(not has_plugins(), reason="needs hdf5plugin")] * (name in PLUGINS))
        for name in COMPRESSIONS
    ]


def has_plugins():
    try:
        import hdf5plugin  # noqa: F401
    except ImportError:
        return False
    return True


# ---- on disk


def test_files_on_disk_follow_the_documented_layout(tmp_path):
    held = clients()
    make(tmp_path / "d", held, provenance={"source": "test"}, shard_bytes=128)
    with h5py.File(tmp_path / "d" / "index.h5") as index:
        assert (index.attrs["format"], index.attrs["version"]) == (b"mpifl-shards", 2)
        texts = [index["features"], index["provenance"], index["splits/train/shards"], index["splits/train/digests"]]
        # A damaged text of any length may have HDF5 search for ever.
        assert all(h5py.check_string_dtype(text.dtype).length for text in texts)
        assert json.loads(index["provenance"].asstr()[()]) == {"source": "test"}
        features = json.loads(index["features"].asstr()[()])
        assert features["x"] == {"dtype": "uint8", "shape": [2, 3], "mean": 0.0, "std": 16.0}
        assert features["t"] == {"dtype": "uint8", "shape": [6], "classes": 90, "pad": 0}
        group = index["splits/train"]
        assert group["sizes"][:].tolist() == list(SIZES) and group["sizes"].dtype == np.int64
        assert [name.decode() for name in group["ids"]] == [name for name, _ in held]
        assert json.loads(group["digests"].asstr()[()])["central"] is False
        shards = json.loads(group["shards"].asstr()[()])
    # A row is 16 bytes and a shard ends before it may exceed 128: sizes 4 0 3 1 0 | 6 2.
    assert [entry["first"] for entry in shards] == [0, 5]
    for entry, part in zip(shards, (held[:5], held[5:])):
        path = tmp_path / "d" / entry["file"]
        assert path.stat().st_size == entry["bytes"]
        with h5py.File(path) as file:
            whole = concatenated(part)
            assert_same({name: file[name][:] for name in ("x", "y")}, {name: whole[name] for name in ("x", "y")})
            assert file["offsets"].dtype == np.int64 and file["crc32/x"].dtype == np.uint32
            assert file["offsets"][:].tolist() == np.cumsum([0] + [len(c["y"]) for _, c in part]).tolist()
            assert [name.decode() for name in file["ids"]] == [name for name, _ in part]
            for name in ("x", "y"):
                assert file[name].chunks is None
                assert file[f"crc32/{name}"][:].tolist() == [zlib.crc32(c[name].tobytes()) for _, c in part]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def test_large_columns_lie_on_64_byte_lines(tmp_path):
    make(tmp_path / "d", clients((100, 101, 102)))
    with h5py.File(tmp_path / "d" / "train-00000.h5") as file:
        assert [file[name].id.get_offset() % 64 for name in ("t", "x", "y")] == [0, 0, 0]


def test_sequences_are_stored_without_padding(tmp_path, open_dataset):
    random = np.random.RandomState(0)
    lengths = random.randint(0, 1001, 64)
    lengths[:4] = 0, 1000, 1, 0
    t = random.randint(0, 50, (64, 1000)).astype("i4")
    t[np.arange(64), np.maximum(lengths - 1, 0)] = 7  # the last one is no pad; pads in the middle are items
    t[np.arange(1000) >= lengths[:, None]] = 0
    held = [(f"c{i}", {"t": t[a:b]}) for i, (a, b) in enumerate(((0, 1), (1, 30), (30, 30), (30, 64)))]
    make(tmp_path / "d", held, {"t": Feature("int32", (1000,), pad=0)})
    with h5py.File(tmp_path / "d" / "train-00000.h5") as file:
        items, counts = stored(t, 0)
        assert counts == lengths.tolist() and 0 in items
        assert file["t"][:].tolist() == items and file["t"].dtype == np.int32
        assert file["lengths/t"][:].tolist() == counts and file["lengths/t"].dtype == np.uint16
        assert file["items/t"][:].tolist() == [0, 0, sum(counts[:30]), sum(counts[:30]), sum(counts)]
        expected = [stored(columns["t"], 0) for _, columns in held]
        crc32 = [zlib.crc32(np.array(i, "i4"), zlib.crc32(np.array(n, "u2"))) for i, n in expected]
        assert file["crc32/t"][:].tolist() == crc32
    size = (tmp_path / "d" / "train-00000.h5").stat().st_size
    assert 4 * len(items) < size < 4 * len(items) + 8192 < t.nbytes * 0.6
    dataset = open_dataset(tmp_path / "d")
    for _ in range(2):  # first touch and later
        for index, (_, columns) in enumerate(held):
            assert_same(dataset.client("train", index), columns)
            assert dataset.client("train", index)["t"].flags.c_contiguous
        assert_same(dataset.rows("train", 17, 51), {"t": t[17:51]})


@pytest.mark.parametrize("pad", [0, -1])
def test_sequences_of_vectors_and_other_pads_survive(tmp_path, open_dataset, pad):
    t = np.full((5, 3, 2), pad, "i2")
    t[1, :2], t[2, 2], t[3, 0, 1], t[4] = 5, pad + 1, 9, np.arange(1, 7).reshape(3, 2)
    make(tmp_path / "d", [("a", {"t": t}), ("b", {"t": t[::-1]})], {"t": Feature("int16", (3, 2), pad=pad)})
    with h5py.File(tmp_path / "d" / "train-00000.h5") as file:
        assert file["lengths/t"][:].tolist() == [0, 2, 3, 1, 3, 3, 1, 3, 2, 0]
        assert file["t"].shape == (18, 2)
    dataset = open_dataset(tmp_path / "d")
    assert_same(dataset.client("train", 0), {"t": t})
    assert_same(dataset.client("train", 1), {"t": t[::-1]})


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
    assert dataset.total("test") == 1200 and dataset.recomputed_digest() == dataset.digest


def test_dtypes_and_memory_orders_survive(tmp_path, open_dataset):
    columns = {
        "flags": np.array([True, False, True]),
        "half": np.array([0.5, -1, 2], np.float16),
        "swapped": (np.arange(3) * 70000).astype(">i4"),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(3, 2)),
        "strided": np.arange(12, dtype=np.uint16)[::4],
    }
    make(tmp_path / "d", [("a", columns), ("ü" * 3, columns)], None)
    dataset = open_dataset(tmp_path / "d")
    native = {name: rows.astype(rows.dtype.newbyteorder("=")) for name, rows in columns.items()}
    assert_same(dataset.client("train", 1), native)
    assert dataset.client_id("train", 1) == "üüü"
    assert dataset.features["fortran"] == Feature("float64", (2,))


def test_central_blocks_are_no_clients(tmp_path, open_dataset):
    with ShardWriter(tmp_path / "d") as writer:
        writer.write("train", [("block-00000-000000", arrays(3))])
        writer.central("test", arrays(3))
    dataset = open_dataset(tmp_path / "d")
    assert dataset.client_id("test", 0) == "block-00000-000000" and not dataset.aligned("test")


def test_central_parts_of_any_length_give_the_same_blocks(tmp_path):
    whole = arrays(1500)
    for name, borders in (("one", (0, 1500)), ("many", (0, 3, 3, 700, 1023, 1024, 1500))):
        with ShardWriter(tmp_path / name, FEATURES) as writer:
            writer.central("test", ({n: r[a:b] for n, r in whole.items()} for a, b in pairwise(borders)))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "many")


def test_writer_streams_shard_by_shard_and_copies_what_it_is_given(tmp_path, open_dataset):
    buffer, on_disk = np.zeros((4, 10), np.uint8), []

    def reusing_one_buffer():
        for i in range(6):
            on_disk.append(len(list(tmp_path.glob("d.partial/train.*.h5"))))
            buffer[:] = i
            yield f"c{i}", {"x": buffer}

    make(tmp_path / "d", reusing_one_buffer(), None, shard_bytes=80)
    assert on_disk == [0, 0, 0, 1, 1, 2]  # asked for client i, everything but the open shard has left memory
    dataset = open_dataset(tmp_path / "d")
    assert [int(dataset.client("train", i)["x"].max()) for i in range(6)] == list(range(6))


# ---- compression


@pytest.mark.parametrize("compression", compressions())
def test_every_compression_keeps_digest_and_data_and_finds_flipped_bytes(tmp_path, open_dataset, compression):
    held = [(name, {**columns, "x": columns["x"] // 64}) for name, columns in clients((50, 0, 70, 60))]
    plain, packed = make(tmp_path / "plain", held), make(tmp_path / "packed", held, compression=compression)
    dataset = Dataset(packed)
    assert dataset.digest == digest_of(plain)
    for index, (_, columns) in enumerate(held):
        assert_same(dataset.client("train", index), columns)
    dataset.close()
    path = packed / "train-00000.h5"
    with h5py.File(path) as file:
        chunks = {name: file[name].id.get_chunk_info(0) for name in ("t", "x", "lengths/t")}
    for name, chunk in chunks.items():
        flip_byte(path, chunk.byte_offset + chunk.size // 2)
        said = rf"train-00000\.h5: .*'({name.removeprefix('lengths/')}|{name})'"
        with closing(Dataset(packed)) as damaged, pytest.raises(UserError, match=said) as error:
            damaged.rows("train", 0, 180)
        assert one_line(error)
        flip_byte(path, chunk.byte_offset + chunk.size // 2)
    assert_same(open_dataset(packed).rows("train", 0, 180), concatenated(held))


@pytest.mark.parametrize(
    ("rows", "side", "chunk"),
    [(100, 28, 100), (3, 28, 5), (700, 64, 256), (1, 2000, 1)],  # a client; at least 4 KiB; at most 1 MiB; a row
)
def test_chunks_are_about_one_client(tmp_path, rows, side, chunk):
    held = [(f"c{i}", {"x": np.zeros((rows, side, side), "u1")}) for i in range(3)]
    make(tmp_path / "d", held, None, compression="gzip")
    with h5py.File(tmp_path / "d" / "train-00000.h5") as file:
        assert file["x"].chunks == (chunk, side, side)
        assert file["offsets"].chunks is None and file["crc32/x"].chunks is None


def test_unknown_compression_is_refused_before_data_is_read(tmp_path):
    with pytest.raises(UserError, match="did you mean 'gzip'"):
        ShardWriter(tmp_path / "d", FEATURES, compression="gzipp")


# ---- standardize


def images(seed=0):
    """Clients of 3-channel images of different brightness, one without any."""
    random = np.random.RandomState(seed)
    x = [random.randint(0, 60 + 40 * i, (n, 3, 5, 4)).astype("u1") for i, n in enumerate((3, 0, 9, 1, 4))]
    return [(f"c{i}", {"x": rows * np.array([1, 1, 0], "u1")[:, None, None]}) for i, rows in enumerate(x)]


def some(held, piece):
    return held[piece.start : piece.stop]


@pytest.mark.parametrize("shape", ["channels", "pixels"])
def test_standardize_is_exact_and_independent_of_shards_and_pieces(tmp_path, open_dataset, shape):
    held = images()
    if shape == "pixels":
        held = [(name, {"x": c["x"].reshape(-1, 15, 4)}) for name, c in held]
    feature = Feature("uint8", held[0][1]["x"].shape[1:])
    whole = concatenated(held)["x"].astype(np.float64)
    found = []
    for number, (borders, shard_bytes) in enumerate((((0, 5), 1 << 20), ((0, 5), 1), ((0, 1, 1, 2, 3, 5), 300))):
        pieces = [range(a, b) for a, b in pairwise(borders)]
        test = Split("test", [None], lambda _: [("", {"x": np.full((9, *feature.shape), 255, "u1")})], central=True)
        conversion = Conversion({"x": feature}, (Split("train", pieces, partial(some, held)), test), {})
        write(conversion, tmp_path / str(number), Storage({"x": feature}, shard_bytes, standardize="x"), 1, "")
        found.append(open_dataset(tmp_path / str(number)).features["x"])
    assert found[0] == found[1] == found[2]
    axes = (0, 2, 3) if shape == "channels" else None
    np.testing.assert_allclose(found[0].mean, whole.mean(axis=axes), rtol=1e-14)
    std = whole.std(axis=axes)
    np.testing.assert_allclose(found[0].std, np.where(std == 0, 1.0, std), rtol=1e-14)  # the last channel is black
    assert np.shape(found[0].mean) == ((3,) if shape == "channels" else ())


@pytest.mark.parametrize(("column", "problem"), [("f", "'f' is not uint8"), ("xx", "did you mean 'x'")])
def test_what_cannot_be_standardized_is_refused(column, problem):
    with pytest.raises(UserError, match=problem):
        Storage({"x": Feature("uint8", (2,)), "f": Feature("float32", ())}, standardize=column)


# ---- the digest


def test_same_input_gives_the_same_bytes_later_elsewhere(tmp_path):
    written = []
    for name, pause in (("one", 0), ("a_much_longer_name", 1.1)):  # HDF5's times have a resolution of one second
        time.sleep(pause)
        turned = (lambda columns: dict(reversed(columns.items()))) if pause else dict  # order in a dict has no say
        with ShardWriter(tmp_path / name, turned(FEATURES), turned({"b": 1, "a": 2}), shard_bytes=50) as writer:
            writer.write("train", ((client, turned(columns)) for client, columns in clients()))
            writer.central("test", turned(arrays(600)))
        written.append(bytes_of(tmp_path / name))
    assert written[0] == written[1] and len(written[0]) > 4


def test_digest_is_of_content_not_of_storage(tmp_path):
    ways = [
        make(tmp_path / "plain", clients()),
        make(tmp_path / "shards", clients(), shard_bytes=1),
        make(tmp_path / "packed", clients(), shard_bytes=100, compression="lzf"),
        make(tmp_path / "told", clients(), provenance={"source": "elsewhere"}),
    ]
    for number, borders in enumerate(((0, 3, 7), (0, 0, 1, 2, 3, 4, 5, 6, 7, 7))):  # some pieces are empty
        ways.append(tmp_path / f"pieces{number}")
        pieces = [range(a, b) for a, b in pairwise(borders)]
        conversion = Conversion(FEATURES, (Split("train", pieces, partial(some, clients())),), {})
        write(conversion, ways[-1], Storage(FEATURES), 1, "")
    assert len({digest_of(path) for path in ways}) == 1
    assert len({len(list(path.iterdir())) for path in ways}) > 2


def alterations():
    """The same dataset but for one thing."""

    def change(client, column, at, value):
        held = clients()
        held[client][1][column][at] += np.array(value, held[client][1][column].dtype)
        return held

    moved = clients()
    moved[2][1].update({name: rows[:-1] for name, rows in moved[2][1].items()})
    moved[3][1].update({n: np.concatenate([rows[-1:], moved[3][1][n]]) for n, rows in clients()[2][1].items()})
    return {
        "a pixel": (change(2, "x", (0, 0, 0), 1), FEATURES),
        "a label": (change(5, "y", 5, (clients()[5][1]["y"][5] == 0) * 2 - 1), FEATURES),
        "an item": (change(5, "t", (1, 0), 1), FEATURES),
        "a name": ([("other", clients()[0][1]), *clients()[1:]], FEATURES),
        "the order": (clients()[::-1], FEATURES),
        "whose row it is": (moved, FEATURES),
        "a client more": ([*clients(), ("c7", arrays(0))], FEATURES),
        "the scale": (clients(), {**FEATURES, "x": Feature("uint8", (2, 3), mean=0.0, std=8.0)}),
        "the classes": (clients(), {**FEATURES, "y": Feature("int32", (), classes=6)}),
        "the names": (clients(), {**FEATURES, "y": Feature("int32", (), classes=5, names=tuple("abcde"))}),
        "the padding": (clients(), {**FEATURES, "t": Feature("uint8", (6,), classes=90)}),
    }


def test_digest_tells_every_difference(tmp_path):
    digests = {"nothing": digest_of(make(tmp_path / "d", clients()))}
    for number, (what, (held, features)) in enumerate(alterations().items()):
        digests[what] = digest_of(make(tmp_path / str(number), held, features))
    with ShardWriter(tmp_path / "central", FEATURES) as writer:
        writer.central("train", concatenated(clients()))
    digests["whose rows they are"] = digest_of(tmp_path / "central")
    with ShardWriter(tmp_path / "split", FEATURES) as writer:
        writer.write("test", clients())
    digests["the split"] = digest_of(tmp_path / "split")
    assert len(set(digests.values())) == len(digests), digests


# ---- refused


def with_column(name, value):
    return {**arrays(3), name: value}


BAD_COLUMNS = {
    "missing": ({name: arrays(3)[name] for name in ("t", "x")}, "y", "is missing"),
    "extra": (with_column("z", np.zeros(3)), "z", "one too many"),
    "ragged": (with_column("y", np.zeros(2, "i4")), "y", "has 2 rows"),
    "dtype": (with_column("y", np.zeros(3, "i8")), "y", "int64"),
    "shape": (with_column("x", np.zeros((3, 3, 2), "u1")), "x", r"\(3, 2\)"),
    "object": (with_column("y", np.array([1, 2, 3], object)), "y", "object"),
    "text": (with_column("y", np.array(["a", "b", "c"])), "y", "<U1"),
    "list": (with_column("y", [1, 2, 3]), "y", "list"),
    "scalar": (with_column("y", np.int32(3)), "y", "int32"),
    "no rows at all": (with_column("y", np.array(3, np.int32)), "y", "int32"),
    "label above": (with_column("y", np.array([0, 5, 1], "i4")), "y", "row 1 holds 5, labels must be 0 to 4"),
    "label below": (with_column("y", np.array([0, 0, -1], "i4")), "y", "row 2 holds -1, labels must be 0 to 4"),
    "word": (with_column("t", np.full((3, 6), 90, "u1")), "t", "item 0 holds 90, labels must be 0 to 89"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
@pytest.mark.parametrize("position", [0, 1])
def test_bad_column_is_refused_by_split_client_and_column(tmp_path, case, position):
    columns, column, problem = BAD_COLUMNS[case]
    held = [*[("good", arrays(2))][:position], ("bad one", columns), ("c", arrays(2, seed=2))]
    with pytest.raises(UserError, match=rf"split 'train', client 'bad one', column '{column}'.*{problem}") as error:
        make(tmp_path / "d", held)
    assert one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_floats_are_refused(tmp_path, value):
    held = [("a", {"f": np.ones((3, 2), "f4")}), ("b", {"f": np.array([[0, 1], [2, value]], "f4")})]
    with pytest.raises(UserError, match=r"'train', client 'b', column 'f': row 1 is not finite"):
        make(tmp_path / "d", held, None)


def test_first_client_sets_the_columns_when_none_are_given(tmp_path):
    held = [("a", {"v": np.zeros((0, 4), "f4")}), ("b", {"v": np.zeros((2, 5), "f4")})]
    with pytest.raises(UserError, match="client 'b', column 'v'"):
        make(tmp_path / "d", held, None)


@pytest.mark.parametrize("rows", [np.zeros((3, 0)), np.zeros(3, np.longdouble), np.zeros(3, complex), np.zeros(())])
def test_first_column_that_cannot_be_stored_is_named(tmp_path, rows):
    with pytest.raises(UserError, match="split 'train', client 'a', column 'v': is"):
        make(tmp_path / "d", [("a", {"v": rows})], None)


@pytest.mark.parametrize("bad", ["", 7, None, b"bytes", "nul\0", "lone \ud800", "x" * 256])
def test_id_that_is_no_short_text_is_refused(tmp_path, bad):
    with pytest.raises(UserError, match=r"split 'train', client .*an id must") as error:
        make(tmp_path / "d", [("a", arrays(1)), (bad, arrays(1))])
    assert one_line(error)


@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])  # found in the next shard, and in the same
@pytest.mark.parametrize("order", ["aba", "bcaa", "zyxz"])
def test_duplicate_id_is_refused_within_a_split(tmp_path, shard_bytes, order):
    with pytest.raises(UserError, match=rf"split 'train', client '{order[-1]}'.*came before.*unique") as error:
        make(tmp_path / "d", [(name, arrays(1)) for name in order], shard_bytes=shard_bytes)
    assert one_line(error) and list(tmp_path.iterdir()) == []


def test_descending_ids_and_the_same_id_in_two_splits_are_fine(tmp_path, open_dataset):
    with ShardWriter(tmp_path / "d", shard_bytes=1) as writer:
        writer.write("train", [(name, arrays(1)) for name in ("b", "ab", "a", "aa")])
        writer.write("test", [("a", arrays(2))])
    dataset = open_dataset(tmp_path / "d")
    assert dataset.splits == ("test", "train") and dataset.ids("train").tolist() == [b"b", b"ab", b"a", b"aa"]


@pytest.mark.parametrize("features", [FEATURES, None])
@pytest.mark.parametrize(
    ("fill", "problem"),
    [
        (lambda writer: None, "at least one client"),
        (lambda writer: writer.write("train", []), "split 'train' has no clients"),
        (lambda writer: (writer.write("train", clients()), writer.write("test", [])), "split 'test' has no clients"),
        (lambda writer: writer.central("test", arrays(0)), "split 'test' has no rows"),
        (lambda writer: writer.write("train", [("a", None)]), "'train', client 'a'"),
        (lambda writer: writer.write("../up", clients()), "cannot name a split"),
        (lambda writer: (writer.write("train", clients()), writer.write("train", clients())), "written before"),
    ],
)
def test_bad_splits_are_refused_and_leave_nothing(tmp_path, fill, problem, features):
    with pytest.raises(UserError, match=problem), ShardWriter(tmp_path / "d", features) as writer:
        fill(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["offsets", "crc32", "ids", "items", "mask", "index", "key", "a/b", "", "1st"])
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
        {"mean": (0.0, 1.0, 2.0), "std": (1.0, 1.0, 1.0)},
        {"mean": (0.0, 1.0), "std": 1.0},
        {"classes": 0},
        {"classes": 2, "names": ("only one",)},
        {"dtype": "float32", "classes": 3},
        {"dtype": "float32", "pad": 0},
        {"shape": (), "pad": 0},
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

    with pytest.raises(RuntimeError, match="source broke"):
        make(tmp_path / "d", failing(), None, shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_swallowed_failure_does_not_finish_a_half_split(tmp_path):
    half = pytest.raises(UserError, match="'train' was not written to its end")
    with half, ShardWriter(tmp_path / "d") as writer, suppress(UserError):
        writer.write("train", [("a", arrays(1)), ("a", arrays(1))])
    assert list(tmp_path.iterdir()) == []


# ---- the folder


def test_existing_folder_is_refused_untouched_unless_empty(tmp_path, open_dataset):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file", "/"):
        with pytest.raises(UserError, match="remove it or choose another path"):
            ShardWriter(tmp_path / name)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    make(tmp_path / "empty", clients())
    assert open_dataset(tmp_path / "empty").clients == len(SIZES)


def test_folder_filled_meanwhile_is_refused_untouched(tmp_path):
    with pytest.raises(UserError, match="choose another path"), ShardWriter(tmp_path / "d") as writer:
        writer.write("train", clients())
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "theirs").write_text("kept")
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "theirs"]


def test_another_folder_of_the_temporary_name_is_refused_untouched(tmp_path):
    (tmp_path / "d.partial").mkdir()
    for name in ("notes.txt", "train-00000.h5"):
        (tmp_path / "d.partial" / name).write_text("kept")
    with pytest.raises(UserError, match=r"d\.partial is where unfinished shards go, but holds 'notes.txt'") as error:
        make(tmp_path / "d", clients())
    assert one_line(error)
    assert sorted(path.name for path in (tmp_path / "d.partial").iterdir()) == ["notes.txt", "train-00000.h5"]


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/d\.partial cannot be written: Not a directory"):
        make(tmp_path / "file" / "d", clients())


def test_two_writers_of_one_folder_do_not_meet(tmp_path, open_dataset):
    with ShardWriter(tmp_path / "d", FEATURES) as writer:
        with pytest.raises(UserError, match="is being made by another process"):
            make(tmp_path / "d", clients())
        writer.write("train", clients())
    assert open_dataset(tmp_path / "d").clients == len(SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["index.h5", "train-00000.h5"]


# ---- pieces, kept


def some_pieces(folder, key, numbers, shard_bytes=80):
    """Write pieces of one client each, and leave it at that."""
    with Unfinished(folder, key) as unfinished:
        for number in numbers:
            held = [(f"c{number}-{i}", arrays(3, seed=number)) for i in range(2)]
            write_piece(unfinished.folder, "train", number, held, Storage(FEATURES, shard_bytes))
    return unfinished


@pytest.mark.parametrize(("key", "kept"), [("same", True), ("other", False), ("", False)])
def test_complete_pieces_are_kept_for_the_same_key_alone(tmp_path, key, kept):
    some_pieces(tmp_path / "d", "same", [0, 2])
    names = {path.name for path in (tmp_path / "d.partial").iterdir()}
    with Unfinished(tmp_path / "d", key) as unfinished:
        assert [unfinished.has("train", number) for number in range(3)] == [kept, False, kept]
        left = {path.name for path in unfinished.folder.iterdir()}
        assert left == names if kept else left == {"lock", "key"}
    assert (tmp_path / "d.partial").exists() == kept


def test_folder_half_cleared_for_another_key_keeps_nothing_for_the_old_one(tmp_path, monkeypatch):
    some_pieces(tmp_path / "d", "old", range(4))
    removed, unlink = [], Path.unlink

    def interrupted(path, missing_ok=False):
        if len(removed) == 3:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Unfinished(tmp_path / "d", "new").__enter__()
    with Unfinished(tmp_path / "d", "old") as unfinished:
        assert not any(unfinished.has("train", number) for number in range(4))


def test_piece_written_again_with_fewer_shards_leaves_none_of_the_old(tmp_path, open_dataset):
    some_pieces(tmp_path / "d", "k", [0], shard_bytes=1)
    assert len(list((tmp_path / "d.partial").glob("train.*.h5"))) == 2
    some_pieces(tmp_path / "d", "k", [0], shard_bytes=1 << 20)
    with Unfinished(tmp_path / "d", "k") as unfinished:
        unfinished.finish({"train": (1, False)}, Storage(FEATURES), "{}")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["index.h5", "train-00000.h5"]
    assert open_dataset(tmp_path / "d").clients == 2


@pytest.mark.parametrize("lost", ["train.00001.done", "train.00001.00001.h5"])
def test_piece_that_is_not_there_is_no_shorter_dataset(tmp_path, lost):
    folder = some_pieces(tmp_path / "d", "k", range(3)).folder
    (folder / lost).unlink()
    said = pytest.raises(UserError, match=r"d\.partial: piece 1 of split 'train' cannot be read again")
    with said, Unfinished(tmp_path / "d", "k") as unfinished:
        unfinished.finish({"train": (3, False)}, Storage(FEATURES), "{}")
    assert not (tmp_path / "d").exists()
