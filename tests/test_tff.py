"""TFF's HDF5 files into datasets: on files of the published layout, and on the real ones if MPIFL_REAL_DATA is set."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import tff_files

from data_prep import conversion, tff, tff_cifar100, tff_emnist, tff_shakespeare, tff_stackoverflow, words
from data_prep.__main__ import main
from data_prep.text import CHARACTERS, char_ids, id_table, most_frequent, sentences, symbols, windows, word_ids
from mpifl.config import UserError
from mpifl.data.shard import Dataset, Feature

pytestmark = pytest.mark.usefixtures("no_picture")
RANDOM = np.random.RandomState(0)
OPTIONS = {
    tff_shakespeare: {"length": 80},
    tff_emnist: {"only_digits": False, "invert": False},
    tff_cifar100: {"crop": 32},
    tff_stackoverflow: {"word_counts": None, "vocabulary": 10000, "length": 20, "max_sentences": None, "jobs": 1},
}


def prepare(converter, source, **options):
    return converter.prepare(Namespace(**OPTIONS[converter] | {"source": source, "shard_mb": 256} | options))


def rows(made, split):
    """{client: columns} of a split, in the converter's order, each column as its feature says."""
    (split,) = [each for each in made.splits if each.name == split]
    read = {client: columns for piece in split.pieces for client, columns in split.read(piece)}
    assert len(read) == split.clients
    for columns in read.values():
        assert columns.keys() == made.features.keys()
        for name, feature in made.features.items():
            assert (columns[name].dtype, columns[name].shape[1:]) == (feature.dtype, feature.shape)
    return read


# ---- text


def test_characters_have_the_published_ids():
    # FedJAX: 86 characters from 3 on in the order of TFF's tutorial, 89 for others.
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 86
    assert char_ids(CHARACTERS).tolist() == list(range(3, 89))
    assert char_ids("dh x\r").tolist() == [3, 4, 16, 8, 88]
    assert symbols(CHARACTERS)[:4] == ("<pad>", "<bos>", "<eos>", "d")
    assert len(symbols(CHARACTERS)) == 90


def test_a_character_not_in_the_table_is_one_oov_however_many_bytes_it_has():
    assert char_ids("d}é漢\U0001f600\ud800h").tolist() == [3, 89, 89, 89, 89, 89, 4]
    assert char_ids("").tolist() == []


def test_windows_are_those_of_fedjaxs_documentation():
    x, y = windows([[10, 11, 12, 13], [14]], length=3)
    assert x.tolist() == [[1, 10, 11], [12, 13, 2], [1, 14, 0]]
    assert y.tolist() == [[10, 11, 12], [13, 2, 1], [14, 2, 0]]
    assert [column.shape for column in windows([], length=3)] == [(0, 3), (0, 3)]


def check_windows(texts, x, y, length):
    """Every transition of the stream, counted in plain Python, is in the windows once and in order."""
    stream = [token for text in texts for token in (1, *text, 2)]
    transitions = list(pairwise(stream))
    found = list(zip(x.ravel().tolist(), y.ravel().tolist()))
    assert found[: len(transitions)] == transitions
    assert set(found[len(transitions) :]) <= {(0, 0)}
    assert (y != 0).sum() == max(0, len(stream) - 1)
    assert len(x) == -(-len(transitions) // length)


@pytest.mark.parametrize("length", [1, 2, 7, 80])
def test_windows_lose_no_transition(length):
    for number in range(30):
        texts = [RANDOM.randint(3, 90, RANDOM.randint(0, 25)).tolist() for _ in range(number % 8)]
        check_windows(texts, *windows(texts, length), length)


def test_sentences_are_cut_and_end_in_eos_where_it_fits():
    words = [[5] * count for count in range(6)]
    x, y = sentences(words, length=4, dtype="uint16")
    for count in range(6):
        tokens = [1, *[5] * count, 2]
        for row, expected in ((x[count], tokens[:-1]), (y[count], tokens[1:])):
            assert row.tolist() == (expected + [0] * 4)[:4]
    assert [2 in row for row in y] == [True] * 4 + [False] * 2
    assert x.dtype == y.dtype == np.uint16
    assert [column.shape for column in sentences([], 4, "uint8")] == [(0, 4), (0, 4)]


def test_most_frequent_words_come_first_and_equals_keep_their_order():
    counts = {"b": 2, "c": 5, "a": 2, "d": 1}
    assert most_frequent(counts, 3) == ("c", "b", "a")
    assert most_frequent(counts, 9) == ("c", "b", "a", "d")
    assert word_ids(["a", "?", "c"], id_table(("c", "b", "a"))) == [5, 6, 3]


# ---- Shakespeare

ROLES = {"THE_KING": [b"To be,\nor not", b"", b"}e\xc3\xa9"], "A_CLOWN": [b"Ha! " * 60, b"?"], "A_LORD": []}


def test_shakespeare_loses_no_transition_of_any_role(tmp_path):
    made = prepare(tff_shakespeare, tff_files.shakespeare(tmp_path, ROLES, ROLES))
    read = rows(made, "train")
    assert list(read) == ["A_CLOWN", "A_LORD", "THE_KING"]
    for role, snippets in ROLES.items():
        texts = [[symbols(CHARACTERS).index(c) if c in CHARACTERS else 89 for c in s.decode()] for s in snippets]
        check_windows(texts, read[role]["x"], read[role]["y"], 80)
    assert len(read["A_CLOWN"]["x"]) == 4  # 245 tokens
    assert made.features["x"] == made.features["y"]
    assert made.features["y"] == Feature("uint8", (80,), classes=90, names=symbols(CHARACTERS), pad=0)


def test_sequences_are_as_long_as_told(tmp_path):
    source = tff_files.shakespeare(tmp_path, ROLES, ROLES)
    made = prepare(tff_shakespeare, source, length=100)
    assert rows(made, "train")["A_CLOWN"]["x"].shape == (3, 100)
    with pytest.raises(UserError, match="--length 0"):
        prepare(tff_shakespeare, source, length=0)


def test_snippet_that_is_not_utf_8_is_named(tmp_path):
    source = tff_files.shakespeare(tmp_path, {"A": [b"fine", b"fine", b"caf\xe9"]}, {"A": [b"x"]})
    with pytest.raises(UserError, match=r"shakespeare_train.h5: client 'A': row 2 of 'snippets' is not UTF-8"):
        rows(prepare(tff_shakespeare, source), "train")


# ---- EMNIST

GRAY = np.arange(2 * 784).reshape(2, 28, 28) % 256  # every level there is
WRITERS = {"f2599_01": (GRAY, [0, 61]), "f2100_45": (GRAY[:1], [3]), "f2600_02": (GRAY[::-1], [35, 36])}


def test_emnist_pixels_are_stored_without_loss(tmp_path):
    made = prepare(tff_emnist, tff_files.emnist(tmp_path, WRITERS, WRITERS))
    read = rows(made, "train")
    assert list(read) == sorted(WRITERS)
    for writer, (levels, labels) in WRITERS.items():
        np.testing.assert_array_equal(read[writer]["x"], levels)
        np.testing.assert_array_equal(read[writer]["y"], labels)
        pixels = (levels / 255).astype(np.float32)  # as published
        np.testing.assert_array_equal((read[writer]["x"].astype(np.float32) - 0) / np.float32(255), pixels)
    x, y = made.features["x"], made.features["y"]
    assert (x.mean, x.std, y.classes) == (0, 255, 62)
    assert [y.names[label] for label in (0, 11, 37)] == ["0", "B", "b"]  # as TFF documents them


def test_inverted_pixels_are_one_minus_those_published(tmp_path):
    made = prepare(tff_emnist, tff_files.emnist(tmp_path, WRITERS, WRITERS), invert=True)
    inverted = rows(made, "test")["f2100_45"]["x"] / made.features["x"].std
    np.testing.assert_allclose(inverted, 1 - GRAY[:1] / 255, atol=1e-12)
    assert "inverted" in made.provenance["made"]


@pytest.mark.parametrize(
    ("writer", "domain"),
    [("f2100_45", 0), ("f2599_01", 0), ("f2099_01", 1), ("f2600_02", 1), ("f0000_14", 1), ("0a1b:f2100_45", 0)],
)
def test_writers_of_the_high_school_are_domain_0(writer, domain):
    assert tff_emnist.domain_of(writer, Path("x.h5")) == domain


def test_domain_is_in_every_row(tmp_path):
    read = rows(prepare(tff_emnist, tff_files.emnist(tmp_path, WRITERS, WRITERS)), "train")
    domains = {writer: columns["domain_id"].tolist() for writer, columns in read.items()}
    assert domains == {"f2100_45": [0], "f2599_01": [0, 0], "f2600_02": [1, 1]}


def test_only_digits_reads_the_other_files_with_ten_classes(tmp_path):
    digits = {"f2100_45": (GRAY, [9, 0])}
    source = tff_files.emnist(tmp_path, digits, digits, stem="fed_emnist_digitsonly")
    made = prepare(tff_emnist, source, only_digits=True)
    assert rows(made, "train")["f2100_45"]["y"].tolist() == [9, 0]
    assert made.features["y"].classes == 10
    with pytest.raises(UserError, match=r"fed_emnist_train\.h5; fetch .*/fed_emnist\.tar"):
        prepare(tff_emnist, source)


def test_pixels_may_be_off_by_the_rounding_of_floats(tmp_path):
    for error in (-5e-7, 5e-7):
        writers = {"f2100_45": (GRAY[:1] + 255 * error, [1])}
        made = prepare(tff_emnist, tff_files.emnist(tmp_path, writers, writers))
        np.testing.assert_array_equal(rows(made, "train")["f2100_45"]["x"], GRAY[:1])


@pytest.mark.parametrize("pixel", [np.nan, -1 / 255, 256 / 255, 0.5 / 255, 17 / 255 + 3e-6])
def test_pixel_between_levels_is_refused_by_row(tmp_path, pixel):
    levels = np.zeros((3, 28, 28))
    levels[1, 4, 5] = pixel * 255
    writers = {"f2100_45": (levels, [1, 1, 1])}
    made = prepare(tff_emnist, tff_files.emnist(tmp_path, writers, writers))
    with pytest.raises(UserError, match=r"fed_emnist_train.h5: client 'f2100_45', row 1 has pixel"):
        rows(made, "train")


# ---- CIFAR-100


def test_cifar100_planes_come_first_and_pixels_stay_where_they_were(tmp_path):
    row, column, channel = np.indices((32, 32, 3))
    image = row * 7 + column * 3 + channel * 50  # at most 410: wraps, and stays different in every direction
    other = RANDOM.randint(0, 256, (2, 32, 32, 3))
    train = {"0": (image[None] % 256, [99]), "1": (other, [0, 5])}
    source = tff_files.cifar100(tmp_path, train, {"0": (other, [1, 2])})
    made = prepare(tff_cifar100, source)
    x = rows(made, "train")["0"]["x"][0]
    for r, c in ((0, 0), (0, 31), (31, 0), (12, 20)):
        for plane in range(3):
            assert x[plane, r, c] == (7 * r + 3 * c + 50 * plane) % 256
    assert {client: c["y"].tolist() for client, c in rows(made, "train").items()} == {"0": [99], "1": [0, 5]}
    assert made.standardize == "x"
    assert made.features == {"x": Feature("uint8", (3, 32, 32)), "y": Feature("uint8", (), classes=100)}
    assert list(rows(made, "test")) == ["0"]  # the clients of test are others


def test_crop_keeps_the_centre(tmp_path):
    images = RANDOM.randint(0, 256, (2, 32, 32, 3))
    source = tff_files.cifar100(tmp_path, {"0": (images, [1, 2])}, {"0": (images, [1, 2])})
    cropped = rows(prepare(tff_cifar100, source, crop=24), "train")["0"]["x"]
    np.testing.assert_array_equal(cropped, images[:, 4:28, 4:28].transpose(0, 3, 1, 2))
    assert cropped.flags.c_contiguous
    with pytest.raises(UserError, match="--crop 33: must be 1 to 32"):
        prepare(tff_cifar100, source, crop=33)


# ---- Stack Overflow

WORDS = ["the", "mpi", "rank", "sum", "of", "a", "b", "zz"]
TRAIN = {
    f"{1000 + user:08d}": [
        (
            " ".join(RANDOM.choice(WORDS, RANDOM.randint(0, 30), p=np.arange(8, 0, -1) / 36)).encode(),
            RANDOM.choice([b"question", b"answer"]),
        )
        for _ in range(user)
    ]
    for user in range(7)
}
TRAIN["00001007"] = [(b"", b"answer"), (b"yy xx", b"question")]  # no word; and words as frequent as each other
POSTS = {"train": TRAIN, "held_out": {"00000010": [(b"the unseen rank", b"answer")]}, "test": {"00001001": []}}


@pytest.fixture
def posts(tmp_path):
    return tff_files.stackoverflow(tmp_path, **POSTS)


def plain_vocabulary(size):
    counts = Counter(word for rows in TRAIN.values() for text, _ in rows for word in text.decode().split())
    return sorted(counts, key=lambda word: (-counts[word], word))[:size]


@pytest.mark.parametrize("size", [5, 10000])
def test_stackoverflow_is_what_plain_python_makes_of_it(posts, size):
    made = prepare(tff_stackoverflow, posts, vocabulary=size)
    known = ["<pad>", "<bos>", "<eos>", *plain_vocabulary(size), "<oov>"]
    assert made.features["x"] == Feature("uint16", (20,), classes=len(known), names=tuple(known), pad=0)
    for split, users in POSTS.items():
        read = rows(made, split)
        assert list(read) == sorted(users)
        for user, published in users.items():
            assert len(read[user]["x"]) == len(published)
            for (text, kind), x, y, domain in zip(published, *(read[user][name] for name in ("x", "y", "domain_id"))):
                ids = [known.index(word) if word in known else len(known) - 1 for word in text.decode().split()]
                tokens = [1, *ids, 2]
                assert x.tolist() == (tokens[:-1] + [0] * 20)[:20]
                assert y.tolist() == (tokens[1:] + [0] * 20)[:20]
                assert domain == [b"question", b"answer"].index(kind)


def test_vocabulary_of_ten_thousand_has_oov_10003(posts, tmp_path):
    (tmp_path / "stackoverflow.word_count").write_text("".join(f"w{i} {20000 - i}\n" for i in range(12000)))
    made = prepare(tff_stackoverflow, posts, word_counts=tmp_path / "stackoverflow.word_count")
    y = made.features["y"]
    assert (y.classes, y.names[3], y.names[10002], y.names[10003]) == (10004, "w0", "w9999", "<oov>")
    assert rows(made, "held_out")["00000010"]["y"][0, :5].tolist() == [10003, 10003, 10003, 2, 0]
    assert "by stackoverflow.word_count," in made.provenance["made"]


@pytest.mark.parametrize("as_json", [False, True])
def test_published_counts_keep_the_order_of_the_file_among_equals(tmp_path, as_json):
    counts, path = {"of": 7, "zz": 9, "a": 7, "}": 7}, tmp_path / "stackoverflow.word_count"
    path.write_text(json.dumps(counts) if as_json else "".join(f"{w} {n}\n" for w, n in counts.items()))
    assert most_frequent(words.read_counts(path), 3) == ("zz", "of", "a")


def test_counted_words_may_hold_any_white_space_but_spaces(tmp_path):
    (tmp_path / "counts").write_bytes("a\u00a0b 5\n\u2028\t 4\r\nc\rd  3".encode())
    assert words.read_counts(tmp_path / "counts") == {"a\u00a0b": 5, "\u2028": 4, "c\rd": 3}


def test_counts_without_a_word_are_refused(posts, tmp_path):
    (tmp_path / "counts").write_text("")
    with pytest.raises(UserError, match=r"there is no word in .*counts"):
        prepare(tff_stackoverflow, posts, word_counts=tmp_path / "counts")
    with pytest.raises(UserError, match=r"no file .*nowhere; .*/stackoverflow\.word_count\.tar\.bz2"):
        prepare(tff_stackoverflow, posts, word_counts=tmp_path / "nowhere")
    tff_files.stackoverflow(posts, train={"1": [(b"", b"answer")]})
    with pytest.raises(UserError, match="there is no word in split train"):
        prepare(tff_stackoverflow, posts)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"the 5\nof\n", "line 2 is not a word and its count: 'of'"),
        (b"the 5\nof many\n", "line 2 is not a word and its count"),
        (b"the 5\nof 3 4\n", "line 2 is not a word and its count"),
        (b"the 5\nthe 3\n", "word 'the' is counted twice"),
        (b'{"the": 5, "the": 3}', "word 'the' is counted twice"),
        (b'{"the": 5', "cannot be read as counts of words"),
        (b'{"the": 5.5}', "word 'the' has count 5.5"),
        (b'{"the":' * 10000, "cannot be read as counts of words"),
        (b"caf\xe9 5\n", "cannot be read as counts of words"),
    ],
)
def test_bad_counts_are_named(tmp_path, content, problem):
    path = tmp_path / "counts"
    path.write_bytes(content)
    with pytest.raises(UserError, match="counts: ") as caught:
        words.read_counts(path)
    assert problem in str(caught.value)


def test_a_users_first_sentences_only(posts):
    made, capped = (prepare(tff_stackoverflow, posts, max_sentences=most) for most in (None, 2))
    assert capped.features == made.features  # words are counted in all sentences
    for user, columns in rows(made, "train").items():
        for name, column in rows(capped, "train")[user].items():
            np.testing.assert_array_equal(column, columns[name][:2])
    with pytest.raises(UserError, match="--max-sentences 0"):
        prepare(tff_stackoverflow, posts, max_sentences=0)


def test_processes_count_the_words_that_one_counts(posts, monkeypatch):
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1)
    path = posts / "stackoverflow_train.h5"
    count = partial(tff_stackoverflow.count_words, partial(tff.clients, path))
    pieces = tff.pieces(tff.client_ids(path), path)
    two, one = (words.count_all(pieces, count, jobs) for jobs in (2, 1))
    assert len(pieces) == len(TRAIN) and list(two.items()) == list(one.items())
    assert most_frequent(two, 5) == tuple(plain_vocabulary(5))


@pytest.mark.parametrize(
    ("count", "raises", "problem"),
    [(os._exit, UserError, "was killed.*--jobs"), (time.sleep, KeyboardInterrupt, "enough")],
    ids=["killed", "interrupted"],
)
def test_processes_that_count_end_with_the_counting(count, raises, problem):
    def interrupt(*_):
        raise KeyboardInterrupt("enough")

    before, began = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.5 if raises is KeyboardInterrupt else 0)
    try:
        with pytest.raises(raises, match=problem):
            words.count_all([60, 60], count, jobs=2)
    finally:
        signal.signal(signal.SIGALRM, before)
    while multiprocessing.active_children():  # the pool's own thread may be the one that reaps it
        assert time.monotonic() - began < 30
        time.sleep(0.01)


SHOW = """
import sys
from argparse import Namespace
from pathlib import Path
from data_prep import tff_stackoverflow
options = dict(word_counts=None, vocabulary=3, length=20, max_sentences=None, jobs=1, shard_mb=256)
made = tff_stackoverflow.prepare(Namespace(source=Path(sys.argv[1]), **options))
for split in made.splits:
    for piece in split.pieces:
        for client, columns in split.read(piece):
            print(client, columns["x"].tolist(), columns["y"].tolist())
"""


def test_ids_are_the_same_in_processes_that_hash_differently(posts):
    root = Path(__file__).parent.parent
    printed = {
        subprocess.run(
            [sys.executable, "-c", SHOW, str(posts)],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    assert ", 6, " in printed.pop()  # there are words out of vocabulary


def test_type_that_is_no_domain_is_named(posts):
    tff_files.stackoverflow(posts, test={"7": [(b"a", b"answer"), (b"b", b"comment")]})
    made = prepare(tff_stackoverflow, posts)
    with pytest.raises(UserError, match=r"stackoverflow_test\.h5: client '7', row 1 has type 'comment'"):
        rows(made, "test")


# ---- what all of them promise


def sources(folder):
    """A source for each converter."""
    tff_files.shakespeare(folder, ROLES, ROLES)
    tff_files.emnist(folder, WRITERS, WRITERS)
    tff_files.stackoverflow(folder, **POSTS)
    images = RANDOM.randint(0, 256, (3, 32, 32, 3))
    tff_files.cifar100(folder, {str(i): (images[:i], list(range(i))) for i in range(4)}, {"0": (images, [1, 2, 3])})
    return folder


@pytest.mark.parametrize("converter", OPTIONS)
def test_pieces_are_read_alone_and_in_any_order(tmp_path, monkeypatch, converter):
    source = sources(tmp_path)
    whole = prepare(converter, source)
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1)
    made = pickle.loads(pickle.dumps(prepare(converter, source)))
    assert made.features == whole.features
    for split in made.splits:
        assert len(split.pieces) == split.clients
        parts = [list(split.read(piece)) for piece in reversed(split.pieces)]
        pairs = [pair for part in reversed(parts) for pair in part]
        expected = rows(whole, split.name)
        assert [client for client, _ in pairs] == list(expected)
        for client, columns in pairs:
            for name, column in columns.items():
                np.testing.assert_array_equal(column, expected[client][name])


def test_clients_of_either_split_are_in_both_in_the_same_order(tmp_path):
    tff_files.shakespeare(tmp_path, {"f2101_00": [b"x"], "f2100_00": [b"y"]}, {"f2102_00": [b"z"]})
    one = (GRAY[:1], [1])
    tff_files.emnist(tmp_path, {"f2101_00": one, "f2100_00": one}, {"f2102_00": one})
    for converter in (tff_shakespeare, tff_emnist):
        made = prepare(converter, tmp_path)
        sizes = [{client: len(c["y"]) for client, c in rows(made, name).items()} for name in ("train", "test")]
        assert sizes[0] == {"f2100_00": 1, "f2101_00": 1, "f2102_00": 0}
        assert sizes[1] == {"f2100_00": 0, "f2101_00": 0, "f2102_00": 1}
        assert list(sizes[0]) == list(sizes[1]) == sorted(sizes[0])


@pytest.mark.parametrize(
    ("converter", "name", "archive"),
    [
        (tff_shakespeare, "shakespeare_test.h5", "shakespeare.tar.bz2"),
        (tff_emnist, "fed_emnist_train.h5", "fed_emnist.tar.bz2"),
        (tff_cifar100, "fed_cifar100_test.h5", "fed_cifar100.tar.bz2"),
        (tff_stackoverflow, "stackoverflow_held_out.h5", "stackoverflow.tar.bz2"),
    ],
)
def test_missing_file_is_named_with_where_to_fetch_it(tmp_path, converter, name, archive):
    (sources(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=rf"no file {tmp_path / name}; fetch https://\S+/{archive} .*--source"):
        prepare(converter, tmp_path)
    with pytest.raises(UserError, match=r"--source .*/nowhere is no folder; fetch .*--source"):
        prepare(converter, tmp_path / "nowhere")
    for text in (name, archive, "https://"):
        assert text in converter.__doc__


def redo(path, change):
    with h5py.File(path, "a") as file:
        change(file)


def replace(name, rows):
    def change(file):
        group = file["examples/f2100_45"]
        del group[name]
        group[name] = rows

    return change


DAMAGE = {
    "no examples": (lambda file: file.move("examples", "clients"), "no group 'examples'"),
    "no clients": (lambda file: (file.pop("examples"), file.create_group("examples")), "no client in it"),
    "no feature": (lambda file: file["examples/f2100_45"].pop("label"), "client 'f2100_45' has no feature 'label'"),
    "shape": (replace("pixels", np.zeros((1, 27, 28), "f4")), "(1, 27, 28), must be float32 (n, 28, 28)"),
    "dtype": (replace("label", np.zeros(1, "f4")), "'label' is float32 (1,), must be int64 (n,)"),
    "text": (replace("label", [b"one"]), "'label' is text (1,), must be int64 (n,)"),
    "unequal": (replace("label", np.zeros(2, "i4")), "unequal length, {'pixels': 1, 'label': 2}"),
    "label": (replace("label", np.array([62], "i4")), "client 'f2100_45', row 0 has label 62; labels are 0 to 61"),
    "negative label": (replace("label", np.array([-1], "i4")), "row 0 has label -1; labels are 0 to 61"),
    "id": (lambda file: h5py.h5g.create(file["examples"].id, b"caf\xe9"), r"client id b'caf\xe9' is not UTF-8 text"),
    "wide label": (replace("label", np.array([2**63], "u8")), "'label' is uint64 (1,), must be int64 (n,)"),
    "writer": (lambda file: file.move("examples/f2100_45", "examples/g2100"), "'g2100' is not named like a writer"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_file_of_another_layout_is_refused(tmp_path, case):
    change, problem = DAMAGE[case]
    tff_files.emnist(tmp_path, WRITERS, WRITERS)
    redo(tmp_path / "fed_emnist_train.h5", change)
    with pytest.raises(UserError, match=r"fed_emnist_train\.h5: ") as caught:
        rows(prepare(tff_emnist, tmp_path), "train")
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_where_text_is_due_are_refused(tmp_path):
    tff_files.shakespeare(tmp_path, ROLES, ROLES)
    tff_files.write(tmp_path / "shakespeare_test.h5", {"A": {"snippets": np.zeros(2)}})
    with pytest.raises(UserError, match=r"client 'A': 'snippets' is float64 \(2,\), must be text \(n,\)"):
        rows(prepare(tff_shakespeare, tmp_path), "test")


def test_pixels_that_would_wrap_around_are_refused(tmp_path):
    images = np.zeros((1, 32, 32, 3))
    source = tff_files.cifar100(tmp_path, {"0": (images, [1])}, {"0": (images, [1])})
    tff_files.write(source / "fed_cifar100_test.h5", {"0": {"image": images.astype(np.uint16), "label": np.array([1])}})
    with pytest.raises(UserError, match=r"client '0': 'image' is uint16 \(1, 32, 32, 3\), must be uint8"):
        rows(prepare(tff_cifar100, source), "test")


def test_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    source = tff_files.shakespeare(tmp_path, ROLES, ROLES)

    def denied(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Unable to synchronously open file")

    monkeypatch.setattr(h5py, "File", denied)
    with pytest.raises(UserError, match=r"shakespeare_train\.h5 cannot be read: Permission denied"):
        prepare(tff_shakespeare, source)


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_truncated_file_is_refused_by_name(tmp_path, keep):
    path = tff_files.emnist(tmp_path, WRITERS, WRITERS) / "fed_emnist_test.h5"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match=r"fed_emnist_test.h5: truncated or damaged \(.*; fetch it again"):
        prepare(tff_emnist, tmp_path)


def test_damage_within_a_file_is_refused_by_name(tmp_path):
    path = tff_files.shakespeare(tmp_path, {"A": [b"one", b"two"]}, ROLES) / "shakespeare_train.h5"
    with h5py.File(path) as file:
        chunk = file["examples/A/snippets"].id.get_chunk_info(0)
    with open(path, "r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\0" * chunk.size)
    with pytest.raises(UserError, match=r"shakespeare_train\.h5: truncated or damaged"):
        rows(prepare(tff_shakespeare, tmp_path), "train")


@pytest.mark.parametrize("converter", OPTIONS)
def test_command_makes_the_dataset(tmp_path, converter):
    name = converter.__name__.removeprefix("data_prep.").replace("_", "-")
    (tmp_path / "in").mkdir()
    source = sources(tmp_path / "in")
    assert main([name, "--source", str(source), "--out", str(tmp_path / "out")]) == 0
    made, dataset = prepare(converter, source), Dataset(tmp_path / "out")
    for split in dataset.splits:
        expected = rows(made, split)
        assert [dataset.client_id(split, i) for i in range(len(expected))] == list(expected)
        for index, columns in enumerate(expected.values()):
            for column, values in dataset.client(split, index).items():
                np.testing.assert_array_equal(values, columns[column])
    if converter in (tff_shakespeare, tff_emnist):
        assert dataset.aligned("test")
    assert {"source", "made", "licence"} <= dataset.provenance.keys()
    dataset.close()


# ---- real data


def test_real_shakespeare_loses_no_transition_of_any_role():
    real = os.environ.get("MPIFL_REAL_DATA")
    if not real:
        pytest.skip("MPIFL_REAL_DATA names no folder of real data (shakespeare/ in it)")
    made = prepare(tff_shakespeare, Path(real) / "shakespeare")
    number, snippets, outside = {c: i for i, c in enumerate(CHARACTERS, 3)}, [], Counter()
    for split in ("train", "test"):
        read, total = rows(made, split), 0
        with h5py.File(Path(real) / "shakespeare" / f"shakespeare_{split}.h5") as file:
            assert list(read) == list(file["examples"]) and len(read) == 715
            for role, columns in read.items():
                texts = [snippet.decode() for snippet in file["examples"][role]["snippets"][:]]
                outside.update(c for text in texts for c in text if c not in number)
                ids = [[number.get(c, 89) for c in text] for text in texts]
                check_windows(ids, columns["x"], columns["y"], 80)
                total += len(texts)
        snippets.append(total)
    assert snippets == [16068, 2356]  # as published
    assert outside == {"}": 2}
