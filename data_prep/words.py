"""The words a converter of texts knows: the most frequent, by given counts or by counting split "train" first."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.text import FIRST, most_frequent
from data_prep.tff import BUCKET
from data_prep.workers import cores, ctrl_c_blocked, workers
from mpifl.config import UserError
from mpifl.launcher import launched_rank

MOST_WORDS = 2**16 - FIRST - 1  # ids are uint16, and one is OOV's
STACKOVERFLOW = f"{BUCKET}stackoverflow.word_count.tar.bz2"
LINE = re.compile(r"([^ \t\n]+)[ \t]+([0-9]{1,18})\s*")
"""A word and its count. Words are cut at spaces alone, so there are some with other white space in them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which words to know."""
    parser.add_argument("--word-counts", type=Path, metavar="FILE", help="a word and its count a line (default: count)")
    parser.add_argument("--vocabulary", type=int, help="number of words to know (default: 10000)")


def vocabulary(
    options: argparse.Namespace, pieces: Sequence[Any], count: Callable[[Any], Counter[str]]
) -> tuple[tuple[str, ...], str]:
    """Choose the words to know, and say how in a phrase; `count` counts those of a piece of split "train"."""
    size = 10000 if options.vocabulary is None else options.vocabulary
    if not 1 <= size <= MOST_WORDS:
        raise UserError(f"--vocabulary {size}: must be 1 to {MOST_WORDS} words")
    if options.word_counts is None:
        counts, by = count_all(pieces, count, options.jobs or cores()), "split train"
    else:
        counts, by = read_counts(options.word_counts), options.word_counts.name
    if not counts:
        raise UserError(f"there is no word in {options.word_counts or by}; give --word-counts another file")
    words = most_frequent(counts, size)
    return words, f"the {len(words)} most frequent words by {by}, PAD 0, BOS 1, EOS 2, OOV {FIRST + len(words)}"


def count_all(pieces: Sequence[Any], count: Callable[[Any], Counter[str]], jobs: int) -> dict[str, int]:
    """Count with so many processes; words come in order of their letters."""
    jobs = min(jobs, len(pieces))
    if len(pieces) > 1 and launched_rank() == 0:
        print("counting the words of split train, which --word-counts FILE would spare", file=sys.stderr)
    if jobs == 1:
        return _sum(map(count, pieces))
    with workers(jobs) as pool:
        with ctrl_c_blocked():
            counted = pool.map(count, pieces)
        return _sum(counted)


def read_counts(path: Path) -> dict[str, int]:
    """Read counts of words, lines or a JSON object, in the order of the file; UserError names the line or the word."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; Stack Overflow's is in {STACKOVERFLOW}, to be unpacked")
    counts: dict[str, int] = {}
    for word, count in _pairs(path):
        if type(count) is not int or count < 0:
            raise UserError(f"{path}: word {word!r} has count {count!r:.40}; counts are integers, 0 or more")
        if word in counts:
            raise UserError(f"{path}: word {word!r} is counted twice")
        counts[word] = count
    return counts


def _pairs(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            is_json = file.read(1) == "{"
            file.seek(0)
            yield from json.load(file, object_pairs_hook=list) if is_json else _pairs_of_lines(file, path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as counts of words ({error})") from None


def _pairs_of_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(lines, 1):
        found = LINE.fullmatch(line)
        if not found:
            raise UserError(f"{path}: line {number} is not a word and its count: {line.strip()!r:.60}")
        yield found[1], int(found[2])


def _sum(counts: Iterable[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for of_piece in counts:
        total.update(of_piece)
    return dict(sorted(total.items()))
