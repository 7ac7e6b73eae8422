"""The JSON files of LEAF (Caldas et al. 2018), found, and read a user at a time.

    {"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}, ...}}

as preprocess.sh leaves them in data/NAME/data: folders train and test (a sample or a user is in one of them), or
all_data. Memory is that of the largest user, and of the names of all, whatever the size of a file; only a file whose
user_data is not in the order of its users (old ones are not) is held whole, as columns.
"""

from __future__ import annotations

import argparse
import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.conversion import Split, ranges
from mpifl.config import UserError
from mpifl.data.shard import Columns

REPOSITORY = "https://github.com/TalwalkarLab/leaf"
SPLITS = ("train", "val", "test")
CHUNK = 8 << 20
"""Bytes of a file that are read at a time."""

Convert = Callable[[list, list, Path, str], Columns]
"""Makes columns of x and y, which a file has for a user; UserError names file, user and sample."""


def add_source(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Declare where the files are."""
    where = "folder with train/*.json and test/*.json, or with *.json"
    parser.add_argument("--source", required=required, type=Path, metavar="DIR", help=where)


def find(source: Path, name: str) -> dict[str, list[Path]]:
    """List the JSON files of every split, those of all samples as split "train"; UserError says where they are made."""
    folders = {split: source / split for split in SPLITS if (source / split).is_dir()} or {"train": source}
    found = {split: sorted(folder.glob("*.json"), key=_by_number) for split, folder in folders.items()}
    empty = [f"{folders[split]} has no .json files" for split, paths in found.items() if not paths]
    empty += [] if "train" in found else [f"{source} has no folder train"]
    if empty:
        how = f"make them as data/{name}/README.md of {REPOSITORY} says, and give its folder data as --source"
        raise UserError(f"{empty[0] if source.is_dir() else f'--source {source} is no folder'}; {how}")
    return found


def splits(
    files: dict[str, list[Path]],
    convert: Convert,
    of_all_splits: bool = False,
    sample_bytes: int = 0,
    shard_mb: float = math.inf,
) -> tuple[Split, ...]:
    """Make a piece of each file: its users in the order of `users`, or in that of the file of "train" beside it.

    Where split_data.py shared out every user's samples, all splits thus have the same clients in the same order, with
    0 rows for a user that has none. of_all_splits: num_samples counts a user's samples in all splits. sample_bytes:
    of a sample that lies outside the file; it is then worth reading a file once for each of several pieces, no larger
    than a shard.
    """
    counts = {split: [users(path) for path in paths] for split, paths in files.items()}
    made = []
    for split, paths in files.items():
        _check_once(paths, counts[split])
        if split == "train" and not any(counts[split]):
            raise UserError(f"{paths[0]}: there is no user in it, nor in another file of split train")
        beside = "train" if _within(counts[split], counts["train"]) else split
        pieces = [
            (path, roster, part)
            for path, roster, own, everyone in zip(paths, files[beside], counts[split], counts[beside])
            for part in ranges(np.array([own.get(user, 0) * sample_bytes for user in everyone]), shard_mb)
        ]
        read = partial(_read, convert, of_all_splits)
        made.append(Split(split, pieces, read, clients=sum(map(len, counts[beside]))))
    return tuple(made)


def users(path: Path) -> dict[str, int]:
    """Users of a file in order, with their num_samples; reads no further than to these."""
    found: dict[str, Any] = {}
    with _Text(path) as text:
        for key in text.members():
            if key == "user_data":
                for _ in text.members():
                    text.value()
            elif key in ("users", "num_samples"):
                found[key] = text.value()
            else:
                text.value()
            if len(found) == 2:
                break
    names, counts = found.get("users"), found.get("num_samples")
    is_head = isinstance(names, list) and isinstance(counts, list) and len(names) == len(counts)
    if not is_head or not all(isinstance(count, int) for count in counts):
        raise UserError(f"{path}: has no lists users and num_samples of one length, so it is no file of LEAF")
    by_name = dict(zip(map(str, names), counts))
    if len(by_name) < len(names):
        raise UserError(f"{path}: user {Counter(map(str, names)).most_common(1)[0][0]!r} is in users twice")
    return by_name


def samples(path: Path) -> Iterator[tuple[str, list, list]]:
    """Yield (user, x, y) in the order of the file; UserError where these are not two lists of one length."""
    with _Text(path) as text:
        for key in text.members():
            if key != "user_data":
                text.value()
                continue
            for user in text.members():
                data = text.value()
                x, y = (data.get(name) if isinstance(data, dict) else None for name in "xy")
                if not isinstance(x, list) or not isinstance(y, list):
                    raise UserError(f"{path}: user {user!r} has no lists x and y")
                if len(x) != len(y):
                    raise UserError(f"{path}: user {user!r} has {len(x)} samples x and {len(y)} labels y")
                yield user, x, y


def count_words(words_of: Callable[[list, Path, str], Iterable[str]], path: Path) -> Counter[str]:
    """Count the words that `words_of` finds in x of every user of a file."""
    counts: Counter[str] = Counter()
    for user, x, _ in samples(path):
        counts.update(words_of(x, path, user))
    return counts


def labels(values: list, classes: int, path: Path, user: str) -> np.ndarray:
    """Bring labels, which LEAF may write as floats, to uint8 (n,); UserError for one that is not 0 to classes - 1."""
    for row, value in enumerate(values):
        if value not in range(classes):
            raise wrong(path, user, row, f"has label {value!r:.40}; labels are 0 to {classes - 1}")
    return np.array(values, np.uint8)


def numbers(values: list, length: int, path: Path, user: str) -> np.ndarray:
    """Bring vectors to float64 (n, length); UserError for one that is not so many finite numbers."""
    rows = np.empty((len(values), length))
    for row, value in enumerate(values):
        try:
            rows[row] = np.asarray(value, float).reshape(length)
        except (TypeError, ValueError):
            found = f"{len(value)} values" if isinstance(value, list) else f"{value!r:.40}"
            raise wrong(path, user, row, f"is {found}, must be {length} numbers") from None
        if not np.isfinite(rows[row]).all():
            raise wrong(path, user, row, "is not finite")
    return rows


def wrong(path: Path, user: str, row: int, problem: str) -> UserError:
    """Name the sample of a user that cannot be used."""
    return UserError(f"{path}: user {user!r}, sample {row} {problem}")


def _read(convert: Convert, of_all_splits: bool, piece: tuple[Path, Path, range]) -> Iterator[tuple[str, Columns]]:
    """Yield a part of the users of the file `roster`, in its order, with what the file `path` has of each."""
    path, roster, part = piece
    counts = users(path)
    wanted = list(counts if roster == path else users(roster))[part.start : part.stop]
    entries = _entries(path, counts, set(wanted), convert, of_all_splits)
    early: dict[str, Columns] = {}  # none, where user_data is in the order of users, as LEAF writes it
    for user in wanted:
        if user in counts and user not in early:
            for name, columns in entries:
                early[name] = columns
                if name == user:
                    break
            else:
                raise UserError(f"{path}: user {user!r} is in users, but not in user_data")
        yield user, early.pop(user) if user in counts else convert([], [], path, user)
    for _ in entries:  # to the end of the file, which may be cut short or hold what does not belong
        pass


def _entries(
    path: Path, counts: dict[str, int], wanted: set[str], convert: Convert, of_all_splits: bool
) -> Iterator[tuple[str, Columns]]:
    """Yield what the file has of each user wanted, in its order, checked against `counts`."""
    seen = set()
    for user, x, y in samples(path):
        where = f"{path}: user {user!r}"
        if user in seen:
            raise UserError(f"{where} is in user_data twice")
        seen.add(user)
        if user not in counts:
            if x:  # split_data.py leaves users without samples, though not in users
                raise UserError(f"{where} has samples, but is not in users")
        elif len(x) > counts[user] if of_all_splits else len(x) != counts[user]:
            raise UserError(f"{where} has {len(x)} samples, num_samples says {counts[user]}; make the file again")
        elif user in wanted:
            yield user, convert(x, y, path, user)


def _check_once(paths: list[Path], counts: list[dict[str, int]]) -> None:
    file_of: dict[str, Path] = {}
    for path, names in zip(paths, counts):
        for name in names:
            if name in file_of:
                raise UserError(f"{path}: user {name!r} is in {file_of[name].name} too; give each user one file")
            file_of[name] = path


def _within(counts: list[dict[str, int]], train: list[dict[str, int]]) -> bool:
    """Whether each file holds only users of the file of "train" in the same place."""
    return len(counts) == len(train) and all(own.keys() <= others.keys() for own, others in zip(counts, train))


def _by_number(path: Path) -> list:
    """Sort key of a file name: all_data_9 before all_data_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


class _Text:
    """A JSON text that is taken apart from the front: whole values, or objects member by member.

    Only what is being taken is in memory. UserError names the file, and where it is cut short or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("rb")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at = "", 0  # what was read and not yet dropped; what of it was taken
        self.dropped = 0

    def __enter__(self) -> _Text:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def members(self) -> Iterator[str]:
        """Take the keys of the object that comes next; each time, its value must be taken before the next key."""
        self._take("{")
        while self._next() != "}":
            if self._next() != '"':
                raise self._broken("expected a key in quotes")
            key = self.value()
            self._take(":")
            yield key
            if self._next() != "}":
                self._take(",")
        self._take("}")

    def value(self) -> Any:
        """Take the value that comes next."""
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_short = error.pos > len(self.text) - _LONGEST_TOKEN or error.msg.startswith("Unterminated")
                if not cut_short or not self._more():
                    raise self._broken(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:  # nested too deep, or a number of too many digits
                raise self._broken(str(error)) from None
            else:
                if end < len(self.text) or not self._more():  # a number could go on
                    self.at = end
                    return value

    def _next(self) -> str:
        """Return the next character that is not white space, without taking it; "" at the end."""
        self.at = _SPACE.match(self.text, self.at).end()
        while self.at == len(self.text) and self._more():
            self.at = _SPACE.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def _take(self, expected: str) -> None:
        if self._next() != expected:
            raise self._broken(f"expected {expected!r}")
        self.at += 1

    def _more(self) -> bool:
        """Drop what was taken, and read on, the more the longer what comes next has turned out to be."""
        raw = self.file.read(max(CHUNK, len(self.text) - self.at))
        try:
            text = self.decoder.decode(raw)
        except UnicodeDecodeError as error:
            at = self.file.tell() - len(error.object) + error.start
            raise UserError(f"{self.path}: byte {at} is not UTF-8 text; make the file again") from None
        self.dropped += self.at
        self.text, self.at = self.text[self.at :] + text, 0
        return bool(raw)

    def _broken(self, problem: str, at: int | None = None) -> UserError:
        at = self.at if at is None else at
        found = f"found {self.text[at : at + 20]!r}" if self.text[at:] else "the file ends here"
        where = f"{self.path}: character {self.dropped + at}"
        return UserError(f"{where}: {problem[0].lower()}{problem[1:]}, {found}; make the file again")


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_TOKEN = 12  # an escaped pair of surrogates, \ud83d\ude00: what the end of a chunk may cut in two
