"""Labels as a source writes them, numbered: whole numbers and text are classes in their order, from 0 on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpifl.config import UserError
from mpifl.data.shard import Feature


def class_column(names: tuple[str, ...]) -> Feature:
    """Return the column of labels 0 .. len(names) - 1."""
    return Feature("uint8" if len(names) <= 256 else "int64", (), classes=len(names), names=names)


def label_column(values: np.ndarray) -> Feature:
    """Return the column for these values, (n,): classes named by what was found, or float32 if one is not whole."""
    plain = _plain(values)
    if plain.dtype.kind == "f":
        return Feature("float32", ())
    return class_column(tuple(map(str, np.unique(plain).tolist())))


def numbered(values: np.ndarray, column: Feature, place: Callable[[int], str]) -> np.ndarray:
    """Values, (n,), as the column has them; UserError, with the `place` of its row, for one that it has not."""
    plain = _plain(values)
    if column.names is None:
        if plain.dtype.kind == "U":
            row = next(row for row, value in enumerate(plain.tolist()) if not _is_number(value))
            raise UserError(f"{place(row)}: label '{plain[row]}' is text, labels for training are numbers")
        return plain
    found, of_row = np.unique(plain, return_inverse=True)
    number = {name: index for index, name in enumerate(column.names)}
    numbers = np.array([number.get(name, -1) for name in map(str, found.tolist())])[of_row]
    if (numbers < 0).any():
        row = int(np.argmax(numbers < 0))
        known = ", ".join(column.names[:20]) + (", ..." if len(number) > 20 else "")
        raise UserError(f"{place(row)}: label '{plain[row]}' is none of those for training: {known}")
    return numbers


def _plain(values: np.ndarray) -> np.ndarray:
    """Values as int64 if all are whole numbers, else as floats if all are numbers, else as text."""
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    try:
        numbers = values.astype(np.float64)
    except ValueError:
        return values
    whole = (np.abs(numbers) < 2**53).all() and (numbers == np.floor(numbers)).all()
    return numbers.astype(np.int64) if whole else numbers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
