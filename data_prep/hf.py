"""Texts of a Hugging Face dataset that was saved to disk, as token ids for a classifier or a language model.

What to put where: --source is the folder that `datasets` wrote with save_to_disk, --tokenizer a tokenizer.json or the
folder that holds it (a tokenizer's save_pretrained writes it). Nothing is downloaded. The rows of split train go to
clients as --partition says, or one for each value of --client-column; --central names splits without clients.
For a classifier, x is one text, cut or padded to --length tokens, special tokens as the tokenizer adds them, and y
its label. With --language-model, x and y are windows of --length tokens and the tokens that follow them: a client's
texts, each in BOS (1) ... EOS (2), one after the other; ids are the tokenizer's + 3, and 0 is padding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import corpus, sharing, text
from data_prep.conversion import Conversion
from data_prep.labels import class_column, label_column, numbered
from mpifl.config import UserError, choice
from mpifl.data.shard import Columns, Feature

BLOCK = 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where texts and tokenizer are, what is made of them, and how to share them out."""
    parser.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder that save_to_disk wrote")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="PATH", help="tokenizer.json, or its folder")
    parser.add_argument("--pad-token", metavar="TOKEN", help="padding (default: what tokenizer_config.json names)")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column of texts (default: text)")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="column of labels (default: label)")
    sharing.add_client_column(parser)
    parser.add_argument("--central", nargs="*", metavar="SPLIT", help="splits without clients (default: test, if any)")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens of a row (default: 128)")
    parser.add_argument("--language-model", action="store_true", help="y is the next token of x, not the label")
    corpus.add_arguments(parser)
    sharing.add_arguments(parser, None, "iid; by-column with --client-column")


def prepare(options: argparse.Namespace) -> Conversion:
    """Open the dataset and the tokenizer, and read labels and client ids."""
    source, length = options.source, options.length
    if length < 2:
        raise UserError(f"--length {length}: must be at least 2")
    options = sharing.by_client_column(options, otherwise="iid")
    splits = _opened(source)
    central = [name for name in ("test",) if name in splits] if options.central is None else options.central
    for name in ("train", *central):
        choice(name, splits, f"split of {source}")
    file = _tokenizer_file(options.tokenizer)
    vocabulary = 1 + max(_tokenizer(file).get_vocab().values())
    if options.language_model:
        token = Feature(_dtype(text.FIRST + vocabulary), (length,), classes=text.FIRST + vocabulary, pad=text.PAD)
        features = {"x": token, "y": token}
    else:
        pad = _pad_id(file, options.pad_token)
        label = _label(splits["train"], options.label_column, source)
        features = {"x": Feature(_dtype(vocabulary), (length,), classes=vocabulary, pad=pad), "y": label}
    rows = {name: _rows(options, name, file, features) for name in ("train", *central)}
    train = rows.pop("train")
    if options.client_column:
        train = train._replace(groups=_column(splits["train"], options.client_column, source))
    made = f"{length} tokens a row, tokenizer {options.tokenizer.name} ({_digest(file)})"
    return Conversion(features, corpus.splits(options, train, rows), corpus.provenance(options, made))


def _rows(options: argparse.Namespace, split: str, file: Path, features: dict[str, Feature]) -> corpus.Rows:
    dataset, x = _opened(options.source)[split], features["x"]
    row_bytes = sum(np.dtype(column.dtype).itemsize * math.prod(column.shape) for column in features.values())
    texts = partial(_texts, options.source, split, options.text_column)
    _texts(options.source, split, options.text_column, np.arange(min(1, len(dataset))))  # is there such a column?
    if options.language_model:
        return corpus.Rows(np.arange(len(dataset)), partial(_windows, texts, file, x), row_bytes)
    values = _column(dataset, options.label_column, options.source)
    where = np.empty(len(dataset), [("row", np.int64), ("y", features["y"].dtype)])
    where["row"] = np.arange(len(dataset))
    where["y"] = numbered(values, features["y"], lambda row: f"{options.source}, split {split}: row {row + 1}")
    return corpus.Rows(where, partial(_tokens, texts, file, x), row_bytes, labels=where["y"])


def _windows(texts: Callable[[np.ndarray], list[str]], file: Path, token: Feature, where: np.ndarray) -> Columns:
    encoded = _tokenizer(file).encode_batch(texts(where), add_special_tokens=False)
    sequences = (np.array(one.ids, np.int64) + text.FIRST for one in encoded)
    x, y = text.windows(sequences, token.shape[0], token.dtype)
    return {"x": x, "y": y}


def _tokens(texts: Callable[[np.ndarray], list[str]], file: Path, token: Feature, where: np.ndarray) -> Columns:
    x = np.full((len(where), *token.shape), token.pad, token.dtype)
    tokenizer = _tokenizer(file, token.shape[0])
    for row, one in zip(x, tokenizer.encode_batch(texts(where["row"]))):
        row[: len(one.ids)] = one.ids
    return {"x": x, "y": where["y"].copy()}


def _texts(source: Path, split: str, column: str, rows: np.ndarray) -> list[str]:
    dataset = _opened(source)[split]
    choice(column, dataset.column_names, f"column of split {split}")
    found = dataset.select_columns(column)[rows.tolist()][column] if len(rows) else []  # others may be images
    for row, value in zip(rows, found):
        if not isinstance(value, str):
            raise UserError(f"{source}, split {split}: row {row + 1} has no text in '{column}' but {value!r:.40}")
    return found


def _label(dataset: Any, column: str, source: Path) -> Feature:
    values = _column(dataset, column, source)
    names = getattr(dataset.features[column], "names", None)
    return label_column(values) if names is None else class_column(tuple(names))


def _column(dataset: Any, name: str, source: Path) -> np.ndarray:
    """Whole column of labels or ids, (rows,), the names of labels where the dataset has them."""
    choice(name, dataset.column_names, f"column of {source}")
    values = [value for table in dataset.with_format("arrow").iter(BLOCK) for value in table[name].to_pylist()]
    for row, value in enumerate(values):
        if not isinstance(value, str | int | float):
            raise UserError(f"{source}: row {row + 1} has no '{name}' but {value!r:.40}")
    names = getattr(dataset.features[name], "names", None)
    if names is None:
        return np.array(values)
    return np.array([names[value] if 0 <= value < len(names) else str(value) for value in values])


@lru_cache(maxsize=2)
def _opened(source: Path) -> dict[str, Any]:
    """Every split of a saved dataset; one that was saved alone is train."""
    datasets = corpus.installed("datasets")
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; write it with the save_to_disk of a datasets.Dataset")
    try:
        found = datasets.load_from_disk(str(source))
    except (OSError, ValueError, KeyError) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source} is not what save_to_disk wrote ({problem}); write it again") from None
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def _tokenizer_file(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"there is no {file}; a fast tokenizer's save_pretrained writes it")
    return file


@lru_cache(maxsize=2)
def _tokenizer(file: Path, length: int | None = None) -> Any:
    """Return the tokenizer, which cuts texts to `length` if that is given."""
    try:
        tokenizer = corpus.installed("tokenizers").Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no other kind
        raise UserError(f"{file} is not a tokenizer ({error}); write it again") from None
    tokenizer.no_padding()
    if length is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(length)
    return tokenizer


def _pad_id(file: Path, token: str | None) -> int:
    config = file.with_name("tokenizer_config.json")
    if token is None and config.is_file():
        named = json.loads(config.read_text("utf-8")).get("pad_token")
        token = named["content"] if isinstance(named, dict) else named
    number = None if token is None else _tokenizer(file).token_to_id(token)
    if number is None:
        problem = "names no token for padding" if token is None else f"has no token '{token}'"
        raise UserError(f"{file}: {problem}; choose one with --pad-token")
    return number


def _dtype(vocabulary: int) -> str:
    return "uint16" if vocabulary <= 1 << 16 else "int32"


def _digest(file: Path) -> str:
    return f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
