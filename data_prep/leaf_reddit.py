"""Reddit by LEAF: comments of December 2017 by user, as sequences of words.

What to put where: --source is the folder data/reddit/data, which data/reddit/README.md of
https://github.com/TalwalkarLab/leaf says where to fetch; in it
    train/*.json  val/*.json  test/*.json
A client is a user. LEAF has cut each comment, BOS, words, EOS, into rows of 10 tokens, and its targets, the next
tokens, likewise, so that none is lost between rows; a row of x holds as many tokens as have a target. The
vocabulary, PAD 0, BOS 1, EOS 2, the 10,000 most frequent words, and 10003 for any other, comes from --word-counts or
from counting split train first (LEAF's reddit_vocab.pck is a pickle, which is not read). All splits have the same
clients in the same order.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import leaf, words
from data_prep.conversion import Conversion
from data_prep.text import BOS, EOS, PAD, id_table, symbols
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

MARKS = {"<PAD>": PAD, "<BOS>": BOS, "<EOS>": EOS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are, which words to know, and how long LEAF's rows are."""
    leaf.add_source(parser)
    words.add_arguments(parser)
    parser.add_argument("--length", type=int, default=10, help="tokens of a row in the files (default: 10)")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files, list their users, and settle the vocabulary."""
    if options.length < 1:
        raise UserError(f"--length {options.length}: a row has at least 1 token")
    files = leaf.find(options.source, "reddit")
    count = partial(leaf.count_words, partial(words_of, length=options.length))
    vocabulary, chosen = words.vocabulary(options, files["train"], count)
    known = symbols(vocabulary)
    tokens = Feature("uint16", (options.length,), classes=len(known), names=known, pad=PAD)
    convert = partial(to_columns, ids=id_table(vocabulary) | MARKS, oov=len(known) - 1, length=options.length)
    return Conversion(
        features={"x": tokens, "y": tokens},
        splits=leaf.splits(files, convert, of_all_splits=True),
        provenance={
            "source": "Reddit comments of December 2017, pushshift.io, by user as in LEAF, JSON: "
            "S. Caldas et al. (2018)",
            "made": f"LEAF's rows of {options.length} tokens, those without a target left out; {chosen}",
            "licence": "none is stated by its authors; LEAF is BSD 2-Clause",
        },
    )


def to_columns(x: list, y: list, path: Path, user: str, ids: dict[str, int], oov: int, length: int) -> Columns:
    """Turn comments in rows of tokens into x, y uint16 (rows, length)."""
    rows: list[list[str]] = []
    following: list[list[str]] = []
    for number, (comment, about) in enumerate(zip(x, y)):
        targets = about.get("target_tokens") if isinstance(about, dict) else None
        if not _is_rows(comment, length) or not _is_rows(targets, length) or len(comment) != len(targets):
            raise leaf.wrong(path, user, number, f"must be rows of {length} tokens, as many as target_tokens in y has")
        rows += comment
        following += targets
    tokens, targets = (
        np.array([[ids.get(token, oov) for token in row] for row in column], np.uint16).reshape(-1, length)
        for column in (rows, following)
    )
    tokens[targets == PAD] = PAD
    has_target = (targets != PAD).any(axis=1)
    return {"x": tokens[has_target], "y": targets[has_target]}


def words_of(x: list, path: Path, user: str, length: int) -> Iterator[str]:
    """All words of a user's comments."""
    for number, comment in enumerate(x):
        if not _is_rows(comment, length):
            raise leaf.wrong(path, user, number, f"must be rows of {length} tokens; --length says how many")
        yield from (token for row in comment for token in row if token not in MARKS)


def _is_rows(value: object, length: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == length and all(isinstance(token, str) for token in row) for row in value
    )
