"""FedJAX's SQLite and LEAF's JSON, from files of the published layouts (sqlite_leaf_files.py) to columns."""

import argparse
import json
import pickle
import sqlite3
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from sqlite_leaf_files import (
    fedjax_blob,
    femnist_images,
    leaf_json,
    reddit_rows,
    shakespeare_windows,
    split_by_sample,
    tweet,
    write_fedjax,
    write_leaf,
)

from data_prep import (
    conversion,
    fedjax_sqlite,
    leaf,
    leaf_celeba,
    leaf_femnist,
    leaf_reddit,
    leaf_sent140,
    leaf_shakespeare,
    leaf_synthetic,
    tff_cifar100,
    tff_emnist,
    tff_shakespeare,
    tff_stackoverflow,
)
from data_prep.__main__ import CONVERTERS, main
from data_prep.text import CHARACTERS
from mpifl.config import UserError
from mpifl.data.shard import Dataset

pytestmark = pytest.mark.usefixtures("no_picture")
RANDOM = np.random.RandomState(0)


def prepare(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--shard-mb", type=int, default=256)
    return module.prepare(parser.parse_args([str(argument) for argument in arguments]))


def read(conversion, split="train"):
    """All clients of a split, in order; what is read must travel to other processes and be as the features say."""
    (found,) = (part for part in conversion.splits if part.name == split)
    travelled = pickle.loads(pickle.dumps(found))
    clients = [entry for piece in travelled.pieces for entry in travelled.read(piece)]
    assert len(clients) == found.clients == len(dict(clients))
    for _, columns in clients:
        assert columns.keys() == conversion.features.keys()
        assert len({len(rows) for rows in columns.values()}) == 1
        for name, feature in conversion.features.items():
            assert (columns[name].dtype.name, columns[name].shape[1:]) == (feature.dtype, feature.shape)
            assert feature.classes is None or (columns[name] < feature.classes).all()
    return dict(clients)


def text_of(ids, conversion):
    """Ids of column x back to words or characters."""
    return [conversion.features["x"].names[id] for id in ids]


# ---- FedJAX

WRITER_A, WRITER_B = b"00112233445566aa:f2100_45", b"00112233445566bb:f2600_12"


def emnist(n, seed=0):
    levels = np.random.RandomState(seed).randint(0, 256, (n, 28, 28))
    return {"pixels": (levels / 255).astype(np.float32), "label": (levels[:, 0, 0] % 62).astype(np.int32)}


def cifar(n):
    images = RANDOM.randint(0, 256, (n, 32, 32, 3)).astype(np.uint8)
    return {"image": images, "label": np.arange(n), "coarse_label": np.arange(n) % 20}


def sentences(*rows, kind=b"question"):
    columns = {"tokens": list(rows), "type": [kind] * len(rows), "score": np.arange(len(rows))}
    return columns | {"title": [b"t"] * len(rows), "tags": [b"a|b"] * len(rows), "creation_date": [b"d"] * len(rows)}


def test_fedjax_emnist_has_pixels_labels_and_domains_in_order_of_ids(tmp_path):
    a, b = emnist(3), emnist(2, seed=1)
    write_fedjax(tmp_path / "federated_emnist_train.sqlite", [(WRITER_B, b), (WRITER_A, a)])
    write_fedjax(tmp_path / "federated_emnist_test.sqlite", [(WRITER_B, b)])
    made = prepare(fedjax_sqlite, "--kind", "emnist", "--source", tmp_path)
    train, test = read(made), read(made, "test")
    assert list(train) == list(test) == [WRITER_A.decode(), WRITER_B.decode()]
    np.testing.assert_array_equal(train[WRITER_A.decode()]["x"], np.rint(a["pixels"] * 255))
    np.testing.assert_array_equal(train[WRITER_B.decode()]["y"], b["label"])
    assert [set(columns["domain_id"].tolist()) for columns in train.values()] == [{0}, {1}]
    assert [len(columns["y"]) for columns in test.values()] == [0, 2]
    inverted = read(prepare(fedjax_sqlite, "--kind", "emnist", "--source", tmp_path, "--invert"))
    for client, columns in inverted.items():
        np.testing.assert_array_equal(columns["x"].astype(int) + train[client]["x"], 255)


def test_fedjax_digits_have_their_own_files_and_ten_classes(tmp_path):
    digits = emnist(2) | {"label": np.array([9, 0], np.int32)}
    for split in ("train", "test"):
        write_fedjax(tmp_path / f"federated_emnist_digitsonly_{split}.sqlite", [(WRITER_A, digits)])
    made = prepare(fedjax_sqlite, "--kind", "emnist", "--source", tmp_path, "--only-digits")
    assert read(made)[WRITER_A.decode()]["y"].tolist() == [9, 0] and made.features["y"].classes == 10


def test_fedjax_shakespeare_is_cut_as_fedjax_says(tmp_path):
    # The example in preprocess_client of fedjax/datasets/shakespeare.py: BOS 1, EOS 2, PAD 0.
    write_fedjax(tmp_path / "a", [(b"ROLE", {"snippets": [b"ABCD", b"E"]})])
    made = prepare(fedjax_sqlite, "--kind", "shakespeare", "--train", tmp_path / "a", "--length", 3)
    a, b, c, d, e = (3 + CHARACTERS.index(letter) for letter in "ABCDE")
    columns = read(made)["ROLE"]
    assert columns["x"].tolist() == [[1, a, b], [c, d, 2], [1, e, 0]]
    assert columns["y"].tolist() == [[a, b, c], [d, 2, 1], [e, 2, 0]]


def test_fedjax_stackoverflow_counts_the_words_of_train(tmp_path):
    train = [(b"u2", sentences(b"b a a b", b"c zz", kind=b"answer")), (b"u1", sentences(b"d c b"))]
    for split, clients in {"train": train, "held_out": train[:1], "test": [(b"u3", sentences(b"a zz"))]}.items():
        write_fedjax(tmp_path / f"stackoverflow_{split}.sqlite", clients)
    kind = ("--kind", "stackoverflow", "--source", tmp_path, "--length", 4)
    made = prepare(fedjax_sqlite, *kind, "--vocabulary", 3, "--max-sentences", 1)
    # b is there 3 times, a and c twice, d and zz once.
    assert made.features["x"].names == ("<pad>", "<bos>", "<eos>", "b", "a", "c", "<oov>")
    users = read(made)
    assert list(users) == ["u1", "u2"] and list(read(made, "test")) == ["u3"]
    assert users["u1"]["x"].tolist() == [[1, 6, 5, 3]] and users["u1"]["y"].tolist() == [[6, 5, 3, 2]]
    assert users["u2"]["x"].tolist() == [[1, 3, 4, 4]] and users["u2"]["domain_id"].tolist() == [1]
    (tmp_path / "counts").write_text("zz 7\nd 5\n")
    named = read(prepare(fedjax_sqlite, *kind, "--word-counts", tmp_path / "counts"))
    assert named["u2"]["x"].tolist() == [[1, 5, 5, 5], [1, 5, 3, 0]]


def test_fedjax_cifar100_has_ids_of_text_and_channels_first(tmp_path):
    client = cifar(2)
    for split in ("train", "test"):
        write_fedjax(tmp_path / f"federated_cifar100_{split}.sqlite", [("7", client)])
    whole, centre = (
        read(prepare(fedjax_sqlite, "--kind", "cifar100", "--source", tmp_path, *crop))["7"]["x"]
        for crop in ((), ("--crop", 24))
    )
    assert whole[1, 2, 5, 9] == client["image"][1, 5, 9, 2]
    np.testing.assert_array_equal(centre, whole[:, :, 4:28, 4:28])


def test_fedjax_plain_keeps_numbers_as_they_are(tmp_path):
    features = {"x": RANDOM.randn(4, 2, 3), "y": np.arange(4, dtype=np.int16), "who": [b"me"] * 4}
    path = write_fedjax(tmp_path / "own.db", [(b"b", features), (b"a", {**features, "x": -features["x"]})])
    arguments = ("--kind", "plain", "--train", path, "--columns", "x", "y", "--classes", 4)
    made = prepare(fedjax_sqlite, *arguments)
    columns = read(made)["a"]
    np.testing.assert_array_equal(columns["x"], -features["x"])
    assert columns["y"].tolist() == [0, 1, 2, 3] and columns["y"].dtype == np.int16
    assert made.features["y"].classes == 4 and made.features["x"].shape == (2, 3)
    with pytest.raises(UserError, match=r"column 'who' is text.*--columns x y"):
        prepare(fedjax_sqlite, "--kind", "plain", "--train", path)


SAME_DATA = {
    "emnist": (tff_emnist, "fed_emnist", [(b"f2100_45", emnist(3)), (b"f0001_02", emnist(1, seed=2))]),
    "shakespeare": (tff_shakespeare, "shakespeare", [(b"B", {"snippets": [b"to be", b"or not\nto be \xc3\xa9"]})]),
    "stackoverflow": (tff_stackoverflow, "stackoverflow", [(b"1", sentences(b"how to", b"a b", b"b c"))]),
    "cifar100": (tff_cifar100, "fed_cifar100", [(b"0", cifar(2))]),
}


@pytest.mark.parametrize("kind", SAME_DATA)
def test_fedjax_and_tff_files_of_the_same_data_become_the_same_columns(tmp_path, kind):
    module, stem, clients = SAME_DATA[kind]
    files = [fedjax_sqlite.STEMS[kind].split("/")[1]]
    for split in ("train", "held_out", "test"):
        write_fedjax(tmp_path / f"{files[0]}_{split}.sqlite", clients)
        with h5py.File(tmp_path / f"{stem}_{split}.h5", "w") as file:
            for client, features in clients:
                for name, rows in features.items():
                    file[f"examples/{client.decode()}/{name}"] = rows
    ours = prepare(fedjax_sqlite, "--kind", kind, "--source", tmp_path)
    theirs = prepare(module, "--source", tmp_path)
    assert ours.features == theirs.features and ours.standardize == theirs.standardize
    for split in ours.splits:
        here, there = read(ours, split.name), read(theirs, split.name)
        assert list(here) == list(there)
        for client, columns in here.items():
            for name, rows in columns.items():
                np.testing.assert_array_equal(rows, there[client][name])


def test_fedjax_clients_do_not_depend_on_how_they_are_cut(tmp_path, monkeypatch):
    clients = {f"role {number}": {"snippets": [b"word " * number]} for number in range(12)}
    # SQLite itself sorts all ids of text before those of bytes: here these come first.
    ids = [client if client > "role 5" else client.encode() for client in clients]
    path = write_fedjax(tmp_path / "a", zip(reversed(ids), reversed(clients.values())))
    arguments = ("--kind", "shakespeare", "--train", path, "--test", path)
    whole = prepare(fedjax_sqlite, *arguments)
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1)
    cut = prepare(fedjax_sqlite, *arguments)
    assert [len(made.splits[0].pieces) for made in (whole, cut)] == [1, 12]
    assert list(read(whole)) == list(read(cut)) == sorted(clients)
    for client, columns in read(whole, "test").items():
        np.testing.assert_array_equal(columns["x"], read(cut, "test")[client]["x"])


def test_fedjax_files_are_read_without_locks_and_without_a_trace(tmp_path):
    path = write_fedjax(tmp_path / "a", [(b"ROLE", {"snippets": [b"text"]})])
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    assert list(read(prepare(fedjax_sqlite, "--kind", "shakespeare", "--train", path))) == ["ROLE"]
    writer.execute("COMMIT")
    writer.close()
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        read(prepare(fedjax_sqlite, "--kind", "shakespeare", "--train", path))
        assert [file.name for file in tmp_path.iterdir()] == ["a"]
    finally:
        tmp_path.chmod(0o755)


def test_fedjax_refuses_a_file_whose_end_is_elsewhere(tmp_path):
    path = write_fedjax(tmp_path / "a", [(b"ROLE", {"snippets": [b"text"]})])
    (tmp_path / "a-wal").write_bytes(b"pages")
    with pytest.raises(UserError, match="part of it in a-wal"):
        prepare(fedjax_sqlite, "--kind", "shakespeare", "--train", path)


TEXT = {"snippets": [b"text"]}


@pytest.mark.parametrize(
    ("clients", "problem"),
    [
        ([(b"r", {"snippets": [b"ok", b"\xff"]})], "client 'r': row 1 of 'snippets' is not UTF-8"),
        ([(b"\xff", TEXT)], "client_id of row 1 is not UTF-8"),
        ([(b"r", TEXT), ("r", TEXT)], "client 'r' is in rows 1 and 2"),
        ([(b"r", {"pixels": np.zeros((1, 28, 28))})], "no feature 'snippets', but pixels.*another --kind"),
        ([(b"r", {"snippets": np.zeros(1)})], r"'snippets' are float64 \(\), must be text \(\)"),
        ([(b"r", {"snippets": [b"a"], "other": [b"a", b"b"]})], "2 rows of 'other', num_examples says 1"),
        ([], "no client in it"),
    ],
)
def test_fedjax_errors_name_file_client_and_row(tmp_path, clients, problem):
    path = write_fedjax(tmp_path / "some.sqlite", clients)
    with pytest.raises(UserError, match=f"some.sqlite.*{problem}"):
        read(prepare(fedjax_sqlite, "--kind", "shakespeare", "--train", path))


def test_fedjax_numbers_that_would_wrap_around_are_refused(tmp_path):
    client = cifar(1)
    path = write_fedjax(tmp_path / "a", [(b"0", client | {"image": client["image"].astype(np.uint16)})])
    with pytest.raises(UserError, match=r"'image' are uint16 \(32, 32, 3\), must be uint8"):
        read(prepare(fedjax_sqlite, "--kind", "cifar100", "--train", path))


def test_fedjax_damage_is_an_error_that_names_the_file(tmp_path):
    def refused(path, problem):
        with pytest.raises(UserError, match=f"{path.name}.*{problem}"):
            read(prepare(fedjax_sqlite, "--kind", "shakespeare", "--train", path))

    whole = fedjax_blob({"snippets": [RANDOM.bytes(9000).hex().encode()]})
    refused(write_fedjax(tmp_path / "blob", [(b"r", whole[:-9])], num_examples=1), "client 'r' is damaged")
    refused(write_fedjax(tmp_path / "count", [(b"r", whole)], num_examples=2), "1 rows.*num_examples says 2")
    path = write_fedjax(tmp_path / "short", [(b"r", whole)], num_examples=1)
    path.write_bytes(path.read_bytes()[:-4096])
    refused(path, "truncated")
    (tmp_path / "text").write_text("no database, but text that goes on for a while" * 99)
    refused(tmp_path / "text", "truncated, damaged or no file of FedJAX")
    sqlite3.connect(tmp_path / "tables").close()
    refused(tmp_path / "tables", "no such table: federated_data")


def test_fedjax_says_which_files_to_fetch_and_which_options_belong_to_which_kind(tmp_path):
    with pytest.raises(UserError, match=r"no file .*fetch https://storage.*/emnist/federated_emnist_train.sqlite "):
        prepare(fedjax_sqlite, "--kind", "emnist", "--source", tmp_path)
    with pytest.raises(UserError, match="load_data"):
        prepare(fedjax_sqlite, "--kind", "cifar100", "--source", tmp_path)
    with pytest.raises(UserError, match="--crop is for --kind cifar100, not emnist"):
        prepare(fedjax_sqlite, "--kind", "emnist", "--source", tmp_path, "--crop", 24)
    with pytest.raises(UserError, match="--source, or else --train"):
        prepare(fedjax_sqlite, "--kind", "emnist")
    path = write_fedjax(tmp_path / "a", [(b"ROLE", TEXT)])
    with pytest.raises(UserError, match=r"--source .*/a is no folder; fetch .*--source"):
        prepare(fedjax_sqlite, "--kind", "emnist", "--source", path)
    with pytest.raises(UserError, match="--length 0"):
        prepare(fedjax_sqlite, "--kind", "shakespeare", "--train", path, "--length", 0)
    path = write_fedjax(tmp_path / "b", [(b"u", {"y": np.arange(2)})])
    with pytest.raises(UserError, match="--classes 0"):
        prepare(fedjax_sqlite, "--kind", "plain", "--train", path, "--classes", 0)


# ---- LEAF's files

NUMBERS = {
    f"task {n}": (RANDOM.randn(n + 1, 3).tolist(), [float(c) for c in RANDOM.randint(0, 10, n + 1)]) for n in range(4)
}


def synthetic(source, *arguments):
    return prepare(leaf_synthetic, "--source", source, "--dimension", 3, *arguments)


def same_as(samples, clients):
    """Whether clients are those samples, in their order."""
    assert list(clients) == list(samples)
    for user, (x, y) in samples.items():
        np.testing.assert_array_equal(clients[user]["x"], np.array(x, np.float32).reshape(-1, 3))
        np.testing.assert_array_equal(clients[user]["y"], np.array(y))


def reordered(samples):
    """The same samples, with the users of user_data from the last to the first, and keys in order of letters."""
    whole = leaf_json(samples)
    whole["user_data"] = {user: {"y": d["y"], "x": d["x"]} for user, d in reversed(whole["user_data"].items())}
    return dict(sorted(whole.items()))


def test_leaf_clients_are_in_the_order_of_users_wherever_their_data_is(tmp_path):
    write_leaf(tmp_path / "as_written" / "data.json", NUMBERS)
    same_as(NUMBERS, read(synthetic(tmp_path / "as_written")))
    path = write_leaf(tmp_path / "reordered" / "data.json", {})
    path.write_text(json.dumps(reordered(NUMBERS), indent=1))
    same_as(NUMBERS, read(synthetic(tmp_path / "reordered")))


def test_leaf_files_are_in_order_of_their_numbers(tmp_path):
    for user, number in zip(NUMBERS, (0, 2, 9, 10)):
        write_leaf(tmp_path / f"all_data_{number}_niid_1.json", {user: NUMBERS[user]})
    made = synthetic(tmp_path)
    same_as(NUMBERS, read(made))
    assert len(made.splits[0].pieces) == 4


def test_leaf_split_by_sample_has_the_same_clients_in_train_and_test(tmp_path):
    (train, train_keys), (test, test_keys) = split_by_sample(NUMBERS, cut=1)
    write_leaf(tmp_path / "train" / "a_9.json", train, **train_keys)
    write_leaf(tmp_path / "test" / "b_9.json", test, **test_keys)
    made = synthetic(tmp_path)
    dropped, *kept = NUMBERS
    assert train[dropped] == ([], []) and dropped not in read(made)
    same_as({user: train[user] for user in kept}, read(made))
    same_as({user: test[user] for user in kept}, read(made, "test"))


def test_leaf_user_that_a_split_lacks_has_no_rows_there(tmp_path):
    write_leaf(tmp_path / "train" / "a.json", NUMBERS)
    (first, samples), _, (third, others), _ = NUMBERS.items()
    write_leaf(tmp_path / "test" / "a.json", {third: others, first: samples})
    clients = read(synthetic(tmp_path), "test")
    assert list(clients) == list(NUMBERS)
    assert [len(columns["y"]) for columns in clients.values()] == [1, 0, 3, 0]
    np.testing.assert_array_equal(clients[third]["y"], others[1])


def test_leaf_split_by_user_keeps_each_split_to_itself(tmp_path):
    users = list(NUMBERS)
    for split, own in {"train": users[2:], "test": users[:2]}.items():
        write_leaf(tmp_path / split / "a.json", {user: NUMBERS[user] for user in own})
    made = synthetic(tmp_path)
    same_as({user: NUMBERS[user] for user in users[2:]}, read(made))
    same_as({user: NUMBERS[user] for user in users[:2]}, read(made, "test"))


NASTY = {
    'quote " and \\ back': ([["é ∑ 😀 \u2028", -1.5e-7]], [{"a": [1, {}]}]),
    "ключ": ([True, None, 10**12], [0, 1, 2]),
    "": ([], []),
}


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 16, 64, 1 << 20])
def test_leaf_json_is_the_same_in_chunks_of_any_size(tmp_path, monkeypatch, chunk, escaped):
    monkeypatch.setattr(leaf, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps(leaf_json(NASTY, other={"k": [{}, ""]}, version=1234567), ensure_ascii=escaped, indent=2), "utf-8"
    )
    assert [(user, (x, y)) for user, x, y in leaf.samples(path)] == list(NASTY.items())
    assert leaf.users(path) == {user: len(y) for user, (_, y) in NASTY.items()}


def test_leaf_file_cut_anywhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(leaf, "CHUNK", 50)
    path = write_leaf(tmp_path / "a.json", {"u": ([[1, 2.5, 3]], [4]), "v": ([[1, 2, 3]], [5])}, hierarchies=["a"])
    whole = path.read_text()
    for cut in range(1, len(whole)):
        path.write_text(whole[:cut])
        with pytest.raises(UserError, match=r"a\.json"):
            read(synthetic(tmp_path))


def test_leaf_memory_is_that_of_a_user_not_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(leaf, "CHUNK", 1 << 14)
    samples = {f"user {n}": ([["word " * 400]] * 4, [0] * 4) for n in range(300)}
    path = write_leaf(tmp_path / "a.json", samples)
    assert path.stat().st_size > 2_400_000
    tracemalloc.start()
    for _ in leaf.samples(path):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000


def test_leaf_users_are_listed_without_reading_their_data(tmp_path):
    path = write_leaf(tmp_path / "a.json", NUMBERS)
    path.write_text(path.read_text()[: path.read_text().index("user_data") - 3])
    assert list(leaf.users(path)) == list(NUMBERS)


ONE = {"u": ([[1, 2, 3]], [4])}


@pytest.mark.parametrize(
    ("whole", "problem"),
    [
        (leaf_json(ONE, num_samples=[2]), "user 'u' has 1 samples, num_samples says 2"),
        (leaf_json(ONE, num_samples=["1"]), "no lists users and num_samples"),
        (leaf_json(ONE, users=["u", "v"]), "no lists users and num_samples of one length"),
        (leaf_json(ONE, users=["u", "v"], num_samples=[1, 1]), "user 'v' is in users, but not in user_data"),
        (leaf_json(ONE, users=["u", "u"], num_samples=[1, 1]), "user 'u' is in users twice"),
        (leaf_json(ONE | {"v": ([], [])}, users=["v"], num_samples=[0]), "user 'u' has samples, but is not in users"),
        (leaf_json({}), "there is no user in it"),
        (leaf_json(ONE, users=[["u"]] * 2, num_samples=[1, 1]), r"user \"\['u'\]\" is in users twice"),
        (leaf_json({"u": ([[1, 2, 3]], [])}), "user 'u' has 1 samples x and 0 labels y"),
        (leaf_json({"u": ([[1, 2, 3]], [4])}, user_data={"u": [1]}), "user 'u' has no lists x and y"),
        (leaf_json({"u": ([[1, 2, 3]], [10])}), "user 'u', sample 0 has label 10; labels are 0 to 9"),
        (leaf_json({"u": ([[1, 2, 3]] * 2, [0, 2.5])}), "sample 1 has label 2.5"),
        (leaf_json({"u": ([[1, 2]], [0])}), "sample 0 is 2 values, must be 3 numbers"),
        (leaf_json({"u": ([[1, 2, "x"]], [0])}), "sample 0 is 3 values, must be 3 numbers"),
        (leaf_json({"u": ([[1, 2, float("nan")]], [0])}), "sample 0 is not finite"),
        ([1], "expected '{'"),
    ],
)
def test_leaf_errors_name_file_user_and_sample(tmp_path, whole, problem):
    (tmp_path / "a.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=rf"a\.json: .*{problem}"):
        read(synthetic(tmp_path))


def test_leaf_text_errors_say_where(tmp_path, monkeypatch):
    monkeypatch.setattr(leaf, "CHUNK", 16)
    path = write_leaf(tmp_path / "a.json", ONE)
    good = path.read_text()
    twice = good.replace('"user_data": {', '"user_data": {"u": {"x": [[1, 2, 3]], "y": [4]}, ')
    for bad, problem in {
        good.replace("[[1", "[[1 !"): f"character {good.index('[[1') + 4}: .*found '! ?, 2",
        good[:-1] + ",": f"character {len(good)}: .*the file ends here",
        twice: "user 'u' is in user_data twice",
        good.replace("[[1", "[" * 9000): r"a\.json: character \d+: .*recursion",
        good.replace("[[1", "[[" + "1" * 5000): "exceeds the limit .* digits",
    }.items():
        path.write_text(bad)
        with pytest.raises(UserError, match=problem):
            read(synthetic(tmp_path))
    at = good.index('"user_data"') + 3
    path.write_bytes(good[:at].encode() + b"\xff" + good[at:].encode())
    with pytest.raises(UserError, match=f"a.json: byte {at} is not UTF-8"):
        read(synthetic(tmp_path))


def test_leaf_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "a.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"a\.json cannot be read: No such file"):
        synthetic(tmp_path)


def test_leaf_user_in_two_files_is_refused(tmp_path):
    write_leaf(tmp_path / "a.json", NUMBERS)
    write_leaf(tmp_path / "b.json", {"task 2": NUMBERS["task 2"]})
    with pytest.raises(UserError, match=r"b.json: user 'task 2' is in a.json too"):
        synthetic(tmp_path)


@pytest.mark.parametrize("module", [leaf_femnist, leaf_celeba, leaf_sent140, leaf_shakespeare, leaf_reddit])
def test_leaf_says_where_its_files_are_made(tmp_path, module):
    how = rf"data/{module.__name__.split('_')[-1]}/README.md of https://github.com/TalwalkarLab/leaf"
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "test").mkdir(parents=True)
    write_leaf(tmp_path / "half" / "test" / "a.json", ONE)
    for folder, problem in {"none": "none is no folder", "empty": "no .json files", "half": "no folder train"}.items():
        with pytest.raises(UserError, match=f"{problem}.*{how}"):
            prepare(module, "--source", tmp_path / folder)


# ---- LEAF's datasets


def test_femnist_pixels_are_row_by_row_from_white_255(tmp_path):
    images = RANDOM.randint(0, 256, (3, 28, 28))
    images[0, 2, 20], images[0, 20, 2] = 7, 99
    write_leaf(tmp_path / "all_data_0.json", {"f0001_41": (femnist_images(images), [0, 35, 61])})
    made = prepare(leaf_femnist, "--source", tmp_path)
    columns = read(made)["f0001_41"]
    np.testing.assert_array_equal(columns["x"], images)
    assert [made.features["y"].names[label] for label in columns["y"]] == ["0", "Z", "z"]
    inverted = read(prepare(leaf_femnist, "--source", tmp_path, "--invert"))["f0001_41"]["x"]
    np.testing.assert_array_equal(inverted, 255 - images)


LINES = ["Who's there?\n", "Nay,  answer me; stand & unfold\n", "x\n"]


def test_leaf_shakespeare_asks_for_every_character_once(tmp_path):
    write_leaf(tmp_path / "a.json", {"HAMLET": shakespeare_windows(LINES)})
    made = prepare(leaf_shakespeare, "--source", tmp_path)
    columns = read(made)["HAMLET"]
    targets = columns["y"][columns["y"] != 0]
    assert "".join(text_of(targets, made)) == "".join(LINES).replace("  ", " ")
    assert (columns["y"][:, :-1] == 0).all() and (columns["x"] != 0).all()
    assert "".join(text_of(columns["x"][5], made)) == " " * 75 + "Who's"


def test_leaf_shakespeare_targets_all_but_the_spaces_before_a_line(tmp_path):
    write_leaf(tmp_path / "a.json", {"HAMLET": shakespeare_windows(LINES)})
    made = prepare(leaf_shakespeare, "--source", tmp_path, "--targets", "all")
    columns = read(made)["HAMLET"]
    # Window i of a line has 80 - i spaces before it, and its own i + 1 characters as targets.
    windows = [number for line in LINES for number in range(len(line.replace("  ", " ")))]
    assert (columns["y"] != 0).sum(axis=1).tolist() == [number + 1 for number in windows]
    inner = columns["y"][:, :-1]
    np.testing.assert_array_equal(inner[inner != 0], columns["x"][:, 1:][inner != 0])
    assert "".join(text_of(columns["y"][5][-6:], made)) == "Who's "


def test_sent140_words_are_those_of_train_by_count_then_by_letters(tmp_path):
    train = {"u": ([tweet("B b, a"), tweet("d c! b")], [1, 0]), "v": ([tweet("I'm a c")], [0])}
    write_leaf(tmp_path / "train" / "all_data_train.json", train)
    write_leaf(tmp_path / "test" / "all_data_test.json", {"v": ([tweet("zz zz zz b"), tweet("")], [1, 1])})
    made = prepare(leaf_sent140, "--source", tmp_path, "--vocabulary", 4, "--length", 3)
    assert made.features["x"].names[3:] == ("b", "a", "c", "!", "<oov>")
    columns = read(made)
    assert columns["u"]["x"].tolist() == [[3, 3, 7], [7, 5, 6]] and columns["u"]["y"].tolist() == [1, 0]
    assert columns["v"]["x"].tolist() == [[7, 4, 5]]
    assert read(made, "test")["v"]["x"].tolist() == [[7, 7, 7], [0, 0, 0]]
    with pytest.raises(UserError, match="sample 0 is 'text', must be"):
        write_leaf(tmp_path / "bad" / "a.json", {"u": (["text"], [0])})
        prepare(leaf_sent140, "--source", tmp_path / "bad")


@pytest.fixture
def celeba(tmp_path):
    from PIL import Image

    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    for number in range(6):
        pixels = np.zeros((218, 178, 3), np.uint8)
        pixels[:109, :45] = (255, 10 * number, 0)  # upper left, higher than wide
        Image.fromarray(pixels).save(folder / f"{number:06}.png")
    users = {"7": (["000000.png", "000003.png"], [1.0, 0.0]), "4": ([f"{n:06}.png" for n in (1, 2, 4, 5)], [0.0] * 4)}
    write_leaf(tmp_path / "train" / "all_data.json", users)
    write_leaf(tmp_path / "test" / "all_data.json", {"4": (["000005.png"], [1])})
    return ("--source", tmp_path, "--images", folder)


def test_celeba_images_are_channels_first_and_upright(celeba):
    made = prepare(leaf_celeba, *celeba)
    columns = read(made)["7"]
    assert columns["x"][1, :, 35, 15].tolist() == [255, 30, 0]
    assert not columns["x"][:, :, 46:, :].any() and not columns["x"][:, :, :, 25:].any()
    assert columns["y"].tolist() == [1, 0] and made.standardize == "x"
    assert [len(columns["y"]) for columns in read(made, "test").values()] == [0, 1]


def test_celeba_does_not_depend_on_how_a_file_is_cut(celeba, monkeypatch):
    whole = prepare(leaf_celeba, *celeba)
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1)
    cut = prepare(leaf_celeba, *celeba)
    assert [len(split.pieces) for split in (*whole.splits, *cut.splits)] == [1, 1, 2, 2]
    for split in ("train", "test"):
        assert list(read(cut, split)) == ["7", "4"]
        for user, columns in read(whole, split).items():
            np.testing.assert_array_equal(read(cut, split)[user]["x"], columns["x"])


def test_celeba_names_the_image_that_is_missing_or_damaged(celeba, tmp_path):
    with pytest.raises(UserError, match=r"no folder.*mmlab"):
        prepare(leaf_celeba, "--source", tmp_path)
    path = tmp_path / "img_align_celeba" / "000003.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"000003.png: truncated or damaged"):
        read(prepare(leaf_celeba, *celeba))
    path.unlink()
    with pytest.raises(UserError, match=r"user '7', sample 1 is '000003.png', of which there is no file"):
        read(prepare(leaf_celeba, *celeba))
    write_leaf(tmp_path / "train" / "all_data.json", {"7": ([[0.5] * 784], [0])})
    with pytest.raises(UserError, match=r"user '7', sample 0 is \[0.5, .*, must be the name of an image"):
        read(prepare(leaf_celeba, *celeba))


COMMENTS = ["one two three", "a b c d e f g h i", "a b c d e f g h", "c " * 23]


def test_reddit_loses_no_transition_and_keeps_no_row_without_target(tmp_path):
    x, y = reddit_rows(COMMENTS)
    # num_samples counts a user's comments in all splits.
    for split, rows in {"train": slice(0, 3), "val": slice(3, 4), "test": slice(4, 4)}.items():
        write_leaf(tmp_path / split / "reddit_0.json", {"1": (x[rows], y[rows])}, num_samples=[4])
    made = prepare(leaf_reddit, "--source", tmp_path, "--vocabulary", 10)
    words = made.features["x"].names
    assert words[3:] == (*"abcdefgh", "i", "one", "<oov>")
    for split, comments in {"train": COMMENTS[:3], "val": COMMENTS[3:], "test": []}.items():
        columns = read(made, split)["1"]
        inputs, targets = ([words[id] for id in columns[name].flat if id] for name in "xy")
        known = [[word if word in words else "<oov>" for word in comment.split()] for comment in comments]
        assert inputs == [token for comment in known for token in ("<bos>", *comment)]
        assert targets == [token for comment in known for token in (*comment, "<eos>")]
        assert ((columns["x"] == 0) == (columns["y"] == 0)).all()
        assert (columns["y"] != 0).any(axis=1).all()


def test_reddit_refuses_more_comments_than_there_are_and_rows_of_other_lengths(tmp_path):
    x, y = reddit_rows(COMMENTS)
    write_leaf(tmp_path / "train" / "a.json", {"1": (x, y)}, num_samples=[3])
    with pytest.raises(UserError, match="has 4 samples, num_samples says 3"):
        read(prepare(leaf_reddit, "--source", tmp_path))
    write_leaf(tmp_path / "train" / "a.json", {"1": (x, y)})
    with pytest.raises(UserError, match="sample 0 must be rows of 9 tokens"):
        prepare(leaf_reddit, "--source", tmp_path, "--length", 9)
    y[2]["target_tokens"].pop()
    write_leaf(tmp_path / "train" / "a.json", {"1": (x, y)})
    with pytest.raises(UserError, match="sample 2 must be rows of 10 tokens, as many as target_tokens"):
        read(prepare(leaf_reddit, "--source", tmp_path))


# ---- Synthetic(alpha, beta)


class Recording(np.random.RandomState):
    """A RandomState that keeps what it drew."""

    def __init__(self, seed):
        super().__init__(seed)
        self.drawn = []

    def normal(self, loc=0.0, scale=1.0, size=None):
        self.drawn.append((loc, scale, super().normal(loc, scale, size)))
        return self.drawn[-1][2]


def test_synthetic_labels_follow_the_equations():
    random = Recording(1)
    x, y = leaf_synthetic.task(random, alpha=0.5, beta=2.0)
    (zero_u, alpha, u), (zero_B, beta, B), (u_W, one_W, W), (u_b, one_b, b), (B_v, one_v, v), (v_x, deviation, _) = (
        random.drawn
    )
    assert (zero_u, alpha, zero_B, beta, one_W, one_b, one_v) == (0, 0.5, 0, 2.0, 1, 1, 1)
    assert u_W == u_b == u and B_v == B and v_x is v
    assert W.shape == (60, 10) and b.shape == (10,) and v.shape == (60,)
    np.testing.assert_allclose(deviation**2, [j**-1.2 for j in range(1, 61)])
    logits = np.einsum("nd,dc->nc", x.astype(float), W) + b
    assert (logits[np.arange(len(y)), y] >= logits.max(axis=1) - 1e-5).all() and len(set(y.tolist())) > 1


def test_synthetic_inputs_have_the_published_spread():
    x = next(
        x for x, _ in (leaf_synthetic.task(np.random.RandomState(seed), 0, 0) for seed in range(99)) if len(x) > 2000
    )
    expected = np.arange(1, 61) ** -1.2
    assert x.var(axis=0) == pytest.approx(expected, rel=6 * (2 / len(x)) ** 0.5)
    sizes = [len(leaf_synthetic.task(np.random.RandomState(seed), 0, 0, 1, 2)[0]) for seed in range(300)]
    assert min(sizes) >= 50
    logs = np.log(np.array(sizes) - 49.5)
    assert logs.mean() == pytest.approx(4, abs=0.5) and logs.std() == pytest.approx(2, abs=0.4)


def made_synthetic(*arguments):
    return prepare(leaf_synthetic, "--alpha", 1, "--beta", 1, "--dimension", 4, *arguments)


def test_synthetic_client_is_a_function_of_seed_and_number(monkeypatch):
    few, many = read(made_synthetic("--clients", 3)), read(made_synthetic("--clients", 7))
    assert list(few) == list(many)[:3] == ["f_00000", "f_00001", "f_00002"]
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1)
    cut = made_synthetic("--clients", 3)
    assert len(cut.splits[0].pieces) == 3
    for client, columns in few.items():
        for other in (many, read(cut)):
            np.testing.assert_array_equal(columns["x"], other[client]["x"])
    assert (
        len({columns["x"].tobytes() for columns in (*few.values(), *read(made_synthetic("--seed", 1)).values())}) == 33
    )


def test_synthetic_test_is_the_last_tenth_of_each_client():
    made = made_synthetic("--clients", 4)
    for number, (train, test) in enumerate(zip(read(made).values(), read(made, "test").values())):
        x, y = leaf_synthetic.task(np.random.RandomState([0, number]), 1, 1, 4)
        np.testing.assert_array_equal(np.concatenate([train["x"], test["x"]]), x)
        np.testing.assert_array_equal(np.concatenate([train["y"], test["y"]]), y)
        assert len(train["y"]) == int(0.9 * len(y))


def test_synthetic_is_made_or_converted_not_both_nor_neither(tmp_path):
    with_source = ("--alpha", 1, "--source", tmp_path)
    for arguments in ((), ("--alpha", 1), with_source, (*with_source, "--beta", 1)):
        with pytest.raises(UserError, match=r"give --alpha and --beta to make.*or else --source"):
            prepare(leaf_synthetic, *arguments)
    for arguments in (("--alpha", -1, "--beta", 1), ("--alpha", 1, "--beta", 1, "--clients", 0)):
        with pytest.raises(UserError, match="spreads must be at least 0, clients at least 1"):
            prepare(leaf_synthetic, *arguments)


# ---- to the end


def test_every_converter_has_a_name_in_the_program():
    sources = Path(fedjax_sqlite.__file__).parent.glob("*.py")
    converters = {path.stem for path in sources if "def prepare(options: argparse.Namespace) ->" in path.read_text()}
    assert converters == set(CONVERTERS.values())


def test_datasets_are_written_whole_whatever_the_number_of_jobs(tmp_path, monkeypatch):
    users = {f"f{n:04}_00": (femnist_images(RANDOM.randint(0, 256, (3, 28, 28))), [n, 1, 2]) for n in range(4)}
    for number, names in enumerate((list(users)[:2], list(users)[2:])):
        (train, train_keys), (test, test_keys) = split_by_sample({user: users[user] for user in names}, cut=2)
        write_leaf(tmp_path / "data" / "train" / f"all_data_{number}_train_9.json", train, **train_keys)
        write_leaf(tmp_path / "data" / "test" / f"all_data_{number}_test_9.json", test, **test_keys)
    digests = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        assert main(["leaf-femnist", "--source", str(tmp_path / "data"), "--out", str(out), "--jobs", jobs]) == 0
        dataset = Dataset(out)
        assert dataset.aligned("test") and dataset.sizes("train").tolist() == [2] * 4
        assert [dataset.client_id("test", index) for index in range(4)] == list(users)
        digests.append(dataset.digest)
        dataset.close()
    assert digests[0] == digests[1]


def test_fedjax_is_written_from_the_command_line(tmp_path, capsys):
    path = write_fedjax(tmp_path / "a.sqlite", [(b"u", {"x": np.ones((2, 3), np.float32), "y": np.array([0, 5])})])
    command = ["fedjax", "--kind", "plain", "--train", str(path), "--classes", "5", "--jobs", "1", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "client 'u', column 'y'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    command[command.index("5")] = "6"
    assert main([*command, str(tmp_path / "out")]) == 0
    dataset = Dataset(tmp_path / "out")
    assert dataset.client("train", 0)["y"].tolist() == [0, 5]
    dataset.close()
