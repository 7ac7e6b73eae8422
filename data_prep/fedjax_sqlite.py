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
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep import fedjax, words
from data_prep.conversion import Conversion
from data_prep.text import CHARACTERS, PAD, char_ids, id_table, sentences, symbols, windows, word_ids
from data_prep.tff import TEXT, Layout, labels
from data_prep.tff_cifar100 import CLASSES, SIDE
from data_prep.tff_cifar100 import LAYOUT as CIFAR100
from data_prep.tff_emnist import DOMAINS, NAMES, domain_of, levels
from data_prep.tff_emnist import LAYOUT as EMNIST
from data_prep.tff_stackoverflow import DOMAINS as TYPES
from data_prep.tff_stackoverflow import domains, words_of
from mpifl.config import UserError, choice
from mpifl.data.shard import Columns, Feature

OPTIONS = {
    "emnist": ("invert", "only_digits"),
    "shakespeare": ("length",),
    "stackoverflow": ("length", "vocabulary", "word_counts", "max_sentences"),
    "cifar100": ("crop",),
    "plain": ("columns", "classes"),
}
"""Kinds of file, and the options that only some have."""
STEMS = {
    "emnist": "emnist/federated_emnist",
    "shakespeare": "shakespeare/shakespeare",
    "stackoverflow": "stackoverflow/stackoverflow",
    "cifar100": "cifar100/federated_cifar100",
}
SNIPPETS: Layout = {"snippets": (TEXT, ())}
SENTENCES: Layout = {"tokens": (TEXT, ()), "type": (TEXT, ())}


class Kind(NamedTuple):
    """What files of a kind hold, and what becomes of it."""

    layout: Layout
    features: dict[str, Feature]
    convert: fedjax.Convert
    source: str
    made: str
    licence: str
    standardize: str | None = None


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
    parser.add_argument("--crop", type=int, help=f"cifar100: side of the centre to keep (default: {SIDE}, all)")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="plain: the columns to keep (default: all)")
    parser.add_argument("--classes", type=int, help="plain: column y holds labels 0 to CLASSES - 1")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files, list their clients, and see what is in them."""
    for name in sorted(set().union(*OPTIONS.values()) - set(OPTIONS[options.kind])):
        if getattr(options, name) is not None:
            kinds = " and ".join(kind for kind, own in OPTIONS.items() if name in own)
            raise UserError(f"--{name.replace('_', '-')} is for --kind {kinds}, not {options.kind}")
    for name in ("length", "max_sentences", "classes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    paths = _paths(options)
    kinds = {"emnist": _emnist, "shakespeare": _shakespeare, "stackoverflow": _stackoverflow, "cifar100": _cifar100}
    kind = kinds.get(options.kind, _plain)(options, paths)
    return Conversion(
        features=kind.features,
        splits=fedjax.splits(paths, kind.layout, kind.convert),
        provenance={"source": kind.source, "made": kind.made, "licence": kind.licence},
        standardize=kind.standardize,
    )


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
            raise UserError(f"there is no file {path}; {fetch}")
    return paths


def _published(options: argparse.Namespace) -> tuple[dict[str, Path], str]:
    """Files by the names they were published under, and where to get them."""
    folder, stem = STEMS[options.kind].split("/")
    stem += "_digitsonly" if options.only_digits else ""
    names = ("train", "held_out", "test") if options.kind == "stackoverflow" else ("train", "test")
    paths = {name: options.source / f"{stem}_{name}.sqlite" for name in names}
    if options.kind == "cifar100":
        return paths, "fedjax.datasets.cifar100.load_data() leaves it in ~/.cache/fedjax"
    return paths, f"fetch {' '.join(f'{fedjax.BUCKET}{folder}/{path.name}' for path in paths.values())}"


def _emnist(options: argparse.Namespace, paths: dict[str, Path]) -> Kind:
    classes = 10 if options.only_digits else 62
    background = "inverted: 255 - k stored, background 0" if options.invert else "k stored, background 255"
    return Kind(
        EMNIST,
        {
            "x": Feature("uint8", (28, 28), mean=0.0, std=255.0),
            "y": Feature("uint8", (), classes=classes, names=NAMES[:classes]),
            "domain_id": Feature("uint8", (), classes=len(DOMAINS), names=DOMAINS),
        },
        partial(_to_emnist, classes=classes, invert=bool(options.invert)),
        "Federated EMNIST, FedJAX, SQLite: G. Cohen et al. (2017), NIST Special Database 19 by writer",
        f"{classes} classes; pixels k/255, {background}; domain_id 0: writers f2100 to f2599, else 1",
        "NIST Special Database 19 is in the public domain",
    )


def _to_emnist(client: str, found: dict[str, Any], path: Path, classes: int, invert: bool) -> Columns:
    x = levels(found["pixels"], path, client)
    y = labels(found["label"], classes, path, client)
    return {"x": 255 - x if invert else x, "y": y, "domain_id": np.full(len(y), domain_of(client, path), np.uint8)}


def _shakespeare(options: argparse.Namespace, paths: dict[str, Path]) -> Kind:
    length, known = options.length or 80, symbols(CHARACTERS)
    tokens = Feature("uint8", (length,), classes=len(known), names=known, pad=PAD)
    return Kind(
        SNIPPETS,
        {"x": tokens, "y": tokens},
        partial(_to_shakespeare, length=length),
        "Shakespeare, FedJAX, SQLite: snippets of text by role; from Project Gutenberg's Complete Works, after "
        "B. McMahan et al. (2017)",
        f"each snippet in BOS ... EOS, a client's snippets joined and cut into (x, y) of {length} characters, no "
        f"transition lost; {len(known)} symbols: PAD 0, BOS 1, EOS 2, TFF's 86 characters, OOV 89",
        "public domain",
    )


def _to_shakespeare(client: str, found: dict[str, Any], path: Path, length: int) -> Columns:
    x, y = windows(map(char_ids, found["snippets"]), length)
    return {"x": x, "y": y}


def _stackoverflow(options: argparse.Namespace, paths: dict[str, Path]) -> Kind:
    length, most = options.length or 20, options.max_sentences
    train = paths["train"]
    pieces = fedjax.pieces(list(fedjax.rows_of_clients(train).items()), train)
    vocabulary, chosen = words.vocabulary(options, pieces, partial(_count_words, train))
    known = symbols(vocabulary)
    tokens = Feature("uint16", (length,), classes=len(known), names=known, pad=PAD)
    return Kind(
        SENTENCES,
        {"x": tokens, "y": tokens, "domain_id": Feature("uint8", (), classes=len(TYPES), names=TYPES)},
        partial(_to_stackoverflow, table=id_table(vocabulary), length=length, most=most),
        "Stack Overflow, FedJAX, SQLite: sentences by user, from the Stack Overflow Data on Kaggle",
        f"{chosen}; BOS, words, EOS cut to {length + 1} tokens; "
        f"{'all sentences' if most is None else f'the first {most} sentences of a client'}; domain_id: question 0, "
        "answer 1",
        "CC BY-SA 3.0",
    )


def _count_words(path: Path, piece: fedjax.Piece) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _, found in fedjax.clients(path, piece, {"tokens": (TEXT, ())}):
        for sentence in found["tokens"]:
            counts.update(words_of(sentence))
    return counts


def _to_stackoverflow(
    client: str, found: dict[str, Any], path: Path, table: dict[str, int], length: int, most: int | None
) -> Columns:
    rows = (word_ids(words_of(sentence, length), table) for sentence in found["tokens"][:most])
    x, y = sentences(rows, length, "uint16")
    return {"x": x, "y": y, "domain_id": domains(found["type"][:most], path, client)}


def _cifar100(options: argparse.Namespace, paths: dict[str, Path]) -> Kind:
    side = SIDE if options.crop is None else options.crop
    if not 1 <= side <= SIDE:
        raise UserError(f"--crop {side}: must be 1 to {SIDE}, the side of the images")
    return Kind(
        CIFAR100,
        {"x": Feature("uint8", (3, side, side)), "y": Feature("uint8", (), classes=CLASSES)},
        partial(_to_cifar100, side=side),
        "Federated CIFAR-100, FedJAX, SQLite: A. Krizhevsky (2009), shared out by S. Reddi et al. (2021)",
        f"the centre {side}x{side} of 32x32, channels first, values 0 to 255; fine labels",
        "none is stated by its authors",
        standardize="x",
    )


def _to_cifar100(client: str, found: dict[str, Any], path: Path, side: int) -> Columns:
    start = (SIDE - side) // 2
    centre = slice(start, start + side)
    x = np.ascontiguousarray(found["image"].transpose(0, 3, 1, 2)[..., centre, centre])
    return {"x": x, "y": labels(found["label"], CLASSES, path, client)}


def _plain(options: argparse.Namespace, paths: dict[str, Path]) -> Kind:
    path = paths["train"]
    found = fedjax.layout_of(path, next(iter(fedjax.rows_of_clients(path).values())))
    names = options.columns or list(found)
    for name in names:
        choice(name, found, f"column of {path.name}")
    if texts := [name for name in names if found[name][0] == TEXT]:
        numbers = " ".join(name for name in names if name not in texts)
        raise UserError(f"{path}: column '{texts[0]}' is text, which has no plain form; give --columns {numbers}")
    if options.classes and "y" not in names:
        raise UserError(f"--classes {options.classes}: {path.name} has no column y, but {', '.join(names)}")
    layout = {name: found[name] for name in names}
    return Kind(
        layout,
        {name: Feature(*kind, classes=options.classes if name == "y" else None) for name, kind in layout.items()},
        _as_it_is,
        f"{path.name}, SQLite in the layout of FedJAX",
        f"columns {', '.join(names)} as they are",
        "not given",
    )


def _as_it_is(client: str, found: dict[str, Any], path: Path) -> Columns:
    return found
