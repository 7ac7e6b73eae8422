"""The words a converter of texts knows: the most frequent, by given counts or by counting split "train" first."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_prep.text import FIRST, most_frequent
from data_prep.tff_stackoverflow import MOST_WORDS, read_counts
from mpifl.config import UserError


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
        counts, by = _count_all(pieces, count, options.jobs), "split train"
    else:
        counts, by = read_counts(options.word_counts), options.word_counts.name
    words = most_frequent(counts, size)
    return words, f"the {len(words)} most frequent words by {by}, PAD 0, BOS 1, EOS 2, OOV {FIRST + len(words)}"


def _count_all(pieces: Sequence[Any], count: Callable[[Any], Counter[str]], jobs: int | None) -> dict[str, int]:
    """Count with so many processes; words of one count come in order of their letters."""
    jobs = min(jobs or 1, len(pieces))
    if jobs == 1:
        return _sum(map(count, pieces))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return _sum(pool.map(count, pieces))


def _sum(counts: Iterable[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for of_piece in counts:
        total.update(of_piece)
    return dict(sorted(total.items()))
