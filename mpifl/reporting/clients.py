"""How a model serves single clients: a histogram and percentiles of each figure, where they were recorded."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from mpifl.reporting.markup import card, number, table
from mpifl.reporting.runs import Run
from mpifl.reporting.svg import histogram_svg

PERCENTILES = (5, 10, 25, 50, 75, 90, 95)


def client_section(runs: Sequence[Run]) -> Iterator[str]:
    """What is recorded, and by which command what is missing is."""
    yield "<h2>Scores of single clients</h2>"
    by_figure: dict[str, dict[str, np.ndarray]] = {}
    for run in runs:
        for model, columns in run.clients.items():
            who = ", ".join(([run.name] if len(runs) > 1 else []) + ([model] if len(run.clients) > 1 else []))
            for name, values in columns.items():
                by_figure.setdefault(name, {})[who] = values
    for name in sorted(by_figure, key=lambda name: "loss" in name):
        yield _figure(name, by_figure[name])
    if missing := [run for run in runs if not run.clients]:
        yield card(_not_recorded(missing))


def _figure(name: str, of: dict[str, np.ndarray]) -> str:
    lowest, highest = (float(end(np.concatenate([*of.values()]))) for end in (np.min, np.max))
    drawn = [
        f"<figure><figcaption>{escape(who)}</figcaption>{histogram_svg(values, name, lowest, highest)}</figure>"
        for who, values in of.items()
    ]
    lines = [
        [who, *_percentiles(values), number(float(values.mean())), f"{len(values):,}"] for who, values in of.items()
    ]
    head = ["", "lowest", *(f"{p} %" for p in PERCENTILES), "highest", "mean", "clients"]
    what = '<p class="soft">How many clients have which value; below, what so many percent have at most.</p>'
    return card(f'<h3>{escape(name)}</h3>{what}<div class="charts">{"".join(drawn)}</div>{table(head, lines)}')


def _percentiles(values: np.ndarray) -> list[str]:
    return [number(float(value)) for value in np.percentile(values, (0, *PERCENTILES, 100))]


def _not_recorded(runs: Sequence[Run]) -> str:
    finished = [shlex.quote(str(run.path)) for run in runs if run.finished]
    going = [run.name for run in runs if not run.finished]
    commands = "".join(f"<li><code>python -m mpifl.evaluate {escape(path)}</code></li>" for path in finished)
    said = f"<p>Not recorded. What records them, before another report:</p><ul>{commands}</ul>" if finished else ""
    later = f"<p>Not recorded while a run is unfinished: {escape(', '.join(going))}.</p>" if going else ""
    return said + later
