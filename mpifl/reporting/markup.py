"""Pieces of the page: numbers for people, tables, charts with their legends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from mpifl.console import readable_bytes
from mpifl.reporting.figures import Row
from mpifl.reporting.svg import chart_svg, style_of


def number(value: float) -> str:
    """Format a score: four decimals, fewer for large and more for small ones; an en dash for none."""
    if not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 4 - max(0, len(str(int(abs(value)))) - 1))}f}"


def duration(seconds: float) -> str:
    """Format seconds in the units that people would use."""
    if seconds < 0.9995:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moved(down: float, up: float) -> str:
    """Format bytes moved, which one process has none of."""
    return f"{readable_bytes(down)} down, {readable_bytes(up)} up" if down or up else "none"


def table(head: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of plain text that scrolls by itself where the page is narrower."""
    titles = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="scroll"><table class="{kind}">{titles}{rows}</table></div>'


def card(inside: str, kind: str = "") -> str:
    """A framed part of the page."""
    return f'<div class="card {kind}">{inside}</div>'


def folded(title: str, inside: str) -> str:
    """What is shown when asked for."""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def figure(row: Row, legend: bool) -> str:
    """A row of charts under its title."""
    charts = "".join(chart_svg(chart) for chart in row.charts)
    return f'<figure class="card"><h3>{escape(row.title)}</h3>{_legend(row) if legend else ""}{_grid(charts)}</figure>'


def _grid(charts: str) -> str:
    return f'<div class="charts">{charts}</div>'


def _legend(row: Row) -> str:
    sample = '<svg viewBox="0 0 26 10"><path class="line {}" d="M0 5H26"/></svg>'
    items = "".join(f"<li>{sample.format(style_of(line.tone))}{escape(line.label)}</li>" for line in row.lines)
    return f'<ul class="legend">{items}</ul>'
