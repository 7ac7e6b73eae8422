"""Where the time of runs went: bars by phase, of rank 0, of the hosts together, and of single ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import chain

from mpifl.reporting.figures import rows_of_time
from mpifl.reporting.markup import card, duration, figure, folded, table
from mpifl.reporting.runs import Group, Run
from mpifl.reporting.svg import TONES

Bars = Mapping[str, Mapping[str, float]]
"""Label -> part -> seconds."""
OTHER, GREY = "other", 7
"""What is not told apart, and its tone."""
SMALL = 0.005
"""Shares below it are not told apart."""
MOST_RANKS = 32
"""Bars of single ranks, the busiest first."""


def time_section(groups: Sequence[Group], tones: Mapping[str, int]) -> Iterator[str]:
    """Phases of rank 0 and of hosts, seconds of each round and imbalance."""
    done = [group for group in groups if all(run.done for run in group.runs)]
    if not done:
        return
    server = {group.name: _mean(_server(run) for run in group.runs) for group in done}
    hosts = {group.name: _mean(_hosts(run) for run in group.runs) for group in done}
    mean = ", mean over seeds" if any(len(group.runs) > 1 for group in done) else ""
    yield "<h2>Where the time went</h2>"
    yield card(f"<h3>Rank 0, by phase{mean}</h3>{_stacks(server, tones)}{_as_table(server)}")
    rest = f'<p class="soft">{OTHER}: waiting, network and scoring</p>'
    yield card(f"<h3>All hosts together{mean}</h3>{_stacks(hosts, tones)}{rest}{_as_table(hosts)}")
    charts = "".join(figure(row, legend=len(row.lines) > 1) for row in rows_of_time(done))
    yield f'<div class="pair">{charts}</div>'


def rank_bars(run: Run, tones: Mapping[str, int]) -> str:
    """Seconds of each rank, where the run was profiled."""
    ranks = run.rank_seconds
    if not ranks:
        return '<p class="soft">Seconds of single ranks: not recorded; <code>run.profile=true</code> records them.</p>'
    shown = dict(list(ranks.items())[:MOST_RANKS])
    left = len(ranks) - len(shown)
    more = f'<p class="soft">{left} more in profile/phases.txt</p>' if left else ""
    return f"<h3>Seconds of each rank, the busiest host first</h3>{_stacks(shown, tones, scaled=True)}{more}"


def phase_tones(runs: Iterable[Run]) -> dict[str, int]:
    """Phase -> tone, the same on all bars: the larger its largest share, the earlier; none for what is always small."""
    shares: dict[str, float] = {}
    for parts in chain.from_iterable((_server(run), _hosts(run), *run.rank_seconds.values()) for run in runs):
        for name, share in _shares(parts).items():
            shares[name] = max(shares.get(name, 0.0), share)
    large = [name for name, share in shares.items() if share >= SMALL and name not in (OTHER, "rest")]
    return {name: tone for tone, name in enumerate(sorted(large, key=lambda name: -shares[name])[:TONES])}


def _server(run: Run) -> dict[str, float]:
    return {phase: seconds for phase, seconds in run.parts("seconds").items() if phase != "total"}


def _hosts(run: Run) -> dict[str, float]:
    busy, total = run.parts("host_seconds"), run.hosts * run.parts("seconds").get("total", 0.0)
    return busy | {OTHER: max(0.0, total - sum(busy.values()))}


def _mean(of_runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    each = list(of_runs)
    return {name: sum(parts.get(name, 0.0) for parts in each) / len(each) for name in dict.fromkeys(chain(*each))}


def _shares(parts: Mapping[str, float]) -> dict[str, float]:
    total = sum(parts.values()) or 1.0
    return {name: seconds / total for name, seconds in parts.items()}


def _stacks(bars: Bars, tones: Mapping[str, int], scaled: bool = False) -> str:
    """Bars and a legend; scaled: as long as their seconds, otherwise all the same, showing shares."""
    longest = max(sum(parts.values()) for parts in bars.values()) or 1.0
    rows, seen = [], {}
    for label, parts in bars.items():
        total = sum(parts.values())
        width = 100 * total / longest if scaled else 100.0
        segments = {name: parts[name] for name in tones if parts.get(name)}
        segments |= {OTHER: rest} if (rest := total - sum(segments.values())) > 1e-3 * total else {}
        inside = "".join(
            f'<i class="b{tones.get(name, GREY)}" style="width:{width * share:.2f}%" '
            f'title="{escape(name)}: {duration(segments[name])}, {100 * share:.1f} %"></i>'
            for name, share in _shares(segments).items()
        )
        name = escape(label) if len(bars) > 1 else ""
        rows.append(f"<span>{name}</span><div>{inside}</div><span>{duration(total)}</span>")
        seen |= segments
    named = (name for name in [*tones, OTHER] if name in seen)
    legend = "".join(f'<li><i class="b{tones.get(name, GREY)}"></i>{escape(name)}</li>' for name in named)
    return f'<ul class="legend">{legend}</ul><div class="stack">{"".join(rows)}</div>'


def _as_table(bars: Bars) -> str:
    most = {name: max(parts.get(name, 0.0) for parts in bars.values()) for name in dict.fromkeys(chain(*bars.values()))}
    names = sorted(most, key=lambda name: -most[name])
    lines = []
    for label, parts in bars.items():
        shares = _shares(parts)
        lines.append(
            [label, *(f"{duration(parts.get(n, 0.0))} ({100 * shares.get(n, 0.0):.1f}\u00a0%)" for n in names)]
        )
    return folded("as a table", table(["", *names], lines))
