"""The report as one HTML page that needs nothing else: what was reached, curves, time, clients, the runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mpifl import __version__
from mpifl.console import LONGEST_VECTOR
from mpifl.reporting.clients import client_section
from mpifl.reporting.figures import rows
from mpifl.reporting.markup import card, duration, figure, folded, moved, number, table
from mpifl.reporting.runs import Group, Run, differing
from mpifl.reporting.times import phase_tones, rank_bars, time_section

MARK = '<meta name="generator" content="mpifl.report">'
"""By this a file is known as a report, which another one may replace."""


def page(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """Return the whole page."""
    name = " · ".join(dict.fromkeys(str(run.job.get("name", run.name)) for run in runs))
    folder = Path(__file__).parent
    style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    tones = phase_tones(runs)
    sections = [*_head(name, runs), *_comparison(runs, groups), *_curves(groups), *time_section(groups, tones)]
    sections += [*client_section(runs), *_runs(runs, tones)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} – mpifl report</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(sections)
        + f"\n<footer>Written by mpifl {__version__} on {time.strftime('%Y-%m-%d at %H:%M')}.</footer>\n"
        f'<div id="read-out"></div>\n<script>\n{script}</script>\n</body></html>\n'
    )


def _head(name: str, runs: Sequence[Run]) -> Iterator[str]:
    yield f"<header><h1>{escape(name)}</h1>"
    yield f'<p class="soft">{_of(runs)}</p></header>'
    if len(runs) == 1 and runs[0].done:
        yield _tiles(runs[0])
    if notes := [_note(run) for run in runs if not run.finished or run.unread]:
        yield card("".join(notes), "notice")


def _of(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        left = sum(not run.finished for run in runs)
        return f"{len(runs)} runs" + (f', <span class="state unfinished">{left} unfinished</span>' if left else "")
    kind = "" if runs[0].finished else " unfinished"
    return f'<span class="state{kind}">{escape(runs[0].state)}</span> · <code>{escape(str(runs[0].path))}</code>'


def _tiles(run: Run) -> str:
    tiles = [(name, number(run.last(f"scores/{name}"))) for name in run.scores if "/" not in name][:4]
    tiles += [("training loss", number(run.last("loss"))), ("rounds", f"{run.done:,}")]
    tiles += [(name, value) for name, value in _effort(run).items() if name in ("time in rounds", "imbalance")]
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles)
    return f'<div class="tiles">{cells}</div>'


def _effort(run: Run) -> dict[str, str]:
    """What a run took: seconds and bytes of its rounds, and how even its hosts were."""
    return {
        "time in rounds": duration(run.parts("seconds").get("total", 0.0)),
        "bytes moved": moved(*(float(np.nansum(run.column(name))) for name in ("bytes_down", "bytes_up"))),
        "imbalance": f"{np.nanmean(run.column('imbalance')):.2f}" if run.done else "–",
    }


def _note(run: Run) -> str:
    """How far an unfinished run went, when, and what ended it."""
    lines = [f"<b>{escape(run.name)}</b>: {escape(run.state)}."]
    if not run.finished:
        lines.append(f"Last written on {time.strftime('%Y-%m-%d at %H:%M:%S', time.localtime(run.changed))}.")
    if run.checkpoint:
        lines.append(f"Its newest checkpoint is <code>{escape(run.checkpoint)}</code>.")
    if run.unread:
        lines.append(f"Lines of metrics.jsonl that cannot be read: {run.unread}.")
    return f"<p>{' '.join(lines)}</p>" + "".join(f"<pre>{escape(text[:4000])}</pre>" for text in run.failures[-1:])


# ---- comparison


def _comparison(runs: Sequence[Run], groups: Sequence[Group]) -> Iterator[str]:
    if len(runs) == 1:
        return
    yield "<h2>Comparison</h2>"
    names = list(dict.fromkeys(name for run in runs for name in run.scores if "/" not in name))
    if any(len(group.runs) > 1 for group in groups):
        lines = [[group.name, *(_spread(group, f"scores/{name}") for name in names)] for group in groups]
        caption = "<p class='soft'>Last scores: mean ± standard deviation over seeds.</p>"
        yield card(table(["", *names], lines) + caption)
    efforts = [_effort(run) for run in runs]
    keys = differing(runs)
    head = ["run", *names, "rounds", *efforts[0], "state"]
    lines = []
    for run, effort in zip(runs, efforts):
        state = "finished" if run.finished else "unfinished"
        scores = [number(run.last(f"scores/{name}")) for name in names]
        lines.append([run.name, *scores, f"{run.done:,}", *effort.values(), state])
    yield card(table(head, lines))
    lines = [[key, *(_values(group, key) for group in groups)] for key in keys]
    lines += [[name, *values] for name, values in _other_circumstances(groups).items()]
    same = "<p>The jobs differ in nothing but their folders.</p>"
    yield card("<h3>What differs</h3>" + (table(["", *(group.name for group in groups)], lines) if lines else same))


def _spread(group: Group, column: str) -> str:
    values = np.array([run.last(column) for run in group.runs])
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return number(float(values[0])) if len(values) else "–"
    return f"{number(float(values.mean()))} ± {number(float(values.std(ddof=1)))}"


def _values(group: Group, key: str) -> str:
    return _joined(_said(run.job.get(key, "–")) for run in group.runs)


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _joined(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _other_circumstances(groups: Sequence[Group]) -> dict[str, list[str]]:
    """What differs apart from the job: ranks, machines, data, versions."""
    of = {run.name: _circumstances(run) for group in groups for run in group.runs}
    names = dict.fromkeys(name for about in of.values() for name in about)
    differ = [name for name in names if len({about[name] for about in of.values() if name in about}) > 1]
    return {name: [_joined(of[run.name].get(name, "–") for run in group.runs) for group in groups] for name in differ}


def _circumstances(run: Run) -> dict[str, str]:
    summary = run.summary
    of_data = {"data": summary["dataset"][:12]} if summary.get("dataset") else {}
    machine = {"hardware": summary["hardware"]} if summary.get("hardware") else {}
    return {"ranks": str(run.ranks)} | machine | of_data | (summary.get("versions") or {})


def _versions(run: Run) -> str:
    versions = run.summary.get("versions") or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "–"


# ---- curves and time


def _curves(groups: Sequence[Group]) -> Iterator[str]:
    drawn = rows(groups)
    yield "<h2>Curves</h2>"
    if not drawn:
        yield card("<p>No round is finished yet.</p>")
        return
    notes = [
        "Time is that of the rounds, with scoring. Bytes are payload that rank 0 sent and received, scoring apart."
    ]
    if any(len(group.runs) > 1 for group in groups):
        notes.append(
            "Over seeds: the mean, in a band from the lowest to the highest, of the rounds that all seeds have."
        )
    if any(not run.column("bytes_down").any() for group in groups for run in group.runs):
        notes.append("A run in one process moves no bytes.")
    yield f'<p class="soft">{" ".join(notes)}</p>'
    yield from (figure(row, legend=len(row.lines) > 1) for row in drawn)


# ---- runs


def _runs(runs: Sequence[Run], tones: Mapping[str, int]) -> Iterator[str]:
    yield f"<h2>{'The run' if len(runs) == 1 else 'The runs'}</h2>"
    for run in runs:
        facts = table([], [[name, value] for name, value in _facts(run) if value], "words")
        about = facts + rank_bars(run, tones)
        if len(runs) > 1:
            about = f"<h3>{escape(run.name)}</h3>{folded('about the run', about)}"
        yield card(f"{about}{folded('job file', f'<pre>{escape(run.text)}</pre>')}")


_COUNTED = {
    "clients that failed": "excluded",
    "clients that dropped out": "dropped",
    "clients that came late": "late",
    "asks repeated": "repeated_asks",
}
"""Named on the page where there are any."""


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    summary = run.summary
    yield "state", run.state
    yield "folder", str(run.path)
    yield "seed", str(run.job.get("seed", ""))
    yield from _effort(run).items()
    hosts = "hosts" if run.hosts > 1 else "host"
    yield "ranks", f"1 server + {run.hosts} {hosts}" if run.ranks > 1 else "1, server and host"
    examples, steps = (np.nansum(run.column(name)) for name in ("examples", "steps"))
    yield "trained on", f"{examples:,.0f} examples in {steps:,.0f} steps"
    for name, column in _COUNTED.items():
        count = float(np.nansum(run.column(column)))
        yield name, f"{count:,.0f}" if count else ""
    virtual = float(np.nansum(run.column("virtual_seconds")))
    yield "virtual time of clients", duration(virtual) if virtual else ""
    yield from ((f"baseline: {name}", number(value)) for name, value in (summary.get("baselines") or {}).items())
    for name, value in (summary.get("scores") or {}).items():
        vector = isinstance(value, list) and all(isinstance(part, float) for part in value)
        if vector and len(value) <= LONGEST_VECTOR:
            yield name, ", ".join(map(number, value))
    yield "hardware", str(summary.get("hardware", ""))
    yield "versions", _versions(run) if summary else ""
    yield "digest", str(summary.get("digest", ""))
    yield "digest of client memory", str(summary.get("memory_digest", ""))
    yield "digest of the data", str(summary.get("dataset", ""))
