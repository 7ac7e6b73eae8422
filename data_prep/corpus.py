"""What the plain corpora share: rows that lie somewhere, and a partition that gives them to clients.

The training rows go to the clients as --partition says: split "train", and with --hold-out a split "test" too.
Test rows that the corpus brings are the central split "test", or "central_test" where clients hold out a "test".
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np

from data_prep import sharing
from data_prep.conversion import Split, ranges
from mpifl.config import UserError
from mpifl.data.pieces import CENTRAL_ROWS
from mpifl.data.shard import Columns


class Rows(NamedTuple):
    """Rows of a corpus: where each is, (n,) of any dtype, how to read them, and what a partition may go by, (n,).

    read: takes some of `where`, perhaps none, and returns their columns; it travels to other processes. row_bytes: of
    one row in memory, all columns.
    """

    where: np.ndarray
    read: Callable[[np.ndarray], Columns]
    row_bytes: int
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None


def splits(options: argparse.Namespace, train: Rows, central: Mapping[str, Rows]) -> tuple[Split, ...]:
    """Share out `train` by the options of sharing.py; the rows of each of `central` belong to no client."""
    shares = sharing.shares(options, train.labels, train.groups, len(train.where))
    found = [_shared("train", shares.train, train, options.shard_mb)]
    if shares.test:
        found.append(_shared("test", shares.test, train, options.shard_mb))
    for name, rows in central.items():
        name = "central_test" if shares.test and name == "test" else name
        # Whole blocks, as they are stored: a dataset's digest does not depend on where it is cut.
        blocks = np.full(-(-len(rows.where) // CENTRAL_ROWS), CENTRAL_ROWS * rows.row_bytes)
        cuts = ranges(blocks, options.shard_mb)
        pieces = [rows.where[cut.start * CENTRAL_ROWS : cut.stop * CENTRAL_ROWS] for cut in cuts]
        found.append(Split(name, pieces, partial(_blocks, rows.read), central=True))
    return tuple(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what only the user knows of a corpus."""
    parser.add_argument("--about", metavar="TEXT", help="what this is and who made it, kept with the dataset")
    parser.add_argument("--licence", metavar="TEXT", help="under which licence, kept with the dataset")


def provenance(options: argparse.Namespace, made: str) -> dict[str, str]:
    """Say where a dataset comes from, for a converter that takes `add_arguments`."""
    return {
        "source": options.about or options.source.absolute().name,
        "made": f"{sharing.describe(options)}; {made}",
        "licence": options.licence or "not given",
    }


def installed(module: str) -> ModuleType:
    """Import an optional module; UserError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'{module.split(".")[0]} is needed and missing: pip install -e ".[prep]"') from None


def _shared(name: str, clients: dict[str, np.ndarray], rows: Rows, shard_mb: int) -> Split:
    named = list(clients.items())
    cuts = ranges(np.array([len(own) * rows.row_bytes for own in clients.values()]), shard_mb)
    pieces = [[(client, rows.where[own]) for client, own in named[cut.start : cut.stop]] for cut in cuts]
    return Split(name, pieces, partial(_clients, rows.read), clients=len(named))


def _clients(read: Callable[[np.ndarray], Columns], piece: list[tuple[str, np.ndarray]]) -> Iterator:
    for client, where in piece:
        yield client, read(where)


def _blocks(read: Callable[[np.ndarray], Columns], where: np.ndarray) -> Iterator[tuple[str, Columns]]:
    for start in range(0, len(where), CENTRAL_ROWS):
        yield "", read(where[start : start + CENTRAL_ROWS])
