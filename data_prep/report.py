"""How a dataset's examples and labels lie over its clients: a table, and a picture.

Sizes come from the index. Labels are read: of all clients, or, evenly over a split that has more, of 10,000 or so
many as hold 1 GiB.
"""

from __future__ import annotations

import argparse
import io
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.random import RandomState

from mpifl.config import UserError, choice
from mpifl.data.shard import Dataset, Feature

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_READ, MOST_BYTES = 10_000, 1 << 30
MOST_SHOWN = 50
# Paul Tol's "muted" scheme: told apart by colour-blind readers; classes beyond make a heat map.
COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#BBBBBB")
BLUE = "#4477AA"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which dataset, and what to draw."""
    parser.add_argument("dataset", type=Path, metavar="DIR", help="folder of a dataset")
    parser.add_argument("--png", type=Path, metavar="FILE", help="picture to draw: labels per client, sizes of clients")
    parser.add_argument("--label", metavar="COLUMN", help="column of labels, or of token sequences (default: y)")


def run(options: argparse.Namespace) -> None:
    """Print the report of `options.dataset`."""
    dataset = Dataset(options.dataset)
    try:
        if options.label is not None:
            choice(options.label, dataset.features, "column")
        print(report(dataset, options.png, options.label or "y"))
        if options.png is not None:
            print(f"picture   {options.png}")
    finally:
        dataset.close()


def drawing(path: Path) -> str:
    """Say by which command a dataset is drawn."""
    return f"python -m data_prep report {path} --png FILE draws it (with matplotlib)"


def report(dataset: Dataset, picture: Path | None = None, label: str = "y") -> str:
    """Return a table, a line per split, and draw split train (or the first with clients) as a PNG to `picture`.

    The effective number of classes of a client is exp(entropy of its label distribution, in nats): k if it has k
    labels equally often (Hill 1973, order 1). A column of sequences is counted in tokens instead; without such a
    column there are only sizes. Raises UserError if there is nothing to draw, or matplotlib is missing.
    """
    tallies = {split: _tally(dataset, split, label) for split in dataset.splits}
    if picture is not None:
        owned = [split for split in dataset.splits if not dataset.central(split) and dataset.total(split)]
        if not owned:
            problem = "no split has clients with examples, so there is nothing to draw"
            raise UserError(f"{dataset.path}: {problem}; leave out --png")
        split = "train" if "train" in owned else owned[0]
        _draw(dataset, split, label, tallies[split], picture)
    return "\n".join([*_table(dataset, label, tallies), *_notes(dataset, label, tallies)])


class Tally(NamedTuple):
    """What was read of a split: effective classes or tokens of each non-empty client, and of all of them together."""

    of_clients: np.ndarray
    of_all: float
    read: int


def _kind(feature: Feature | None) -> str:
    """What a column is counted in: "classes", "tokens", or nothing."""
    if feature is not None and feature.pad is not None:
        return "tokens"
    return "classes" if feature is not None and feature.classes and not feature.shape else ""


def _tally(dataset: Dataset, split: str, label: str) -> Tally:
    feature = dataset.features.get(label)
    kind, sizes = _kind(feature), dataset.sizes(split)
    sample = _sample(len(sizes), _most_read(dataset, split)) if kind else np.arange(0)
    columns = (dataset.client(split, index)[label] for index in sample[sizes[sample] > 0])
    if kind == "tokens":
        tokens = np.array([np.count_nonzero(rows != feature.pad) for rows in columns], float)
        return Tally(tokens, tokens.sum(), len(sample))
    whole, found = np.zeros(feature.classes if kind else 1), []
    for rows in columns:
        counts = np.bincount(rows, minlength=len(whole))
        whole += counts
        found.append(effective_number(counts))
    return Tally(np.array(found), effective_number(whole), len(sample))


def effective_number(counts: np.ndarray) -> float:
    """exp(entropy in nats) of the distribution that `counts` (classes,) stand for; 0.0 if they are all 0."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def _most_read(dataset: Dataset, split: str) -> int:
    """How many clients to read: a client comes with all its columns, and of large ones a few must do."""
    row = sum(np.dtype(feature.dtype).itemsize * math.prod(feature.shape) for feature in dataset.features.values())
    clients = len(dataset.sizes(split)) * MOST_BYTES // max(1, row * dataset.total(split))
    return min(max(clients, MOST_SHOWN), MOST_READ)


def _sample(clients: int, most: int) -> np.ndarray:
    """At most so many clients, ascending: one at random from each of as many equal ranges."""
    borders = np.arange(min(clients, most) + 1) * clients // max(1, min(clients, most))
    return RandomState(0).randint(borders[:-1], borders[1:])


def _table(dataset: Dataset, label: str, tallies: dict[str, Tally]) -> Iterator[str]:
    kind = _kind(dataset.features.get(label))
    named = {"classes": "effective classes", "tokens": "tokens"}.get(kind)
    header = ["split", "clients", "empty", "examples", "examples per client"]
    lines = [header + ([f"{named} per client", "overall"] if named else [])]
    for split, tally in tallies.items():
        sizes, central = dataset.sizes(split), dataset.central(split)
        line = [split, "central", "", f"{dataset.total(split):,}", ""]
        if not central:
            line = [split, f"{len(sizes):,}", f"{(sizes == 0).sum():,}", line[3], _spread(sizes, 0)]
        if named:
            digits = 1 if kind == "classes" else 0
            line += ["" if central else _spread(tally.of_clients, digits), f"{tally.of_all:,.{digits}f}"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *rest in lines:
        cells = [f"{first:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:]))]
        yield "  ".join(cells).rstrip()


def _notes(dataset: Dataset, label: str, tallies: dict[str, Tally]) -> Iterator[str]:
    feature = dataset.features.get(label)
    yield "per client: min / median / max"
    if _kind(feature) == "classes":
        yield f"effective classes: exp(entropy) of column {label} ({feature.classes} classes), of clients with examples"
    if not _kind(feature):
        yield f"there is no column {label} of labels or token sequences, so these are sizes only"
    for split, tally in tallies.items():
        clients = len(dataset.sizes(split))
        if 0 < tally.read < clients:
            what = "blocks" if dataset.central(split) else "clients"
            read = f"{tally.read:,} of {clients:,} {what}, evenly spread (seed 0)"
            yield f"{split}: column {label} was read of {read}; what is said of it is of those"


def _spread(values: np.ndarray, digits: int) -> str:
    """Minimum, median and maximum; the median of an even number of integers may end on a half."""
    if not len(values):
        return "none"
    median = f"{np.median(values):,.1f}"
    middle = median if digits else median.removesuffix(".0")
    return f"{values.min():,.{digits}f} / {middle} / {values.max():,.{digits}f}"


def _draw(dataset: Dataset, split: str, label: str, tally: Tally, picture: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise UserError('pictures are drawn by matplotlib, which is missing: pip install -e ".[prep]"') from None
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure, png = _figure(dataset, split, label, tally), io.BytesIO()
        try:
            figure.savefig(png, format="png", dpi=200)
            picture.write_bytes(png.getvalue())  # at once: not half of it, if interrupted
        except OSError as error:
            raise UserError(f"{picture} cannot be written ({error.strerror}); choose another --png") from None


def _figure(dataset: Dataset, split: str, label: str, tally: Tally) -> Figure:
    """Labels or tokens of clients on the left, where there are any; sizes on the right."""
    from matplotlib.figure import Figure

    kind = _kind(dataset.features.get(label))
    figure = Figure(figsize=(10 if kind else 5, 4), layout="constrained")
    *left, right = figure.subplots(1, 2 if kind else 1, width_ratios=(3, 2) if kind else None, squeeze=False)[0]
    if kind == "classes":
        _draw_labels(left[0], dataset, split, label)
    elif kind == "tokens":
        _draw_histogram(left[0], tally.of_clients.astype(np.int64), f"tokens per client (column {label})")
    _draw_histogram(right, dataset.sizes(split), "examples per client")
    figure.suptitle(_title(dataset, split, 150 if kind else 75), fontsize="medium")
    return figure


def _title(dataset: Dataset, split: str, width: int) -> str:
    """Which dataset this is and how it was made, in lines of at most so many characters."""
    made = textwrap.wrap(str(dataset.provenance.get("made", "")), width, max_lines=3, placeholder=" ...")
    return "\n".join([f"{dataset.path.resolve().name}, split {split}", *made])


def _draw_labels(axes: Axes, dataset: Dataset, split: str, label: str) -> None:
    """Label distributions of up to 50 clients, smallest client first: bars, or a heat map for many classes.

    Clients all of one size are in their own order, and have no sizes on the axis.
    """
    feature, sizes = dataset.features[label], dataset.sizes(split)
    order = np.argsort(sizes, kind="stable")
    order = order[np.searchsorted(sizes[order], 1) :]
    shown = order[np.linspace(0, len(order) - 1, min(len(order), MOST_SHOWN)).round().astype(int)]
    counts = [np.bincount(dataset.client(split, i)[label], minlength=feature.classes) for i in shown]
    shares = np.array([count / count.sum() for count in counts]).reshape(len(shown), feature.classes).T
    names = [name[:16] for name in feature.names or map(str, range(feature.classes))]
    (_draw_bars if feature.classes <= len(COLOURS) else _draw_heat)(axes, shares, names)
    those, smallest, largest = f"{len(shown):,} of {len(sizes):,} clients", sizes[shown[0]], sizes[shown[-1]]
    if smallest == largest:
        axes.set_xticks([])
        axes.set_xlabel(f"{those}, each with {largest:,} examples")
        return
    ticks = np.unique(np.linspace(0, len(shown) - 1, min(6, len(shown))).round().astype(int))
    axes.set_xticks(ticks, [f"{sizes[shown[tick]]:,}" for tick in ticks])
    axes.set_xlabel(f"examples of the client ({those}, smallest first)")


def _draw_bars(axes: Axes, shares: np.ndarray, names: list[str]) -> None:
    bottoms = np.cumsum(shares, axis=0) - shares
    places = np.arange(shares.shape[1])
    bars = [
        axes.bar(places, heights, 0.9, bottom=bottom, color=colour)
        for heights, bottom, colour in zip(shares, bottoms, COLOURS)
    ]
    axes.set(xlim=(-0.7, shares.shape[1] - 0.3), ylim=(0, 1), ylabel="share of the client's examples")
    axes.legend(bars, names, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handlelength=1, reverse=True)


def _draw_heat(axes: Axes, shares: np.ndarray, names: list[str]) -> None:
    from matplotlib.colors import PowerNorm

    # By its square root, or small shares would look like none beside a client of one example.
    norm = PowerNorm(0.5, vmin=0)
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="Blues", origin="lower", norm=norm)
    step = -(-len(names) // 24)
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.set_ylabel("class")
    axes.figure.colorbar(image, ax=axes, label="share of the client's examples", pad=0.02)


def _draw_histogram(axes: Axes, values: np.ndarray, what: str) -> None:
    """Histogram of counts; empty clients are stated, as a logarithmic axis has no 0."""
    some = values[values > 0]
    empty = len(values) - len(some)
    if len(some) and some.max() >= 100 * some.min():
        # A bin per power of two: bins of one width on this axis, and none between two integers.
        axes.hist(
            some, 2.0 ** np.arange(np.log2(some.min()) // 1, np.log2(some.max()) // 1 + 2), color=BLUE, ec="white"
        )
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")
    elif len(some):
        width = (some.max() - some.min()) // 40 + 1
        edges = np.arange(some.min(), some.max() + width + 1, width) - 0.5
        axes.hist(some, edges, color=BLUE, rwidth=0.9)
        axes.set_xlim(edges[0] - width, edges[-1] + width)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=what, ylabel="clients")
    if empty:
        axes.set_title(f"without {empty:,} empty clients", fontsize="medium")
