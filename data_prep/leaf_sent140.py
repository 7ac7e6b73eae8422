"""Sentiment140 by LEAF: tweets by user, positive or not, as sequences of words.

What to put where: --source is the folder data/sent140/data that data/sent140/preprocess.sh of
https://github.com/TalwalkarLab/leaf fills, e.g. with `./preprocess.sh -s niid --sf 1.0 -k 0 -t sample`; in it
    train/*.json  test/*.json
or one folder of all_data.json, which becomes the split "train".
A client is a user. A tweet is its first 25 words and marks . , ! ? ; in lower case. The vocabulary, PAD 0, the 10,000
most frequent words from 3 on, and 10003 for any other, comes from --word-counts or from counting split train first.
Column y is 1 for a positive tweet and 0 for others.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep import leaf, words
from data_prep.conversion import Conversion
from data_prep.text import PAD, id_table, symbols, word_ids
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

WORD = re.compile(r"[\w']+|[.,!?;]")
TEXT = 4
"""Place of the text among a tweet's fields: id, date, query, user, text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are, which words to know, and how much of a tweet to keep."""
    leaf.add_source(parser)
    words.add_arguments(parser)
    parser.add_argument("--length", type=int, default=25, help="words of a tweet (default: 25)")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files, list their users, and settle the vocabulary."""
    if options.length < 1:
        raise UserError(f"--length {options.length}: a tweet has at least 1 word")
    files = leaf.find(options.source, "sent140")
    vocabulary, chosen = words.vocabulary(options, files["train"], partial(leaf.count_words, words_of))
    known = symbols(vocabulary)
    return Conversion(
        features={
            "x": Feature("uint16", (options.length,), classes=len(known), names=known, pad=PAD),
            "y": Feature("uint8", (), classes=2, names=("negative", "positive")),
        },
        splits=leaf.splits(files, partial(to_columns, table=id_table(vocabulary), length=options.length)),
        provenance={
            "source": "Sentiment140, A. Go et al. (2009), by user as in LEAF, JSON: S. Caldas et al. (2018)",
            "made": f"a tweet's first {options.length} words in lower case; {chosen}; y 0: negative or neutral",
            "licence": "none is stated by its authors; LEAF is BSD 2-Clause",
        },
    )


def to_columns(x: list, y: list, path: Path, user: str, table: dict[str, int], length: int) -> Columns:
    """Turn tweets into x uint16 (n, length), y uint8 (n,)."""
    tokens = np.full((len(x), length), PAD, np.uint16)
    for row, text in zip(tokens, _texts(x, path, user)):
        ids = word_ids(_words(text)[:length], table)
        row[: len(ids)] = ids
    return {"x": tokens, "y": leaf.labels(y, 2, path, user)}


def words_of(x: list, path: Path, user: str) -> Iterator[str]:
    """All words of a user's tweets."""
    return chain.from_iterable(map(_words, _texts(x, path, user)))


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _texts(x: list, path: Path, user: str) -> Iterator[str]:
    for row, fields in enumerate(x):
        if not isinstance(fields, list) or len(fields) <= TEXT or not isinstance(fields[TEXT], str):
            raise leaf.wrong(path, user, row, f"is {fields!r:.60}, must be [id, date, query, user, text, ...]")
        yield fields[TEXT]
