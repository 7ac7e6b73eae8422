"""Schedules: how a learning rate, or any other number of a job, changes from round to round.

Each may begin with a linear warm-up: round t < warmup gives (t + 1) / warmup of the first value, so that the
last round of the warm-up has the whole of it. The schedule proper starts after that, at its own beginning:
round t >= warmup gives what it gives without warm-up at round t - warmup. Only `cosine` still ends at the
round it was told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

from mpifl.config import UserError

LARGEST = 3.4e38
"""Of numbers that training is given, which computes in float32."""

Schedule = Callable[[int], float]
"""Round, 0-based -> value."""


def checked(option: str, value: float, allowed: str, holds: Callable[[float], bool]) -> float:
    """Return `value` if it is a number of float32 for which `holds` is true, else raise UserError.

    `allowed` says in words which numbers those are, e.g. "a number in [0, 1)".
    """
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and holds(value):
        if abs(value) <= LARGEST:
            return value
        allowed = f"a number up to {LARGEST:g}, the largest of float32"
    raise UserError(f"{option} = {value!r} is not allowed: give {allowed}")


def constant(value: float, warmup: int = 0) -> Schedule:
    """Return the schedule that stays at `value`; warmup: rounds of linear ramp towards it."""
    _check_finite("value", value)
    return _after_warmup(lambda round: value, warmup)


def step(value: float, every: int, factor: float, warmup: int = 0) -> Schedule:
    """Return the schedule value * factor**(round // every), counted after the warm-up; factor in (0, 1]."""
    _check_finite("value", value)
    _check_whole("every", every, least=1)
    checked("factor", factor, "a number above 0, at most 1", lambda number: 0 < number <= 1)
    return _after_warmup(lambda round: value * factor ** (round // every), warmup)


def cosine(value: float, rounds: int, final: float = 0.0, warmup: int = 0) -> Schedule:
    """Return the half cosine from `value`, after the warm-up, to `final` (Loshchilov and Hutter 2017, eq. 5).

    `final` is reached at round rounds - 1 and held from there on; `rounds` includes the warm-up.
    """
    _check_finite("value", value)
    _check_finite("final", final)
    _check_whole("warmup", warmup, least=0)
    _check_whole("rounds", rounds, least=warmup + 2)  # after the warm-up, a round for each end
    span = rounds - 1 - warmup

    def schedule(round: int) -> float:
        # A weighted mean, so that both ends are met exactly.
        share = 0.5 * (1.0 + math.cos(math.pi * min(round / span, 1.0)))
        return share * value + (1.0 - share) * final

    return _after_warmup(schedule, warmup)


def _check_finite(option: str, value: float) -> None:
    checked(option, value, "a finite number", lambda number: True)


def _check_whole(option: str, value: int, least: int) -> None:
    allowed = f"a whole number, {least} or more"
    checked(option, value, allowed, lambda number: isinstance(number, Integral) and number >= least)


def _after_warmup(schedule: Schedule, warmup: int) -> Schedule:
    _check_whole("warmup", warmup, least=0)
    first = schedule(0)
    return lambda round: first * (round + 1) / warmup if round < warmup else schedule(round - warmup)
