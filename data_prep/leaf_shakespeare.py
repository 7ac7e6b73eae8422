"""Shakespeare by LEAF: the lines of each role, as windows of 80 characters and the one that follows.

What to put where: --source is the folder data/shakespeare/data that data/shakespeare/preprocess.sh of
https://github.com/TalwalkarLab/leaf fills, e.g. with `./preprocess.sh -s niid --sf 1.0 -k 0 -t sample -tf 0.8`; in it
    train/*.json  test/*.json
or one folder of all_data.json, which becomes the split "train".
A client is a role. LEAF slides its window by one character, over each line with 80 spaces before it, and asks
for the character after the window: column y is that one, at the last position, and PAD elsewhere, so that every
character is learned once. --targets all makes every position a target, except the spaces before a line: each
character is then learned in up to 80 windows. Ids are those of tff-shakespeare, 90 symbols.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import leaf
from data_prep.conversion import Conversion
from data_prep.text import CHARACTERS, PAD, char_ids, symbols
from mpifl.data.shard import Columns, Feature

LENGTH = 80
NAMES = symbols(CHARACTERS)
SPACE = char_ids(" ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are and which positions are targets."""
    leaf.add_source(parser)
    parser.add_argument(
        "--targets", choices=("last", "all"), default="last", help="positions that have a target (default: last)"
    )


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files and list their users."""
    files = leaf.find(options.source, "shakespeare")
    tokens = Feature("uint8", (LENGTH,), classes=len(NAMES), names=NAMES, pad=PAD)
    where = {"last": "at the last position", "all": "at every position but those of spaces before a line"}
    return Conversion(
        features={"x": tokens, "y": tokens},
        splits=leaf.splits(files, partial(to_columns, every=options.targets == "all")),
        provenance={
            "source": "Shakespeare, LEAF, JSON: S. Caldas et al. (2018); from Project Gutenberg's Complete Works, "
            "after B. McMahan et al. (2017)",
            "made": f"LEAF's windows of {LENGTH} characters, the next character as target {where[options.targets]}; "
            f"{len(NAMES)} symbols: PAD 0, BOS 1, EOS 2, TFF's 86 characters, OOV 89",
            "licence": "the text is in the public domain; LEAF is BSD 2-Clause",
        },
    )


def to_columns(x: list, y: list, path: Path, user: str, every: bool) -> Columns:
    """Turn windows and the characters after them into x, y uint8 (n, 80)."""
    windows = _characters(x, LENGTH, path, user)
    following = np.concatenate([windows[:, 1:], _characters(y, 1, path, user)], axis=1)
    is_target = np.zeros(windows.shape, bool)
    is_target[:, -1] = True
    if every:
        before_line = np.logical_and.accumulate(windows == SPACE, axis=1)
        is_target[:, :-1] = ~before_line[:, 1:]
    return {"x": windows, "y": np.where(is_target, following, np.uint8(PAD))}


def _characters(texts: list, length: int, path: Path, user: str) -> np.ndarray:
    for row, text in enumerate(texts):
        if not isinstance(text, str) or len(text) != length:
            raise leaf.wrong(path, user, row, f"has {text!r:.90} where there must be {length} characters")
    return char_ids("".join(texts)).reshape(len(texts), length)
