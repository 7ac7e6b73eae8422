"""Shakespeare by TensorFlow Federated: the lines of 715 roles, as sequences of characters.

What to put where: into --source, unpacked from
https://storage.googleapis.com/tff-datasets-public/shakespeare.tar.bz2
(mirror: https://fedml.s3-us-west-1.amazonaws.com/shakespeare.tar.bz2),
    shakespeare_train.h5  shakespeare_test.h5
A client is a role. Its snippets, each wrapped in BOS ... EOS, are joined and cut into sequences: every
transition from one character to the next is learned once. 90 symbols: PAD 0, BOS 1, EOS 2, the 86 characters
of TFF's tutorial, and 89 for any other. Splits train and test have the same clients in the same order.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from data_prep import tff
from data_prep.conversion import Conversion
from data_prep.text import CHARACTERS, PAD, char_ids, symbols, windows
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

ARCHIVE = "shakespeare.tar.bz2"
NAMES = symbols(CHARACTERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the files are and how long the sequences are to be."""
    parser.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder of the HDF5 files")
    parser.add_argument("--length", type=int, default=80, help="characters of a sequence (default: 80)")


def prepare(options: argparse.Namespace) -> Conversion:
    """Find the files and list their clients."""
    content = snippets(options.length)
    paths = {name: tff.find(options.source, f"shakespeare_{name}.h5", ARCHIVE) for name in ("train", "test")}
    return content.conversion(tff.splits(paths, content, options.shard_mb, aligned=True), tff.FILES)


def snippets(length: int) -> tff.Content:
    """What becomes of Shakespeare's lines in sequences of `length` characters; UserError unless that is 1 or more."""
    if length < 1:
        raise UserError(f"--length {length}: a sequence has at least 1 character")
    tokens = Feature("uint8", (length,), classes=len(NAMES), names=NAMES, pad=PAD)
    return tff.Content(
        layout={"snippets": (tff.TEXT, ())},
        features={"x": tokens, "y": tokens},
        convert=partial(to_columns, length=length),
        source="Shakespeare: snippets of text by role, from Project Gutenberg's Complete Works, after B. McMahan et "
        "al. (2017)",
        made=f"each snippet in BOS ... EOS, a client's snippets joined and cut into (x, y) of {length} characters, no "
        f"transition lost; {len(NAMES)} symbols: PAD 0, BOS 1, EOS 2, TFF's 86 characters, OOV 89",
        licence="public domain",
    )


def to_columns(client: str, found: dict[str, Any], path: Path, length: int) -> Columns:
    """Cut a role's snippets into sequences: x, y uint8 (n, length)."""
    x, y = windows(map(char_ids, found["snippets"]), length)
    return {"x": x, "y": y}
