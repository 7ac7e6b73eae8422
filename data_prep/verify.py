"""Read every byte of a dataset and name all that is wrong: files, tables, checksums, values, labels, ids."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from mpifl.config import UserError
from mpifl.data.format import wrong_value
from mpifl.data.shard import Dataset

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which dataset."""
    parser.add_argument("dataset", type=Path, metavar="DIR", help="folder of a dataset")


def run(options: argparse.Namespace) -> None:
    """Print that all is well, or raise UserError with every problem: what is damaged ends with status 2."""
    dataset = Dataset(options.dataset)
    with closing(dataset):
        problems = [*dict.fromkeys(problems_of(dataset))]
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError(f"{options.dataset} is damaged:", *problems[:SHOWN], *more)
    rows = sum(dataset.total(split) for split in dataset.splits)
    clients = sum(len(dataset.sizes(split)) for split in dataset.splits if not dataset.central(split))
    print(f"{options.dataset} is as it was written: {rows:,} rows, {clients:,} clients, digest {dataset.digest}")


def problems_of(dataset: Dataset) -> Iterator[str]:
    """Yield a line per problem: of the index, of a shard that cannot be read, of a client in it."""
    whole = True
    for split in dataset.splits:
        tables = [partial(dataset.ids, split), partial(dataset.sizes, split)]
        shards = [partial(dataset.check, split, number) for number in range(len(dataset.shards(split)))]
        readable = [_problem(check) for check in [*tables, *shards]]
        yield from filter(None, readable)
        whole = whole and not any(readable)
        if readable[0] is None:
            yield from _repeated_ids(dataset, split)
        for (_, clients), problem in zip(dataset.shards(split), readable[2:]):
            for index in clients if problem is None else ():
                yield from _client(dataset, split, index)
    if whole and dataset.recomputed_digest() != dataset.digest:
        yield f"{dataset.path}: checksums are not those that its digest was made of"


def _problem(check: Callable[[], object]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None


def _repeated_ids(dataset: Dataset, split: str) -> Iterator[str]:
    ids = np.sort(dataset.ids(split))
    for number in np.flatnonzero(ids[1:] == ids[:-1]):
        yield f"split '{split}': client id {ids[number].decode(errors='replace')!r} is there twice"


def _client(dataset: Dataset, split: str, index: int) -> Iterator[str]:
    try:
        columns = dataset.client(split, index)
    except UserError as error:
        yield str(error)
        return
    for name, rows in columns.items():
        if wrong := wrong_value(rows, dataset.features[name]):
            where = f"split '{split}', client {dataset.client_id(split, index)!r}, column '{name}'"
            yield f"{where}: row {wrong[0]} {wrong[1]}"
