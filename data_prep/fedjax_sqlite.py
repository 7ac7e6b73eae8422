"""FedJAX's SQLite files: EMNIST, Shakespeare, Stack Overflow, CIFAR-100, or any that its builder wrote.

What to put where: into --source, for each --kind
    emnist         federated_emnist_train.sqlite  federated_emnist_test.sqlite
                   (--only-digits: federated_emnist_digitsonly_train.sqlite and _test.sqlite)
    shakespeare    shakespeare_train.sqlite  shakespeare_test.sqlite
    stackoverflow  stackoverflow_train.sqlite  stackoverflow_held_out.sqlite  stackoverflow_test.sqlite
    cifar100       federated_cifar100_train.sqlite  federated_cifar100_test.sqlite
from folders emnist, shakespeare and stackoverflow of https://storage.googleapis.com/gresearch/fedjax/; those of
CIFAR-100 are what fedjax.datasets.cifar100.load_data() leaves in ~/.cache/fedjax. Files of other names are given by
--train FILE and --test FILE; with --kind plain, any that SQLiteFederatedDataBuilder wrote, whose columns of numbers are
kept as they are. The other kinds become what tff-emnist, tff-shakespeare, tff-stackoverflow and tff-cifar100 make of
the same data (see their --help). Clients are in order of their ids; a split with no clients but those of train has
them all.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from data_prep import fedjax, tff_cifar100, tff_emnist, tff_shakespeare, tff_stackoverflow, words
from data_prep.conversion import Conversion
from data_prep.tff import TEXT, Content
from mpifl.config import UserError, choice
from mpifl.data.shard import Columns, Feature

OPTIONS: dict[str, dict[str, Any]] = {
    "emnist": {"only_digits": False, "invert": False},
    "shakespeare": {"length": 80},
    "stackoverflow": {"length": 20, "vocabulary": None, "word_counts": None, "max_sentences": None},
    "cifar100": {"crop": tff_cifar100.SIDE},
    "plain": {"columns": None, "classes": None},
}
"""Kinds of file, and the options that only some have, with what they are if not given."""
STEMS = {
    "emnist": "emnist/federated_emnist",
    "shakespeare": "shakespeare/shakespeare",
    "stackoverflow": "stackoverflow/stackoverflow",
    "cifar100": "cifar100/federated_cifar100",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are, what is in them, and what to make of it."""
    parser.add_argument("--kind", required=True, choices=OPTIONS, help="what is in the files")
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder of files with the names above")
    parser.add_argument("--train", type=Path, metavar="FILE", help="file of split train, instead of --source")
    parser.add_argument("--test", type=Path, metavar="FILE", help="file of split test")
    parser.add_argument("--only-digits", action="store_true", default=None, help="emnist: the ten digits")
    parser.add_argument("--invert", action="store_true", default=None, help="emnist: store 1 - x, as FedJAX has it")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: shakespeare 80, stackoverflow 20)")
    words.add_arguments(parser)
    parser.add_argument("--max-sentences", type=int, help="stackoverflow: a client's first so many only (default: all)")
    parser.add_argument("--crop", type=int, help="cifar100: side of the centre to keep (default: 32, all)")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="plain: the columns to keep (default: all)")
    parser.add_argument("--classes", type=int, help="plain: column y holds labels 0 to CLASSES - 1")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files, list their clients, and see what is in them."""
    own = OPTIONS[options.kind]
    for name in sorted(set().union(*OPTIONS.values())):
        if getattr(options, name) is None:
            setattr(options, name, own.get(name))
        elif name not in own:
            kinds = " and ".join(kind for kind, names in OPTIONS.items() if name in names)
            raise UserError(f"--{name.replace('_', '-')} is for --kind {kinds}, not {options.kind}")
    paths = _paths(options)
    content = _content(options, paths["train"])
    return content.conversion(fedjax.splits(paths, content, options.shard_mb), fedjax.FILES)


def _content(options: argparse.Namespace, train: Path) -> Content:
    if options.kind == "emnist":
        return tff_emnist.characters(options.only_digits, options.invert)
    if options.kind == "shakespeare":
        return tff_shakespeare.snippets(options.length)
    if options.kind == "cifar100":
        return tff_cifar100.cropped(options.crop)
    rows = fedjax.rows_of_clients(train)
    if options.kind == "plain":
        return _plain(options, train, next(iter(rows.values())))
    count = partial(tff_stackoverflow.count_words, partial(fedjax.clients, train))
    return tff_stackoverflow.posts(options, fedjax.pieces(list(rows.items()), train), count)


def _paths(options: argparse.Namespace) -> dict[str, Path]:
    if (options.source is None) == (options.train is None) or (options.test and not options.train):
        raise UserError("give --source, or else --train and perhaps --test")
    if options.source and options.kind == "plain":
        raise UserError("--kind plain has files of any name: give --train, and perhaps --test")
    if options.source:
        paths, fetch = _published(options)
    else:
        paths = {"train": options.train} | ({"test": options.test} if options.test else {})
        fetch = "--help says which files there are, and where"
    for path in paths.values():
        if not path.is_file():
            is_folder = options.source is None or options.source.is_dir()
            what = f"there is no file {path}" if is_folder else f"--source {options.source} is no folder"
            raise UserError(f"{what}; {fetch}")
    return paths


def _published(options: argparse.Namespace) -> tuple[dict[str, Path], str]:
    """Files by the names they were published under, and where to get them."""
    folder, stem = STEMS[options.kind].split("/")
    stem += "_digitsonly" if options.only_digits else ""
    names = ("train", "held_out", "test") if options.kind == "stackoverflow" else ("train", "test")
    paths = {name: options.source / f"{stem}_{name}.sqlite" for name in names}
    if options.kind == "cifar100":
        return paths, "fedjax.datasets.cifar100.load_data() leaves it in ~/.cache/fedjax, to be given as --source"
    urls = " ".join(f"{fedjax.BUCKET}{folder}/{path.name}" for path in paths.values())
    return paths, f"fetch {urls} and give their folder as --source"


def _plain(options: argparse.Namespace, path: Path, row: int) -> Content:
    """Keep columns of numbers as they are, by those of the client in that row."""
    found = fedjax.layout_of(path, row)
    names = options.columns or list(found)
    for name in names:
        choice(name, found, f"column of {path.name}")
    if texts := [name for name in names if found[name][0] == TEXT]:
        numbers = " ".join(name for name in names if name not in texts)
        instead = f"give --columns {numbers}" if numbers else "there is no other"
        raise UserError(f"{path}: column '{texts[0]}' is text, which has no plain form; {instead}")
    classes = options.classes
    if classes is not None and classes < 1:
        raise UserError(f"--classes {classes}: must be at least 1")
    if classes and "y" not in names:
        raise UserError(f"--classes {classes}: {path.name} has no column y, but {', '.join(names)}")
    layout = {name: found[name] for name in names}
    return Content(
        layout=layout,
        features={name: Feature(*kind, classes=classes if name == "y" else None) for name, kind in layout.items()},
        convert=_as_it_is,
        source=path.name,
        made=f"columns {', '.join(names)} as they are",
        licence="not given",
    )


def _as_it_is(client: str, found: dict[str, Any], path: Path) -> Columns:
    return found
