"""Converters and partitions, on sources that the tests write, and on real files if MPIFL_REAL_DATA is set."""

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.partition import _draw, dirichlet, equal_labels, stratified
from mpifl.config import UserError
from mpifl.data.shard import Dataset, Feature, embedded

LABELS = np.random.RandomState(1).choice(10, 997, p=np.arange(1, 11) / 55)


def counts(labels, part, classes=10):
    return np.bincount(labels[part], minlength=classes)


def read(path):
    """Read every client of both splits: train columns per client, and all test rows."""
    dataset = Dataset(path)
    train = [dataset.client("train", index) for index in range(dataset.clients)]
    test = dataset.rows("test", 0, dataset.total("test"))
    assert dataset.central("test")
    dataset.close()
    return train, test


# ---- partitions


@pytest.mark.parametrize("clients", [1, 7, 100, 2000])
@pytest.mark.parametrize("alpha", [0.01, 0.5, 1e4])
def test_dirichlet_gives_every_example_once_and_equal_sizes(clients, alpha):
    parts = dirichlet(LABELS, clients, alpha, seed=3)
    assert len(parts) == clients
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all((np.diff(part) > 0).all() for part in parts)


def test_dirichlet_shares_vary_as_the_distribution_says():
    # Var of a share: (1/K)(1 - 1/K)/(K alpha + 1) of the Dirichlet, plus E[q(1 - q)]/n of drawing n examples.
    # The first quarter of the clients draws before any label runs out.
    labels, n, alpha = np.repeat(np.arange(10), 4000), 50, 0.5
    shares = np.array([counts(labels, part) / n for part in dirichlet(labels, 800, alpha, seed=0)[:200]])
    variance = 0.09 / (10 * alpha + 1)
    assert shares.var() == pytest.approx(variance + (0.09 - variance) / n, rel=0.1)
    assert shares.mean(axis=0) == pytest.approx(np.full(10, 0.1), abs=0.03)


def test_client_whose_labels_have_run_out_takes_what_is_left():
    taken = _draw(3, np.array([1.0, 0.0, 0.0]), np.array([1, 2, 0]), np.random.RandomState(0))
    assert taken.tolist() == [1, 2, 0]


def test_partitions_depend_on_the_seed_alone():
    for partition in (
        lambda seed: np.concatenate(dirichlet(LABELS, 10, 0.5, seed)),
        lambda seed: np.concatenate(equal_labels(LABELS, 3, 2, seed)),
        lambda seed: stratified(LABELS, 100, seed),
    ):
        np.random.seed(int(partition(0)[0]))  # the global stream has no say
        np.testing.assert_array_equal(partition(0), partition(0))
        assert not np.array_equal(partition(0), partition(1))


def test_equal_labels_gives_the_same_number_of_every_label_and_no_example_twice():
    parts = equal_labels(LABELS, 3, 4, seed=0)
    assert [counts(LABELS, part).tolist() for part in parts] == [[4] * 10] * 3
    assert len(np.unique(np.concatenate(parts))) == 120


def test_equal_labels_names_the_label_that_has_too_few():
    rarest = counts(LABELS, slice(None))[0]
    with pytest.raises(UserError, match=f"label 0 has {rarest} examples.*--per-label"):
        equal_labels(LABELS, 1, int(rarest) + 1, seed=0)
    assert len(equal_labels(LABELS, 1, int(rarest), seed=0)) == 1


@pytest.mark.parametrize("count", [0, 1, 13, 360, 997])
def test_stratified_keeps_the_share_of_every_label(count):
    drawn = stratified(LABELS, count, seed=0)
    assert len(np.unique(drawn)) == count
    shares = counts(LABELS, slice(None)) * count / len(LABELS)
    assert (np.abs(counts(LABELS, drawn) - shares) < 1).all()


def test_partitions_refuse_the_impossible():
    for call in (lambda: dirichlet(LABELS, 0, 0.5, 0), lambda: dirichlet(LABELS, 3, 0.0, 0)):
        with pytest.raises(UserError):
            call()
    with pytest.raises(UserError, match="998 of 997"):
        stratified(LABELS, 998, 0)


# ---- digits


def test_digits_are_made_again_as_they_are_shipped(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn brings the digits' file (extra prep)")
    assert main(["digits", "--out", str(tmp_path / "digits")]) == 0
    made, shipped = Dataset(tmp_path / "digits"), Dataset(embedded("digits"))
    assert made.digest == shipped.digest
    made.close()
    shipped.close()


def test_shipped_digits_are_the_source_each_image_once():
    sklearn = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the digits' file (extra prep)")
    source = sklearn.load_digits()
    train, test = read(embedded("digits"))
    rows = [np.column_stack([c["x"].reshape(len(c["x"]), 64), c["y"]]) for c in [*train, test]]
    expected = np.column_stack([source.data, source.target])
    assert sorted(map(tuple, np.concatenate(rows).tolist())) == sorted(map(tuple, expected.tolist()))
    assert {len(columns["y"]) for columns in train} == {14, 15}
    shares = np.bincount(source.target) * 360 / 1797
    assert (np.abs(np.bincount(test["y"]) - shares) < 1).all()


def test_digits_without_scikit_learn_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["digits", "--out", str(tmp_path / "d")]) == 2
    assert 'pip install -e ".[prep]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- MNIST


def idx(values):
    values = np.asarray(values, np.uint8)
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def images(count, seed):
    return np.random.RandomState(seed).randint(0, 256, (count, 28, 28))


TRAIN, TEST = (images(60, 0), np.arange(60) % 10), (images(20, 1), np.arange(20) % 10)


@pytest.fixture
def source(tmp_path):
    """The four files at a small size: images plain, labels gzipped."""
    folder = tmp_path / "source"
    folder.mkdir()
    for part, (pixels, labels) in (("train", TRAIN), ("t10k", TEST)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def mnist(source, out, *options):
    return main(["mnist", "--source", str(source), "--out", str(out), *options])


def test_mnist_images_keep_their_labels(source, tmp_path, capsys):
    assert mnist(source, tmp_path / "out", "--clients", "2", "--per-label", "3") == 0
    train, test = read(tmp_path / "out")
    assert [np.bincount(columns["y"]).tolist() for columns in train] == [[3] * 10] * 2
    label_of = {pixels.tobytes(): label for pixels, label in zip(TRAIN[0].astype("u1"), TRAIN[1])}
    pairs = [(x.tobytes(), y) for columns in train for x, y in zip(columns["x"], columns["y"])]
    assert len({pixels for pixels, _ in pairs}) == 60
    assert all(label_of[pixels] == label for pixels, label in pairs)
    np.testing.assert_array_equal(test["x"], TEST[0])
    np.testing.assert_array_equal(test["y"], TEST[1])
    dataset = Dataset(tmp_path / "out")
    assert dataset.features["x"] == Feature("uint8", (28, 28), mean=0.0, std=255.0)
    assert dataset.features["y"] == Feature("uint8", (), classes=10)
    assert dataset.client_id("train", 1) == "client-001"
    assert "--clients 2 --per-label 3 --seed 0" in dataset.provenance["command"]
    assert str(tmp_path) not in str(dataset.provenance)
    dataset.close()
    printed = capsys.readouterr().out
    assert str(tmp_path / "out") in printed
    assert "60 examples, 2 clients; size min 30, median 30, max 30; labels per client min 10" in printed


def test_mnist_is_the_same_whether_gzipped_or_named_with_a_dot(source, tmp_path):
    (source / "train-images-idx3-ubyte").rename(source / "train-images.idx3-ubyte")
    for name in ("train", "t10k"):
        packed = source / f"{name}-labels-idx1-ubyte.gz"
        (source / f"{name}-labels-idx1-ubyte").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert mnist(source, tmp_path / "out", "--clients", "1", "--per-label", "6") == 0
    np.testing.assert_array_equal(read(tmp_path / "out")[0][0]["x"], TRAIN[0])


IMAGES, LABEL_FILE = "train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"
BAD_FILES = {
    "truncated": (IMAGES, idx(TRAIN[0])[:-1], "says 47040 bytes of data, it has 47039"),
    "trailing bytes": (IMAGES, idx(TRAIN[0]) + b"\0", "says 47040 bytes of data, it has 47041"),
    "header cut": (IMAGES, idx(TRAIN[0])[:10], "fetch it again"),
    "empty": (IMAGES, b"", "starts with nothing"),
    "labels for images": (IMAGES, idx(TRAIN[1]), "starts with 00000801 where IDX has 00000803"),
    "floats": (IMAGES, b"\0\0\x0d\3" + idx(TRAIN[0])[4:], "starts with 00000d03"),
    "web page": (IMAGES, b"<html>404</html>", "starts with 3c68746d"),
    "truncated gzip": (LABEL_FILE, gzip.compress(idx(TRAIN[1]))[:-9], "gzip"),
    "damaged gzip": (LABEL_FILE, b"\x1f\x8b" + b"\xff" * 30, "gzip"),
    "fewer labels": (LABEL_FILE, idx(TRAIN[1][:-1]), "59 labels, but train-images-idx3-ubyte has 60"),
    "label out of range": (LABEL_FILE, idx([*TRAIN[1][:-1], 10]), "label 59 is 10"),
    "other size": (IMAGES, idx(np.zeros((60, 32, 32))), r"(32, 32) pixels"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_idx_file_is_refused_by_name(source, tmp_path, capsys, case):
    name, content, problem = BAD_FILES[case]
    (source / name).write_bytes(content)
    assert mnist(source, tmp_path / "out", "--clients", "1", "--per-label", "1") == 2
    printed = capsys.readouterr().err
    assert f"{source / name}: " in printed and problem in printed and printed.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_missing_file_is_named_with_where_to_fetch_it(source, tmp_path, capsys):
    (source / "t10k-labels-idx1-ubyte.gz").unlink()
    assert mnist(source, tmp_path / "out", "--clients", "1", "--per-label", "1") == 2
    printed = capsys.readouterr().err
    assert "t10k-labels-idx1-ubyte.gz" in printed and "fetch https://" in printed
    assert mnist(tmp_path / "nowhere", tmp_path / "out") == 2
    assert f"there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["mnits"], "did you mean 'mnist'"),
        ([], "required: NAME"),
        (["digits"], "required: --out"),
        (["digits", "--out", "{out}", "--clients", "3"], "unrecognized arguments: --clients 3"),
        (["mnist", "--out", "{out}"], "required: --source"),
        (["mnist", "--out", "{out}", "--source", "{source}", "--clients", "many"], "--clients: invalid int"),
        (["mnist", "--out", "{out}", "--source", "{source}", "--clients", "0"], "must be at least 1"),
        (["mnist", "--out", "{out}", "--source", "{source}", "--seed", "-1"], "the seed 0 to"),
        (
            ["mnist", "--out", "{out}", "--source", "{source}", "--per-label", "7"],
            "lower --clients or --per-label",
        ),
        (["mnist", "--out", "{out}", "--sour", "{source}"], "required: --source"),
        (["mnist", "--out", "{source}", "--source", "{source}"], "choose another --out"),
    ],
)
def test_mistakes_are_one_line_and_status_2(source, tmp_path, capsys, arguments, problem):
    filled = [word.format(out=tmp_path / "out", source=source) for word in arguments]
    try:
        status = main(filled)
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr().err
    assert status == 2 and problem in printed and printed.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_help_lists_what_to_put_where(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    for text in ("digits", "mnist", "train-images-idx3-ubyte.gz", "--source", '".[prep]"'):
        assert text in printed


def test_the_command_itself_exits_with_the_status():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "data_prep", "digits", "--out", str(root)]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "choose another --out" in ended.stderr and "Traceback" not in ended.stderr


# ---- real data


def test_real_mnist_is_shared_out_equally(tmp_path):
    real = os.environ.get("MPIFL_REAL_DATA")
    if not real:
        pytest.skip("MPIFL_REAL_DATA names no folder of real data (mnist/ in it)")
    assert mnist(Path(real) / "mnist", tmp_path / "mnist") == 0
    train, test = read(tmp_path / "mnist")
    assert len(train) == 100
    assert all(np.bincount(columns["y"]).tolist() == [45] * 10 for columns in train)
    assert test["x"].shape == (10000, 28, 28)
    assert np.bincount(test["y"]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert len({image.tobytes() for columns in train for image in columns["x"]}) == 45000
