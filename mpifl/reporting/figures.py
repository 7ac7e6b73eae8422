"""What a report draws, apart from how: lines with their axes, from the columns of runs, thinned to what can be seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mpifl.reporting.runs import Group, Run

POINTS = 400
"""Points of a line at most."""
WIDE = 1000.0
"""Losses whose largest is so many times the smallest have a logarithmic axis."""
MOST_TICKS = 6


@dataclass(frozen=True)
class Line:
    """One line of a chart. x, y: (points,). low, high: (points,), a band around it. tone: index of its colour."""

    label: str
    x: np.ndarray
    y: np.ndarray
    tone: int = 0
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over one axis, which is in units of what `x_label` says; whole: only whole numbers are on it."""

    y_label: str
    x_label: str
    lines: tuple[Line, ...]
    whole: bool = False
    logarithmic: bool = False


@dataclass(frozen=True)
class Row:
    """The same figure against rounds, seconds and bytes, as far as there is something to draw."""

    title: str
    charts: tuple[Chart, ...]

    @property
    def lines(self) -> tuple[Line, ...]:
        """What a legend lists."""
        return self.charts[0].lines


def rows(groups: Sequence[Group]) -> list[Row]:
    """Scores and losses of all runs; scores of single models, called metric/model, share a row by metric."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.scores)
    titled: dict[str, list[str]] = {}
    for name in names:
        metric, _, model = name.partition("/")
        titled.setdefault(f"{metric} of each model" if model else name, []).append(f"scores/{name}")
    titled["training loss"] = ["loss"]
    return _rows(titled, groups, (_ROUNDS, _SECONDS, _BYTES))


def rows_of_time(groups: Sequence[Group]) -> list[Row]:
    """Seconds of each round, and imbalance of the hosts, against rounds."""
    return _rows({"seconds per round": ["seconds/total"], "imbalance": ["imbalance"]}, groups, (_ROUNDS,))


def _rows(titled: dict[str, list[str]], groups: Sequence[Group], axes: Sequence[_Axis]) -> list[Row]:
    found = [Row(title, tuple(_chart(title, names, groups, axis) for axis in axes)) for title, names in titled.items()]
    return [replace(row, charts=charts) for row in found if (charts := tuple(c for c in row.charts if c.lines))]


@dataclass(frozen=True)
class _Axis:
    """What lines are drawn against. unit: largest value -> (its name, what to divide by)."""

    label: str
    values: Callable[[Run], np.ndarray]
    unit: Callable[[float], tuple[str, float]]
    whole: bool = False


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit that fits a time, and its seconds."""
    units = [("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)]
    return next((unit for unit in units if seconds >= 2 * unit[1]), ("seconds", 1.0))


def byte_unit(count: float) -> tuple[str, float]:
    """Return the binary unit that fits a number of bytes, and its bytes."""
    units = [("TiB", 1024.0**4), ("GiB", 1024.0**3), ("MiB", 1024.0**2), ("KiB", 1024.0)]
    return next((unit for unit in units if count >= unit[1]), ("bytes", 1.0))


_ROUNDS = _Axis("round", lambda run: run.column("round"), lambda _: ("", 1.0), whole=True)
_SECONDS = _Axis("time in rounds", lambda run: run.summed("seconds/total"), time_unit)
_BYTES = _Axis("moved, down and up", lambda run: run.summed("bytes_down", "bytes_up"), byte_unit)


def _chart(title: str, columns: Sequence[str], groups: Sequence[Group], axis: _Axis) -> Chart:
    pairs = [(group, column) for group in groups for column in columns]
    made = [_line(group, column, axis, tone) for tone, (group, column) in enumerate(pairs)]
    named = [replace(line, label=_label(*pair, groups, columns)) for line, pair in zip(made, pairs) if line.x.any()]
    unit, size = axis.unit(max((float(line.x.max()) for line in named), default=0.0))
    lines = tuple(replace(line, x=line.x / size) for line in named)
    label = f"{axis.label} ({unit})" if unit else axis.label
    return Chart(title.removesuffix(" of each model"), label, lines, axis.whole, _wide(title, lines))


def _label(group: Group, column: str, groups: Sequence[Group], columns: Sequence[str]) -> str:
    models = [column.split("/")[2]] if column.count("/") > 1 else []
    return ", ".join(([group.name] if len(groups) > 1 or not models else []) + models)


def _line(group: Group, column: str, axis: _Axis, tone: int) -> Line:
    """A run's values; of more the mean, and a band from lowest to highest, in the rounds that all of them have."""
    have = [~np.isnan(run.column(column)) for run in group.runs]
    common = group.runs[0].columns["round"][have[0]]
    for run, mask in zip(group.runs[1:], have[1:]):
        common = np.intersect1d(common, run.columns["round"][mask])
    at = [np.searchsorted(run.columns["round"], common) for run in group.runs]
    x = np.mean([axis.values(run)[rounds] for run, rounds in zip(group.runs, at)], axis=0)
    values = np.array([run.column(column)[rounds] for run, rounds in zip(group.runs, at)])
    y = values.mean(axis=0)
    kept = thinned(y)
    if len(values) == 1:
        return Line("", x[kept], y[kept], tone)
    return Line("", x[kept], y[kept], tone, values.min(axis=0)[kept], values.max(axis=0)[kept])


def thinned(values: np.ndarray, most: int = POINTS) -> np.ndarray:
    """Ascending indices of at most so many of values, (n,): both ends, and each stretch's lowest and highest."""
    if len(values) <= most:
        return np.arange(len(values))
    borders = np.linspace(1, len(values) - 1, (most - 2) // 2 + 1).astype(int)
    stretches = [(first, values[first:last]) for first, last in pairwise(borders)]
    inner = [first + index for first, part in stretches for index in (int(part.argmin()), int(part.argmax()))]
    return np.unique([0, *inner, len(values) - 1])


def _wide(title: str, lines: Sequence[Line]) -> bool:
    """Whether a loss has grown, or fallen, so far that a linear axis would show one end of it only."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines]) if lines else np.empty(0)
    return "loss" in title and len(values) > 0 and 0 < values.min() < values.max() / WIDE


def span(chart: Chart) -> tuple[float, float, float, float]:
    """Return (left, right, bottom, top) of a chart's axes: all of its lines and bands, and never of no width."""
    x = np.concatenate([line.x for line in chart.lines])
    parts = [part for line in chart.lines for part in (line.y, line.low, line.high) if part is not None]
    y = np.concatenate(parts)
    y = y[np.isfinite(y) & (y > 0)] if chart.logarithmic else y[np.isfinite(y)]
    left, right = (0.0 if x.min() < 0.2 * x.max() else float(x.min())), float(x.max())
    low, high = (float(y.min()), float(y.max())) if len(y) else (0.0, 1.0)
    if chart.logarithmic:
        return left, right if right > left else left + 1, low / 1.2, high * 1.2
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return left, right if right > left else left + 1, low - room if low - room > 0 or low < 0 else 0.0, high + room


def ticks(low: float, high: float, whole: bool = False, most: int = MOST_TICKS) -> list[float]:
    """Round numbers within an axis, at most so many, evenly: 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * number for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = MOST_TICKS) -> list[float]:
    """Powers of ten within an axis, or every second, third ... of them."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    return [10.0**power for power in range(first, last + 1, max(1, -(-(last - first + 1) // most)))]


def tick_label(value: float, step: float) -> str:
    """Format a tick so that neighbours, `step` apart, differ, without digits that do not."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return f"{value:,.{digits}f}"
