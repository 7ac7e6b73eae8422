"""Tables with a row per example: CSV, Parquet or NPZ files, with or without a column that says whose a row is.

What to put where: --source is a file (.csv, .csv.gz, .parquet, .npz: an array per column) or a folder of such files,
read in order of name; --test is another one, for the central split "test". Each value of --client-column becomes a
client, or another --partition shares the rows out. The columns of numbers (or --columns, in that order) become x,
float32 (n, F), stored as they are; the mean and std of each over the training rows are recorded, and models are fed
(x - mean) / std. With --separate they stay columns of their own in the dtype they have (CSV: float32). --label-column
becomes y: whole numbers and text are classes, numbered in order; other numbers stay what they are. Ids and labels are
kept in memory, and one copy of the rest per process on disk, in TMPDIR.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import corpus, sharing, table_files
from data_prep.conversion import Conversion, Split
from data_prep.labels import label_column, numbered
from mpifl.config import UserError, choice
from mpifl.data.shard import Columns, Feature

_AT_ONCE = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the table is, what its columns are, and how to share its rows out."""
    parser.add_argument("--source", required=True, type=Path, metavar="PATH", help="file, or folder of files")
    parser.add_argument("--test", type=Path, metavar="PATH", help="the same with the rows of the central split test")
    sharing.add_client_column(parser)
    parser.add_argument("--label-column", metavar="NAME", help="column that becomes y")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="columns to take (default: all of numbers)")
    parser.add_argument("--separate", action="store_true", help="keep columns apart instead of joining them to x")
    parser.add_argument("--unscaled", action="store_true", help="record no mean and std of x")
    corpus.add_arguments(parser)
    sharing.add_arguments(parser, None, "by-column, which needs --client-column")


def prepare(options: argparse.Namespace) -> Conversion:
    """Look at the columns, and read ids and labels."""
    options = sharing.by_client_column(options)
    client, label = options.client_column, options.label_column
    paths = table_files.files(options.source)
    dtype, left = _record(paths[0], options)
    known = table_files.values(paths, [name for name in dict.fromkeys((client, label)) if name])
    features = {name: Feature(dtype[name].base.name, dtype[name].shape) for name in dtype.names}
    if not options.separate:
        features = {"x": Feature("float32", (len(dtype.names),))}
    target = None
    if label is not None:
        target = features["y"] = label_column(known[label])
    train = _rows(paths, dtype, options, target, known)
    central = {}
    if options.test:
        paths = table_files.files(options.test)
        central["test"] = _rows(paths, dtype, options, target, table_files.values(paths, [label] if label else []))
    made = f"{'columns' if options.separate else 'x of columns'} {', '.join(dtype.names)}"
    if left:
        made += f", without {', '.join(left)}"
    splits = corpus.splits(options, train._replace(groups=known.get(client)), central)
    if not options.separate and not options.unscaled:
        features["x"] = _scaled(features["x"], splits[0], train.read)
    return Conversion(
        features=features,
        splits=splits,
        provenance=corpus.provenance(options, made + (f"; y of {label}" if label else "")),
    )


def _record(path: Path, options: argparse.Namespace) -> tuple[np.dtype, list[str]]:
    """Return the columns to take as one record, their names, dtypes and shapes of a row; and the columns left out."""
    found = table_files.schema(path)
    special = {options.client_column, options.label_column}
    names = options.columns or [name for name, dtype in found.items() if dtype is not None and name not in special]
    for name in names:
        choice(name, found, f"column of {path.name}")
        if found[name] is None:
            raise UserError(f"{path}: column '{name}' is not of numbers; leave it out of --columns, or number it first")
        if found[name].shape and not options.separate:
            raise UserError(f"{path}: rows of column '{name}' are {found[name].shape}; keep it apart with --separate")
        if name == "y" and options.separate and options.label_column:
            raise UserError(f"{path}: column 'y' and --label-column {options.label_column} would both be y; rename one")
    if not names:
        raise UserError(f"{path}: has no column of numbers beside ids and labels, only {', '.join(found)}")
    if len(set(names)) < len(names):
        raise UserError(f"--columns {' '.join(names)}: name each column once")
    dtype = np.dtype([(name, found[name] if options.separate else np.float32) for name in names])
    return dtype, [name for name in found if name not in {*names, *special}]


def _rows(
    paths: tuple[Path, ...],
    dtype: np.dtype,
    options: argparse.Namespace,
    target: Feature | None,
    known: table_files.Block,
) -> corpus.Rows:
    read = partial(_read, paths, dtype, options.separate, target is not None)
    count = len(table_files.records(paths, dtype))
    for name, values in known.items():
        if len(values) != count:
            raise UserError(f"{paths[0]}: column '{name}' has {len(values)} rows, others {count}; make them alike")
    if target is None:
        return corpus.Rows(np.arange(count), read, dtype.itemsize)
    where = np.empty(count, [("row", np.int64), ("y", target.dtype)])
    label = options.label_column
    place = partial(table_files.place, paths, label)
    where["row"], where["y"] = np.arange(count), numbered(known[label], target, place)
    labels = where["y"] if target.classes else None
    return corpus.Rows(where, read, dtype.itemsize + where["y"].itemsize, labels=labels)


def _scaled(feature: Feature, train: Split, read: Callable[[np.ndarray], Columns]) -> Feature:
    """Record the mean and std of each column over the training rows, in their order in the files."""
    where = np.sort(np.concatenate([rows for piece in train.pieces for _, rows in piece]))
    blocks = [where[start : start + _AT_ONCE] for start in range(0, len(where), _AT_ONCE)]

    def means(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        # Not numpy's sum: its last bits, hence the dataset's digest, may be another processor's own.
        sums = [
            [math.fsum(column) for column in of(read(block)["x"].astype(np.float64)).T.tolist()] for block in blocks
        ]
        return np.array([math.fsum(column) / len(where) for column in zip(*sums)])

    if not len(where):
        return feature
    mean = means(lambda x: x)
    std = np.sqrt(means(lambda x: (x - mean) ** 2))
    std[std <= 1e-7 * np.abs(mean)] = 1.0  # float32 knows no difference
    return replace(feature, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _read(paths: tuple[Path, ...], dtype: np.dtype, separate: bool, labelled: bool, where: np.ndarray) -> Columns:
    rows = table_files.records(paths, dtype)[where["row"] if labelled else where]
    if separate:
        columns = {name: np.ascontiguousarray(rows[name]) for name in dtype.names}
    else:
        columns = {"x": rows.view(np.float32).reshape(len(rows), len(dtype.names))}
    return columns | ({"y": where["y"].copy()} if labelled else {})
