"""MNIST, EMNIST, CIFAR and images into datasets: files of the published layouts, and real ones by MPIFL_REAL_DATA."""

import gzip
import os
import pickle
import shutil
import sys
from pathlib import Path

import corpora_files as files
import numpy as np
import pytest
from prepared import central, clients, joined, pairs, prepare, refused, the

from data_prep import archive, cifar10, cifar100, conversion, emnist, images, mnist
from data_prep.__main__ import main
from mpifl.config import UserError
from mpifl.data.shard import Dataset, Feature

pytestmark = pytest.mark.usefixtures("no_picture")
REAL = os.environ.get("MPIFL_REAL_DATA")


# ---- MNIST and EMNIST


@pytest.fixture
def digits(tmp_path):
    return files.write_mnist(tmp_path / "mnist")


def test_mnist_images_keep_their_labels(digits):
    made = prepare(mnist, digits, "--clients", 2, "--per-label", 3)
    found = clients(made)
    assert list(found) == ["client-000", "client-001"]
    assert [np.bincount(columns["y"]).tolist() for columns in found.values()] == [[3] * 10] * 2
    assert pairs(joined(found)) == pairs(dict(zip("xy", files.MNIST_TRAIN)))
    test = central(made)
    np.testing.assert_array_equal(test["x"], files.MNIST_TEST[0])
    np.testing.assert_array_equal(test["y"], files.MNIST_TEST[1])
    assert made.features["x"] == Feature("uint8", (28, 28), mean=0.0, std=255.0)
    assert made.features["y"] == Feature("uint8", (), classes=10)


def test_mnist_is_shared_out_as_the_job_wants_it_unless_told_otherwise(tmp_path):
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 4700))
    folder = tmp_path / "large"
    folder.mkdir()
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(files.idx(np.zeros((len(labels), 28, 28))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(files.idx(labels))
    made = prepare(mnist, folder)
    owned = [where for piece in the(made, "train").pieces for _, where in piece]
    assert [np.bincount(labels[rows]).tolist() for rows in owned] == [[45] * 10] * 100
    assert "equal-labels" in made.provenance["made"]
    np.testing.assert_array_equal(central(made)["y"], labels)
    iid = prepare(mnist, folder, "--partition", "iid", "--clients", 10)
    assert the(iid, "train").clients == 10 and "iid" in iid.provenance["made"]


def test_mnist_is_the_same_whether_gzipped_or_named_with_a_dot(digits):
    before = pairs(joined(clients(prepare(mnist, digits, "--clients", 1, "--per-label", 6))))
    (digits / "train-images-idx3-ubyte").rename(digits / "train-images.idx3-ubyte")
    for name in ("train", "t10k"):
        packed = digits / f"{name}-labels-idx1-ubyte.gz"
        (digits / f"{name}-labels-idx1-ubyte").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert pairs(joined(clients(prepare(mnist, digits, "--clients", 1, "--per-label", 6)))) == before


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"
PIXELS, NUMBERS = files.idx(files.MNIST_TRAIN[0]), files.MNIST_TRAIN[1]
BAD_IDX = {
    "truncated": (IMAGES, PIXELS[:-1], "says 47040 bytes of data, it has 47039"),
    "trailing bytes": (IMAGES, PIXELS + b"\0", "says 47040 bytes of data, it has 47041"),
    "header cut": (IMAGES, PIXELS[:10], "fetch it again"),
    "empty": (IMAGES, b"", "empty file"),
    "labels for images": (IMAGES, files.idx(NUMBERS), "starts with 00000801 where IDX has 00000803"),
    "floats": (IMAGES, b"\0\0\x0d\3" + PIXELS[4:], "starts with 00000d03"),
    "web page": (IMAGES, b"<html>404</html>", "starts with 3c68746d"),
    "truncated gzip": (LABELS, gzip.compress(files.idx(NUMBERS))[:-9], "damaged or empty gzip file"),
    "damaged gzip": (LABELS, b"\x1f\x8b\x08" + b"\xff" * 30, "gzip"),
    "fewer labels": (LABELS, files.idx(NUMBERS[:-1]), "59 labels, but train-images-idx3-ubyte has 60"),
    "label out of range": (LABELS, files.idx([*NUMBERS[:-1], 10]), "label 59 is 10, it must be 0 to 9"),
    "other size": (IMAGES, files.idx(np.zeros((60, 32, 32))), "(32, 32) pixels"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_file_is_refused_by_name(digits, case):
    name, content, problem = BAD_IDX[case]
    (digits / name).write_bytes(content)
    said = refused(mnist, digits, "--clients", 1, "--per-label", 1)
    assert f"{digits / name}: " in said and problem in said


def test_missing_idx_file_is_named_with_where_to_fetch_it(digits, tmp_path):
    (digits / "t10k-labels-idx1-ubyte.gz").unlink()
    said = refused(mnist, digits, "--per-label", 1, "--clients", 1)
    assert "t10k-labels-idx1-ubyte.gz" in said and "fetch it from https://" in said
    assert f"there is no folder {tmp_path / 'nowhere'}" in refused(mnist, tmp_path / "nowhere")
    (tmp_path / "mnist.zip").touch()
    assert f"{tmp_path / 'mnist.zip'} is a file; --source is the folder" in refused(mnist, tmp_path / "mnist.zip")


def test_emnist_is_upright_and_its_labels_have_their_names(tmp_path):
    upright = np.zeros((26, 28, 28))
    upright[:, 3, :] = np.arange(28)  # a row, from left to right
    folder = files.write_emnist(tmp_path / "emnist", "letters", upright, range(1, 27))
    made = prepare(emnist, folder, "--part", "letters", "--clients", 2)
    test = central(made)
    np.testing.assert_array_equal(test["x"], upright)
    assert [made.features["y"].names[label] for label in test["y"]] == list("abcdefghijklmnopqrstuvwxyz")
    assert pairs(joined(clients(made))) == pairs(test)
    assert "label 0 is 1, it must be 0 to 9" not in refused(emnist, folder, "--part", "digits")  # no such files
    files.write_emnist(folder, "digits", upright, range(1, 27))
    assert "label 9 is 10, it must be 0 to 9" in refused(emnist, folder, "--part", "digits")


MERGED = {0: 48, 10: 65, 35: 90, 36: 97, 38: 100, 43: 110, 44: 113, 45: 114, 46: 116}
MAPPINGS = {  # some lines of the published emnist-*-mapping.txt: label, ASCII code
    "byclass": {0: 48, 9: 57, 10: 65, 35: 90, 36: 97, 61: 122},
    "bymerge": MERGED,
    "balanced": MERGED,
    "mnist": {0: 48, 9: 57},
}


@pytest.mark.parametrize("part", MAPPINGS)
def test_emnist_labels_have_their_published_names(tmp_path, part):
    count = max(MAPPINGS[part]) + 1
    folder = files.write_emnist(tmp_path / "emnist", part, np.zeros((count, 28, 28)), range(count))
    feature = prepare(emnist, folder, "--part", part, "--clients", 1).features["y"]
    assert feature.classes == count
    assert {label: ord(feature.names[label]) for label in MAPPINGS[part]} == MAPPINGS[part]


# ---- CIFAR


CIFAR = {"cifar10": (cifar10, files.cifar10_files), "cifar100": (cifar100, files.cifar100_files)}


def known_pixels(x):
    """Whether the first three images are those whose pixels say their channel, row and column."""
    channel, row, column = np.indices((3, 32, 32))
    return all((image == place).all() for image, place in zip(x, (channel, row, column)))


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("edition", CIFAR)
def test_cifar_pixels_are_where_they_belong(tmp_path, edition, version):
    # One client has all rows in their order: pixel [channel, row, column] of plane-ordered rows.
    converter, written = CIFAR[edition]
    made = prepare(converter, files.write_files(tmp_path / "in", written(version)), "--clients", 1)
    train, test = clients(made)["client-000"], central(made)
    assert made.features["x"].shape == (3, 32, 32) and made.standardize == "x"
    assert known_pixels(train["x"])
    rows = [files.cifar_row(number) for number in range(len(train["y"]) + len(test["y"]))]
    assert [x.tobytes() for x in np.concatenate([train["x"], test["x"]])] == rows
    numbers = np.arange(len(rows))
    labels, names = (
        (numbers % 10, files.CIFAR10_NAMES) if edition == "cifar10" else (7 * numbers % 100, files.FINE_NAMES)
    )
    assert np.concatenate([train["y"], test["y"]]).tolist() == labels.tolist()
    assert list(made.features["y"].names) == names


@pytest.mark.parametrize("version", ["python", "binary"])
def test_cifar100_can_take_the_coarse_labels(tmp_path, version):
    made = prepare(
        cifar100, files.write_files(tmp_path / "in", files.cifar100_files(version)), "--coarse", "--clients", 1
    )
    assert central(made)["y"].tolist() == [number % 20 for number in range(12, 24)]
    assert list(made.features["y"].names) == files.COARSE_NAMES


@pytest.mark.parametrize("version", ["python", "binary"])
def test_cifar_archive_is_read_without_unpacking(tmp_path, version):
    written = files.cifar10_files(version)
    (tmp_path / "a.tar.gz").write_bytes(files.tar({f"cifar-10/{n}": c for n, c in written.items()}, "gz"))
    folder = files.write_files(tmp_path / "in" / "cifar-10", written).parent
    from_tar, from_folder = (prepare(cifar10, source, "--clients", 3) for source in (tmp_path / "a.tar.gz", folder))
    assert pairs(central(from_tar)) == pairs(central(from_folder))
    for one, other in zip(clients(from_tar).values(), clients(from_folder).values()):
        np.testing.assert_array_equal(one["x"], other["x"])


def test_cifar_pickled_again_by_python_3_reads_the_same(tmp_path):
    written = files.cifar10_files("python")
    before = central(prepare(cifar10, files.write_files(tmp_path / "old", written), "--clients", 1))
    rows = np.frombuffer(b"".join(map(files.cifar_row, range(20, 24))), np.uint8).reshape(4, 3072)
    for protocol in (2, 4):
        again = {"data": rows, "labels": [number % 10 for number in range(20, 24)]}
        folder = files.write_files(tmp_path / f"new{protocol}", written | {"test_batch": pickle.dumps(again, protocol)})
        assert pairs(central(prepare(cifar10, folder, "--clients", 1))) == pairs(before)


class Malice:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.mkdir, np.fromfile, eval, getattr])
def test_a_pickle_that_would_run_something_runs_nothing(tmp_path, function, protocol):
    witness = tmp_path / "witness"
    argument = f"__import__('os').mkdir({str(witness)!r})" if function is eval else str(witness)
    arguments = (argument, "x") if function is getattr else (argument,)
    bomb = {"data": Malice(function, *arguments), "labels": [1]}
    written = files.cifar10_files("python") | {"data_batch_3": pickle.dumps(bomb, protocol)}
    said = refused(cifar10, files.write_files(tmp_path / "in", written))
    assert "data_batch_3" in said and "asks for" in said and not witness.exists()


CIFAR_TEST = files.python2_pickle({"labels": [1], "data": [files.cifar_row(0)]})
BAD_CIFAR = {
    "cut pickle": ("python", "test_batch", CIFAR_TEST[:-100], "truncated"),
    "no pickle": ("python", "test_batch", b"<html>404</html>", "test_batch"),
    "not a dict": ("python", "test_batch", pickle.dumps([1]), "has no 'data'"),
    "no labels": ("python", "test_batch", files.python2_pickle({"data": [files.cifar_row(0)]}), "no 'labels'"),
    "fewer labels": ("python", "test_batch", CIFAR_TEST.replace(b"M\x01\x00", b"", 1), "0 labels"),
    "label too large": ("python", "test_batch", CIFAR_TEST.replace(b"M\x01\x00", b"M\x0a\x00", 1), "label 0 is 10"),
    "cut rows": ("binary", "test_batch.bin", bytes(3073 + 3072), "6145 bytes, not rows of 3073"),
    "empty": ("binary", "test_batch.bin", b"", "empty"),
    "binary label": ("binary", "test_batch.bin", bytes(3073) + b"\x0a" + bytes(3072), "label 1 is 10"),
    "names": ("binary", "batches.meta.txt", b"cat\ndog\n", "2 names of classes"),
}


@pytest.mark.parametrize("case", BAD_CIFAR)
def test_bad_cifar_file_is_refused_by_name(tmp_path, case):
    version, name, content, problem = BAD_CIFAR[case]
    folder = files.write_files(tmp_path / "in", files.cifar10_files(version) | {name: content})
    said = refused(cifar10, folder)
    assert str(folder) in said and problem in said


def test_missing_cifar_says_which_archive_to_fetch(tmp_path):
    assert "cifar-10-binary.tar.gz" in refused(cifar10, tmp_path / "nowhere")
    folder = files.write_files(tmp_path / "in", files.cifar10_files("binary"))
    (folder / "data_batch_4.bin").unlink()
    said = refused(cifar10, folder)
    assert "converter images" not in said
    assert "has no data_batch_4" in said and "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in said


# ---- images


def pictures(colour=True):
    """{path: pixels} of two splits with classes cat and dog, each image of its own."""
    random = np.random.RandomState(5)
    shape = (4, 5, 3) if colour else (4, 5)
    names = [
        "train/dog/1.png",
        "train/cat/1.png",
        "train/cat/2.png",
        "train/dog/0.png",
        "test/dog/7.png",
        "test/cat/7.png",
    ]
    return {name: random.randint(0, 256, shape).astype(np.uint8) for name in names}


def as_files(pixels):
    return {name: files.image(image) for name, image in pixels.items()}


@pytest.mark.parametrize("compression", ["folder", "", "gz", "bz2", "xz"])
@pytest.mark.parametrize("colour", [True, False])
def test_images_of_a_folder_or_a_tar_keep_their_pixels_and_classes(tmp_path, compression, colour):
    pixels = pictures(colour)
    if compression == "folder":
        source = files.write_files(tmp_path / "in", as_files(pixels))
    else:
        source = tmp_path / f"in.tar.{compression}"
        source.write_bytes(
            files.tar({f"./pets/{name}": content for name, content in as_files(pixels).items()}, compression)
        )
    made = prepare(images, source, "--clients", 2)
    first = (lambda image: np.moveaxis(image, -1, 0)) if colour else (lambda image: image)
    for split, found in (("train", joined(clients(made))), ("test", central(made))):
        expected = [(first(image).tobytes(), int("dog" in name)) for name, image in pixels.items() if split in name]
        assert pairs(found) == sorted(expected)
    assert made.features["x"].shape == ((3, 4, 5) if colour else (4, 5))
    assert made.features["y"].names == ("cat", "dog") and made.standardize == "x"
    assert {len(columns["y"]) for columns in clients(made).values()} == {2}


def test_a_folder_of_classes_alone_is_all_for_training(tmp_path):
    shades = {f"{name}/1.png": np.full((2, 2), shade) for shade, name in enumerate("abcdefg")}
    made = prepare(images, files.write_files(tmp_path / "in", as_files(shades)), "--clients", 1)
    assert [split.name for split in made.splits] == ["train"]
    assert made.features["y"].names == tuple("abcdefg")
    found = clients(made)["client-000"]
    assert found["x"][:, 0, 0].tolist() == found["y"].tolist() == list(range(7))


def test_what_clients_hold_out_is_test_and_the_folder_test_is_central_test(tmp_path):
    source = files.write_files(tmp_path / "in", as_files(pictures()))
    made = prepare(images, source, "--clients", 2, "--hold-out", 0.5)
    train, test = clients(made), clients(made, "test")
    assert list(train) == list(test)
    expected = pairs(joined(clients(prepare(images, source, "--clients", 1))))
    assert sorted(pairs(joined(train)) + pairs(joined(test))) == expected
    assert len(central(made, "central_test")["y"]) == 2


def test_images_are_resized_bilinearly_when_asked(tmp_path):
    ramp = np.repeat(np.arange(0, 200, 50)[:, None], 4, axis=1)  # 4 x 4: each row one shade
    written = {"a/1.png": files.image(ramp), "a/2.png": files.image(np.full((9, 3), 7))}
    made = prepare(images, files.write_files(tmp_path / "in", written), "--clients", 1, "--size", 2, 3)
    x = clients(made)["client-000"]["x"]
    assert x.shape == (2, 2, 3)
    # Half the height: a triangle of weights 3, 3, 1 and 1, 3, 3 over rows of 0, 50, 100, 150.
    assert x[0].tolist() == [[36] * 3, [114] * 3]
    assert (x[1] == 7).all()


def test_images_become_grey_or_coloured_when_asked(tmp_path):
    grey, red = np.full((2, 2), 100), np.full((2, 2, 3), [255, 0, 0])
    source = files.write_files(tmp_path / "in", {"a/1.png": files.image(grey), "a/2.png": files.image(red)})
    coloured = clients(prepare(images, source, "--clients", 1, "--colour", "rgb"))["client-000"]["x"]
    assert coloured[:, :, 0, 0].tolist() == [[100, 100, 100], [255, 0, 0]]
    greyed = clients(prepare(images, source, "--clients", 1, "--colour", "grey"))["client-000"]["x"]
    assert greyed[:, 0, 0].tolist() == [100, 76]  # ITU-R 601: 0.299 of red
    assert "a/2.png: is in colour, the first image is grey; choose with --colour" in refused(images, source)


GOOD = files.image(np.zeros((4, 4, 3)))
BAD_IMAGES = {
    "cut": ({"train/b/x.jpg": files.image(np.zeros((4, 4, 3)), "jpeg")[:-20]}, "b/x.jpg: cannot be decoded"),
    "no image": ({"train/b/x.jpg": b"<html>404</html>"}, "b/x.jpg: cannot be decoded"),
    "empty": ({"train/b/x.jpg": b""}, "b/x.jpg: cannot be decoded"),
    "other size": (
        {"train/b/x.png": files.image(np.zeros((4, 5, 3)))},
        "b/x.png: is 4 x 5 pixels, the first image 4 x 4",
    ),
    "in the root": ({"x.png": GOOD}, " x.png is not in a folder train/CLASS/"),
    "too deep": ({"train/b/c/x.png": GOOD}, " train/b/c/x.png is not in a folder train/CLASS/"),
    "no split": ({"b/x.png": GOOD}, " b/x.png is not in a folder train/CLASS/"),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_is_refused_by_name(tmp_path, case, packed):
    written, problem = BAD_IMAGES[case]
    written = {"train/a/1.png": GOOD} | written
    source = tmp_path / "in"
    source.write_bytes(files.tar(written, "gz")) if packed else files.write_files(source, written)
    said = refused(images, source, "--clients", 1)
    assert str(source) in said and problem in said


def test_tar_that_was_cut_is_refused_wherever_it_was_cut(tmp_path):
    whole = files.tar({f"train/a/{number}.png": GOOD for number in range(3)})
    end = whole.rindex(GOOD) + 512 * -(-len(GOOD) // 512)
    assert whole[end:] == bytes(len(whole) - end)
    for number, cut in enumerate([end, end - 1, end - 512, end - 1024, 512 + 100, 100]):
        (tmp_path / f"{number}.tar").write_bytes(whole[:cut])
        said = refused(images, tmp_path / f"{number}.tar", "--clients", 1)
        assert "damaged" in said and f"{number}.tar" in said
    packed = gzip.compress(whole)
    for number, broken in enumerate([packed[:-9], packed[:50], packed[:30] + b"zz" + packed[32:]]):
        (tmp_path / f"{number}.tar.gz").write_bytes(broken)
        assert "gzip file" in refused(images, tmp_path / f"{number}.tar.gz", "--clients", 1)


def test_tar_may_hold_what_is_no_image_but_no_link_and_no_image_twice(tmp_path):
    written = {"train/a/1.png": GOOD, "train/a/._1.png": b"macOS", "README.md": b"text"}
    (tmp_path / "a.tar").write_bytes(files.tar(written))
    assert len(clients(prepare(images, tmp_path / "a.tar", "--clients", 1))["client-000"]["y"]) == 1
    (tmp_path / "b.tar").write_bytes(files.tar({"train/a/1.png": GOOD, "./train/a/1.png": GOOD}))
    assert "train/a/1.png is in it twice" in refused(images, tmp_path / "b.tar")
    (tmp_path / "c.tar").write_bytes(files.tar({"train/a/1.png": GOOD}, links={"train/a/2.png": "train/a/1.png"}))
    assert "train/a/2.png is a link" in refused(images, tmp_path / "c.tar")


def test_no_images_at_all_say_what_must_be_there(tmp_path):
    source = files.write_files(tmp_path / "in", {"train/a/1.txt": b""})
    assert "holds no images" in (said := refused(images, source)) and "name the tar" not in said
    (source / "pets.tar.gz").touch()
    assert f"or name the tar in it: --source {source / 'pets.tar.gz'}" in refused(images, source)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_of_single_images_is_told_of_the_other_converter(tmp_path, packed):
    source = files.write_files(tmp_path / "in", {"train/cat/1.JPG": b""})
    if packed:
        source = tmp_path / "in.tar.gz"
        source.write_bytes(files.tar({"train/cat/1.JPG": b""}, "gz"))
    said = refused(cifar10, source)
    assert "has no data_batch_1; fetch" in said and "it holds images, which converter images reads" in said
    assert "train/CLASS/NAME.jpg" in refused(images, tmp_path / "nowhere")
    assert "--size 0 3: both must be at least 1" in refused(images, tmp_path / "in", "--size", 0, 3)


def test_what_the_system_will_not_read_is_refused_by_name(tmp_path, monkeypatch):
    source = files.write_files(tmp_path / "in", {"train/a/1.png": GOOD, "train/b/1.png": GOOD})
    (source / "train/a/2.png").symlink_to("nowhere")
    assert "train/a/2.png: cannot be read (No such file or directory)" in refused(images, source, "--clients", 1)
    (source / "train/a/2.png").unlink()
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("train/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert refused(images, source) == f"{source / 'train/b'} cannot be read: Permission denied"
    assert f"{source / 'nowhere.tar'} cannot be read: No such file" in refused_content(source / "nowhere.tar")


def refused_content(path):
    with pytest.raises(UserError) as caught:
        archive.content(path)
    return str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux how much memory is in use")
def test_a_tar_takes_no_memory_for_what_was_read_of_it(tmp_path):
    def resident():
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssFile" in line]
        return int(line.split()[1]) << 10

    image = b"P5 2000 2000 255\n" + bytes(4_000_000)
    (tmp_path / "a.tar").write_bytes(files.tar({f"train/a/{number}.pgm": image for number in range(12)}))
    made = prepare(images, tmp_path / "a.tar", "--clients", 12)
    split, before = the(made, "train"), resident()
    for piece in split.pieces:
        for _ in split.read(piece):
            assert resident() - before < 12_000_000  # of 48


def test_names_of_splits_are_refused_before_anything_is_read(tmp_path):
    source = files.write_files(tmp_path / "in", {"train/a/1.png": GOOD, "train/a/2.png": GOOD, "val-1/a/1.png": GOOD})
    assert "'val-1' cannot name a split" in refused(images, source, "--clients", 1)
    (source / "val-1").rename(source / "test")
    shutil.copytree(source / "test", source / "central_test")
    assert [split.name for split in prepare(images, source, "--clients", 1).splits] == ["train", "central_test", "test"]
    said = refused(images, source, "--clients", 1, "--hold-out", 0.5)  # "test" becomes central_test too
    assert "two splits would be named 'central_test'" in said


def test_unpacking_on_a_full_disk_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.tar.gz").write_bytes(files.tar({"train/a/1.png": GOOD}, "gz"))
    full = open("/dev/full", "w+b", buffering=0)  # noqa: SIM115 - closed by who is given it
    monkeypatch.setattr(archive.tempfile, "TemporaryFile", lambda: full)
    said = refused(images, tmp_path / "a.tar.gz")
    assert "a.tar.gz: No space left on device while it was unpacked" in said and "TMPDIR" in said


def test_without_pillow_images_say_what_to_install(tmp_path, monkeypatch):
    source = files.write_files(tmp_path / "in", {"train/a/1.png": GOOD})
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert 'pip install -e ".[prep]"' in refused(images, source)


# ---- whole conversions


def test_a_tar_is_converted_by_other_processes_as_by_this_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1)  # a piece for each client
    (tmp_path / "in.tar.gz").write_bytes(files.tar(as_files(pictures()), "gz"))
    command = ["images", "--source", str(tmp_path / "in.tar.gz"), "--clients", "2", "--jobs", "2"]
    assert main([*command, "--about", "pets", "--out", str(tmp_path / "out")]) == 0
    made, dataset = prepare(images, tmp_path / "in.tar.gz", "--clients", 2), Dataset(tmp_path / "out")
    for index, (client, columns) in enumerate(clients(made).items()):
        assert dataset.client_id("train", index) == client
        assert pairs(dataset.client("train", index)) == pairs(columns)
    assert pairs(dataset.rows("test", 0, dataset.total("test"))) == pairs(central(made))
    pixels = np.stack([image for name, image in pictures().items() if "train" in name])
    assert dataset.features["x"].mean == pytest.approx(pixels.mean(axis=(0, 1, 2)))
    assert dataset.features["x"].std == pytest.approx(pixels.std(axis=(0, 1, 2)))
    assert dataset.provenance["source"] == "pets" and "2 clients, iid" in dataset.provenance["made"]
    dataset.close()


# ---- real data


@pytest.mark.skipif(not REAL, reason="MPIFL_REAL_DATA names no folder of real data (mnist/ in it)")
def test_real_mnist_is_shared_out_equally():
    made = prepare(mnist, Path(REAL) / "mnist")
    train, test = clients(made), central(made)
    assert len(train) == 100
    assert all(np.bincount(columns["y"]).tolist() == [45] * 10 for columns in train.values())
    assert test["x"].shape == (10000, 28, 28)
    assert np.bincount(test["y"]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert len({image.tobytes() for columns in train.values() for image in columns["x"]}) == 45000


@pytest.mark.skipif(not REAL, reason="MPIFL_REAL_DATA names no folder of real data (cifar10_jpeg/ in it)")
def test_real_cifar10_images_have_the_published_channel_means():
    # 0.4914, 0.4822, 0.4465 of 255 over all of CIFAR-10's training images; here 12 clients of 50, drawn iid.
    made = prepare(images, Path(REAL) / "cifar10_jpeg" / "cifar10_jpeg.tar.gz", "--clients", 1000)
    split = the(made, "train")
    assert (split.clients, sum(map(len, split.pieces)), made.features["y"].names[0]) == (1000, 1000, "airplane")
    assert sum(map(len, the(made, "test").pieces)) == 10000
    x = np.concatenate([columns["x"] for _, columns in split.read(split.pieces[0][:12])])
    assert x.shape == (600, 3, 32, 32)
    assert x.mean(axis=(0, 2, 3)) / 255 == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.02)
