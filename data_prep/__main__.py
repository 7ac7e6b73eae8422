"""`python -m data_prep NAME ...`: convert a source into a dataset of shards, and say what came out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from data_prep import digits, mnist
from mpifl.config import UserError, choice
from mpifl.data.shard import Dataset

CONVERTERS = {"digits": digits, "mnist": mnist}


class Parser(argparse.ArgumentParser):
    """argparse, with every mistake on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one converter and return the exit status: 0, or 2 for what the user can mend."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and not arguments[0].startswith("-"):
            choice(arguments[0], CONVERTERS, "converter")
        options = _parser().parse_args(arguments)
        CONVERTERS[options.name].convert(options)
        print(summary(options.out))
    except (UserError, OSError) as error:
        print(f"python -m data_prep: {error}", file=sys.stderr)
        return 2
    return 0


def summary(path: Path) -> str:
    """Describe a finished dataset with labels in column `y`: where it is, its splits, clients and sizes."""
    dataset = Dataset(path)
    lines = [f"dataset: {path}"]
    for split in dataset.splits:
        line = f"  {split}: {dataset.total(split):,} examples, "
        if dataset.central(split):
            lines.append(line + "central")
            continue
        sizes = dataset.sizes(split)
        labels = [len(np.unique(dataset.client(split, index)["y"])) for index in range(len(sizes))]
        lines.append(line + f"{len(sizes):,} clients; {_spread('size', sizes)}; {_spread('labels per client', labels)}")
    dataset.close()
    return "\n".join(lines)


def _spread(what: str, values: Sequence[int]) -> str:
    return f"{what} min {min(values)}, median {np.median(values):g}, max {max(values)}"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m data_prep",
        description="Convert a source into a dataset of shards.\n\n"
        + "\n".join(f"{name}: {module.__doc__}" for name, module in CONVERTERS.items()),
        epilog="python -m data_prep NAME --help lists a converter's options",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, module in CONVERTERS.items():
        command = commands.add_parser(
            name,
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the dataset, to be made")
        module.add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
