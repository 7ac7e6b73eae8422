"""Charts as SVG that takes its colours from the page around it, and as data for the read-out under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from mpifl.reporting.figures import Chart, Line, log_ticks, span, tick_label, ticks

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 10, 40
APART = 8.0
"""Pixels: a line whose points are so far apart also shows them one by one."""
DIGIT = 6.6
"""Pixels of a digit of a tick, about."""
TONES = 7
"""Colours; lines beyond them have the same ones again, dashed."""


class Plane:
    """Maps values to the pixels of a chart."""

    def __init__(self, left: float, right: float, low: float, high: float, logarithmic: bool = False) -> None:
        self.left, self.right, self.logarithmic = left, right, logarithmic
        self.low, self.high = (math.log10(low), math.log10(high)) if logarithmic else (low, high)

    def x(self, values: np.ndarray | float) -> np.ndarray | float:
        """Pixels from the left."""
        return LEFT + (values - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, values: np.ndarray | float) -> np.ndarray | float:
        """Pixels from the top, within the frame."""
        if self.logarithmic:
            values = np.log10(np.maximum(values, 10**self.low))
        return HEIGHT - BOTTOM - (values - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def chart_svg(chart: Chart) -> str:
    """Draw a chart's axes and lines."""
    left, right, low, high = span(chart)
    plane = Plane(left, right, low, high, chart.logarithmic)
    levels = log_ticks(low, high) if chart.logarithmic else ticks(low, high)
    levels = levels if len(levels) > 1 else ticks(low, high)
    steps = ticks(left, right, chart.whole)
    bands = [_band(line, plane) for line in chart.lines if line.low is not None]
    parts = [*_levels(levels, plane, chart.logarithmic), *_steps(steps, plane), *bands]
    parts += [_line(line, plane) for line in chart.lines]
    title = f"{chart.y_label} against {chart.x_label}"
    return _svg(title, [*parts, _label(chart.x_label)], _read_out(chart, plane))


def histogram_svg(values: np.ndarray, label: str, low: float, high: float, bins: int = 20) -> str:
    """Draw how many of `values`, (n,), fall into each of so many equal ranges from low to high."""
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    counts, edges = np.histogram(values, bins, (low, high))
    plane = Plane(low, high, 0.0, 1.08 * float(counts.max()))
    x, y = plane.x(edges), plane.y(counts)
    bars = [
        f'<rect class="bar" x="{a:.1f}" y="{top:.1f}" width="{max(0.5, b - a - 1):.1f}" '
        f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{count:,} from {first:.4g} to {last:.4g}</title></rect>'
        for a, b, top, count, first, last in zip(x, x[1:], y, counts, edges, edges[1:])
    ]
    levels = ticks(0.0, 1.08 * float(counts.max()), whole=True)
    parts = [*_levels(levels, plane), *bars, *_steps(ticks(low, high), plane), _label(label)]
    return _svg(f"clients by {label}", parts)


def _svg(title: str, parts: Sequence[str], data: str = "") -> str:
    start = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    inside = "".join(parts)
    return f"{start}{data}>{inside}</svg>"


def _levels(levels: Sequence[float], plane: Plane, logarithmic: bool = False) -> list[str]:
    """Horizontal lines of the grid, and what they stand for."""
    step, parts = levels[1] - levels[0] if len(levels) > 1 else 0.0, []
    for level in levels:
        y, text = plane.y(level), f"{level:,.6g}" if logarithmic else tick_label(level, step)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    return parts


def _steps(steps: Sequence[float], plane: Plane) -> list[str]:
    step, floor = steps[1] - steps[0] if len(steps) > 1 else 0.0, HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>']
    for value in steps:
        x, text = plane.x(value), tick_label(value, step)
        inside = min(x, WIDTH - 1 - DIGIT * len(text) / 2)  # the last one would be cut off
        parts.append(f'<path class="axis" d="M{x:.1f} {floor}v4"/>')
        parts.append(f'<text class="tick" x="{inside:.1f}" y="{floor + 16}" text-anchor="middle">{text}</text>')
    return parts


def _label(text: str) -> str:
    """What is on the axis below; what is on the other one stands above the chart."""
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(text)}</text>'


def style_of(tone: int) -> str:
    """Classes of a line, or of its sample in a legend."""
    dash = tone // TONES % 3
    return f"c{tone % TONES}" + (f" dash{dash}" if dash else "")


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))


def _line(line: Line, plane: Plane) -> str:
    x, y = plane.x(line.x), plane.y(line.y)
    if len(x) == 1:
        return f'<circle class="dot {style_of(line.tone)}" cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="3.5"/>'
    drawn = f'<path class="line {style_of(line.tone)}" d="{_path(x, y)}"/>'
    if x[-1] - x[0] >= APART * (len(x) - 1):
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y))
        drawn += f'<path class="dots {style_of(line.tone).split()[0]}" d="{dots}"/>'
    return drawn


def _band(line: Line, plane: Plane) -> str:
    x = plane.x(line.x)
    around = _path(np.concatenate([x, x[::-1]]), plane.y(np.concatenate([line.high, line.low[::-1]])))
    return f'<path class="band {style_of(line.tone).split()[0]}" d="{around}Z"/>'


def _read_out(chart: Chart, plane: Plane) -> str:
    """What page.js needs to say what is under the pointer: values as they are, and where the axes lie."""
    lines = [
        [line.label, line.tone % TONES, [float(f"{v:.7g}") for v in line.x], [float(f"{v:.5g}") for v in line.y]]
        for line in chart.lines
    ]
    frame = [plane.left, plane.right, LEFT, RIGHT, TOP, BOTTOM]
    data = {"axes": [chart.x_label, chart.y_label], "frame": frame, "lines": lines}
    return f' data-chart="{escape(json.dumps(data, separators=(",", ":")))}"'
