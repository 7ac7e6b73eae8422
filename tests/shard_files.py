"""Datasets in the layout that mpifl/data/format.py publishes, written by plain h5py without the package's code."""

import hashlib
import json
import os
import zlib
from itertools import pairwise

import h5py
import numpy as np

FEATURES = {
    "t": {"classes": 90, "dtype": "uint8", "pad": 0, "shape": [6]},
    "x": {"dtype": "uint8", "mean": 0.0, "shape": [2, 3], "std": 16.0},
    "y": {"classes": 5, "dtype": "int32", "shape": []},
}
SIZES = (4, 0, 3, 1, 0, 6, 2)


def arrays(rows, seed=0):
    """Random columns; sequences of 0 to 6 items, some of which are 0 in the middle."""
    random = np.random.RandomState(seed)
    t = random.randint(0, 90, (rows, 6)).astype("u1") * (random.rand(rows, 6) < 0.8)
    lengths = random.randint(0, 7, rows)
    return {
        "t": np.where(np.arange(6) < lengths[:, None], t, 0).astype("u1"),
        "x": random.randint(0, 256, (rows, 2, 3)).astype("u1"),
        "y": random.randint(0, 5, rows).astype("i4"),
    }


def clients(sizes=SIZES):
    return [(f"c{i}", arrays(rows, seed=i)) for i, rows in enumerate(sizes)]


def concatenated(held):
    return {name: np.concatenate([columns[name] for _, columns in held]) for name in held[0][1]}


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])


def sha256(*tables):
    return hashlib.sha256(b"".join(table.tobytes() for table in tables)).hexdigest()


def stored(rows, pad):
    """The items of rows without the pads at their ends, and how many each has."""
    rows = [row.tolist() for row in rows]
    for row in rows:
        while row and row[-1] == pad:
            row.pop()
    return [item for row in rows for item in row], [len(row) for row in rows]


def tables_of(held):
    """The tables of one shard."""
    names = [name.encode() for name, _ in held]
    tables = {"offsets": np.cumsum([0, *(len(c["y"]) for _, c in held)]).astype("i8"), "ids": np.array(names)}
    for name, values in concatenated(held).items():
        tables[name] = values
        crc32 = [zlib.crc32(columns[name].tobytes()) for _, columns in held]
        if "pad" in FEATURES.get(name, {}):
            parts = [stored(columns[name], FEATURES[name]["pad"]) for _, columns in held]
            tables[name] = np.array([item for items, _ in parts for item in items], values.dtype)
            tables[f"lengths/{name}"] = np.array([n for _, lengths in parts for n in lengths], "u1")
            tables[f"items/{name}"] = np.cumsum([0, *(len(items) for items, _ in parts)]).astype("i8")
            crc32 = [zlib.crc32(np.array(i, values.dtype), zlib.crc32(np.array(n, "u1"))) for i, n in parts]
        tables[f"crc32/{name}"] = np.array(crc32, "u4")
    return tables


def vouched(tables):
    """What a shard's digest is taken of."""
    names = sorted(name.removeprefix("crc32/") for name in tables if name.startswith("crc32/"))
    items = [tables[f"items/{name}"] for name in names if f"items/{name}" in tables]
    return [tables["offsets"], tables["ids"], *items, *(tables[f"crc32/{name}"] for name in names)]


def plant_shard(path, held, alter=None, **storage):
    """Write one shard, its tables first changed by `alter`; returns what the index says of it, and the tables."""
    tables = tables_of(held)
    if alter:
        alter(tables)
    with h5py.File(path, "w") as file:
        for name, values in tables.items():
            file.create_dataset(name, data=values, **(storage if name in held[0][1] else {}))
    return {"file": path.name, "bytes": os.path.getsize(path), "digest": sha256(*vouched(tables))}, tables


def plant(folder, splits, features=FEATURES, alter=None, **storage):
    """Write a dataset; splits: name -> (clients, borders of its shards, whether it is central).

    alter(split, number, tables) changes a shard before it is vouched for, so that nothing but the change is wrong.
    """
    folder.mkdir()
    digests, text = {}, json.dumps(features, sort_keys=True)
    with h5py.File(folder / "index.h5", "w") as index:
        index.attrs["format"], index.attrs["version"] = fixed("mpifl-shards"), 2
        index["features"], index["provenance"] = fixed(text), fixed(json.dumps({"source": "planted"}))
        for split, (held, borders, central) in splits.items():
            entries, crc32, sizes, ids = [], {name: [] for name in held[0][1]}, [], []
            for number, (first, last) in enumerate(pairwise(borders)):
                path = folder / f"{split}-{number:05d}.h5"
                change = alter and (lambda tables, at=(split, number): alter(*at, tables))
                entry, tables = plant_shard(path, held[first:last], change, **storage)
                entries.append({**entry, "first": first})
                sizes.append(np.diff(tables["offsets"]))
                ids += tables["ids"].tolist()
                for name, parts in crc32.items():
                    parts.append(tables.get(f"crc32/{name}", np.empty(0)))
            sizes, ids = np.concatenate(sizes), np.array(ids)
            group = index.create_group(f"splits/{split}")
            digests[split] = {
                "central": central,
                "sizes": sha256(sizes),
                "ids": "" if central else sha256(ids),
                "crc32": {name: sha256(*parts) for name, parts in crc32.items()},
            }
            group["shards"], group["digests"] = fixed(json.dumps(entries)), fixed(json.dumps(digests[split]))
            group["sizes"], group["ids"] = sizes, ids
        whole = json.dumps([text, digests], sort_keys=True)
        index.attrs["digest"] = fixed(hashlib.sha256(whole.encode()).hexdigest())
    return folder


def fixed(text):
    """A text of fixed length."""
    return np.array(text.encode(), h5py.string_dtype("utf-8", len(text.encode())))


def replace_text(group, name, change):
    """Change a JSON text in a file."""
    value = json.loads(group[name].asstr()[()])
    change(value)
    del group[name]
    group[name] = json.dumps(value, sort_keys=True)


def flip(path, column, row):
    """Flip one bit of a row (of sequences: an item) in the file, behind HDF5's back."""
    with h5py.File(path) as file:
        dataset = file[column]
        at = dataset.id.get_offset() + row * dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
    flip_byte(path, at)


def flip_byte(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def one_line(error):
    """What an error of pytest.raises says, if it is one line."""
    return "\n" not in str(error.value) and str(error.value)
