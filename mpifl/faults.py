"""Clients that drop out or are slow, on a virtual clock: who of a round's clients reports in time, and when it is over.

    asked      cohort (1 + over_selection) clients, rounded up, sampled as ever
    dropped    each of them with a probability, by (seed, round, client): it returns nothing
    duration   sum over the round's asks of  bytes down / downlink + examples seconds_per_example slowdown
                                             + bytes up / uplink;  slowdown and links by (seed, client)
    counted    the first `cohort` of the others to report, within the deadline; the rest is late
    seconds    until the cohort was complete, or else the deadline; without one, until the last has reported

All of it is known before anyone trains, so that only those who count do. Examples are all that batches hold, epoch by
epoch. Clients that report at the same instant take turns by (seed, round, client), so that none is preferred for good.
Bonawitz et al. (2019) select 130 % of a cohort and close a round like this.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mpifl.config import Faults
from mpifl.rand import fold, uniforms
from mpifl.work import Batching


class Visit(NamedTuple):
    """One of a round's asks as it is for a client: its batches, and bytes to and from it."""

    batches: Batching
    down: int
    up: int


class Devices(NamedTuple):
    """What clients have, (n,) float64 each: factor on seconds per example, seconds per byte down and up."""

    slowdown: np.ndarray
    down: np.ndarray
    up: np.ndarray


class Turnout(NamedTuple):
    """What became of a round's clients. asked: how many were sampled. ids: (n,) int64, ascending, who is to train.

    dropped, late: how many were left out. seconds: virtual ones that the round took. A client without a batch is none
    of these: it stays in ids, and is left out where it is hosted.
    """

    asked: int
    ids: np.ndarray
    dropped: int = 0
    late: int = 0
    seconds: float = 0.0


def asked(cohort: int, over_selection: float) -> int:
    """How many clients are sampled for `cohort` of them to count."""
    return cohort + math.ceil(round(cohort * over_selection, 6))  # 30 * 0.1 is a little more than 3


def examples_read(batches: Batching, examples: np.ndarray) -> np.ndarray:
    """Rows that all batches of a visit hold together, (n,) int64, for clients with so many examples, (n,)."""
    used = np.asarray(batches.examples_used(examples), dtype=np.int64)
    size = batches.size or np.maximum(used, 1)
    epoch = used - used % size if batches.drop_last else used
    whole, rest = np.divmod(batches.steps_of(examples), np.maximum(-(-epoch // size), 1))
    return whole * epoch + rest * size


def devices(faults: Faults, seed: int, ids: np.ndarray) -> Devices:
    """What clients `ids`, (n,) int64, have: a function of (seed, client)."""
    if not faults.devices:
        return Devices(np.ones(len(ids)), np.zeros(len(ids)), np.zeros(len(ids)))
    shares = np.cumsum([device.share for device in faults.devices])
    kind = np.searchsorted(shares[:-1], uniforms(fold(seed, "device"), ids) * shares[-1], side="right")
    rows = [(d.slowdown, d.spread, _per_byte(d.down_mbps), _per_byte(d.up_mbps)) for d in faults.devices]
    slowdown, spread, down, up = np.asarray(rows)[kind].T
    return Devices(slowdown * np.exp(spread * _normal(fold(seed, "slowdown"), ids)), down, up)


def durations(
    faults: Faults, seed: int, visits: tuple[Visit, ...], ids: np.ndarray, examples: np.ndarray
) -> np.ndarray:
    """Virtual seconds until clients `ids` that have so many examples report, (n,) float64; they have no waiting."""
    own = devices(faults, seed, ids)
    seconds = np.zeros(len(ids))
    for visit in visits:
        training = examples_read(visit.batches, examples) * faults.seconds_per_example * own.slowdown
        seconds += visit.down * own.down + training + visit.up * own.up
    return seconds


def turnout(
    faults: Faults, seed: int, round: int, cohort: int, ids: np.ndarray, able: np.ndarray, seconds: np.ndarray
) -> Turnout:
    """Who of the asked clients `ids`, (n,) int64, counts. able: (n,) bool, has a batch. seconds: (n,), of its visit."""
    dropped = able & (uniforms(fold(seed, "dropout", round), ids) < faults.dropout)
    order = np.lexsort((uniforms(fold(seed, "tie", round), ids), seconds))
    first = order[(able & ~dropped)[order]][:cohort]
    deadline = faults.deadline or math.inf
    counted = first[seconds[first] <= deadline]
    complete = len(counted) == min(cohort, np.count_nonzero(able))
    closed = seconds[counted].max(initial=0.0) if complete or deadline == math.inf else deadline
    stays = ~able
    stays[counted] = True
    gone = np.count_nonzero(dropped)
    late = np.count_nonzero(able) - gone - len(counted)
    return Turnout(len(ids), ids[stays], int(gone), int(late), float(closed))


def _per_byte(megabits_per_second: float) -> float:
    return 8e-6 / megabits_per_second if megabits_per_second else 0.0


def _normal(key: int, ids: np.ndarray) -> np.ndarray:
    """Standard normal numbers, one per client (Box and Muller 1958)."""
    radius = np.sqrt(-2.0 * np.log(1.0 - uniforms(fold(key, "radius"), ids)))
    return radius * np.cos(2.0 * np.pi * uniforms(fold(key, "angle"), ids))
