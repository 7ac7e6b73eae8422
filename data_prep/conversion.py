"""What a converter promises: the columns, where they come from, and splits in pieces that any process can read.

A converter module has a docstring (its first line is its summary; the rest says which files to put where, and
where they come from), `add_arguments(parser)`, and `prepare(options) -> Conversion`, which looks at the source
and refuses what it cannot use. `write` then does the rest, on all cores, the same way for all of them. `options` holds
what the main program adds as well: a piece should be no larger than a shard, `shard_mb`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mpifl.config import UserError
from mpifl.data.pieces import check_split_name
from mpifl.data.shard import Columns, Feature

PIECE_BYTES = 32 << 20
MOST_PIECES = 64


@dataclass(frozen=True)
class Split:
    """A split to be written: `read(piece)` yields (client id, columns) of one piece, pieces in order.

    pieces: independent parts of the split, in its order; each ends up in shards of its own, wherever it is read.
    read: a module's function, or a functools.partial of one, as it travels to other processes with its arguments; the
    same for pieces. central: the rows belong to no client (ids are then ignored). clients: how many there will
    be, for the progress bar; 0: not known.
    """

    name: str
    pieces: Sequence[Any]
    read: Callable[[Any], Iterable[tuple[str, Columns]]]
    central: bool = False
    clients: int = 0


@dataclass(frozen=True)
class Conversion:
    """Everything there is to know before reading: columns, splits, and provenance (source, made, licence).

    standardize: a uint8 column that is given the mean and std of what split "train" holds, per channel (the first
    axis of three) or over all pixels. Raises UserError for splits that cannot be written.
    """

    features: dict[str, Feature]
    splits: tuple[Split, ...]
    provenance: dict[str, str]
    standardize: str | None = None

    def __post_init__(self) -> None:
        """Refuse names of splits before anything is read."""
        names = [split.name for split in self.splits]
        for name in names:
            check_split_name(name)
            if names.count(name) > 1:
                raise UserError(f"two splits would be named '{name}'; rename what becomes one of them in the source")


def ranges(sizes: np.ndarray, shard_mb: float = math.inf) -> list[range]:
    """Cut clients of so many bytes each, (n,), into consecutive ranges, the pieces of a split.

    A range fills a shard of `shard_mb` MiB, so that an interrupted conversion keeps what it has written; or it is of
    about 32 MiB, or a 64th of all, whichever is more, so that there is work for all cores.
    """
    if not len(sizes):
        return [range(0)]
    ends = np.cumsum(sizes, dtype=np.int64)
    pieces = min(max(1, ends[-1] // PIECE_BYTES), MOST_PIECES)
    # One client more than their share, or the last range would be of what they leave.
    most = min(shard_mb * 2**20, ends[-1] / pieces + ends[-1] / len(ends))
    borders = [0]
    while borders[-1] < len(ends):
        filled = np.searchsorted(ends, ends[borders[-1]] - sizes[borders[-1]] + most, "right")
        borders.append(max(borders[-1] + 1, int(filled)))
    return [range(start, stop) for start, stop in pairwise(borders)]
