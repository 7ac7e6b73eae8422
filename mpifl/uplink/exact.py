"""The exact sum: the same bits whatever rank hosted a client and in whatever order clients were added.

Each weight * value is rounded to a grid, a power of two 2^e per leaf, by float64 `(x + M) - M` with
M = 1.5 * 2^(e + 52). Grid values below 2^(e + 53) add without rounding, so their sum has no order. The grid
follows the data: a leaf's `limit` is 2^10 times the largest |weight * value| of the last accepted sum, and
e leaves room for the cohort. A value beyond the limit, or all of them far below it, makes the server ask
again with a better grid: a rule of per-client values and cohort size only, so every rank count obeys it alike.

The buffer of one ask is [update U | weight | stats | count | one row per rank], all float64. Row r is filled
by rank r alone: a sum then gathers what a sum cannot maximise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mpifl.tree import Layout, Tree, leaves, unflatten
from mpifl.work import Sums, Upload

HEADROOM = 10
"""Bits between the largest value of the last sum and the limit of the next."""
PRECISION = 22
"""Bits below the largest value that a grid must resolve, else the server asks again with a finer one."""
FIRST_UPDATE, FIRST_STATISTIC = 2.0**12, 2.0**20
"""Limits before anything is known; the first sum mends them if they do not fit."""
ROW = (
    "busy",
    "load",
    "train",
    "sum",
    "steps",
    "examples",
    "excluded",
    "bad_client",
    "bad_leaf",
    "over_client",
    "over_leaf",
    "resident_bytes",
    "stop",
)
"""What each rank reports beside its peaks; clients as index + 1, 0 for none."""
_PIECE = 1 << 22
"""Elements of a block of uploads that are rounded at a time, in float64."""


@dataclass(frozen=True)
class Wire:
    """What uploads of one work look like in the Reduce buffer, found by a blank visit."""

    update: Layout
    stats: Layout
    ranks: int
    exact: bool = True

    @staticmethod
    def of(upload: Upload, ranks: int, exact: bool) -> Wire:
        """Take names and shapes from an upload."""
        return Wire(Layout.of(upload.update), Layout.of(upload.stats), ranks, exact)

    @cached_property
    def size(self) -> int:
        """U, the number of update elements."""
        return sum(leaf.size for leaf in self.update.leaves)

    @cached_property
    def names(self) -> list[str]:
        """Leaves that have a grid each: the update's, the weight, the stats'."""
        return [leaf.name for leaf in self.update.leaves] + ["weight"] + [leaf.name for leaf in self.stats.leaves]

    @cached_property
    def small(self) -> list[int]:
        """Elements of weight and of each stats leaf."""
        return [1] + [leaf.size for leaf in self.stats.leaves]

    @cached_property
    def tail(self) -> int:
        """Elements after the update: weight, stats, count and the rows."""
        return sum(self.small) + 1 + self.ranks * self.row

    @property
    def row(self) -> int:
        """Elements of one rank's row."""
        return len(self.names) + len(ROW)

    @property
    def bytes(self) -> int:
        """Bytes one rank sends up."""
        return self.size * (8 if self.exact else 4) + self.tail * 8

    def first_limits(self) -> np.ndarray:
        """Limits, (leaves,) float64, for a sum of which nothing is known."""
        updates = len(self.update.leaves)
        return np.asarray([FIRST_UPDATE] * updates + [FIRST_STATISTIC] * (len(self.names) - updates))

    def buffers(self, memory: Tensor | None = None) -> list[Tensor]:
        """Return what is reduced, zeroed: one float64 buffer when exact, else float32 update and float64 rest.

        memory: where they are to lie, (bytes,) uint8, zeroed.
        """
        memory = torch.zeros(self.bytes, dtype=torch.uint8) if memory is None else memory
        if self.exact:
            return [memory.view(torch.float64)]
        rest, update = memory.split([self.tail * 8, self.size * 4])
        return [update.view(torch.float32), rest.view(torch.float64)]

    def parts(self, buffers: list[Tensor]) -> tuple[Tensor, np.ndarray]:
        """View buffers as (update (U,), rest (T,))."""
        if self.exact:
            return buffers[0][: self.size], buffers[0][self.size :].numpy()
        return buffers[0], buffers[1].numpy()


def spacing(limits: np.ndarray, clients: int) -> np.ndarray:
    """Grid 2^e per leaf such that `clients` values of at most `limits` add exactly."""
    room = math.ceil(math.log2(max(clients, 1)))
    return np.exp2(np.ceil(np.log2(limits)) + room - 51)


def next_limits(wire: Wire, limits: np.ndarray, peaks: np.ndarray, clients: int) -> np.ndarray:
    """Limits for the next sum from the largest |weight * value| of this one; a leaf of zeros keeps its own.

    Statistics vary more than updates and need less, so theirs do not shrink while the first limit resolves them.
    """
    adapted = np.where(peaks > 0, _adapted(peaks), limits)
    first = wire.first_limits()
    statistic = np.arange(len(peaks)) >= len(wire.update.leaves)
    # With a margin, so that a statistic that shrinks slowly has its own limit before the first fails to resolve it.
    generous = statistic & (spacing(first, clients) <= peaks * 2.0 ** -(PRECISION + 4))
    return np.where(generous, np.maximum(adapted, first), adapted)


def _adapted(peaks: np.ndarray) -> np.ndarray:
    return np.exp2(np.ceil(np.log2(np.where(peaks > 0, peaks, 1.0))) + HEADROOM)


def fits(limits: np.ndarray, peaks: np.ndarray, clients: int) -> bool:
    """Whether values with these peaks were within the limits and resolved to PRECISION bits."""
    # Beyond 2^19 clients the headroom gives way before the precision test could fail for ever.
    resolved = (spacing(limits, clients) <= peaks * 2.0**-PRECISION) | (limits <= _adapted(peaks))
    return bool(np.all((peaks <= limits) & ((peaks == 0) | resolved)))


@dataclass
class Accumulator:
    """Adds uploads of one ask on one rank.

    limits: (leaves,) float64. clients: size of the whole cohort. memory: where the sums are to lie, (wire.bytes,)
    uint8, zeroed. After the `add`s, `report` completes the rank's row and `buffers` are ready to be reduced.
    """

    wire: Wire
    limits: np.ndarray
    clients: int
    rank: int
    memory: Tensor | None = None
    peaks: np.ndarray = field(init=False)
    bad: tuple[int, int] | None = None
    over: tuple[int, int] | None = None
    excluded: int = 0

    def __post_init__(self) -> None:
        wire = self.wire
        self.buffers = wire.buffers(self.memory)
        update, rest = wire.parts(self.buffers)
        self.peaks = np.zeros(len(wire.names))
        magic = 1.5 * 2.0**52 * spacing(self.limits, self.clients)
        updates = len(wire.update.leaves)
        self._magic = torch.from_numpy(magic[:updates]).unbind()
        self._small_magic = np.repeat(magic[updates:], wire.small)
        self._small_starts = np.cumsum([0, *wire.small[:-1]])
        self._parts = update.split([leaf.size for leaf in wire.update.leaves])
        self._scratch: dict[int, Tensor] = {}
        self._there: Tensor | None = None
        self._small = rest[: sum(wire.small)]
        self._count = rest[sum(wire.small) :]

    def add(self, client: int, upload: Upload) -> bool:
        """Add one client's upload; returns False, and adds nothing, if any of its numbers is not finite."""
        self._refuse_other_shapes(upload)
        values = [leaf.reshape(-1) for _, leaf in leaves(upload.update)]
        small = torch.cat([_double(upload.weight), *(_double(leaf) for _, leaf in leaves(upload.stats))]).numpy()
        if not self._admit(client, [_largest(value) for value in values], small):
            return False
        if self.over is not None:  # the server will ask again: this sum is not going to be used
            return True
        weight = float(small[0])
        if self.wire.exact:
            for part, value, magic in zip(self._parts, values, self._magic):
                part.add_(self._rounded(value, weight, magic))
        else:
            for part, value in zip(self._parts, values):
                part.add_(value.cpu(), alpha=weight)
        self._small += (small + self._small_magic) - self._small_magic
        return True

    def refuse(self, client: int) -> None:
        """Count a client that has no upload as excluded; its leaf is said to be the one after the last."""
        self.bad = _first(self.bad, client, len(self.wire.names))
        self.excluded += 1

    def add_block(self, clients: Sequence[int], upload: Upload) -> list[bool]:
        """As `add` for each of these clients, whose uploads are the first rows of leaves (K, ...).

        Updates are summed on the device where they are; what `add` would read goes to the host in one piece.
        """
        self._refuse_other_shapes(upload, axes=1)
        count = len(clients)
        values = [leaf[:count].reshape(count, -1) for _, leaf in leaves(upload.update)]
        statistics = [_double_rows(leaf[:count]) for _, leaf in leaves(upload.stats)]
        read = torch.cat([*map(_largest_of_rows, values), _double_rows(upload.weight[:count]), *statistics], dim=1)
        largest, small = np.split(read.cpu().numpy(), [len(values)], axis=1)
        admitted = [self._admit(*row) for row in zip(clients, largest.tolist(), small)]
        if self.over is not None or not any(admitted):
            return admitted
        if not all(admitted):
            small = small[admitted]
            values = [value[torch.tensor(admitted, device=value.device)] for value in values]
        weights = torch.from_numpy(small[:, :1]).to(read.device)
        for part, value, magic in zip(self._parts_on(read.device), values, self._magic):
            width = max(1, _PIECE // len(value))
            for sum, piece in zip(part.split(width), value.split(width, dim=1)):
                terms = piece.to(torch.float64) * weights
                sum.add_((terms.add_(magic).sub_(magic) if self.wire.exact else terms).sum(dim=0))
        self._small += ((small + self._small_magic) - self._small_magic).sum(axis=0)
        return admitted

    def _admit(self, client: int, largest: list[float], small: np.ndarray) -> bool:
        """Note peaks, count and flags of one upload; False if it holds a number that is not finite."""
        weight = float(small[0])
        scale = abs(weight) if math.isfinite(weight) else 1.0  # a bad weight is its own fault, not the first leaf's
        peaks = np.asarray(
            [value * scale for value in largest] + np.maximum.reduceat(np.abs(small), self._small_starts).tolist()
        )
        if not np.isfinite(peaks).all():
            self.bad = _first(self.bad, client, int(np.argmin(np.isfinite(peaks))))
            self.excluded += 1
            return False
        self.peaks = np.maximum(self.peaks, peaks)
        self._count[0] += weight != 0
        beyond = peaks > self.limits
        if self.wire.exact and beyond.any():
            self.over = _first(self.over, client, int(np.argmax(beyond)))
        return True

    def _parts_on(self, device: torch.device) -> list[Tensor]:
        """The sums of update leaves: in the buffer itself if it is on the device, else there until `report`."""
        update, _ = self.wire.parts(self.buffers)
        if device == update.device:
            return self._parts
        if self._there is None:
            self._there = torch.zeros_like(update, device=device)
        return list(self._there.split([len(part) for part in self._parts]))

    def _refuse_other_shapes(self, upload: Upload, axes: int = 0) -> None:
        """ValueError unless an upload, behind this many leading axes, has the names and shapes of the wire."""
        for expected, tree in ((self.wire.update, upload.update), (self.wire.stats, upload.stats)):
            found = [(name, leaf.shape[axes:]) for name, leaf in leaves(tree)]
            if found != [(leaf.name, leaf.shape) for leaf in expected.leaves]:
                names = [f"{leaf.name} {leaf.shape}" for leaf in expected.leaves]
                raise ValueError(
                    f"an upload holds {[f'{name} {tuple(shape)}' for name, shape in found]}, but the same work on "
                    f"blank data gave {names}: names and shapes must not depend on the data"
                )

    def _rounded(self, value: Tensor, weight: float, magic: Tensor) -> Tensor:
        scratch = self._scratch.get(len(value))
        if scratch is None:
            scratch = self._scratch[len(value)] = torch.empty(len(value), dtype=torch.float64)
        scratch.copy_(value)  # the product is exact, 24 bits times at most 29: one pass rounds as two would
        return torch.add(magic, scratch, alpha=weight, out=scratch).sub_(magic)

    def report(self, **figures: float) -> None:
        """Fill this rank's row with its peaks and `figures` (names of ROW), and fetch what was summed elsewhere."""
        if self._there is not None:
            update, _ = self.wire.parts(self.buffers)
            fetched = torch.empty(update.shape, dtype=update.dtype, pin_memory=self._there.is_cuda)
            update.add_(fetched.copy_(self._there))
        bad, over = self.bad or (-1, 0), self.over or (-1, 0)
        figures |= {"excluded": self.excluded, "bad_client": bad[0] + 1, "bad_leaf": bad[1]}
        figures |= {"over_client": over[0] + 1, "over_leaf": over[1]}
        row = self._count[1:].reshape(self.wire.ranks, self.wire.row)[self.rank]
        row[:] = [*self.peaks, *(figures.get(name, 0.0) for name in ROW)]


def _double(leaf: Tensor) -> Tensor:
    return leaf.reshape(-1).to("cpu", torch.float64)


def _double_rows(leaf: Tensor) -> Tensor:
    return leaf.reshape(len(leaf), -1).to(torch.float64)


def _largest(value: Tensor) -> float:
    """Largest magnitude; NaN or inf if there is one. One pass, where isfinite().all() would take ten times."""
    if not value.numel():
        return 0.0
    low, high = value.aminmax()
    return max(-float(low), float(high)) if low == low else math.nan


def _largest_of_rows(values: Tensor) -> Tensor:
    """`_largest` of each row of (K, n) values, (K, 1) float64, without waiting for a GPU."""
    if not values.numel():
        return values.new_zeros((len(values), 1), dtype=torch.float64)
    low, high = values.aminmax(dim=1, keepdim=True)
    return torch.maximum(-low.to(torch.float64), high.to(torch.float64))


def _first(found: tuple[int, int] | None, client: int, leaf: int) -> tuple[int, int]:
    """Keep the lowest client: all are looked at, so every rank count names the same one."""
    return (client, leaf) if found is None or client < found[0] else found


@dataclass(frozen=True)
class Answer:
    """The reduced buffers of one ask, read back."""

    sums: Sums
    peaks: np.ndarray
    rows: dict[str, np.ndarray]

    def first(self, kind: str) -> tuple[int, int] | None:
        """Lowest (client, leaf) flagged "bad" or "over" on any rank."""
        clients, of_leaf = self.rows[f"{kind}_client"], self.rows[f"{kind}_leaf"]
        flagged = [(int(c) - 1, int(f)) for c, f in zip(clients, of_leaf) if c > 0]
        return min(flagged, default=None)


def decode(wire: Wire, buffers: list[Tensor]) -> Answer:
    """Read reduced buffers: float64 leaves in the update's shapes, float stats (lists for vectors)."""
    update, rest = wire.parts(buffers)
    parts = update.to(torch.float64).split([leaf.size for leaf in wire.update.leaves])
    tree: Tree = unflatten({leaf.name: part.view(leaf.shape) for leaf, part in zip(wire.update.leaves, parts)})
    weight, *stats = np.split(rest[: sum(wire.small)], np.cumsum(wire.small)[:-1])
    named = {leaf.name: value.reshape(leaf.shape).tolist() for leaf, value in zip(wire.stats.leaves, stats)}
    after = rest[sum(wire.small) :]
    rows = after[1:].reshape(wire.ranks, wire.row)
    columns = {name: rows[:, len(wire.names) + i] for i, name in enumerate(ROW)}
    peaks = rows[:, : len(wire.names)].max(axis=0)
    return Answer(Sums(tree, float(weight[0]), int(after[0]), named), peaks, columns)
