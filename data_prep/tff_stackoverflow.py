"""Stack Overflow by TensorFlow Federated: sentences of questions and answers, as sequences of words.

What to put where: into --source, unpacked from
https://storage.googleapis.com/tff-datasets-public/stackoverflow.tar.bz2
(mirror: https://fedml.s3-us-west-1.amazonaws.com/stackoverflow.tar.bz2),
    stackoverflow_train.h5  stackoverflow_held_out.h5  stackoverflow_test.h5
A client is a user; splits train, held_out and test have 342,477, 38,758 and 204,088 of them. The vocabulary,
PAD 0, BOS 1, EOS 2, the 10,000 most frequent words, and 10003 for any other, comes from the published counts,
--word-counts stackoverflow.word_count (stackoverflow.word_count.tar.bz2 there: a word and its count a line; or
a JSON object), or else from counting the words of split train first. Words of one count keep the order of the
file; counted here, they are in order of their letters. A sentence is BOS, words, EOS, cut to 21 tokens, hence x
and y of 20: EOS is there if the sentence has fewer than 20 words. domain_id: question 0, answer 1.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import tff, words
from data_prep.conversion import Conversion
from data_prep.text import PAD, id_table, sentences, symbols, word_ids
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

ARCHIVE = "stackoverflow.tar.bz2"
SPLITS = ("train", "held_out", "test")
DOMAINS = ("question", "answer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are, which words to know, and how much of sentences and clients to keep."""
    parser.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder of the HDF5 files")
    words.add_arguments(parser)
    parser.add_argument("--length", type=int, default=20, help="tokens of a sequence (default: 20)")
    parser.add_argument("--max-sentences", type=int, help="a client's first so many only (default: all)")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files, list their clients, and settle the vocabulary."""
    paths = {name: tff.find(options.source, f"stackoverflow_{name}.h5", ARCHIVE) for name in SPLITS}
    train = paths["train"]
    pieces = tff.pieces(tff.client_ids(train), train)
    content = posts(options, pieces, partial(count_words, partial(tff.clients, train)))
    return content.conversion(tff.splits(paths, content, options.shard_mb), tff.FILES)


def posts(options: argparse.Namespace, pieces: Sequence[Any], count: Callable[[Any], Counter[str]]) -> tff.Content:
    """What becomes of Stack Overflow's sentences, by the options above; `count` counts the words of a piece of train.

    Raises UserError for an option out of range.
    """
    length, most = options.length, options.max_sentences
    if length < 1:
        raise UserError(f"--length {length}: a sequence has at least 1 token")
    if most is not None and most < 1:
        raise UserError(f"--max-sentences {most}: must be at least 1")
    vocabulary, chosen = words.vocabulary(options, pieces, count)
    known = symbols(vocabulary)
    tokens = Feature("uint16", (length,), classes=len(known), names=known, pad=PAD)
    return tff.Content(
        layout={"tokens": (tff.TEXT, ()), "type": (tff.TEXT, ())},
        features={"x": tokens, "y": tokens, "domain_id": Feature("uint8", (), classes=len(DOMAINS), names=DOMAINS)},
        convert=partial(to_columns, table=id_table(vocabulary), length=length),
        source="Stack Overflow: sentences by user, from the Stack Overflow Data on Kaggle",
        made=f"{chosen}; BOS, words, EOS cut to {length + 1} tokens; "
        f"{'all sentences' if most is None else f'the first {most} sentences of a client'}; domain_id: question 0, "
        "answer 1",
        licence="CC BY-SA 3.0",
        most=most,
    )


def to_columns(client: str, found: dict[str, Any], path: Path, table: dict[str, int], length: int) -> Columns:
    """Number the words of a user's sentences: x, y uint16 (n, length), domain_id uint8 (n,)."""
    rows = (word_ids(words_of(sentence, length), table) for sentence in found["tokens"])
    x, y = sentences(rows, length, "uint16")
    return {"x": x, "y": y, "domain_id": domains(found["type"], path, client)}


def words_of(sentence: str, most: int = -1) -> list[str]:
    """Words of a sentence as TFF separates them, by single spaces; what follows the first `most` is one item."""
    return sentence.split(" ", most) if sentence else []


def domains(types: list[str], path: Path, client: str) -> np.ndarray:
    """Number the types of posts, (n,) uint8; UserError naming client and row for one that is none of DOMAINS."""
    for row, name in enumerate(types):
        if name not in DOMAINS:
            raise UserError(f"{path}: client {client!r}, row {row} has type {name!r}; types are {', '.join(DOMAINS)}")
    return np.array([DOMAINS.index(name) for name in types], np.uint8)


def count_words(clients: Callable[[Any, tff.Layout], Iterable[tuple[str, dict]]], piece: Any) -> Counter[str]:
    """Count the words of the sentences of a piece, which `clients` reads."""
    counts: Counter[str] = Counter()
    for _, found in clients(piece, {"tokens": (tff.TEXT, ())}):
        for sentence in found["tokens"]:
            counts.update(words_of(sentence))
    return counts
