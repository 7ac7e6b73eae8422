"""Damage to files of datasets and runs, drawn by hypothesis: by disks, copies, other programs, and careless writers.

Each kind is a value that is called with the folder to be damaged. What checksums would tell at once is also done with
checksums that fit, as a program of somebody else would write it: only then is the rest looked at.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import h5py
import numpy as np
from hypothesis import strategies as st
from mutations import BytesEdit, byte_edits, strange_values
from shard_files import fixed, sha256, vouched

# ---- any file


@dataclass(frozen=True)
class OfBytes:
    """An edit of one of the files; which: a share of their number."""

    which: float
    edit: BytesEdit

    def __call__(self, folder):
        path = chosen(folder, self.which)
        path.write_bytes(self.edit(path.read_bytes()))


@dataclass(frozen=True)
class OfFile:
    """One of the files is something else afterwards, or has changed places with another one."""

    which: float
    other: float
    kind: str

    def __call__(self, folder):
        path, other = chosen(folder, self.which), chosen(folder, self.other)
        if self.kind == "swapped":
            data = path.read_bytes()
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
            return
        path.unlink()
        if self.kind in LINKS:
            path.symlink_to(LINKS[self.kind])
        elif self.kind == "folder":
            path.mkdir()
        elif self.kind != "gone":
            path.write_bytes({"empty": b"", "text": b"precious\n", "zeros": bytes(5000)}[self.kind])


LINKS = {"link to nothing": "nowhere", "link to itself": ".", "endless": "/dev/zero"}
KINDS = ["gone", "swapped", "empty", "text", "zeros", "folder", *LINKS]
share = st.floats(0, 1, exclude_max=True)
of_bytes, of_file = st.builds(OfBytes, share, byte_edits), st.builds(OfFile, share, share, st.sampled_from(KINDS))


def chosen(folder, which):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return files[int(which * len(files))] if files else folder / "nothing"


def with_json_edited(text, which, value):
    """JSON text in which a value is replaced, or removed if `value` is `GONE`; which: a share of their number."""
    document = json.loads(text)
    places = list(_places(document))
    holder, key = places[int(which * len(places))]
    if value == GONE:
        del holder[key]
    else:
        holder[key] = value
    return json.dumps(document, sort_keys=True, default=str)


GONE = "gone"
json_values = strange_values | st.sampled_from(
    [GONE, None, 3, "../../../etc/passwd", "uint8", "float64", "object", [2]]
)


def _places(node):
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


# ---- datasets


@dataclass(frozen=True)
class OfTable:
    """A table of one of the HDF5 files is changed."""

    which: float
    table: float
    kind: str

    def __call__(self, folder):
        with h5py.File(chosen(folder, self.which), "r+") as file:
            names = names_in(file)
            name = names[int(self.table * len(names))]
            values = file[name][()]
            if self.kind == "renamed":
                file.move(name, f"{name}x")
                return
            del file[name]
            if self.kind == "group":
                file.create_group(name)
            elif self.kind != "gone":
                file[name] = CHANGES[self.kind](np.asarray(values))


def _one_changed(value):
    def change(values):
        changed = values.astype(
            np.float64 if value != value else np.int64 if values.dtype.kind in "iu" else values.dtype
        )
        if changed.size and changed.dtype.kind != "S":
            changed.reshape(-1)[changed.size // 2] = value
        return (
            changed.astype(values.dtype, casting="unsafe") if values.dtype.kind in "iu" and value == value else changed
        )

    return change


CHANGES = {
    "number": lambda values: 7,
    "text": lambda values: "precious",
    "empty": lambda values: values.reshape(-1)[:0],
    "floats": lambda values: values.astype("f8") if values.dtype.kind in "iu" else np.zeros(3),
    "wide": lambda values: values.astype("i8") if values.dtype.kind in "iu" else np.zeros(3, "i8"),
    "flat": lambda values: values.reshape(-1),
    "deep": lambda values: values.reshape(*values.shape, 1),
    "reversed": lambda values: values[::-1] if values.ndim else values,
    "negative": lambda values: -values - 1 if values.dtype.kind in "iu" else values,
    "shorter": lambda values: values[:-1] if values.ndim else values,
    "longer": lambda values: np.concatenate([values, values[-1:]]) if values.ndim else values,
    "compound": lambda values: np.zeros(values.shape, [("a", "i4"), ("b", "f4")]),
    "one is huge": _one_changed(2**62),
    "one is 7": _one_changed(7),
    "one is no number": _one_changed(float("nan")),
}


@dataclass(frozen=True)
class OfText:
    """A value in one of the index's JSON texts is changed."""

    table: float
    which: float
    value: object

    def __call__(self, folder):
        with h5py.File(folder / "index.h5", "r+") as index:
            texts = [
                "features",
                *(f"splits/{split}/{name}" for split in index["splits"] for name in ("shards", "digests")),
            ]
            name = texts[int(self.table * len(texts))]
            text = with_json_edited(index[name].asstr()[()], self.which, self.value)
            del index[name]
            index[name] = fixed(text)


@dataclass(frozen=True)
class OfAttribute:
    """An attribute of the index is changed or removed."""

    name: str
    value: object

    def __call__(self, folder):
        with h5py.File(folder / "index.h5", "r+") as index:
            if self.value == GONE:
                del index.attrs[self.name]
            else:
                index.attrs[self.name] = self.value


@dataclass(frozen=True)
class Fitting:
    """The index is given the sizes of the files that are there, and with `checksums` those of all they hold."""

    checksums: bool

    def __call__(self, folder):
        with h5py.File(folder / "index.h5", "r+") as index:
            found = {split: self._fit(folder, group) for split, group in index["splits"].items()}
            if self.checksums:
                whole = json.dumps([index["features"].asstr()[()], found], sort_keys=True)
                index.attrs["digest"] = fixed(hashlib.sha256(whole.encode()).hexdigest())

    def _fit(self, folder, group):
        shards, digests = (json.loads(group[name].asstr()[()]) for name in ("shards", "digests"))
        held = []
        for shard in shards:
            path = folder / shard["file"]
            if self.checksums:
                with h5py.File(path, "r+") as file, suppress(*ANYTHING):
                    fit_crc32(file)
                with h5py.File(path) as file, suppress(*ANYTHING):
                    tables = {name: file[name][()] for name in names_in(file) if name.count("/") or name in TABLES}
                    shard["digest"] = sha256(*vouched(tables))
                    held.append(tables)
            shard["bytes"] = path.stat().st_size
        with suppress(*ANYTHING):
            if self.checksums:
                digests["sizes"] = sha256(np.concatenate([np.diff(tables["offsets"]) for tables in held]))
                digests["ids"] = digests["ids"] and sha256(np.concatenate([tables["ids"] for tables in held]))
                crc32 = {name: sha256(*(tables[f"crc32/{name}"] for tables in held)) for name in digests["crc32"]}
                digests["crc32"] = crc32
        for name, value in {"shards": shards, "digests": digests}.items():
            del group[name]
            group[name] = fixed(json.dumps(value))
        return digests


TABLES = ("offsets", "ids")
ANYTHING = (ArithmeticError, KeyError, OSError, TypeError, ValueError, IndexError, AttributeError, RuntimeError)


def names_in(file):
    names = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def fit_crc32(file):
    """Checksums of what each client of a shard holds now."""
    offsets = file["offsets"][()]
    for name in file["crc32"]:
        values, lengths, starts = file[name][()], None, offsets
        if f"items/{name}" in file:
            lengths, starts = file[f"lengths/{name}"][()], file[f"items/{name}"][()]
        for client, (start, stop) in enumerate(pairwise(starts)):
            before = 0 if lengths is None else zlib.crc32(lengths[offsets[client] : offsets[client + 1]].tobytes())
            file[f"crc32/{name}"][client] = zlib.crc32(values[start:stop].tobytes(), before)


attributes = st.sampled_from(["format", "version", "digest"])
of_dataset = st.one_of(
    st.tuples(of_bytes),
    st.tuples(of_bytes),
    st.tuples(of_bytes, of_bytes, of_bytes),
    st.tuples(of_file),
    st.tuples(
        st.builds(OfTable, share, share, st.sampled_from(["gone", "renamed", "group", *CHANGES])),
        st.builds(Fitting, st.booleans()),
    ),
    st.tuples(st.builds(OfText, share, share, json_values), st.builds(Fitting, st.booleans())),
    st.tuples(st.builds(OfAttribute, attributes, st.sampled_from([GONE, 0, 3, 2.0, "", "mpifl", b"\xff", [1, 2]]))),
)
"""Damage to a dataset's folder, as a tuple of what is done one after the other."""


def damage(folder, steps):
    """Do it; what was done first may leave nothing to do for the next."""
    for step in steps:
        with suppress(*ANYTHING):
            step(folder)


# ---- runs


@dataclass(frozen=True)
class OfJson:
    """A value in a checkpoint's run.json or COMPLETE, or in a run's other JSON files, is changed."""

    which: float
    place: float
    value: object

    def __call__(self, folder):
        files = sorted([*folder.rglob("*.json"), *folder.rglob("COMPLETE")])
        path = files[int(self.which * len(files))]
        path.write_text(with_json_edited(path.read_text(), self.place, self.value))


@dataclass(frozen=True)
class FittingMarks:
    """The marks of checkpoints are given the sizes and checksums of the files that are there."""

    def __call__(self, folder):
        for mark in folder.rglob("COMPLETE"):
            files = {name: (mark.parent / name).read_bytes() for name in json.loads(mark.read_text())}
            mark.write_text(json.dumps({name: [len(data), zlib.crc32(data)] for name, data in files.items()}))


of_run = st.one_of(
    st.tuples(of_bytes),
    st.tuples(of_bytes, of_bytes),
    st.tuples(of_file),
    st.tuples(of_bytes, st.just(FittingMarks())),
    st.tuples(st.builds(OfJson, share, share, json_values), st.just(FittingMarks())),
)
"""Damage to a run's folder, as a tuple of what is done one after the other."""
