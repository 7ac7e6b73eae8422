"""The report's other files: the numbers of every round as CSV, and the curves as a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpifl.config import UserError
from mpifl.reporting.figures import Chart, Row
from mpifl.reporting.runs import Run
from mpifl.reporting.svg import TONES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST_COLUMNS = ("run", "seed", "round", "seconds so far", "bytes so far")
SOFTWARE = "mpifl.report"
"""What the picture names as its maker."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")
"""Those of page.css in the light: Okabe and Ito's, told apart by colour-blind readers."""
DASHES = ("-", (0, (6, 3)), (0, (2, 3)))


def curves_csv(runs: Sequence[Run]) -> str:
    """All rounds of all runs, a line each: what metrics.jsonl has as numbers, and sums of seconds and bytes."""
    names = list(dict.fromkeys(name for run in runs for name in run.columns if name != "round"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST_COLUMNS, *names])
    for run in runs:
        sums = run.summed("seconds/total"), run.summed("bytes_down", "bytes_up")
        columns = [run.columns["round"], *sums, *(run.column(name) for name in names)]
        for values in zip(*(column.tolist() for column in columns)):
            writer.writerow([run.name, run.job.get("seed", ""), *map(_cell, values)])
    return text.getvalue()


def _cell(value: float) -> str | int | float:
    return "" if math.isnan(value) else int(value) if value.is_integer() and abs(value) < 2**53 else value


def curves_png(rows: Sequence[Row], path: Path) -> None:
    """Draw the curves, a row each. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need a package: pip install matplotlib") from None
    across = max(len(row.charts) for row in rows)
    figure = Figure(figsize=(4.4 * across, 3.0 * len(rows)), layout="constrained", dpi=150)
    for row, places in zip(rows, figure.subplots(len(rows), across, squeeze=False)):
        for place in places[len(row.charts) :]:
            place.set_axis_off()
        for chart, place in zip(row.charts, places):
            _draw(chart, place)
        if len(row.lines) > 1:
            places[0].legend(fontsize=8, frameon=False)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": SOFTWARE})


def _draw(chart: Chart, place: Axes) -> None:
    for line in chart.lines:
        colour, dash = COLOURS[line.tone % TONES], DASHES[line.tone // TONES % 3]
        marker = "o" if len(line.x) <= 40 else None
        place.plot(
            line.x, line.y, color=colour, linestyle=dash, linewidth=1.6, marker=marker, markersize=3, label=line.label
        )
        if line.low is not None:
            place.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
    place.set_xlabel(chart.x_label)
    place.set_ylabel(chart.y_label)
    place.grid(color="#e8ebef")
    if chart.logarithmic:
        place.set_yscale("log")
    for side in ("top", "right"):
        place.spines[side].set_visible(False)
