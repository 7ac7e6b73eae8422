"""Benchmarks: `python -m mpifl.bench FAMILY`; with no family, it lists them.

A family is a module: its docstring says what is measured, `add_arguments` adds its options to a parser, and `cases`
yields what it finds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO

import torch

from mpifl.bench import data, gpu, messages, peers, rounds, scale, step
from mpifl.bench.cases import Case, count
from mpifl.comm import Alone, World
from mpifl.config import UserError, choice
from mpifl.console import Console
from mpifl.launch import Parser, agree, command
from mpifl.results import hardware, versions

FAMILIES = {"step": step, "round": rounds, "comm": messages, "data": data, "scale": scale, "peers": peers, "gpu": gpu}
CASE_WIDTH = 36


def report(family: str, cases: Iterator[Case], comm: World | Alone, file: TextIO | None) -> None:
    """Print a table of the cases, each row when it is measured, and write them to `file` as JSON lines.

    The names of figures are printed whenever they are others than those of the row before.
    """
    console, shown = Console(), None
    machine = {"versions": versions(comm.library), "hardware": hardware(torch.device("cpu"))}
    for case in cases:
        figures = {name: value for name, value in case.items() if isinstance(value, int | float) and name != "stored"}
        if shown != [*figures]:
            shown = [*figures]
            console.say(f"{family:<{CASE_WIDTH}}" + "".join(f"{_words(name):>{_width(name)}}" for name in figures))
        row = "".join(f"{_figure(value):>{_width(name)}}" for name, value in figures.items())
        console.say(f"{case['case']:<{CASE_WIDTH}}{row}")
        if file and not case.get("stored"):
            print(json.dumps({"family": family} | case | machine), file=file, flush=True)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _width(name: str) -> int:
    return max(12, len(name) + 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return command(_command, arguments)


def _command(comm: World | Alone, arguments: Sequence[str]) -> None:
    name, *rest = arguments or ["--help"]
    if name.startswith("-"):
        _general_parser().read(comm, arguments or ["--help"])
        return
    family = agree(comm, lambda: FAMILIES[choice(name, FAMILIES, "benchmark")])
    parser = Parser(
        prog=f"python -m mpifl.bench {name}",
        description=family.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=count, default=15, help="runs of each contestant (default 15)")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per case to FILE")
    family.add_arguments(parser)
    options = parser.read(comm, rest)
    if options is None:
        return
    with agree(comm, lambda: _opened(options.json if comm.rank == 0 else None)) as file:
        if comm.rank == 0:
            report(name, family.cases(options), comm, file)


def _general_parser() -> Parser:
    listed = [f"  {name:<8}{family.__doc__.splitlines()[0]}" for name, family in FAMILIES.items()]
    return Parser(
        prog="python -m mpifl.bench",
        usage="python -m mpifl.bench FAMILY [options]",
        description="\n".join(["Measure a family of cases:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _opened(path: str | None) -> AbstractContextManager[TextIO | None]:
    try:
        return Path(path).open("a", encoding="utf-8") if path else nullcontext()
    except OSError as error:
        raise UserError(f"--json is '{path}', which cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
