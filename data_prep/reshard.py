"""Cut a dataset into another number of shards, or compress it otherwise; clients, their order and digest stay."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.conversion import Conversion, Split
from data_prep.report import drawing
from data_prep.workers import cores
from data_prep.writing import add_compression, write
from mpifl.config import UserError
from mpifl.data.pieces import Storage
from mpifl.data.shard import Columns, Dataset

LARGEST_SHARD = 4 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is cut, how and whereto."""
    parser.add_argument("dataset", type=Path, metavar="DIR", help="folder of a dataset, which stays as it is")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the new one, to be made")
    parser.add_argument("--shards", type=int, required=True, metavar="M", help="shards per split, of about equal size")
    parser.add_argument("--jobs", type=int, default=cores(), metavar="N", help="processes (default: one per core)")
    add_compression(parser)


def run(options: argparse.Namespace) -> None:
    """Write the new dataset and say what it is."""
    if options.shards < 1 or options.jobs < 1:
        raise UserError(f"--shards {options.shards} --jobs {options.jobs}: both must be at least 1")
    with closing(Dataset(options.dataset)) as source:
        _refuse_large_shards(source, options.shards)
        read = partial(read_clients, source.path)
        splits = []
        for split in source.splits:
            sizes = source.sizes(split)
            pieces = [(split, part) for part in cut(sizes, options.shards)]
            splits.append(Split(split, pieces, read, source.central(split), clients=len(sizes)))
        storage = Storage(source.features, math.inf, options.compression)
        conversion = Conversion(source.features, tuple(splits), source.provenance)
        key = f"{source.digest} in {options.shards} shards {options.compression}"
        write(conversion, options.out, storage, options.jobs, key)
        with closing(Dataset(options.out)) as made:
            if made.digest != source.digest:
                raise UserError(f"{options.out} has another digest than {options.dataset}: verify that one")
            counts = ", ".join(f"{split} {len(made.shards(split))}" for split in made.splits)
    print(f"{options.out}: the same clients and digest in other shards ({counts})")
    print(drawing(options.out))


def _refuse_large_shards(source: Dataset, shards: int) -> None:
    row = sum(np.dtype(feature.dtype).itemsize * math.prod(feature.shape) for feature in source.features.values())
    largest = row * max(map(source.total, source.splits)) / shards
    if largest > LARGEST_SHARD:
        problem = f"makes shards of about {largest / 2**30:.1f} GiB, which are held in memory while they are written"
        raise UserError(f"--shards {shards} {problem}; ask for at least {math.ceil(largest * shards / LARGEST_SHARD)}")


def cut(sizes: np.ndarray, shards: int) -> list[range]:
    """Consecutive clients with about equal numbers of rows, in so many ranges, at most one per client."""
    shards = min(shards, len(sizes))
    ends, number = np.cumsum(sizes + 1), np.arange(1, shards)  # a client without rows takes some place too
    borders = np.searchsorted(ends, ends[-1] * number / shards)
    borders = np.maximum.accumulate(np.maximum(borders - number, 0)) + number  # none is empty
    borders = np.minimum(borders, len(sizes) - shards + number).tolist()
    return [range(start, stop) for start, stop in pairwise([0, *borders, len(sizes)])]


def read_clients(path: Path, piece: tuple[str, range]) -> Iterator[tuple[str, Columns]]:
    """Yield (id, columns) of a range of clients of a split."""
    split, clients = piece
    with closing(Dataset(path)) as dataset:
        ids = dataset.ids(split)[clients.start : clients.stop]
        for client, index in zip(ids, clients):
            yield client.decode(), dataset.client(split, index)
