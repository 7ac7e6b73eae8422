"""Small files of published layouts, written by hand: IDX, CIFAR, folders and tars of images, tables, saved datasets."""

import csv
import gzip
import io
import json
import struct
import tarfile

import numpy as np

# ---- IDX (MNIST, EMNIST)


def idx(values):
    """An IDX file: magic 0 0 8 (unsigned bytes) dimensions, sides as big-endian uint32, bytes in C order."""
    values = np.asarray(values, np.uint8)
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def random_images(count, seed):
    return np.random.RandomState(seed).randint(0, 256, (count, 28, 28)).astype(np.uint8)


MNIST_TRAIN = random_images(60, 0), np.arange(60) % 10
MNIST_TEST = random_images(20, 1), np.arange(20) % 10


def write_mnist(folder):
    """The four files at a small size: images plain, labels gzipped."""
    folder.mkdir()
    for part, (pixels, labels) in (("train", MNIST_TRAIN), ("t10k", MNIST_TEST)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def write_emnist(folder, part, images, labels):
    """Four files of one part, gzipped, the same examples for training and test; images lie on their side."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        sideways = [list(zip(*image)) for image in np.asarray(images).tolist()]
        (folder / f"emnist-{part}-{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(sideways)))
        (folder / f"emnist-{part}-{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


# ---- CIFAR

KNOWN_ROWS = [  # 1024 red, 1024 green, 1024 blue, row by row: each image's pixels say their own channel, row or column
    bytes(channel for channel in range(3) for row in range(32) for column in range(32)),
    bytes(row for channel in range(3) for row in range(32) for column in range(32)),
    bytes(column for channel in range(3) for row in range(32) for column in range(32)),
]
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE_NAMES = [f"fine_{number}" for number in range(100)]
COARSE_NAMES = [f"coarse_{number}" for number in range(20)]


def cifar_row(number):
    """Pixels of example `number`: the three known images first, then noise."""
    if number < len(KNOWN_ROWS):
        return KNOWN_ROWS[number]
    return np.random.RandomState(number).randint(0, 256, 3072).astype(np.uint8).tobytes()


def python2_pickle(entries):
    """A dict of text to lists of ints, lists of text, or an array of (rows, 3072) bytes, as Python 2.7 pickles it.

    Opcodes of protocol 2: U and T are the 8-bit strings that Python 3 has no way to write; the array is what NumPy
    gave: numpy.core.multiarray._reconstruct(ndarray, (0,), 'b'), then the state (1, shape, dtype, False, bytes).
    """
    return b"\x80\x02" + b"}(" + b"".join(_string(key) + _value(value) for key, value in entries.items()) + b"u."


def _value(value):
    if isinstance(value[0], bytes):
        return _array(value)
    items = (struct.pack("<cH", b"M", item) if isinstance(item, int) else _string(item) for item in value)
    return b"](" + b"".join(items) + b"e"


def _string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return (struct.pack("<cB", b"U", len(raw)) if len(raw) < 256 else struct.pack("<cI", b"T", len(raw))) + raw


def _array(rows):
    dtype_state = b"(K\x03" + _string("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    dtype = b"cnumpy\ndtype\n(" + _string("u1") + b"K\x00K\x01tR" + dtype_state
    shape = struct.pack("<cIcH", b"J", len(rows), b"M", 3072) + b"\x86"
    state = b"(K\x01" + shape + dtype + b"\x89" + _string(b"".join(rows)) + b"tb"
    return b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + _string("b") + b"tR" + state


def cifar10_files(version, per_batch=4):
    """{name: bytes} of cifar-10-python or cifar-10-binary; example i, counted through all batches, has label i % 10."""
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    files = {}
    for batch, name in enumerate(names):
        numbers = range(batch * per_batch, (batch + 1) * per_batch)
        labels, rows = [number % 10 for number in numbers], [cifar_row(number) for number in numbers]
        if version == "binary":
            files[f"{name}.bin"] = b"".join(bytes([label]) + row for label, row in zip(labels, rows))
        else:
            files[name] = python2_pickle({"batch_label": [name], "labels": labels, "data": rows, "filenames": [name]})
    if version == "binary":
        files["batches.meta.txt"] = "\n".join([*CIFAR10_NAMES, "", ""]).encode()
    else:
        files["batches.meta"] = python2_pickle({"num_vis": [3072], "label_names": CIFAR10_NAMES})
    return files


def cifar100_files(version, count=12):
    """The same for CIFAR-100: example i has the fine label 7 i % 100 and the coarse label i % 20."""
    files = {}
    for split, first in (("train", 0), ("test", count)):
        numbers = range(first, first + count)
        fine, coarse = [7 * number % 100 for number in numbers], [number % 20 for number in numbers]
        rows = [cifar_row(number) for number in numbers]
        if version == "binary":
            files[f"{split}.bin"] = b"".join(bytes([c, f]) + row for c, f, row in zip(coarse, fine, rows))
        else:
            files[split] = python2_pickle({"fine_labels": fine, "data": rows, "coarse_labels": coarse})
    if version == "binary":
        files["fine_label_names.txt"] = "\n".join(FINE_NAMES).encode()
        files["coarse_label_names.txt"] = "\n".join(COARSE_NAMES).encode()
    else:
        files["meta"] = python2_pickle({"fine_label_names": FINE_NAMES, "coarse_label_names": COARSE_NAMES})
    return files


# ---- folders and tars of files


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def tar(files, compression="", links=None):
    """Bytes of a tar with folders, files and links {name: target}; compression: "", "gz", "bz2" or "xz"."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=f"w:{compression}") as archive:
        for folder in sorted({name.rpartition("/")[0] for name in files} - {""}):
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, linked in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, linked
            archive.addfile(entry)
    return target.getvalue()


def image(pixels, kind="png"):
    """Bytes of an image: (H, W) is grey, (H, W, 3) in colour; PNG keeps every pixel."""
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(target, kind)
    return target.getvalue()


# ---- tables


def csv_bytes(columns, encoding="utf-8"):
    target = io.StringIO(newline="")
    csv.writer(target).writerows([list(columns), *zip(*columns.values())])
    return target.getvalue().encode(encoding)


def parquet(columns, **options):
    import pyarrow
    from pyarrow import parquet as writer

    target = io.BytesIO()
    writer.write_table(pyarrow.table(columns), target, **options)
    return target.getvalue()


def npz(columns, save=np.savez):
    target = io.BytesIO()
    save(target, **columns)
    return target.getvalue()


# ---- Hugging Face

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["a", "bad", "film", "good", "it", "very", "was"]
TOKENS = {word: number for number, word in enumerate(SPECIAL + WORDS)}


def write_tokenizer(folder, pad_token="[PAD]"):
    """tokenizer.json of a word-level tokenizer: [CLS] words, lower case, in the order of TOKENS [SEP]."""
    folder.mkdir()
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False) | {"special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": {
            "strategy": {"Fixed": 3},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [{"id": number, "content": token} | flags for number, token in enumerate(SPECIAL)],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": TOKENS, "unk_token": "[UNK]"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad_token}))
    return folder
