"""`python -m data_prep NAME ...`: convert a source into a dataset of shards; verify, describe or reshard one."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

from data_prep.conversion import Conversion
from data_prep.info import describe
from data_prep.report import drawing, report
from data_prep.workers import cores
from data_prep.writing import add_compression, key_of, write
from mpifl.comm import Alone, World
from mpifl.config import UserError, choice
from mpifl.data.format import INDEX
from mpifl.data.pieces import Storage
from mpifl.data.shard import Dataset
from mpifl.data.writer import Unfinished
from mpifl.launch import Parser, agree, command

CONVERTERS = {
    "digits": "digits",
    "mnist": "mnist",
    "emnist": "emnist",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "images": "images",
    "table": "tables",
    "hf": "hf",
    "tff-emnist": "tff_emnist",
    "tff-shakespeare": "tff_shakespeare",
    "tff-cifar100": "tff_cifar100",
    "tff-stackoverflow": "tff_stackoverflow",
    "fedjax": "fedjax_sqlite",
    "leaf-femnist": "leaf_femnist",
    "leaf-shakespeare": "leaf_shakespeare",
    "leaf-sent140": "leaf_sent140",
    "leaf-celeba": "leaf_celeba",
    "leaf-reddit": "leaf_reddit",
    "leaf-synthetic": "leaf_synthetic",
}
TOOLS = {"verify": "verify", "info": "info", "report": "report", "reshard": "reshard"}

WHERE = re.compile(r"What to put where: (.*?\S\S\.)(?=\s+[A-Z0-9]|\s*$)", re.DOTALL)
"""The first sentence of what a converter says of its sources; initials do not end it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one converter or tool; returns the exit status: 0, 2 for what the user can mend."""
    return command(_command, arguments)


def _command(comm: World | Alone, arguments: Sequence[str]) -> None:
    name, *rest = arguments or ["--help"]
    if name.startswith("-"):
        _general_parser().read(comm, arguments or ["--help"])
        return
    agree(comm, lambda: choice(name, [*CONVERTERS, *TOOLS], "converter or tool"))
    module = _module(name)
    parser = Parser(
        prog=f"python -m data_prep {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if name in CONVERTERS:
        _add_arguments(parser)
    options = parser.read(comm, rest)
    if options is None:
        return
    if name in TOOLS:
        agree(comm, lambda: module.run(options) if comm.rank == 0 else None)
        return
    _convert(comm, name, rest, options)


def _convert(comm: World | Alone, name: str, arguments: Sequence[str], options: argparse.Namespace) -> None:
    options.jobs = options.jobs or (cores() if comm.size == 1 else 1)
    unfinished = agree(comm, lambda: Unfinished(options.out))  # refuse what exists before looking at the source
    conversion = agree(comm, lambda: _module(name).prepare(options))
    asked = _without(arguments, "--out", "--jobs")
    sources = [value for value in vars(options).values() if isinstance(value, Path) and value != options.out]
    named = {source: source.absolute().name for source in sources}  # where they lay is nobody's business
    words = ["python", "-m", "data_prep", name, *(named.get(Path(word), word) for word in asked)]
    made = {"command": shlex.join(words)}
    conversion = replace(conversion, provenance=conversion.provenance | made)
    how = (options.shard_mb << 20, options.compression, conversion.standardize or "")
    storage = agree(comm, lambda: Storage(conversion.features, *how))
    pieces = [f"{split.name} {len(split.pieces)}" for split in conversion.splits]  # of another version, other ones
    key = agree(comm, lambda: key_of([name, *asked, *pieces], sources, unfinished.folder))
    try:
        write(conversion, options.out, storage, options.jobs, key, comm)
        if comm.rank == 0:
            print(describe(options.out))
            _tell_of_test(conversion, options)
            _report(options.out)
    except KeyboardInterrupt as stop:
        if not (options.out / INDEX).is_file():
            raise
        raise type(stop)(f", but {options.out} is complete; {drawing(options.out)}") from None


def _tell_of_test(conversion: Conversion, options: argparse.Namespace) -> None:
    """Tell who shares a corpus out that training will be scored on the examples that it has seen."""
    if "hold_out" not in options or any(split.name == "test" for split in conversion.splits):
        return
    ways = "--hold-out FRACTION" + (" or --test PATH" if "test" in options else "")
    print(f"no test   there is no split test, so scores will be of the training data; {ways} makes one")


def _report(path: Path) -> None:
    """Print how labels and sizes lie over clients; draw it beside the shards, if there is something to draw with."""
    drawn = importlib.util.find_spec("matplotlib") is not None
    with closing(Dataset(path)) as dataset:
        anybody = any(dataset.sizes(split).any() for split in dataset.splits if not dataset.central(split))
        picture = path / "report.png" if drawn and anybody else None
        how = drawing(path) if picture is None else f"picture   {picture}"
        try:
            table = report(dataset, picture)
        except UserError as problem:  # of the picture: the dataset is whole all the same
            table, how = report(dataset), f"no picture: {problem}"
        print(table, how, sep="\n")


def _add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("writing")
    group.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the dataset, to be made")
    group.add_argument("--jobs", type=_count, metavar="N", help="processes (default: one per core; under mpirun: 1)")
    group.add_argument("--shard-mb", type=_count, default=256, metavar="MB", help="size of a shard file (default: 256)")
    add_compression(group)


def _general_parser() -> Parser:
    def listed(names: dict[str, str]) -> list[str]:
        return [f"  {name:<18}{_module(name).__doc__.splitlines()[0]}" for name in names]

    details = [f"{name}: {WHERE.search(_module(name).__doc__)[1]}" for name in CONVERTERS]
    lines = ["python -m data_prep NAME --help says more, and lists the options of one of these.", ""]
    lines += ["Convert a source into a dataset of shards:", *listed(CONVERTERS), ""]
    lines += ["Look at a dataset, or recut it:", *listed(TOOLS), "", "What to put where:", *details]
    return Parser(
        prog="python -m data_prep",
        usage="python -m data_prep NAME [options]",
        description="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"data_prep.{(CONVERTERS | TOOLS)[name]}")


def _without(arguments: Sequence[str], *names: str) -> list[str]:
    """The arguments without these options and their values; --option=value as two words."""
    kept, skip = [], False
    for word in (part for given in arguments for part in (given.split("=", 1) if given[:2] == "--" else [given])):
        option, equals, _ = word.partition("=")
        if not skip and option not in names:
            kept.append(word)
        skip = option in names and not equals
    return kept


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
