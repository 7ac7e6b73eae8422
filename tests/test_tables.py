"""Tables and Hugging Face datasets into datasets of shards, on files that the tests write."""

import gzip
from itertools import pairwise

import corpora_files as files
import numpy as np
import pytest
from prepared import central, clients, prepare, refused

from data_prep import hf, table_files, tables
from data_prep.labels import label_column
from mpifl.data.shard import Feature

# ---- tables


VISITS = {  # six rows of two clinics, and of one whose name needs quotes
    "clinic": ["north", "south", "north", 'a "b",\nc', "south", "north"],
    "age": [30, 41, 52, 63, 74, 85],
    "dose": [0.5, 1.25, -2.0, 1e-3, 4.0, 5.5],
    "note": ["x", "y", "z", "u", "v", "é"],
    "outcome": ["sick", "well", "well", "sick", "dead", "well"],
}
AS_TABLE = {
    "csv": files.csv_bytes,
    "csv.gz": lambda columns: gzip.compress(files.csv_bytes(columns)),
    "parquet": files.parquet,
    "npz": lambda columns: files.npz({name: np.array(column) for name, column in columns.items()}),
}
BY_CLINIC = ("--client-column", "clinic", "--label-column", "outcome")


def written(tmp_path, columns, kind="csv", name="table"):
    path = tmp_path / f"{name}.{kind}"
    path.write_bytes(AS_TABLE[kind](columns))
    return path


@pytest.mark.parametrize("kind", AS_TABLE)
def test_table_of_any_kind_becomes_its_clients(tmp_path, kind):
    made = prepare(tables, written(tmp_path, VISITS, kind), *BY_CLINIC)
    found = clients(made)
    assert list(found) == ['a "b",\nc', "north", "south"]
    assert made.features["y"] == Feature("uint8", (), classes=3, names=("dead", "sick", "well"))
    assert found["north"]["x"].tolist() == [[30, 0.5], [52, -2.0], [85, 5.5]]
    assert found["south"]["x"].tolist() == [[41, 1.25], [74, 4.0]]
    assert [columns["y"].tolist() for columns in found.values()] == [[1], [1, 2, 2], [2, 0]]
    assert "x of columns age, dose, without note; y of outcome" in made.provenance["made"]


def test_table_columns_are_taken_in_the_order_asked_for(tmp_path):
    made = prepare(tables, written(tmp_path, VISITS), *BY_CLINIC, "--columns", "dose", "age")
    assert clients(made)["south"]["x"].tolist() == [[1.25, 41], [4.0, 74]]


def test_mean_and_std_of_each_column_are_those_of_the_training_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_AT_ONCE", 16)
    rng = np.random.RandomState(0)
    columns = {
        "who": rng.randint(0, 7, 300),
        "far": rng.normal(4e4, 3, 300).astype(np.float32),
        "same": np.full(300, 0.1, np.float32),
    } | {f"wide {number}": rng.lognormal(0, 9, 300).astype(np.float32) for number in range(9)}
    path, asked = written(tmp_path, columns, "npz"), ("--client-column", "who", "--hold-out", "0.3")
    made = prepare(tables, path, *asked)
    held = np.concatenate([found["x"] for found in clients(made, "test").values()])
    x = np.concatenate([found["x"] for found in clients(made).values()]).astype(np.float64)
    assert len(held) + len(x) == 300 and abs(held.mean(0) - x.mean(0))[0] > 0.01
    np.testing.assert_allclose(made.features["x"].mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(made.features["x"].std, np.where(np.arange(11) == 1, 1.0, x.std(0)), rtol=1e-9)
    shared = [prepare(tables, path, "--partition", "iid", "--clients", n, "--seed", n).features["x"] for n in "39"]
    assert shared[0] == shared[1]  # of the same rows, whoever has them
    assert prepare(tables, path, *asked, "--unscaled").features["x"] == Feature("float32", (11,))


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_separate_columns_keep_dtype_and_name(tmp_path, kind):
    columns = {"who": np.array([2, 1, 2]), "n": np.array([7, 8, 9], np.uint8), "far": np.array([2**40, 1, 0])}
    made = prepare(tables, written(tmp_path, columns, kind), "--client-column", "who", "--separate")
    assert made.features == {"n": Feature("uint8", ()), "far": Feature("int64", ())}
    assert {client: found["far"].tolist() for client, found in clients(made).items()} == {"1": [1], "2": [2**40, 0]}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_arrays_of_several_axes_are_columns_of_their_own(tmp_path, save):
    pixels = np.random.RandomState(0).randint(0, 256, (5, 2, 3)).astype(np.uint8)
    columns = {"x": np.asfortranarray(pixels), "digit": np.array([3, 1, 3, 1, 3]), "version": np.array(2)}
    path = tmp_path / "a.npz"
    path.write_bytes(files.npz(columns, save))
    options = ("--separate", "--label-column", "digit", "--partition", "iid", "--clients", 1)
    found = clients(prepare(tables, path, *options))["client-000"]
    np.testing.assert_array_equal(found["x"], pixels)
    assert found["y"].tolist() == [1, 0, 1, 0, 1]
    assert "keep it apart with --separate" in refused(tables, path, "--partition", "iid")


def test_folder_of_tables_is_read_in_order_of_name(tmp_path):
    columns = {"who": ["a", "b"], "v": [1, 2]}
    folder = files.write_files(tmp_path / "in", {"2.csv": files.csv_bytes(columns), "1.csv": files.csv_bytes(VISITS)})
    both = {name: columns[name] for name in columns}
    (folder / "1.csv").write_bytes(files.csv_bytes({"who": ["b", "c"], "v": [3, 4]}))
    found = clients(prepare(tables, folder, "--client-column", "who"))
    assert {client: rows["x"].ravel().tolist() for client, rows in found.items()} == {"a": [1], "b": [3, 2], "c": [4]}
    (folder / "3.npz").write_bytes(files.npz(both))
    assert "must be files of one kind" in refused(tables, folder, "--client-column", "who")


def test_rows_for_test_have_the_classes_of_training(tmp_path):
    test = written(tmp_path, {name: column[:3] for name, column in VISITS.items()}, "csv", "test")
    source = written(tmp_path, VISITS)
    made = prepare(tables, source, *BY_CLINIC, "--test", test)
    assert central(made)["y"].tolist() == [1, 2, 2] and central(made)["x"][:, 0].tolist() == [30, 41, 52]
    test = written(tmp_path, VISITS | {"outcome": ["well", "?", "?", "well", "!", "?"]}, "csv", "other")
    assert "other.csv: row 3: label '?' is none of those for training: dead" in refused(
        tables, source, *BY_CLINIC, "--test", test
    )


def test_a_bad_label_is_named_by_its_own_file_of_a_folder(tmp_path):
    parts = {"who": [1, 2], "v": [1, 2], "y": ["a", "b"]}, {"who": [1, 2], "v": [1, 2], "y": ["a", "c"]}
    folder = files.write_files(tmp_path / "in", {f"{n}.npz": AS_TABLE["npz"](part) for n, part in enumerate(parts)})
    options = ("--client-column", "who", "--label-column", "y")
    assert clients(prepare(tables, folder, *options))["2"]["y"].tolist() == [1, 2]
    source = written(tmp_path, parts[0])
    csv = files.write_files(tmp_path / "csv", {f"{n}.csv": files.csv_bytes(part) for n, part in enumerate(parts)})
    assert "1.csv: row 3: label 'c' is none of those" in refused(tables, source, *options, "--test", csv)
    numbers = written(tmp_path, {"who": [1, 2], "v": [1, 2], "y": [0.5, 2]}, "npz")
    assert "1.npz: row 2: label 'c' is none of those" in refused(tables, source, *options, "--test", folder)
    assert "0.npz: row 1: label 'a' is text" in refused(tables, numbers, *options, "--test", folder)


def test_text_with_line_breaks_is_one_value_wherever_a_block_of_the_file_ends(tmp_path):
    breaks = "\n" * 20
    columns = {"who": [f'{row % 2}{breaks}"' for row in range(100_000)], "v": range(100_000)}  # blocks are of 1 MiB
    path = written(tmp_path, columns)
    assert path.stat().st_size > 2 << 20
    found = clients(prepare(tables, path, "--client-column", "who"))
    assert {client: rows["x"].ravel().tolist() for client, rows in found.items()} == {
        f'0{breaks}"': [*range(0, 100_000, 2)],
        f'1{breaks}"': [*range(1, 100_000, 2)],
    }


@pytest.mark.parametrize("kind", ["csv", "parquet", "npz"])
def test_true_and_false_are_1_and_0(tmp_path, kind):
    columns = {"who": [1, 1, 2], "on": np.array([True, False, True])}
    made = prepare(tables, written(tmp_path, columns, kind), "--client-column", "who")
    assert {client: rows["x"].tolist() for client, rows in clients(made).items()} == {"1": [[1], [0]], "2": [[1]]}


@pytest.mark.parametrize("kind", ["csv", "parquet", "npz"])
def test_labels_are_classes_in_their_order_or_plain_numbers(tmp_path, kind):
    options = ("--label-column", "y", "--partition", "iid", "--clients", 1)
    whole = written(tmp_path, {"a": [1, 2, 3], "y": [10, 9, 10]}, kind, "whole")
    made = prepare(tables, whole, *options)
    assert made.features["y"].names == ("9", "10") and clients(made)["client-000"]["y"].tolist() == [1, 0, 1]
    large = written(tmp_path, {"a": [1, 2], "y": [2**60 + 1, 2**60]}, kind, "large")
    if kind != "csv":
        assert prepare(tables, large, *options).features["y"].names == (f"{2**60}", f"{2**60 + 1}")
    real = written(tmp_path, {"a": [1, 2, 3], "y": [0.5, 9, 10]}, kind, "real")
    made = prepare(tables, real, *options)
    assert made.features["y"] == Feature("float32", ()) and clients(made)["client-000"]["y"].tolist() == [0.5, 9, 10]


def test_a_parquet_column_of_repeated_text_is_text(tmp_path):
    import pyarrow

    path = tmp_path / "a.parquet"
    path.write_bytes(files.parquet({"who": pyarrow.array(["b", "a", "b"]).dictionary_encode(), "v": [1, 2, 3]}))
    assert list(clients(prepare(tables, path, "--client-column", "who"))) == ["a", "b"]


def test_a_parquet_file_is_read_a_little_at_a_time(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({name: np.random.RandomState(0).random_sample(1_000_000) for name in "abcd"})  # 32 MB
    parquet.write_table(table, path, row_group_size=250_000, use_dictionary=False)
    del table
    before = pyarrow.total_allocated_bytes()
    for _, block in table_files._blocks(path, list("abcd"), text=False):
        assert len(block["a"]) and pyarrow.total_allocated_bytes() - before < 12_000_000


@pytest.mark.parametrize(("count", "dtype"), [(256, "uint8"), (257, "int64")])
def test_label_columns_hold_their_last_class(count, dtype):
    column = label_column(np.arange(count))
    assert (column.dtype, column.classes, column.names[-1]) == (dtype, count, str(count - 1))


def test_clients_need_a_column_or_another_partition(tmp_path):
    source = written(tmp_path, VISITS)
    assert "give --client-column" in refused(tables, source)
    assert "give --client-column" in refused(tables, source, "--partition", "by-column")
    assert len(clients(prepare(tables, source, "--partition", "iid", "--clients", 4))) == 4


def test_a_client_column_beside_another_partition_is_refused(tmp_path, tokenizer):
    said = "--client-column author makes a client of each id, --partition iid shares rows out; leave one of them out"
    options = ("--client-column", "author", "--partition", "iid")
    assert refused(tables, written(tmp_path, VISITS), *options) == said
    assert refused(hf, saved(tmp_path, {"": REVIEWS}), "--tokenizer", tokenizer, *options) == said


UTF8 = files.csv_bytes({"who": ["a", "é"], "v": [1, 2]}, "latin1")
PARQUET = files.parquet({"who": ["a", "b"], "v": [1.5, None]})
BAD_TABLES = {
    "number": ("csv", b"who,v\na,1\nb,z\n", ("--columns", "v"), "column 'v' is not of numbers"),
    "late text": ("csv", b"who,v\n" + b"a,1\n" * 400_000 + b"a,z\n", (), "invalid value 'z'"),
    "late row": ("csv", b"who,v\n" + b"a,1\n" * 400_000 + b"a\n", (), "Row #400002: Expected 2 columns"),
    "missing number": ("csv", b"who,v\na,1\nb,\n", (), "column 'v' is missing or not finite in row 3"),
    "missing truth": ("csv", b"who,v\na,true\nb,\n", (), "column 'v' is missing or not finite in row 3"),
    "missing bit": ("parquet", files.parquet({"who": [1, 2], "v": [True, None]}), (), "not finite in row 2"),
    "too large": (
        "parquet",
        files.parquet({"who": [1, 2], "v": [1, 1e39]}),
        (),
        "'v' is too large for float32 in row 2",
    ),
    "missing in parquet": ("parquet", PARQUET, (), "column 'v' is missing or not finite in row 2"),
    "missing integer": ("parquet", files.parquet({"who": [1, 2], "v": [1, None]}), ("--separate",), "in row 2"),
    "not finite": ("csv", b"who,v\na,1\nb,inf\n", (), "column 'v' is missing or not finite in row 3"),
    "missing id": ("csv", b"who,v\na,1\n,2\n", (), "row 3 has no 'who'"),
    "ragged": ("csv", b"who,v\na,1\nb\n", (), "Row #3: Expected 2 columns, got 1"),
    "not UTF-8": ("csv", UTF8, (), "invalid UTF8"),
    "no rows": ("npz", files.npz({"who": np.empty(0), "v": np.empty(0)}), (), "has no rows"),
    "no numbers": ("csv", b"who,v\na,x\n", (), "has no column of numbers"),
    "empty": ("csv", b"", (), "Empty CSV"),
    "twice": ("csv", b"who,v,v\na,1,2\n", (), "two columns have the same name"),
    "cut gzip": ("csv.gz", gzip.compress(files.csv_bytes(VISITS))[:-30], (), "cannot be read"),
    "cut parquet": ("parquet", PARQUET[:-20], (), "cannot be read"),
    "cut npz": ("npz", files.npz({"who": [1], "v": [1]})[:-20], (), "cannot be read"),
    "lengths": ("npz", files.npz({"who": [1, 2], "v": [1], "w": [1, 2]}), (), "differ in length"),
    "fewer ids": ("npz", files.npz({"who": [1, 2], "v": [1, 2, 3]}), (), "column 'who' has 2 rows, others 3"),
    "pickled": ("npz", files.npz({"who": np.array(["a", None]), "v": [1, 2]}), (), "neither numbers nor text"),
    "no such column": ("csv", b"wo,v\na,1\n", (), "no column of table.csv 'who'; did you mean 'wo'"),
    "dates": ("parquet", files.parquet({"who": np.array(["2020-01-01"], "M8[ns]"), "v": [1]}), (), "neither numbers"),
    "column twice": ("csv", b"who,v\na,1\n", ("--columns", "v", "v"), "v v: name each column once"),
    "label twice": ("csv", b"who,y,z\na,1,2\n", ("--separate", "--label-column", "z"), "would both be y"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_table_is_refused_by_name(tmp_path, case):
    kind, content, options, problem = BAD_TABLES[case]
    path = tmp_path / f"table.{kind}"
    path.write_bytes(content)
    said = refused(tables, path, "--client-column", "who", *options)
    assert problem in said and ("table." in said or "--columns" in said)


def test_files_of_a_table_must_be_alike(tmp_path):
    one, other = {"who": [1], "v": np.array([1], np.int16)}, {"who": [1], "v": [0.5]}
    folder = files.write_files(tmp_path / "in", {"1.npz": files.npz(one), "2.npz": files.npz(other)})
    assert "2.npz: column 'v' is float64 (), elsewhere int16 ()" in refused(
        tables, folder, "--client-column", "who", "--separate"
    )
    assert clients(prepare(tables, folder, "--client-column", "who"))["1"]["x"].tolist() == [[1], [0.5]]


# ---- Hugging Face


REVIEWS = {
    "text": ["It was good", "it was very very bad", "a good film", "", "bad FILM indeed", "good"],
    "label": [1, 0, 1, 0, 0, 1],
    "author": ["ann", "bob", "ann", "ann", "bob", "cy"],
}


def ids(words):
    return [files.TOKENS[word] for word in words.split()]


@pytest.fixture
def tokenizer(tmp_path):
    return files.write_tokenizer(tmp_path / "tokenizer")


def saved(tmp_path, splits, names=None):
    datasets = pytest.importorskip("datasets", reason="the extra prep has it")
    made = {split: datasets.Dataset.from_dict(columns) for split, columns in splits.items()}
    if names:
        made = {split: one.cast_column("label", datasets.ClassLabel(names=names)) for split, one in made.items()}
    folder = tmp_path / "saved"
    datasets.DatasetDict(made).save_to_disk(str(folder)) if "train" in made else made[""].save_to_disk(str(folder))
    return folder


def test_texts_become_padded_ids_and_keep_their_labels(tmp_path, tokenizer):
    source = saved(tmp_path, {"train": REVIEWS, "test": REVIEWS}, ["negative", "positive"])
    made = prepare(hf, source, "--tokenizer", tokenizer, "--length", 5, "--clients", 1)
    rows = [
        ids("[CLS] it was good [SEP]"),
        ids("[CLS] it was very [SEP]"),
        ids("[CLS] a good film [SEP]"),
        ids("[CLS] [SEP] [PAD] [PAD] [PAD]"),
        ids("[CLS] bad film [UNK] [SEP]"),
        ids("[CLS] good [SEP] [PAD] [PAD]"),
    ]
    for found in (clients(made)["client-000"], central(made)):
        assert found["x"].tolist() == rows and found["y"].tolist() == REVIEWS["label"]
    assert made.features["x"] == Feature("uint16", (5,), classes=len(files.TOKENS), pad=0)
    assert made.features["y"].names == ("negative", "positive")


def test_a_split_without_labels_is_refused(tmp_path, tokenizer):
    unlabelled = REVIEWS | {"label": [-1] * 6}  # as in the split "unsupervised" of IMDB
    source = saved(tmp_path, {"train": REVIEWS, "unsupervised": unlabelled}, ["negative", "positive"])
    said = refused(hf, source, "--tokenizer", tokenizer, "--central", "unsupervised")
    assert "split unsupervised: row 1: label '-1' is none of those for training: negative, positive" in said


def test_authors_become_clients(tmp_path, tokenizer):
    source = saved(tmp_path, {"": REVIEWS})
    options = ("--tokenizer", tokenizer / "tokenizer.json", "--length", 4, "--client-column", "author")
    made = prepare(hf, source, *options)
    assert made.provenance["made"].startswith("by-column, ")
    assert {client: found["y"].tolist() for client, found in clients(made).items()} == {
        "ann": [1, 1, 0],
        "bob": [0, 0],
        "cy": [1],
    }
    assert list(clients(prepare(hf, source, *options, "--partition", "by-column"))) == ["ann", "bob", "cy"]


def test_language_model_windows_lose_no_transition(tmp_path, tokenizer):
    source = saved(tmp_path, {"train": REVIEWS})
    options = ("--tokenizer", tokenizer, "--length", 4, "--client-column", "author", "--partition", "by-column")
    made = prepare(hf, source, *options, "--language-model")
    token = Feature("uint16", (4,), classes=len(files.TOKENS) + 3, pad=0)
    assert made.features == {"x": token, "y": token}
    for author, found in clients(made).items():
        stream = []
        for text, owner in zip(REVIEWS["text"], REVIEWS["author"]):
            if owner == author:
                words = [word if word in files.TOKENS else "[UNK]" for word in text.lower().split()]
                stream += [1, *(files.TOKENS[word] + 3 for word in words), 2]
        transitions = [(x, y) for x, y in zip(found["x"].ravel().tolist(), found["y"].ravel().tolist()) if y]
        assert transitions == list(pairwise(stream))


def test_padding_is_the_tokenizers_own_or_the_one_asked_for(tmp_path, tokenizer):
    source = saved(tmp_path, {"train": REVIEWS})
    options = ("--length", 5, "--clients", 1)
    made = prepare(hf, source, "--tokenizer", tokenizer, *options, "--pad-token", "[UNK]")
    assert made.features["x"].pad == 1 and clients(made)["client-000"]["x"][3].tolist() == [2, 3, 1, 1, 1]
    nameless = files.write_tokenizer(tmp_path / "other", pad_token=None)
    assert "names no token for padding; choose one with --pad-token" in refused(hf, source, "--tokenizer", nameless)
    assert "has no token '<p>'" in refused(hf, source, "--tokenizer", tokenizer, "--pad-token", "<p>")


def test_mistakes_with_saved_datasets_are_one_line(tmp_path, tokenizer):
    source = saved(tmp_path, {"train": REVIEWS, "extra": REVIEWS | {"label": [1, 0, 1, 7, 0, 1]}})
    named = ("--tokenizer", tokenizer)
    assert "no folder" in refused(hf, tmp_path / "nowhere", *named)
    assert "save_to_disk" in refused(hf, tokenizer, *named)
    assert "tokenizer.json" in refused(hf, source, "--tokenizer", source)
    assert "is not a tokenizer" in refused(hf, source, "--tokenizer", tokenizer / "tokenizer_config.json")
    assert "'txt'; did you mean 'text'" in refused(hf, source, *named, "--text-column", "txt")
    assert "'labl'; did you mean 'label'" in refused(hf, source, *named, "--label-column", "labl")
    assert "no split" in refused(hf, source, *named, "--central", "test")
    assert "split extra: row 4: label '7'" in refused(hf, source, *named, "--central", "extra")
    assert "--length 1" in refused(hf, source, *named, "--length", 1)
    assert "row 1 has no text in 'label' but 1" in refused(hf, source, *named, "--text-column", "label")
