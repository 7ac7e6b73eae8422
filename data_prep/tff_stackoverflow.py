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
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data_prep import tff
from data_prep.conversion import Conversion
from data_prep.text import FIRST, PAD, id_table, most_frequent, sentences, symbols, word_ids
from data_prep.writing import cores
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

ARCHIVE, COUNTS_ARCHIVE = "stackoverflow.tar.bz2", "stackoverflow.word_count.tar.bz2"
DOMAINS = ("question", "answer")
MOST_WORDS = 2**16 - FIRST - 1  # ids are uint16, and one is OOV's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are, which words to know, and how much of sentences and clients to keep."""
    parser.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder of the HDF5 files")
    parser.add_argument("--word-counts", type=Path, metavar="FILE", help="counts of words (default: count them)")
    parser.add_argument("--vocabulary", type=int, default=10000, help="number of words to know (default: 10000)")
    parser.add_argument("--length", type=int, default=20, help="tokens of a sequence (default: 20)")
    parser.add_argument("--max-sentences", type=int, help="a client's first so many only (default: all)")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files, list their clients, and settle the vocabulary."""
    _check(options)
    names = ("train", "held_out", "test")
    paths = {name: tff.find(options.source, f"stackoverflow_{name}.h5", ARCHIVE) for name in names}
    if options.word_counts is None:
        counts, counted = count_train(paths["train"], options.jobs or cores()), "split train"
    else:
        counts, counted = read_counts(options.word_counts), options.word_counts.name
    vocabulary = most_frequent(counts, options.vocabulary)
    known = symbols(vocabulary)
    tokens = Feature("uint16", (options.length,), classes=len(known), names=known, pad=PAD)
    cap = "all sentences" if options.max_sentences is None else f"a client's first {options.max_sentences} sentences"
    return Conversion(
        features={"x": tokens, "y": tokens, "domain_id": Feature("uint8", (), classes=2, names=DOMAINS)},
        splits=tff.splits(
            paths, partial(read, vocabulary=vocabulary, length=options.length, most=options.max_sentences)
        ),
        provenance={
            "source": "Stack Overflow, TensorFlow Federated, HDF5: sentences by user, from the Stack Overflow Data "
            "on Kaggle",
            "made": f"the {len(vocabulary)} most frequent words by {counted}, PAD 0, BOS 1, EOS 2, OOV "
            f"{len(known) - 1}; BOS, words, EOS cut to {options.length + 1} tokens; {cap}; domain_id: question 0, "
            "answer 1",
            "licence": "CC BY-SA 3.0",
        },
    )


def _check(options: argparse.Namespace) -> None:
    if not 1 <= options.vocabulary <= MOST_WORDS:
        raise UserError(f"--vocabulary {options.vocabulary}: must be 1 to {MOST_WORDS} words")
    if options.length < 1:
        raise UserError(f"--length {options.length}: a sequence has at least 1 token")
    if options.max_sentences is not None and options.max_sentences < 1:
        raise UserError(f"--max-sentences {options.max_sentences}: must be at least 1")


def read(
    ids: Iterable[str], path: Path, vocabulary: tuple[str, ...], length: int, most: int | None
) -> Iterator[tuple[str, Columns]]:
    """Yield each user's sentences: x, y uint16 (n, length), domain_id uint8 (n,)."""
    table = id_table(vocabulary)
    layout: tff.Layout = {"tokens": (tff.TEXT, ()), "type": (tff.TEXT, ())}
    for client, columns in tff.clients(path, ids, layout, most):
        words = (words_of(sentence, length) for sentence in columns["tokens"])
        x, y = sentences((word_ids(row, table) for row in words), length, "uint16")
        yield client, {"x": x, "y": y, "domain_id": domains(columns["type"], path, client)}


def words_of(sentence: str, most: int = -1) -> list[str]:
    """Words of a sentence as TFF separates them, by single spaces; what follows the first `most` is one item."""
    return sentence.split(" ", most) if sentence else []


def domains(types: list[str], path: Path, client: str) -> np.ndarray:
    """Number the types of posts, (n,) uint8; UserError naming client and row for one that is none of DOMAINS."""
    for row, name in enumerate(types):
        if name not in DOMAINS:
            raise UserError(f"{path}: client {client!r}, row {row} has type {name!r}; types are {', '.join(DOMAINS)}")
    return np.array([DOMAINS.index(name) for name in types], np.uint8)


def count_train(path: Path, jobs: int) -> dict[str, int]:
    """Count the words of a file's sentences with so many processes; in order of words, each in memory once."""
    parts, count = tff.pieces(tff.client_ids(path), path), partial(count_words, path=path)
    jobs = min(jobs, len(parts))
    total: Counter[str] = Counter()
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for counts in pool.map(count, parts) if jobs > 1 else map(count, parts):
            total.update(counts)
    return dict(sorted(total.items()))


def count_words(ids: Iterable[str], path: Path) -> Counter[str]:
    """Count the words of some clients' sentences."""
    counts: Counter[str] = Counter()
    for _, columns in tff.clients(path, ids, {"tokens": (tff.TEXT, ())}):
        for sentence in columns["tokens"]:
            counts.update(words_of(sentence))
    return counts


def read_counts(path: Path) -> dict[str, int]:
    """Read counts of words, in the order of the file; UserError naming the line that is no word and count."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; fetch {tff.BUCKET}{COUNTS_ARCHIVE} and unpack it")
    try:
        with path.open(encoding="utf-8") as file:
            is_json = file.read(1) == "{"
            file.seek(0)
            counts = json.load(file) if is_json else _counts_of_lines(file, path)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as counts of words ({error})") from None
    for word, count in counts.items():
        if type(count) is not int or count < 0:
            raise UserError(f"{path}: word {word!r} has count {count!r}; counts are integers, 0 or more")
    return counts


def _counts_of_lines(lines: Iterable[str], path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        word, count = fields if len(fields := line.split()) == 2 else ("", "")
        if not count.isdecimal():
            raise UserError(f"{path}: line {number} is not a word and its count: {line.strip()!r:.60}")
        if word in counts:
            raise UserError(f"{path}: line {number} counts {word!r}, which an earlier line did")
        counts[word] = int(count)
    return counts
